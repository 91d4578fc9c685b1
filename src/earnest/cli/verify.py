"""`earnest verify`: is this checkpoint whole, plausible and computed exactly?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from earnest.checkpoint.integrity import check
from earnest.cli.opening import opened
from earnest.cli.terminal import (
    allow_bias_option,
    json_option,
    out,
    print_json,
    print_table,
    progress_bar,
)
from earnest.runners.native import isa

EPILOG = """\b
Examples:
  earnest verify ./ERNIE-4.5-0.3B-PT
  earnest verify ./ERNIE-4.5-21B-A3B-PT --against transformers --layers 2
  earnest verify ./packed --against native
  earnest verify ./model --write-manifest model.sha256.json
  earnest verify ./copy --manifest model.sha256.json --no-self-check
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path")
@click.option(
    "--against",
    type=click.Choice(["transformers", "native"]),
    help="Also compare experts and logits: transformers, with the reference implementation (needs "
    "torch and transformers); native, how near the compiled runner is to the specification.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="With --against transformers: only the first N layers (default: what memory allows).",
)
@click.option(
    "--manifest", type=click.Path(path_type=Path), help="Check tensors against this manifest."
)
@click.option(
    "--write-manifest",
    type=click.Path(path_type=Path),
    help="Write the sha256 of every tensor here.",
)
@click.option("--no-self-check", is_flag=True, help="Leave out the perplexity of built-in text.")
@allow_bias_option
@json_option
def command(
    path: str,
    against: str | None,
    layers: int | None,
    manifest: Path | None,
    write_manifest: Path | None,
    no_self_check: bool,
    allow_missing_correction_bias: bool,
    as_json: bool,
) -> None:
    """Check the checkpoint at PATH; exit status 0 if everything passes, 1 if not.

    Integrity reads every tensor (names, shapes, NaN, zeros, correction bias, sha256). The
    self-check runs the model on a built-in text and says which known mistake an implausible result
    looks like. --against compares expert choice and logits with the reference implementation, or
    those of the compiled runner with ours.
    """
    from earnest import verify

    if layers is not None and against != "transformers":
        raise click.UsageError("--layers goes with --against transformers only")
    # What is missing is said before minutes of reading.
    if against == "native":
        isa.native()
    elif against == "transformers":
        verify.load_packages()
    with progress_bar("verifying") as progress:
        checkpoint = opened(
            path, progress, allow_missing_correction_bias=allow_missing_correction_bias
        )
        reports: dict[str, Any] = {
            "integrity": check(
                checkpoint, manifest=manifest, write_manifest=write_manifest, progress=progress
            )
        }
        if not no_self_check:
            reports["self_check"] = verify.selfcheck(checkpoint, progress=progress)
        if against == "native":
            reports["nearness"] = verify.nearness(checkpoint, progress=progress)
        if against == "transformers":
            reports["exactness"] = verify.compare(checkpoint, num_layers=layers, progress=progress)
    passed = verify.verdict(**reports)
    if as_json:
        named = {name: report.to_dict() for name, report in reports.items()}
        print_json({"path": str(checkpoint.path), "passed": passed, **named})
    else:
        for name, report in reports.items():
            print_table(name.replace("_", "-"), report.COLUMNS, report.rows())
            out.print(report.summary(), markup=False)
        out.print("PASS" if passed else "FAIL", style="bold green" if passed else "bold red")
    raise SystemExit(0 if passed else 1)
