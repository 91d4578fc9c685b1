"""`earnest convert`: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from earnest.checkpoint.convert import convert
from earnest.checkpoint.export import export
from earnest.cli.opening import opened
from earnest.cli.terminal import (
    allow_bias_option,
    force_option,
    json_option,
    print_written,
    progress_bar,
)

EPILOG = """\b
Examples:
  earnest convert ./ERNIE-4.5-21B-A3B-PT ./paddle --to paddle
  earnest convert ./ERNIE-4.5-0.3B-Paddle ./hf --to hf
  earnest convert model.gguf ./hf --to hf --dtype bf16
  earnest convert ./ERNIE-4.5-0.3B-PT model.gguf --to gguf
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "layout",
    type=click.Choice(["hf", "paddle", "gguf"]),
    required=True,
    help="Target layout.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    help="Store weights in this type (default: as they are; quantised blocks, which only GGUF can "
    "hold, become bf16 in a folder).",
)
@click.option(
    "--shard-size",
    type=click.FloatRange(min=0.001),
    default=5.0,
    show_default=True,
    help="Largest file, in GB (hf and paddle).",
)
@force_option
@allow_bias_option
@json_option
def command(
    source: str,
    destination: Path,
    layout: Literal["hf", "paddle", "gguf"],
    dtype: str | None,
    shard_size: float,
    force: bool,
    allow_missing_correction_bias: bool,
    as_json: bool,
) -> None:
    """Rewrite the checkpoint SRC (any layout Earnest opens) as DST: a folder, or a .gguf file.

    Weights stream from file to file: memory stays far under 2 GB whatever the size. DST appears
    when it is complete; an interrupted run is continued by the same command.
    """
    with progress_bar("converting") as progress:
        checkpoint = opened(
            source, progress, allow_missing_correction_bias=allow_missing_correction_bias
        )
        if layout == "gguf":
            report = export(checkpoint, destination, dtype=dtype, force=force, progress=progress)
        else:
            report = convert(
                checkpoint,
                destination,
                layout,
                dtype=dtype,
                force=force,
                shard_bytes=int(shard_size * 1e9),
                progress=progress,
            )
    print_written(report, as_json=as_json)
