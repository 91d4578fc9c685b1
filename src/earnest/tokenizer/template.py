"""Chat templates: a conversation to the text a model was trained on.

A template is a jinja2 program that comes with a checkpoint, so it is a stranger's: it runs in the
bounded sandbox of `earnest.tokenizer.sandbox`. It is compiled when it is first used, so that a
broken one does not keep a model from continuing plain text.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from typing import Any

import jinja2

from earnest.errors import PromptError, TemplateError, UserError
from earnest.tokenizer.sandbox import ENVIRONMENT, MAX_CHARACTERS, LimitError, budget

MAX_SOURCE_CHARACTERS = 2**16
"""The longest template that is compiled; the longest published ones have a third of it."""

BUILTIN_TEMPLATES = ("ernie", "ernie-thinking")


class ChatTemplate:
    """A jinja2 template that turns messages into a prompt.

    Besides what jinja2 has, a template may use `raise_exception(message)`, `strftime_now(format)`,
    `tojson` without HTML escapes, `break`, `continue` and `{% generation %}`.

    Args:
        source: the template.
        origin: what to call it in errors.
        seconds: how long compiling and rendering may take.
    """

    def __init__(
        self, source: str, *, origin: str = "the chat template", seconds: float = 10.0
    ) -> None:
        self.source, self.origin, self._seconds = source, origin, seconds

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: each a mapping with "role" and "content", and what the template understands.
            tools: JSON descriptions of functions the model may call.
            add_generation_prompt: end with the opening of an answer; None: leave it to the
                template.
            **variables: what else the template understands (`bos_token`, ...).

        Raises:
            TemplateError: the template is broken, refuses the messages, or exceeds a bound.
            PromptError: the messages are not a list of mappings.
        """
        if isinstance(messages, str | bytes | Mapping) or not all(
            isinstance(message, Mapping) for message in messages
        ):
            raise PromptError(
                "the messages of a conversation are not a list of mappings",
                got=type(messages).__name__,
                expected='[{"role": "user", "content": "..."}, ...]',
            )
        variables = {**variables, "messages": messages, "tools": tools}
        if add_generation_prompt is not None:
            variables["add_generation_prompt"] = add_generation_prompt
        compiled = self._compiled
        try:
            with budget(self._seconds):
                pieces, length = [], 0
                for piece in compiled.generate(variables):
                    length += len(piece)
                    if length > MAX_CHARACTERS:
                        raise LimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
                    pieces.append(piece)
        except Exception as error:
            raise self._error("failed", error) from error
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.source) > MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"{self.origin} is too long",
                got=f"{len(self.source):,} characters",
                expected=f"at most {MAX_SOURCE_CHARACTERS:,}",
            )
        try:
            with budget(self._seconds):
                return ENVIRONMENT.from_string(self.source)
        except Exception as error:
            raise self._error("cannot be compiled", error) from error

    def _error(self, what: str, error: Exception) -> TemplateError:
        reason = str(error) or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, MemoryError):
            reason = "it needs too much memory"
        elif not isinstance(error, jinja2.TemplateError):
            reason = f"{type(error).__name__}: {reason}"
        line = _line(error)
        return TemplateError(
            f"{self.origin} {what}{f' at line {line}' if line else ''}: {reason[:1000]}",
            remedy="check the messages against what the template wants, or use another template",
        )


def _line(error: Exception) -> int | None:
    """The template's line that an error came from."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename in ("<unknown>", "<template>"):  # jinja2's name for its code
            line = number
    return line


@cache
def builtin_template(name: str) -> ChatTemplate:
    """A chat template that comes with Earnest.

    "ernie" is that of the post-trained text models (`-PT`), "ernie-thinking" that of
    21B-A3B-Thinking. They write the same text as the published ones.

    Raises:
        UserError: there is none of this name.
    """
    if name not in BUILTIN_TEMPLATES:
        raise UserError(
            "no built-in chat template has this name",
            got=repr(name),
            expected=" or ".join(BUILTIN_TEMPLATES),
        )
    file = resources.files(__package__) / "templates" / f"{name}.jinja"
    return ChatTemplate(file.read_text(encoding="utf-8"), origin=f"built-in template {name!r}")
