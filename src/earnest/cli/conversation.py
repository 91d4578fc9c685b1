"""The interactive chat of `earnest run` on a terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from earnest.cli.terminal import notice, out
from earnest.cli.timings import Timings
from earnest.engine import LanguageModel, SamplingParams
from earnest.errors import PromptError

HELP = """/help          this list
/reset         forget the conversation
/system TEXT   set the system message (and forget the conversation)
/exit          leave (or Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


def converse(
    model: LanguageModel,
    params: SamplingParams,
    *,
    system: str | None,
    chatting: bool,
    watch: Timings | None = None,
) -> None:
    """Read lines and answer them, streaming, until /exit or end of input.

    A model without a chat format continues each line as plain text instead; that is said once.
    With a `watch` every answer is followed by what it cost.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    if chatting:
        notice("chat: /help lists the commands; Ctrl-D leaves")
    else:
        notice(
            "this model has no chat format (a Base model): it continues your text. Ctrl-D leaves"
        )
    messages = _opening(system)
    while True:
        try:
            line = input(">>> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if not line:
            continue
        if line.startswith("/"):
            word, _, rest = line.partition(" ")
            if word in ("/exit", "/quit", "/bye"):
                return
            if word == "/reset":
                messages = [m for m in messages if m["role"] == "system"]
                notice("forgotten")
            elif word == "/system":
                messages = _opening(rest.strip())
                notice("system message set")
            else:
                notice(HELP)
            continue
        turn = [*messages, {"role": "user", "content": line}]
        try:
            ids = model.chat_ids(turn) if chatting else model.text_ids(line)
            answer = _answer(model, params, ids, watch)
        except PromptError as error:
            # The conversation no longer fits: say so and keep what was there before this line.
            notice(f"{error}\n/reset starts over")
            continue
        if chatting:
            messages = [*turn, {"role": "assistant", "content": answer}]


def _opening(system: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] if system else []


def _answer(
    model: LanguageModel, params: SamplingParams, ids: list[int], watch: Timings | None
) -> str:
    stream = model.stream(ids, params)
    events = stream if watch is None else watch.watch(len(ids), stream)
    written: list[str] = []
    try:
        for event in events:
            written.append(event.text)
            sys.stdout.write(event.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        notice(" [stopped]")
    finally:
        stream.close()
    sys.stdout.write("\n")
    if watch is not None:
        notice(watch.line(model))
    return "".join(written)
