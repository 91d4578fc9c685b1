"""Tokenizers inside GGUF files, read from the file's metadata (keys `tokenizer.ggml.*`).

Two kinds: "llama" is a SentencePiece BPE with scores, "gpt2" a byte-level BPE with merges. The
formats of both follow llama.cpp, which defines them; where a file says nothing, so do the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from earnest.config.values import brief
from earnest.errors import TokenizerError
from earnest.log import logger
from earnest.tokenizer import byte_level
from earnest.tokenizer.fast_vocabulary import FastVocabulary
from earnest.tokenizer.sentencepiece_proto import (
    MAX_PIECES,
    PieceType,
    SentencePieceModel,
    byte_of,
)
from earnest.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from earnest.tokenizer.sources import Source, added_tokens, names_of_model
from earnest.tokenizer.template import ChatTemplate
from earnest.tokenizer.tokenizer_json import Decoding
from earnest.tokenizer.vocabulary import AddedToken, is_unicode, library_errors

PREFIX = "tokenizer.ggml."
NAMED = {
    "bos_token": ("bos_token_id",),
    "eos_token": ("eos_token_id",),
    "eot_token": ("eot_token_id",),
    "eom_token": ("eom_token_id",),
    "unk_token": ("unknown_token_id",),
    "sep_token": ("seperator_token_id", "separator_token_id"),  # the format's own misspelling
    "pad_token": ("padding_token_id",),
    "cls_token": ("cls_token_id",),
    "mask_token": ("mask_token_id",),
}
# Converters that copy SentencePiece types call ERNIE's turn markers ordinary pieces; no text would
# reach them. They are known by their form and by the template that writes them.
_MARKER = re.compile(r"<\|[^\s<>|]{1,60}\|>")


def read_metadata(metadata: Mapping[str, Any]) -> Source:
    """The tokenizer that GGUF metadata describes.

    Raises:
        TokenizerError: there is none, or it is broken or of a kind that is not supported.
    """
    kind = metadata.get(PREFIX + "model")
    if kind not in ("llama", "gpt2"):
        raise TokenizerError(
            "the GGUF file has no tokenizer of a supported kind (tokenizer.ggml.model)",
            got=repr(kind)[:80],
            expected="'llama' (SentencePiece) or 'gpt2' (byte-level BPE)",
        )
    tokens = _strings(metadata, "tokens")
    types = _integers(metadata, "token_type", len(tokens))
    templates = _templates(metadata)
    names = _names(metadata, tokens)
    specials = {*names.values(), *_markers(templates.values(), tokens)}
    if kind == "llama":
        model = _sentencepiece(metadata, tokens, types)
        declared = [token for token in _typed_tokens(tokens, types) if not token.special]
        added = added_tokens(model, declared, specials)
        vocabulary: SentencePieceVocabulary | FastVocabulary
        vocabulary = SentencePieceVocabulary(model, added)
        names = names_of_model(model) | names
        bos_default = True
    else:
        ids = {token: token_id for token_id, token in enumerate(tokens)}
        typed = {token.content: token for token in _typed_tokens(tokens, types)}
        typed |= {content: AddedToken(ids[content], content) for content in specials}
        added = tuple(sorted(typed.values(), key=lambda token: token.id))
        pre = _pre_name(metadata)
        vocabulary = _byte_level(tokens, _strings(metadata, "merges"), pre, added)
        bos_default = byte_level.ignores_merges(pre)  # Llama 3's, by llama.cpp's default
    return Source(
        vocabulary,
        names,
        _flag(metadata, "add_bos_token", default=bos_default),
        _flag(metadata, "add_eos_token", default=False),
        templates,
        added,
    )


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> SentencePieceModel:
    scores = _numbers(metadata, "scores", len(tokens))
    byte_pieces = {byte_of(token) for token, kind in zip(tokens, types, strict=True) if kind == 6}
    unknown = metadata.get(PREFIX + "unknown_token_id", 0)
    if PieceType.UNKNOWN not in types and isinstance(unknown, int) and unknown < len(types):
        types = [*types[:unknown], PieceType.UNKNOWN, *types[unknown + 1 :]]
    return SentencePieceModel(
        tokens,
        scores,
        types,
        byte_fallback=len(byte_pieces - {None}) == 256,
        add_dummy_prefix=_flag(metadata, "add_space_prefix", default=True),
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", default=False),
    )


def _byte_level(
    tokens: list[str], merges: list[str], pre: str, added: Sequence[AddedToken]
) -> FastVocabulary:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise TokenizerError("the GGUF file's vocabulary holds a token twice")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise TokenizerError(
                "a merge of the GGUF file's tokenizer is broken", got=repr(merge[:80])
            )
        pairs.append((left, right))
    with library_errors("building the GGUF file's tokenizer"):
        library = Library(
            models.BPE(vocab=ids, merges=pairs, ignore_merges=byte_level.ignores_merges(pre))
        )
        if (normalizer := byte_level.normalizer(pre)) is not None:
            library.normalizer = normalizer
        library.pre_tokenizer = byte_level.pre_tokenizer(pre)
        library.decoder = decoders.ByteLevel()
    return FastVocabulary(library, Decoding.BYTE_LEVEL, added=added)


def _typed_tokens(tokens: list[str], types: list[int]) -> list[AddedToken]:
    """Control and user-defined tokens, which are found in text whole."""
    special = {PieceType.CONTROL: True, PieceType.UNKNOWN: True, PieceType.USER_DEFINED: False}
    return [
        AddedToken(token_id, token, special=special[PieceType(kind)])
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in special
    ]


def _names(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {}
    for name, keys in NAMED.items():
        for key in keys:
            token_id = metadata.get(PREFIX + key)
            if token_id is None:
                continue
            if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
                logger.warning("GGUF: %s%s is no token: %s; ignored", PREFIX, key, brief(token_id))
                continue
            names[name] = tokens[token_id]
    return names


def _markers(templates: Any, tokens: list[str]) -> set[str]:
    written = {m for template in templates for m in _MARKER.findall(template.source)}
    return written.intersection(tokens)


def _templates(metadata: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    templates = {}
    for name, key in (("default", "chat_template"), ("tool_use", "chat_template.tool_use")):
        source = metadata.get("tokenizer." + key)
        if source is None:
            continue
        if not isinstance(source, str):
            raise TokenizerError(f"the GGUF file's tokenizer.{key} is not text")
        templates[name] = ChatTemplate(source, origin=f"GGUF tokenizer.{key}")
    return templates


def _pre_name(metadata: Mapping[str, Any]) -> str:
    name = metadata.get(PREFIX + "pre", "default")
    return name if isinstance(name, str) else repr(name)


# --- typed access to metadata -------------------------------------------------------------------


def _flag(metadata: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = metadata.get(PREFIX + key, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"GGUF: {PREFIX}{key} is not true or false", got=repr(value)[:80])
    return value


def _array(metadata: Mapping[str, Any], key: str, length: int | None) -> list[Any]:
    value = metadata.get(PREFIX + key)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise TokenizerError(f"GGUF: {PREFIX}{key} is missing or not a list")
    if length is not None and len(value) != length:
        raise TokenizerError(
            f"GGUF: {PREFIX}{key} does not fit the vocabulary",
            got=f"{len(value):,} entries",
            expected=f"{length:,}",
        )
    if len(value) > 4 * MAX_PIECES:
        raise TokenizerError(f"GGUF: {PREFIX}{key} is absurdly long", got=f"{len(value):,}")
    return list(value)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = _array(metadata, key, None)
    if not all(isinstance(value, str) and is_unicode(value) for value in values):
        raise TokenizerError(f"GGUF: {PREFIX}{key} holds something that is not Unicode text")
    return values


def _integers(metadata: Mapping[str, Any], key: str, length: int) -> list[int]:
    values = _array(metadata, key, length)
    known = set(PieceType)
    if not all(isinstance(value, int) and value in known for value in values):
        raise TokenizerError(f"GGUF: {PREFIX}{key} holds something that is no token type (1 to 6)")
    return values


def _numbers(metadata: Mapping[str, Any], key: str, length: int) -> list[float]:
    values = _array(metadata, key, length)
    if not all(isinstance(value, int | float) for value in values):
        raise TokenizerError(f"GGUF: {PREFIX}{key} holds something that is not a number")
    return [float(value) for value in values]
