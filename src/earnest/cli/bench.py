"""`earnest bench`: how fast a model runs here."""

from __future__ import annotations

import contextlib
from typing import Any, Unpack

import click

from earnest.cli.opening import opened
from earnest.cli.runner_options import RunnerOptions, runner_options
from earnest.cli.terminal import (
    allow_bias_option,
    human_bytes,
    json_option,
    out,
    print_json,
    print_table,
    progress_bar,
    still_progress,
)
from earnest.log import Progress
from earnest.measure import Rates, Speed, measure_speed, plan, try_rates

EPILOG = """\b
Examples:
  earnest bench smollm2
  earnest bench ./ERNIE-4.5-21B-A3B-PT --depth 0,4096,16384 --batch 1,8
  earnest bench model.gguf --threads 1 --tokens 64 --json
"""

_DEPTH_IS = "declared: KV blocks filled with random numbers"
_ENOUGH_HUGE_PAGES = 0.95


def _numbers(_ctx: click.Context, _option: click.Parameter, value: str | None) -> list[int] | None:
    """Whole numbers between commas, as a list."""
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list of whole numbers, as in 0,4096"
        ) from None


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--depth", callback=_numbers, metavar="N,N,...", help="Tokens already stored (default: 0,4096)."
)
@click.option(
    "--batch",
    callback=_numbers,
    metavar="N,N,...",
    default="1,4",
    help="Sequences together (default: 1,4).",
)
@click.option("--prefill", type=click.IntRange(min=0), help="Prompt tokens (default: 512).")
@click.option("--tokens", type=click.IntRange(min=0), default=32, help="Tokens to decode (32).")
@runner_options
@allow_bias_option
@json_option
def command(
    model: str,
    depth: list[int] | None,
    batch: list[int],
    prefill: int | None,
    tokens: int,
    allow_missing_correction_bias: bool,
    as_json: bool,
    **how: Unpack[RunnerOptions],
) -> None:
    """Measure prefill and decoding of MODEL at depths and batch sizes; medians.

    GB/s counts what a step must read: weights (of experts, those that were chosen) once, keys and
    values up to each position; its share is of the read bandwidth measured in the same minute.
    Every sequence is fed its own random tokens. A depth is declared: the KV blocks are filled with
    random numbers, which a step reads like any others. Sampling is not timed.
    """
    with contextlib.ExitStack() as shown:
        opening = shown.enter_context(progress_bar("opening"))
        checkpoint = opened(
            model, opening, allow_missing_correction_bias=allow_missing_correction_bias
        )
        wanted = plan(
            checkpoint.config, depths=depth, batches=batch, prefill=prefill, tokens=tokens
        )
        measuring: Progress | None = None

        def measured(done: int, total: int, what: str) -> None:
            nonlocal measuring
            if measuring is None:
                shown.close()  # the bar has a thread of its own, which would be timed, too
                measuring = shown.enter_context(still_progress())
            measuring(done, total, what)

        speed = measure_speed(checkpoint, wanted, **how, loading=opening, progress=measured)
    # Afterwards, so that the memory it reads is not part of the peak.
    rates, skipped = try_rates(speed.threads)
    if as_json:
        print_json(_facts(speed, rates, skipped))
    else:
        _print(speed, rates, skipped)


def _facts(speed: Speed, rates: Rates | None, skipped: str | None) -> dict[str, Any]:
    nothing = {"tier": None, "threads": None, "read_gb_s": None, "int8_tops": None}
    return {
        "machine": rates.to_dict() if rates else nothing,
        "machine_skipped": skipped,
        "runner": speed.runner,
        "depth_is": _DEPTH_IS,
        "load_s": speed.load_seconds,
        "first_token": [
            {"prompt": n, "seconds": seconds} for n, seconds in speed.first_token_seconds.items()
        ],
        "peak_memory_bytes": speed.peak_memory,
        "huge_page_share": speed.huge_page_share,
        "weight_bytes": speed.weight_bytes,
        "kv_bytes_per_token": speed.kv_bytes_per_token,
        "rows": [row.to_dict(rates) for row in speed.rows],
    }


def _print(speed: Speed, rates: Rates | None, skipped: str | None) -> None:
    if rates is None:
        out.print(f"{speed.runner} runner; the machine was not measured: {skipped}")
    else:
        out.print(
            f"{speed.runner} runner, tier {rates.tier}, {rates.threads} threads; "
            f"this machine reads {rates.read / 1e9:.1f} GB/s and does "
            f"{rates.integer / 1e12:.2f} int8 TOP/s"
        )
    out.print(
        f"weights {human_bytes(speed.weight_bytes)}, keys and values "
        f"{human_bytes(speed.kv_bytes_per_token)} a token; depth {_DEPTH_IS}"
    )
    first = ", ".join(
        f"{1e3 * seconds:,.0f} ms after a prompt of {n}"
        for n, seconds in speed.first_token_seconds.items()
    )
    peak = "unknown" if speed.peak_memory is None else human_bytes(speed.peak_memory)
    out.print(
        f"loaded in {speed.load_seconds:.2f} s; first token, cold: {first}; peak memory {peak}"
    )
    if speed.huge_page_share is not None:
        slow = speed.huge_page_share < _ENOUGH_HUGE_PAGES
        out.print(
            f"{_percent(speed.huge_page_share)} of the weights in memory lie in huge pages"
            + ("; the others are slower until the file is read anew (README, pack)" if slow else "")
        )
    rows = [row.to_dict(rates) for row in speed.rows]
    print_table(
        "speed",
        ["kind", "depth", "batch", "tokens", "ms/step", "tok/s", "GB/s", "of read", "of int8"],
        [
            [
                row["kind"],
                f"{row['depth']:,}",
                str(row["batch"]),
                str(row["tokens"]),
                f"{row['step_ms']:,.2f}",
                f"{row['tok_s']:,.1f}",
                f"{row['gb_s']:,.2f}",
                _percent(row["bandwidth_share"]),
                _percent(row["int8_share"]),
            ]
            for row in rows
        ],
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
