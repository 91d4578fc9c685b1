"""`earnest run`: ask a model once, or chat with it on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

from earnest import hub
from earnest.cli.runner_options import RunnerOptions, runner_options
from earnest.cli.terminal import (
    allow_bias_option,
    json_option,
    notice,
    out,
    print_json,
    progress_bar,
    speculation_option,
)
from earnest.cli.timings import Timings, ran_by
from earnest.engine import (
    Completion,
    LanguageModel,
    SamplingParams,
    TokenEvent,
    load,
    sampling_defaults,
)
from earnest.errors import ChatUnsupportedError, MissingPackageError, NetworkError, UserError

EPILOG = """\b
Examples:
  earnest run "Why is the sky blue?"            the default model (smollm2) answers
  earnest run smollm2                           chat, on a terminal
  earnest run stories "Once upon a time"        the small story model, no download
  earnest run ./model -p "2+2=" --temperature 0 --max-tokens 8 --json
  cat letter.txt | earnest run ./model --raw    continue a text
"""

# Sampling options that are handed on under their own names when they are given.
_SAMPLING = (
    ("--max-tokens", int, "At most this many new tokens."),
    ("--min-tokens", int, "No end before this many tokens."),
    ("--temperature", float, "0 is greedy; higher is more varied."),
    ("--top-k", int, "Keep the k likeliest tokens (0: all)."),
    ("--top-p", float, "Keep the likeliest tokens that reach this probability."),
    ("--min-p", float, "Drop tokens less likely than this times the likeliest."),
    ("--repetition-penalty", float, "Divide the logits of tokens already seen (1: off)."),
    ("--presence-penalty", float, "Subtract once from tokens already written."),
    ("--frequency-penalty", float, "Subtract per occurrence from tokens already written."),
    ("--seed", int, "Makes the answer reproducible."),
    ("--logprobs", int, "With --json: log-probabilities and the n likeliest tokens."),
    ("--prompt-logprobs", int, "With --json: the same for the prompt."),
)


def _sampling_options(command: Any) -> Any:
    for flag, kind, text in reversed(_SAMPLING):
        command = click.option(flag, type=kind, default=None, help=text)(command)
    return command


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.argument("text", required=False, metavar="[PROMPT]")
@click.option("-p", "--prompt", help="The prompt (or give it after MODEL, or on standard input).")
@click.option("--system", help="A system message for the chat.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text: no chat template.")
@click.option("--chat", is_flag=True, help="Insist on a chat: an error if the model cannot.")
@_sampling_options
@click.option("--stop", multiple=True, help="Stop before this text (may be given repeatedly).")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of context to reserve.")
@runner_options
@speculation_option
@click.option(
    "--timings", is_flag=True, help="Show tokens per second, time to first token and memory."
)
@allow_bias_option
@json_option
def command(
    model: str | None,
    text: str | None,
    prompt: str | None,
    system: str | None,
    raw: bool,
    chat: bool,
    stop: tuple[str, ...],
    ignore_eos: bool,
    context: int | None,
    speculation: Literal["prompt", "off"],
    timings: bool,
    allow_missing_correction_bias: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask MODEL (default: smollm2), or chat with it on a terminal when no prompt is given.

    A model with a chat template is asked in its chat format; --raw continues the text instead.
    """
    if raw and chat:
        raise UserError("--raw and --chat contradict each other", remedy="pass one of them")
    name, question = _model_and_prompt(model, text, prompt)
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().rstrip("\n")
    how = {key: options.pop(key) for key in RunnerOptions.__annotations__}
    given = {key: value for key, value in options.items() if value is not None}
    # Checked before the model is loaded: a typing error should not cost a download.
    SamplingParams(**given)

    begun = time.monotonic()
    language_model = _load(
        name,
        max_context=context,
        **how,
        speculation=None if speculation == "off" else speculation,
        allow_missing_correction_bias=allow_missing_correction_bias,
    )
    watch = Timings(time.monotonic() - begun)
    chatting = _chats(language_model, raw=raw, chat=chat)
    defaults = sampling_defaults(language_model.checkpoint)
    params = SamplingParams(
        **(_fields(defaults) | given | {"stop": stop, "ignore_eos": ignore_eos})
    )
    if question is None:
        if as_json:
            raise UserError("--json needs a prompt", remedy="pass one with -p")
        from earnest.cli.conversation import converse

        converse(
            language_model,
            params,
            system=system,
            chatting=chatting,
            watch=watch if timings else None,
        )
        return
    messages = ([{"role": "system", "content": system}] if system else []) + [
        {"role": "user", "content": question}
    ]
    ids = language_model.chat_ids(messages) if chatting else language_model.text_ids(question)
    if as_json:
        completion = language_model.generate(ids, params)
        took = Timings.of(completion, watch.load_seconds)
        print_json(_as_dict(completion, name, chatting, took, language_model))
        return
    events = language_model.stream(ids, params)
    if not chatting:
        out.print(question, end="", markup=False)
    show(watch.watch(len(ids), events))
    if timings:
        notice(watch.line(language_model))


