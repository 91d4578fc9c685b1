"""`earnest VERB ...`: finds the verb, and turns every error into one message and an exit status.

Exit status: 0 done; 1 a check failed; 2 the call was wrong; 3 the model files are wrong; 4 the
machine stands in the way (disk, memory, permissions, network); 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from typing import TextIO

import click

from earnest.errors import EarnestError, MemoryBudgetError, MissingKernelsWarning
from earnest.log import logger

# Verb to the line shown by --help. Modules are imported only when their verb is used, so that
# --help and completion answer at once.
VERBS = {
    "run": "Ask a model, or chat with it on a terminal.",
    "serve": "Serve a model over HTTP, as OpenAI, Anthropic and Ollama do.",
    "deploy": "Serve a model with several engines on a Ray cluster.",
    "top": "Watch a running server on the terminal: load, tokens per second, waiting times.",
    "inspect": "Show what a checkpoint (or a preset) holds: config, parts, types, sizes.",
    "verify": "Check a checkpoint's integrity, its plausibility, and its exactness.",
    "diff": "List which tensors of two checkpoints differ, and by how much.",
    "convert": "Rewrite a checkpoint in the Hugging Face or the Paddle layout, or as GGUF.",
    "pack": "Rewrite a checkpoint, without loss, so that it starts at once and runs in place.",
    "quantize": "Write a checkpoint with smaller weights, packed or as a GGUF file.",
    "synth": "Write a checkpoint of true shapes with random weights, for tests and benchmarks.",
    "pull": "Download a checkpoint from the Hugging Face hub.",
    "bench": "Measure prefill and decoding of a model, against what this machine can.",
    "doctor": "Show and measure what this machine can, and which models fit.",
}

EPILOG = """\b
Examples:
  earnest run "Why is the sky blue?"
  earnest run ./ERNIE-4.5-0.3B-PT -p "Once upon a time" --max-tokens 64
  earnest inspect ./ERNIE-4.5-21B-A3B-Base-PT
  earnest verify ./ERNIE-4.5-0.3B-PT --against transformers

A MODEL is a folder, a .safetensors or .gguf file, or a built-in name: smollm2, stories.
"""


class VerbGroup(click.Group):
    """A command group that imports a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's click command, or None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"earnest.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs in --help, without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=VerbGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="earnest")
def group() -> None:
    """ERNIE 4.5, in earnest: open, prove and run ERNIE-4.5 checkpoints on the machine you own."""


class _Warnings(logging.Handler):
    """What the library warns of, told to the person. (A server has a log, which replaces this.)"""

    def emit(self, record: logging.LogRecord) -> None:
        from earnest.cli.terminal import notice

        notice(record.getMessage())


_WARNINGS = _Warnings(logging.WARNING)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning`: what Earnest warns of without the line of code it comes from."""
    if issubclass(category, MissingKernelsWarning):
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {message}", err=True)
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        click.echo(text, file=file, err=file is None, nl=False)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `earnest` command; does not return."""
    logger.addHandler(_WARNINGS)
    warnings.showwarning = _show_warning
    argv = sys.argv[1:] if arguments is None else arguments
    try:
        status = group.main(args=argv, prog_name="earnest", standalone_mode=False)
    except EarnestError as error:
        status = report(error, as_json="--json" in argv)
    except MemoryError:
        exhausted = MemoryBudgetError(
            "the machine ran out of memory",
            remedy="close other programs, use a smaller model, or lower EARNEST_MEMORY_GIB",
        )
        status = report(exhausted, as_json="--json" in argv)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        # click raises its own in place of an interrupt.
        notes: list[str] = getattr(error.__cause__ or error, "__notes__", [])
        click.echo("\n  ".join(["interrupted", *notes]), err=True)
        status = 130
    except BrokenPipeError:
        # The reader of our output has gone (for example `| head`): nothing to say, nobody to hear.
        sys.stderr.close()
        status = 141
    sys.exit(status if isinstance(status, int) else 0)


def report(error: EarnestError, *, as_json: bool) -> int:
    """Print `error` for a person (stderr) or a machine (stdout); returns the exit status."""
    if as_json:
        problem = {"type": type(error).__name__, "message": str(error), "remedy": error.remedy}
        click.echo(json.dumps({"error": problem}, ensure_ascii=False))
    else:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
    return error.exit_code
