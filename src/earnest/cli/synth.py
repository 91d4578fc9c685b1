"""`earnest synth`: a checkpoint of true shapes with random weights."""

from __future__ import annotations

from pathlib import Path

import click

from earnest.checkpoint.export import DTYPES
from earnest.checkpoint.synth import synth, truncated
from earnest.cli.terminal import (
    force_option,
    json_option,
    print_written,
    progress_bar,
)
from earnest.config import PRESETS, preset
from earnest.errors import UserError
from earnest.quantize import RECIPES, synth_gguf, synth_packed

EPILOG = """\b
Examples:
  earnest synth ./random-0.3b --preset 0.3b --seed 1
  earnest synth ./four-layers --preset 21b-a3b --seed 1 --layers 4
  earnest synth ./random-21b --preset 21b-a3b --codec q4_0
  earnest synth ./random-21b.gguf --preset 21b-a3b --codec q4_0
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--preset", "preset_name", required=True, help=f"Configuration: {', '.join(PRESETS)}."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed."
)
@click.option("--layers", type=click.IntRange(min=1), help="Only the first N layers.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the weights (bf16), of a folder or a .gguf file; router and correction bias are "
    "always f32. Not with --codec.",
)
@click.option(
    "--codec",
    type=click.Choice([*RECIPES, *DTYPES]),
    help="Block types (as earnest quantize has them) or one plain type; for a packed folder or "
    "a .gguf file.",
)
@click.option("--mtp", is_flag=True, help="Also write the multi-token-prediction block.")
@force_option
@json_option
def command(
    destination: Path,
    preset_name: str,
    seed: int,
    layers: int | None,
    dtype: str | None,
    codec: str | None,
    mtp: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint DST with random weights, for tests and benchmarks: a Hugging Face folder,
    with --codec a packed one or, if its name ends in .gguf, a GGUF file. The large tensors of the
    latter two repeat a random tile, the same in both.

    Scales are plausible and the correction bias is not zero. The same seed gives the same bytes.
    """
    if codec and dtype:
        raise UserError(
            "--codec and --dtype both say in which type the weights are stored",
            got=f"--codec {codec} --dtype {dtype}",
            remedy="leave out one of them; --codec takes plain types, too",
        )
    as_gguf = destination.suffix == ".gguf"
    if mtp and as_gguf:
        raise UserError("GGUF has no place for the multi-token-prediction block")
    config = preset(preset_name)
    if layers is not None:
        config = truncated(config, layers)
    with progress_bar("writing") as progress:
        if as_gguf:
            report = synth_gguf(
                destination,
                config,
                codec or dtype or "bf16",
                seed=seed,
                force=force,
                progress=progress,
            )
        elif codec:
            report = synth_packed(
                destination, config, codec, seed=seed, mtp=mtp, force=force, progress=progress
            )
        else:
            report = synth(
                destination,
                config,
                seed=seed,
                mtp=mtp,
                dtype=dtype or "bf16",
                force=force,
                progress=progress,
            )
    print_written(report, as_json=as_json)
