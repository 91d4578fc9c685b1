"""`earnest diff`: a weight-level changelog of two checkpoints."""

from __future__ import annotations

import click

from earnest.checkpoint.difference import diff
from earnest.cli.opening import opened
from earnest.cli.terminal import (
    allow_bias_option,
    json_option,
    out,
    print_json,
    print_table,
    progress_bar,
)

EPILOG = """\b
Examples:
  earnest diff ./ERNIE-4.5-21B-A3B-Base-PT ./ERNIE-4.5-21B-A3B-PT
  earnest diff ./hf-folder ./paddle-folder      layouts may differ
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@click.option("--all", "show_all", is_flag=True, help="List equal tensors too.")
@allow_bias_option
@json_option
def command(
    left: str, right: str, show_all: bool, allow_missing_correction_bias: bool, as_json: bool
) -> None:
    """List which tensors of the checkpoints A and B differ, and by how much.

    Exit status 1 if anything differs, 0 if nothing does.
    """
    with progress_bar("comparing") as progress:
        first, second = (
            opened(name, progress, allow_missing_correction_bias=allow_missing_correction_bias)
            for name in (left, right)
        )
        report = diff(first, second, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        rows = report.rows(show_all=show_all)
        if rows:
            print_table(f"{left} against {right}", report.COLUMNS, rows)
        out.print(report.summary(), markup=False)
    raise SystemExit(0 if report.same else 1)
