"""`earnest serve`: a model for everybody on this machine, or on the network."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import click

from earnest import env
from earnest.cli.runner_options import RunnerOptions
from earnest.cli.serving_options import serving_options
from earnest.cli.terminal import notice, out, progress_bar
from earnest.engine import load
from earnest.errors import MissingPackageError, UserError

if TYPE_CHECKING:
    from earnest.serve.traces import Traces

EPILOG = """\b
Examples:
  earnest serve smollm2
  earnest serve ./ernie-21b --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="MODEL")
@serving_options(any_port=True)
@click.option("--unix-socket", type=click.Path(path_type=Path), help="Listen on this socket file.")
@click.option("--api-key", multiple=True, help="A key that lets clients in (also EARNEST_API_KEY).")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let web pages of ORIGIN call it.")
@click.option(
    "--tls-certificate",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Answer over https, with this certificate and those that signed it (PEM).",
)
@click.option(
    "--tls-key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The certificate's private key (PEM), without a password.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Answers that may wait; then clients are told to come again.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds for an answer.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is told on standard error; info: a line for each request.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Log lines for people, or an object on each line.",
)
@click.option(
    "--otlp-traces-endpoint",
    metavar="URL",
    help="Send OpenTelemetry traces there (also OTEL_EXPORTER_OTLP_TRACES_ENDPOINT).",
)
def command(
    model: str,
    host: str,
    port: int,
    unix_socket: Path | None,
    name: str | None,
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    cors: tuple[str, ...],
    tls_certificate: Path | None,
    tls_key: Path | None,
    context: int | None,
    speculation: Literal["prompt", "off"],
    max_waiting: int,
    timeout: float | None,
    drain: float,
    log_level: str,
    log_format: Literal["text", "json"],
    otlp_traces_endpoint: str | None,
    allow_missing_correction_bias: bool,
    **how: Unpack[RunnerOptions],
) -> None:
    """Serve MODEL over HTTP, with the interfaces of OpenAI, Anthropic and Ollama.

    Many requests run at the same time; each gets what it would have got alone. Listens on this
    machine only, unless told otherwise. SIGTERM lets answers under way come to their end.
    """
    try:
        from earnest.serve import journal
        from earnest.serve.run import Address, listen, serve
        from earnest.serve.state import Limits, Served, keys_in
    except ImportError as error:
        raise MissingPackageError(
            "earnest serve needs packages that are not installed",
            got=str(error),
            remedy="pip install fastapi uvicorn llguidance prometheus_client",
        ) from error
    if (tls_certificate is None) != (tls_key is None):
        raise UserError("--tls-certificate and --tls-key belong together")
    keys = (*api_key, *env.api_keys(), *keys_in(api_key_file))
    address = Address(host, port, unix_socket, tls_certificate, tls_key)
    journal.configure(log_level, log_format)
    traces = _traces(otlp_traces_endpoint)
    listener = listen(address)
    try:
        with progress_bar("opening") as progress:
            opened = load(
                model,
                max_context=context,
                speculation=None if speculation == "off" else speculation,
                **how,
                allow_missing_correction_bias=allow_missing_correction_bias,
                progress=progress,
                notice=notice,
            )
        served = Served(
            opened,
            name or Path(model).resolve().name.removesuffix(".gguf"),
            api_keys=keys,
            limits=Limits(waiting=max_waiting, request_seconds=timeout),
            origins=cors,
            traces=traces,
        )
        if not keys and host not in ("127.0.0.1", "localhost", "::1") and unix_socket is None:
            key = secrets.token_hex(8)
            notice(f"anybody who reaches {host} may use it; --api-key {key} asks for a key")
        scheme = "https" if tls_certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        where = f"unix:{unix_socket}"
        if unix_socket is None:
            where = f"{scheme}://{shown}:{listener.getsockname()[1]}"

        def ready() -> None:
            out.print(f"serving {served.name} at {where} (Ctrl-C ends it)", markup=False)

        serve(served, listener, address, drain_seconds=drain, ready=ready)
    finally:
        listener.close()
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)


def _traces(endpoint: str | None) -> Traces | None:
    """Where traces go, if anywhere. What the environment asks for, which is often set for all
    programs of a machine, is done where it can be done."""
    from earnest.serve.traces import Traces

    if endpoint is None and env.traces_endpoint() is None:
        return None
    try:
        return Traces(endpoint)
    except MissingPackageError as error:
        if endpoint is not None:
            raise
        notice(f"no traces are sent: {error.problem}; {error.remedy}")
        return None
