"""`earnest deploy`: a model on Ray Serve, several engines behind one address."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal, Unpack

import click

from earnest import env, hub
from earnest.checkpoint import open_checkpoint
from earnest.cli.runner_options import RunnerOptions
from earnest.cli.serving_options import serving_options
from earnest.cli.terminal import notice, out, progress_bar
from earnest.errors import MachineError, MissingPackageError, UserError

# Bytes of Ray's object store: requests and answers are small, and weights never go there.
_OBJECT_STORE = 100 * 2**20
# The application's name within the cluster.
_APPLICATION = "earnest"

EPILOG = """\b
Examples:
  earnest deploy smollm2 --replicas 2
  earnest deploy /models/ernie-21b --address auto --replicas 4 --cpus 16
  serve run earnest.serve.ray_app:build model=smollm2 replicas=2
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="MODEL")
@click.option(
    "--replicas", type=click.IntRange(1), default=2, show_default=True, help="Engines to run."
)
@click.option("--max-replicas", type=click.IntRange(1), help="Run more while they are busy.")
@click.option(
    "--cpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="CPUs of each, and threads it computes with unless --threads says otherwise.",
)
@serving_options(any_port=False)
@click.option("--address", help="A cluster that runs already (auto finds it); else one is started.")
def command(
    model: str,
    replicas: int,
    max_replicas: int | None,
    cpus: int,
    context: int | None,
    speculation: Literal["prompt", "off"],
    name: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    address: str | None,
    drain: float,
    allow_missing_correction_bias: bool,
    **how: Unpack[RunnerOptions],
) -> None:
    """Serve MODEL with several engines on a Ray cluster, until Ctrl-C or SIGTERM.

    Without --address a cluster of this machine alone is started, and ended at the end. For a
    deployment that stays, give Ray a configuration file (docs/ray.md).
    """
    if address is None:  # a cluster of our own tells nobody about itself, unless it is asked to
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve

        from earnest.serve.ray_app import build
        from earnest.serve.run import Address, listen
    except ImportError as error:
        raise MissingPackageError(
            "earnest deploy needs packages that are not installed",
            got=str(error),
            remedy="pip install 'ray[serve]', and what earnest serve needs",
        ) from error
    if max_replicas is not None and max_replicas < replicas:
        raise UserError("--max-replicas is less than --replicas", got=max_replicas)
    arguments: dict[str, Any] = {
        "model": model,
        "name": name,
        "replicas": replicas,
        "cpus": cpus,
        "context": context,
        "speculation": speculation,
        "api_key_file": api_key_file,
        "drain": drain,
        "allow_missing_correction_bias": allow_missing_correction_bias,
        **how,
    }
    if max_replicas is not None:
        arguments["autoscaling"] = {"min_replicas": replicas, "max_replicas": max_replicas}
    application = build(arguments)
    if address is None:
        listen(Address(host, port)).close()  # somebody else's port is better noticed now
        with progress_bar("opening") as progress:
            path = hub.locate(model, progress=progress, notice=notice)
        # What is wrong with it is better said now than by every replica.
        open_checkpoint(path, allow_missing_correction_bias=allow_missing_correction_bias)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ended = threading.Event()
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        object_store_memory=None if address else _OBJECT_STORE,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        if address is None and ray.cluster_resources().get("CPU", 0) < replicas * cpus:
            raise UserError(
                "this machine has too few CPUs for so many replicas",
                got=f"{replicas} x {cpus}",
                expected=f"at most {ray.cluster_resources().get('CPU', 0):.0f}",
            )
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(application, name=_APPLICATION)
        except RuntimeError as error:
            told = serve.status().applications[_APPLICATION].deployments.values()
            why = next((found.message for found in told if found.message), str(error))
            last = "\n".join(why.strip().splitlines()[-4:])  # of a traceback, what went wrong
            raise MachineError("the replicas cannot be started", got=last) from error
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        if host not in ("127.0.0.1", "localhost", "::1") and not (api_key_file or env.api_keys()):
            notice(f"anybody who reaches {host} may use it; --api-key-file asks for a key")
        shown = f"[{host}]" if ":" in host else host
        many = f"{replicas} replicas" if replicas > 1 else "1 replica"
        out.print(f"serving {model} with {many} at http://{shown}:{port} (Ctrl-C ends it)")
        ended.wait()
        serve.delete(_APPLICATION)  # returns when the answers under way have ended
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()
