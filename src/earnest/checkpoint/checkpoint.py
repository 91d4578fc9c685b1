"""`Checkpoint`: an opened model, whatever its container and dialect; nothing of it is copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from earnest.checkpoint.lazy import LazyTensor
from earnest.config import ErnieConfig
from earnest.tokenizer import Tokenizer


@dataclass(frozen=True)
class LeftOut:
    """Stored tensors that are not part of the text model, and why they were left out.

    Attributes:
        reason: a phrase, for example "vision experts".
        names: their names in the files.
        nbytes: their stored size in all.
    """

    reason: str
    names: tuple[str, ...]
    nbytes: int


_FORGET_BYTES = 2**25


def _nothing_to_forget() -> None:
    """The `forget` of a checkpoint that is not memory-mapped."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the file or folder it was opened from.
        config: the model's numbers.
        container: "safetensors", "gguf" or "panel" (a packed model).
        dialect: naming and layout of the stored tensors, one of `names.DIALECTS`: "hf",
            "hf_packed", "paddle", "gguf", "vl" or "vl_packed".
        tensors: canonical name (that of the published `-PT` files) to tensor, in the order of the
            name table. Correction biases are float32 `[E]`; MTP tensors are included if stored.
        left_out: what the files hold beyond the text model.
        notes: what a careful reader should know, one sentence each.
        generation_config: the folder's `generation_config.json`, or what a GGUF file says of it.
        metadata: the GGUF metadata, or the folder's raw `config.json`.
        forget: gives the pages read so far back to the system; whoever streams over all weights
            calls it after each piece, so that the peak memory stays small.
    """

    path: Path
    config: ErnieConfig
    container: str
    dialect: str
    tensors: Mapping[str, LazyTensor]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    forget: Callable[[], None] = field(default=_nothing_to_forget, repr=False, compare=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the weights, read on first use.

        Raises:
            TokenizerError: there is none, or it is broken or of an unknown kind.
        """
        if self.container == "gguf":
            return Tokenizer.from_gguf(self.metadata)
        folder = self.path if self.path.is_dir() else self.path.parent
        return Tokenizer.from_folder(folder)

    def forgetter(self) -> Callable[[int], None]:
        """A function that is told how many bytes were streamed, and forgets from time to time."""
        streamed = 0

        def count(nbytes: int) -> None:
            nonlocal streamed
            streamed += nbytes
            if streamed >= _FORGET_BYTES:
                streamed = 0
                self.forget()

        return count

    @property
    def has_mtp(self) -> bool:
        """Whether the files hold the multi-token-prediction block."""
        return any(name.startswith("model.mtp_") for name in self.tensors)
