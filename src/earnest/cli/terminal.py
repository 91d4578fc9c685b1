"""How verbs speak: results to standard output, notices and progress to standard error."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from earnest.checkpoint.writer import WriteReport
from earnest.log import Progress

# Into a file or a pipe tables go unbroken, so that names in them can be searched for.
out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 1000)
# A cell of a column of numbers: a figure with its unit, or a dash for none.
_NUMBER = re.compile(r"-?|(x )?-?[\d.,]+(e[+-]?\d+)?( ?[kMGT]?B|%)?")

err = Console(stderr=True, soft_wrap=True, highlight=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
allow_bias_option = click.option(
    "--allow-missing-correction-bias",
    is_flag=True,
    help="Open a MoE checkpoint that lost its e_score_correction_bias (routes differently!).",
)
speculation_option = click.option(
    "--speculation",
    type=click.Choice(["prompt", "off"]),
    default="prompt",
    show_default=True,
    help="Guess tokens where the text repeats itself, while it pays; they stay the same.",
)
force_option = click.option("--force", is_flag=True, help="Replace DST if it exists.")


def notice(text: str) -> None:
    """Tell the person something that is not the result."""
    err.print(text, style="dim", markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))


def print_written(report: WriteReport, *, as_json: bool) -> None:
    """What a verb that writes a checkpoint has written."""
    if as_json:
        print_json(report.to_dict())
        return
    out.print(
        f"wrote {report.path}: {report.tensors:,} tensors, {human_bytes(report.nbytes)}"
        + (", continuing an interrupted run" if report.resumed else ""),
        markup=False,
    )
    for note in report.notes:
        notice(note)


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress bar over bytes on a terminal; elsewhere a plain line every ten seconds."""
    if not sys.stderr.isatty():
        yield _plain_lines(label)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{label} {what[-40:]}")

        yield advance


@contextlib.contextmanager
def still_progress() -> Iterator[Progress]:
    """Which of several things is being done, for what is timed: nothing is drawn but by a call.

    On a terminal one line, gone at the end; elsewhere a plain line for each.
    """
    if not sys.stderr.isatty():
        yield _numbered_lines
        return
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None, visible=False)

        def advance(done: int, total: int, what: str) -> None:
            now = min(done + 1, total)
            bar.update(task, completed=now, total=total, description=what, visible=True)
            bar.refresh()

        yield advance


def _numbered_lines(done: int, total: int, what: str) -> None:
    if done < total:
        notice(f"{done + 1} of {total}: {what}")


def _plain_lines(label: str) -> Progress:
    spoken = time.monotonic()

    def advance(done: int, total: int, what: str) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= 10:
            spoken = time.monotonic()
            notice(f"{label}: {100 * done / max(total, 1):.0f}% ({what})")

    return advance


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; columns of numbers are right-aligned. Nothing is printed for no rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name, cells in zip(columns, zip(*rows, strict=True), strict=True):
        numeric = all(_NUMBER.fullmatch(cell) for cell in cells)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def human_bytes(count: float) -> str:
    """A size for people: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.3g} TB"
