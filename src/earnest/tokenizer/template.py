"""Chat templates: a conversation to the text a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_SOURCE_CHARACTERS = 2**17
BUILTIN_TEMPLATES = ("ernie", "ernie-thinking")


class ChatTemplate:
    """A jinja2 template that turns messages into a prompt."""

    def __init__(self, source: str, *, origin: str = "chat template") -> None:
        self.source, self.origin = source, origin

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation."""
        raise NotImplementedError


def builtin_template(name: str) -> ChatTemplate:
    """The template "ernie" (post-trained) or "ernie-thinking"."""
    raise NotImplementedError
