"""`earnest serve`: a model for everybody on this machine, or on the network."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

import click

from earnest import env
from earnest.cli.terminal import allow_bias_option, notice, out, progress_bar
from earnest.engine import load
from earnest.errors import MissingPackageError, UserError

EPILOG = """\b
Examples:
  earnest serve smollm2
  earnest serve ./ernie-21b --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="MODEL")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes any that is free.",
)
@click.option("--unix-socket", type=click.Path(path_type=Path), help="Listen on this socket file.")
@click.option("--name", help="What clients call the model; by default the name of its file.")
@click.option("--api-key", multiple=True, help="A key that lets clients in (also EARNEST_API_KEY).")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with a key on each line.",
)
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let web pages of ORIGIN call it.")
@click.option("--tls-certificate", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--tls-key", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--context", type=click.IntRange(1), help="Tokens that a conversation may have.")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.")
@click.option(
    "--max-waiting",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Answers that may wait; then clients are told to come again.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds for an answer.")
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds for answers under way when the server is told to end.",
)
@allow_bias_option
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
    threads: int | None,
    max_waiting: int,
    timeout: float | None,
    drain: float,
    allow_missing_correction_bias: bool,
) -> None:
    """Serve MODEL over HTTP, with OpenAI's interface and others.

    Many requests run at the same time; each gets what it would have got alone. Listens on this
    machine only, unless told otherwise. SIGTERM lets answers under way come to their end.
    """
    try:
        from earnest.serve.run import Address, listen, serve
        from earnest.serve.state import Limits, Served
    except ImportError as error:
        raise MissingPackageError(
            "earnest serve needs packages that are not installed",
            got=str(error),
            remedy="pip install fastapi uvicorn llguidance prometheus_client",
        ) from error
    if (tls_certificate is None) != (tls_key is None):
        raise UserError("--tls-certificate and --tls-key belong together")
    keys = (*api_key, *env.api_keys(), *_keys_in(api_key_file))
    address = Address(host, port, unix_socket, tls_certificate, tls_key)
    listener = listen(address)
    with progress_bar("opening") as progress:
        opened = load(
            model,
            max_context=context,
            threads=threads,
            allow_missing_correction_bias=allow_missing_correction_bias,
            progress=progress,
            notice=notice,
        )
    served = Served(
        opened,
        name or Path(model).name.removesuffix(".gguf"),
        api_keys=keys,
        limits=Limits(waiting=max_waiting, request_seconds=timeout),
        origins=cors,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    if unix_socket is None:
        scheme = "https" if tls_certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        where = f"{scheme}://{shown}:{listener.getsockname()[1]}"
    else:
        where = f"unix:{unix_socket}"
    if not keys and host not in ("127.0.0.1", "localhost", "::1") and unix_socket is None:
        key = secrets.token_hex(8)
        notice(f"anybody who reaches {host} may use it; --api-key {key} asks for a key")

    def ready() -> None:
        out.print(f"serving {served.name} at {where} (Ctrl-C ends it)", markup=False)

    try:
        serve(served, listener, address, drain_seconds=drain, ready=ready)
    finally:
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)


def _keys_in(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    keys = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not keys:
        raise UserError(f"{path} holds no keys", expected="one on each line")
    return keys
