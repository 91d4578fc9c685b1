"""`earnest top`: how a running server does, on the terminal."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from earnest import env
from earnest.cli.terminal import human_bytes, out
from earnest.errors import MissingPackageError, NetworkError

if TYPE_CHECKING:
    from earnest.serve.watching import Reading, Server, Times, View

EPILOG = """\b
Examples:
  earnest top
  earnest top http://192.168.1.7:8000 --api-key KEY
  earnest top unix:./earnest.sock --once
  earnest top --json --interval 10 >> load.jsonl
"""
_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 60


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--api-key", help="A key that the server asks for (also EARNEST_API_KEY).")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two readings.",
)
@click.option("--once", is_flag=True, help="Show one interval, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each interval.")
def command(url: str, api_key: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Show what the server at URL does (http://HOST:PORT, https://... or unix:PATH).

    Rates and times are those of the last interval; times are of all answers so far where none came
    in it. Ctrl-C ends it.
    """
    try:
        from earnest.serve.watching import Server
    except ImportError as error:
        raise MissingPackageError(
            "earnest top needs a package that is not installed",
            got=str(error),
            remedy="pip install prometheus_client",
        ) from error
    server = Server(url, api_key=api_key or next(iter(env.api_keys()), None))
    before = server.read()  # what is wrong with the address is an error, and the end
    if once or as_json or not out.is_terminal:
        _lines(server, before, interval, once=once or not as_json, as_json=as_json)
    else:
        _live(server, before, interval)


def _lines(server: Server, before: Reading, interval: float, *, once: bool, as_json: bool) -> None:
    import json

    from earnest.serve.watching import to_dict, view

    while True:
        time.sleep(interval)
        after = server.read()
        found = view(server.url, before, after)
        before = after
        if as_json:
            click.echo(json.dumps(to_dict(found), ensure_ascii=False))
        else:
            out.print(_shown(found, []))
        if once:
            return


def _live(server: Server, before: Reading, interval: float) -> None:
    from earnest.serve.watching import view

    rates: deque[float] = deque(maxlen=_HISTORY)
    with Live(Text("reading ..."), console=out, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(interval)
            try:
                after = server.read()
            except NetworkError as error:  # it may come back
                live.update(Text(f"{error.problem} any more; still trying", "red"), refresh=True)
                continue
            found = view(server.url, before, after)
            before = after
            rates.append(found.generation_rate or 0.0)
            live.update(_shown(found, list(rates)), refresh=True)


def _shown(found: View, rates: list[float]) -> Group:
    state = {True: "ready", False: "ending", None: "running"}[found.ready]
    names = ", ".join(_plain(name) for name in found.models) or "a model"
    version = f", Earnest {_plain(found.version)}" if found.version else ""
    head = Text(f"{names} at {_plain(found.url)}: {state}{version}", "bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    finished = ", ".join(f"{count:,} {_plain(why)}" for why, count in found.finished.items())
    blocks = f" of {found.kv_blocks:,} blocks" if found.kv_blocks else ""
    guesses = "-"
    if found.guesses_right is not None:
        guesses = f"{_percent(found.guesses_right)} right"
        if found.tokens_a_draft is not None:
            guesses += f", {found.tokens_a_draft:.2f} tokens a draft"
    for name, text in (
        ("answers", f"{found.running:,} running, {found.waiting:,} waiting"),
        ("finished", finished or "none"),
        ("tokens/s", f"{_rate(found.generation_rate)} written, {_rate(found.prompt_rate)} read"),
        ("", _line(rates)),
        ("first token", _times(found.first_token)),
        ("between tokens", _times(found.between_tokens)),
        ("in the queue", _times(found.queue)),
        ("KV cache", f"{_percent(found.kv_used)}{blocks}, {found.preemptions or 0:,} preemptions"),
        ("prefixes", f"{_percent(found.prefix_hits)} of the prompts' tokens found"),
        ("guesses", guesses),
        ("memory", "-" if found.memory is None else human_bytes(found.memory)),
        ("processors", "-" if found.processors is None else f"{found.processors:.2f} busy"),
    ):
        if name or text:
            table.add_row(name, Text(text))
    return Group(head, table)


def _plain(text: str) -> str:
    """Names come from a server; none may write to the terminal as it likes."""
    return "".join(character if character.isprintable() else "?" for character in text[:200])


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _times(found: Times) -> str:
    named = (("p50", found.p50), ("p90", found.p90), ("p99", found.p99))
    return ", ".join(f"{name} {_duration(value)}" for name, value in named)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _line(rates: list[float]) -> str:
    """The rates of late, as small bars."""
    highest = max(rates, default=0.0)
    if highest <= 0:
        return ""
    return "".join(_BARS[round(8 * rate / highest)] for rate in rates)
