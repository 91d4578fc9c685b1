"""`earnest pack`: a checkpoint as the panels that the kernels read."""

from __future__ import annotations

from pathlib import Path

import click

from earnest.checkpoint.pack import pack
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
  earnest pack ./ERNIE-4.5-21B-A3B-PT ./ernie-21b
  earnest pack ernie-21b-q4_k_m.gguf ./ernie-21b-q4
  earnest convert ./ernie-21b-q4 again.gguf --to gguf     the way back, bit for bit
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@force_option
@allow_bias_option
@json_option
def command(
    source: str,
    destination: Path,
    force: bool,
    allow_missing_correction_bias: bool,
    as_json: bool,
) -> None:
    """Rewrite the checkpoint SRC (any layout Earnest opens) as the packed folder DST.

    Weights keep their types and their bits; they only lie in the order in which the kernels read
    them, so that earnest run maps the file and starts at once. Few types have no such order; they
    become q8_0, and a line says so. Weights stream from file to file on all cores: memory stays
    under 2 GB whatever the size. DST appears when it is complete; an interrupted run is continued
    by the same command. A GGUF file is made by earnest convert --to gguf, or earnest quantize.
    """
    with progress_bar("packing") as progress:
        checkpoint = opened(
            source, progress, allow_missing_correction_bias=allow_missing_correction_bias
        )
        report = pack(checkpoint, destination, force=force, progress=progress)
    print_written(report, as_json=as_json)
