"""`earnest doctor`: what this machine can, and what to do if it could do more."""

from __future__ import annotations

from typing import Any

import click

from earnest.cli.terminal import human_bytes, json_option, notice, out, print_json, print_table
from earnest.measure import Machine, Rates, fits, look, try_rates
from earnest.measure.machine import CONTEXT
from earnest.runners.native import isa

EPILOG = """\b
Examples:
  earnest doctor
  earnest doctor --json
  EARNEST_ISA=avx2 earnest doctor               the same in a lower tier
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--threads", type=click.IntRange(1, 1024), help="Measure with so many threads.")
@json_option
def command(threads: int | None, as_json: bool) -> None:
    """Show what this machine is, measure what it can, and list which models fit.

    Measured, in a few seconds, by the kernels' own loops: bytes a second read from memory, which
    bound decoding, and 8-bit integer operations a second, which bound prefill. Where too little
    memory is free for that, it says so and shows the rest.
    """
    machine = look()
    if isa.installed():
        notice("measuring memory and integer units for a few seconds")
    rates, skipped = try_rates(threads)
    table = fits(machine.free_memory, rates.read if rates else None)
    problems = [] if isa.installed() else [isa.WITHOUT_KERNELS]
    if as_json:
        print_json(
            {
                "machine": machine.to_dict(),
                "rates": rates.to_dict() if rates else None,
                "rates_skipped": skipped,
                "fits": table,
                "problems": problems,
            }
        )
        return
    _print(machine, rates, skipped, table)
    for problem in problems:
        click.echo(f"{click.style('problem:', fg='red', bold=True)} {problem}", err=True)


def _print(
    machine: Machine, rates: Rates | None, skipped: str | None, table: list[dict[str, Any]]
) -> None:
    quota = "no limit" if machine.quota is None else f"{machine.quota:g} processors"
    caches = [
        f"L{cache.level} {cache.nbytes // 1024:,} KiB"
        + (f" shared by {cache.shared_by}" if cache.shared_by > 1 else "")
        for cache in machine.caches
    ]
    rows = [
        ["processor", machine.processor],
        ["cores", f"{machine.cores}, of which {machine.allowed} may be used"],
        ["quota", quota],
        ["threads", str(machine.threads)],
        ["caches", "; ".join(caches) or "the system does not say"],
        ["free memory", human_bytes(machine.free_memory)],
    ]
    if machine.tier is None:
        rows.append(["kernels", "NONE: models run in numpy, tens of times slower; see below"])
    else:
        available, compiled = machine.available_tiers or (), machine.compiled_tiers or ()
        rows += [
            ["tier", f"{machine.tier} (available: {', '.join(available)})"],
            ["compiled", ", ".join(compiled)],
        ]
    if rates is not None:
        with_threads = f"with {rates.threads} thread{'s' * (rates.threads > 1)}"
        rows += [
            ["read", f"{rates.read / 1e9:.1f} GB/s {with_threads}"],
            ["int8", f"{rates.integer / 1e12:.2f} TOP/s {with_threads}"],
        ]
    elif machine.tier is not None:
        rows += [["read", f"not measured: {skipped}"], ["int8", "not measured, either"]]
    print_table("machine", ["what", "value"], rows)
    print_table(
        f"what fits: weights and keys and values of {CONTEXT:,} tokens, in the free memory",
        ["model", "type", "weights", "keys+values", "fits", "at most tok/s"],
        [
            [
                row["model"],
                row["type"],
                human_bytes(row["weight_bytes"]),
                human_bytes(row["kv_bytes"]),
                "yes" if row["fits"] else "from disk" if row["from_disk"] else "no",
                f"{row['most_tok_s']:.1f}" if row["fits"] and row["most_tok_s"] else "-",
            ]
            for row in table
        ],
    )
    if any(row["from_disk"] for row in table):
        out.print(
            "from disk: more than the free memory, but a packed folder of it (earnest pack, "
            "earnest quantize) runs all the same, slowly: each token waits for the disk"
        )