def _model_and_prompt(
    model: str | None, text: str | None, prompt: str | None
) -> tuple[str | None, str | None]:
    """Tell `run MODEL PROMPT`, `run MODEL` and `run PROMPT` apart.

    A single argument is a prompt if it contains white space and no such path exists.
    """
    if text is not None and prompt is not None:
        raise UserError("two prompts were given", remedy="pass it once: after MODEL or with -p")
    prompt = text if prompt is None else prompt
    if (
        model is not None
        and prompt is None
        and len(model.split()) > 1
        and model not in hub.BUILTIN
        and not _exists(model)
    ):
        return None, model
    return model, prompt


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False  # a prompt too long to be a path, or with a NUL in it


def _load(name: str | None, **options: Any) -> LanguageModel:
    if name is None:
        notice("no MODEL was named: smollm2 answers, the default model")
    with progress_bar("opening") as progress:
        try:
            path = hub.locate(name or "smollm2", progress=progress, notice=notice)
        except (NetworkError, MissingPackageError) as error:
            if name is not None:
                raise
            notice(f"the default model could not be fetched ({error.problem})")
            name, path = "stories", hub.locate("stories")
        if name == "stories":
            notice(
                "stories: a 260-thousand-parameter model that only knows how to tell small "
                "children's stories in English; it answers no questions."
            )
        return load(path, **options, progress=progress, notice=notice)


def _chats(model: LanguageModel, *, raw: bool, chat: bool) -> bool:
    able = model.tokenizer.chat_template is not None
    if chat and not able:
        raise ChatUnsupportedError(
            "this model has no chat format: it is a Base model, which continues text",
            remedy="leave out --chat and phrase the prompt as the beginning of a text, "
            "or use a post-trained model",
        )
    return able and not raw


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def show(events: Iterator[TokenEvent]) -> None:
    """Print a stream as it comes."""
    for event in events:
        sys.stdout.write(event.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _as_dict(
    completion: Completion, name: str | None, chat: bool, took: Timings, model: LanguageModel
) -> dict[str, Any]:
    def row(entry: Any) -> Any:
        return entry and {
            "token_id": entry.token_id,
            "logprob": entry.logprob,
            "top": [list(pair) for pair in entry.top],
        }

    result: dict[str, Any] = {
        "model": name or "smollm2",
        "chat": chat,
        "prompt_ids": completion.prompt_token_ids,
        "completion_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "timings": took.to_dict() | ran_by(model),
    }
    if completion.logprobs is not None:
        result["logprobs"] = [row(entry) for entry in completion.logprobs]
    if completion.prompt_logprobs is not None:
        result["prompt_logprobs"] = [row(entry) for entry in completion.prompt_logprobs]
    return result
