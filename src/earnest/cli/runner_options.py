"""The options that choose a runner, the same for every verb that runs a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, get_args

import click

from earnest.runners.choice import RunnerName
from earnest.runners.native.runner import DEFAULT_KV, KvType

_Command = TypeVar("_Command", bound=Callable[..., Any])


class RunnerOptions(TypedDict):
    """Arguments of `earnest.load` and of `measure_speed`: see `runners.choice.RunnerChoice`."""

    runner: RunnerName
    threads: int | None
    lock: bool
    kv: KvType | None
    activation_bits: Literal[8, 15] | None


_OPTIONS = (
    click.option(
        "--runner",
        type=click.Choice(get_args(RunnerName)),
        default="auto",
        help="Compiled kernels (the default where installed), or numpy: exact and slow.",
    ),
    click.option("--threads", type=click.IntRange(1, 1024), help="Threads to compute with."),
    click.option("--lock", is_flag=True, help="Pin the weights in RAM."),
    click.option(
        "--kv",
        type=click.Choice(get_args(KvType)),
        help=f"How keys and values are kept ({DEFAULT_KV}); int8 takes half, and is less exact.",
    ),
    click.option(
        "--activation-bits",
        type=click.Choice(["8", "15"]),
        callback=lambda _ctx, _option, value: value and int(value),
        help="How finely activations are rounded (15); 8 is faster, and less exact: 8-bit "
        "integers, or bf16 where weights are bf16.",
    ),
)


def runner_options(command: _Command) -> _Command:
    """Add the options; they arrive as the keywords of `RunnerOptions`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
