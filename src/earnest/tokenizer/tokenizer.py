"""`Tokenizer`: text to ids and back, whatever files the vocabulary came in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from earnest.tokenizer.detokenizer import Detokenizer
from earnest.tokenizer.template import ChatTemplate


class Tokenizer:
    """One vocabulary with its special tokens and its chat template."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None
    pad_id: int | None
    special_tokens: dict[str, str]
    chat_template: ChatTemplate | None

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        raise NotImplementedError

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        raise NotImplementedError

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[int]:
        raise NotImplementedError

    def decode(
        self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False
    ) -> str:
        raise NotImplementedError

    def detokenizer(
        self, skip_special_tokens: bool = True, *, continuation: bool = False
    ) -> Detokenizer:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        raise NotImplementedError

    def is_special(self, token_id: int) -> bool:
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        raise NotImplementedError

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        chat_template: ChatTemplate | None = None,
        **variables: Any,
    ) -> str:
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError
