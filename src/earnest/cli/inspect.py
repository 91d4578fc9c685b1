"""`earnest inspect`: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import click

from earnest import hub
from earnest.checkpoint import describe, open_checkpoint
from earnest.cli.terminal import (
    allow_bias_option,
    human_bytes,
    json_option,
    notice,
    out,
    print_json,
    print_table,
    progress_bar,
)
from earnest.config import PRESETS, Accounting, preset
from earnest.errors import UserError

EPILOG = """\b
Examples:
  earnest inspect ./ERNIE-4.5-21B-A3B-Base-PT
  earnest inspect smollm2 --json
  earnest inspect --preset 21b-a3b              the numbers without any file
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", required=False)
@click.option("--preset", "preset_name", help=f"A built-in configuration: {', '.join(PRESETS)}.")
@allow_bias_option
@json_option
def command(
    path: str | None,
    preset_name: str | None,
    allow_missing_correction_bias: bool,
    as_json: bool,
) -> None:
    """Show the configuration, parts, types, parameter counts and sizes of the checkpoint at PATH.

    Nothing is read but headers: a 43 GB checkpoint answers at once.
    """
    if (path is None) == (preset_name is None):
        raise UserError("inspect needs one thing to look at", expected="PATH, or --preset NAME")
    if preset_name is not None:
        facts = describe.describe_config(preset(preset_name))
    else:
        with progress_bar("opening") as progress:
            located = hub.locate(str(path), progress=progress, notice=notice)
        checkpoint = open_checkpoint(
            located, allow_missing_correction_bias=allow_missing_correction_bias
        )
        facts = describe.describe(checkpoint)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    """The facts of `describe` as three short tables."""
    if "path" in facts:
        out.print(f"{facts['path']}: {facts['container']}, {facts['dialect']} layout", markup=False)
