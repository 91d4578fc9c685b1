"""The options of a server, the same for every verb that serves a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from earnest.cli.runner_options import runner_options
from earnest.cli.terminal import allow_bias_option, speculation_option

_Command = TypeVar("_Command", bound=Callable[..., Any])


def serving_options(*, any_port: bool) -> Callable[[_Command], _Command]:
    """Where a model listens, to whom, how it is opened and how it ends.

    Args:
        any_port: 0 may be asked for, which is whatever port is free.
    """
    options: tuple[Callable[[_Command], _Command], ...] = (
        click.option(
            "--host", default="127.0.0.1", show_default=True, help="Address to listen on."
        ),
        click.option(
            "--port",
            type=click.IntRange(0 if any_port else 1, 65535),
            default=8000,
            show_default=True,
            help=f"Port to listen on{'; 0 takes any that is free' if any_port else ''}.",
        ),
        click.option(
            "--name", help="What clients call the model; by default the name of its file."
        ),
        click.option(
            "--api-key-file",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="A file with a key on each line; those of EARNEST_API_KEY let clients in, too.",
        ),
        click.option(
            "--context", type=click.IntRange(1), help="Tokens that a conversation may have."
        ),
        runner_options,
        speculation_option,
        allow_bias_option,
        click.option(
            "--drain",
            type=click.FloatRange(0),
            default=30.0,
            show_default=True,
            help="Seconds for answers under way when the server is told to end.",
        ),
    )

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
