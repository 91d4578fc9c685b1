"""`earnest quantize`: smaller weights."""

from __future__ import annotations

from pathlib import Path

import click

from earnest.cli.opening import opened
from earnest.cli.terminal import (
    allow_bias_option,
    force_option,
    json_option,
    print_written,
    progress_bar,
)
from earnest.quantize import RECIPES, quantize

EPILOG = """\b
Examples:
  earnest quantize ./ERNIE-4.5-21B-A3B-PT ./ernie-21b --codec q4_k_m     packed, for earnest run
  earnest quantize ./ERNIE-4.5-21B-A3B-PT ernie-21b.gguf --codec q4_k_m
  earnest quantize smollm2 small.gguf --codec q8_0
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--codec",
    type=click.Choice(list(RECIPES)),
    required=True,
    help="The mix of block types; _m puts more bits where they matter.",
)
@force_option
@allow_bias_option
@json_option
def command(
    source: str,
    destination: Path,
    codec: str,
    force: bool,
    allow_missing_correction_bias: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint SRC (any layout Earnest opens) with smaller weights as DST: a packed
    folder (see earnest pack) or, if its name ends in .gguf, a GGUF file.

    Router, norms and correction bias are never quantised. Weights stream from file to file on all
    cores: memory stays under 2 GB whatever the size. DST appears when it is complete; an
    interrupted run is continued by the same command.
    """
    with progress_bar("quantising") as progress:
        checkpoint = opened(
            source, progress, allow_missing_correction_bias=allow_missing_correction_bias
        )
        report = quantize(checkpoint, destination, codec, force=force, progress=progress)
    print_written(report, as_json=as_json)
