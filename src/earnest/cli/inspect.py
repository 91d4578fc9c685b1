"""`earnest inspect`: what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import click

from earnest.checkpoint.describe import describe, describe_config
from earnest.cli.opening import opened
from earnest.cli.terminal import (
    allow_bias_option,
    human_bytes,
    json_option,
    out,
    print_json,
    print_table,
    progress_bar,
)
from earnest.config import PRESETS, preset
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
        facts = describe_config(preset(preset_name))
    else:
        with progress_bar("opening") as progress:
            checkpoint = opened(
                str(path), progress, allow_missing_correction_bias=allow_missing_correction_bias
            )
        facts = describe(checkpoint)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    """The facts of `describe` (or of `describe_config`, which has fewer) as short tables."""
    if "path" in facts:
        out.print(f"{facts['path']}", style="bold", markup=False)
        out.print(f"{facts['container']}, {facts['dialect']} layout, {facts['architecture']}")
    print_table(
        "configuration", ["name", "value"], [[k, str(v)] for k, v in facts["config"].items()]
    )
    parameters = facts["parameters"]
    rows = [[part, f"{count:,}"] for part, count in parameters["parts"].items()]
    rows += [
        [name.replace("_", " "), f"{parameters[name]:,}"]
        for name in ("total", "active", "active_without_embedding", "mtp")
    ]
    print_table("parameters", ["part", "count"], rows)
    if "stored" in facts:
        stored = facts["stored"]
        print_table(
            "stored",
            ["type", "tensors", "weights", "size"],
            [
                [name, f"{t['tensors']:,}", f"{t['weights']:,}", human_bytes(t["bytes"])]
                for name, t in [*stored["types"].items(), ("all", stored)]
            ],
        )
        tokenizer = facts["tokenizer"]
        if "error" in tokenizer:
            out.print(f"tokenizer: {tokenizer['error']}", markup=False)
        else:
            template = "with" if tokenizer["chat_template"] else "without"
            out.print(
                f"tokenizer: {tokenizer['source']}, {tokenizer['vocab_size']:,} tokens, "
                f"{template} a chat template",
                markup=False,
            )
    else:
        sizes = ", ".join(f"{t} {human_bytes(n)}" for t, n in facts["weight_bytes"].items())
        out.print(f"weights: {sizes}")
    cache = ", ".join(f"{t} {human_bytes(n)}" for t, n in facts["kv_bytes_per_token"].items())
    out.print(f"keys and values per token: {cache}")
    for left in facts.get("left_out", []):
        size = human_bytes(left["bytes"])
        out.print(f"left out: {left['reason']}: {left['tensors']:,} tensors, {size}", markup=False)
    for note in facts.get("notes", []):
        out.print(f"note: {note}", markup=False)
