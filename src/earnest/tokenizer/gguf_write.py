"""Tokenizers for GGUF files: the metadata that `earnest.tokenizer.gguf` (and llama.cpp) reads.

A SentencePiece vocabulary, from whichever file, becomes kind "llama" with scores; a byte-level one
becomes kind "gpt2" with merges. What a model's files call special is written as CONTROL, whatever
its SentencePiece type: ERNIE's turn markers are ordinary pieces in `tokenizer.model`, and a reader
that believed that would split them. Rows of the embedding that no token uses get names of their own
and the type UNUSED, since GGUF's vocabulary is as long as the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from earnest.errors import TokenizerError
from earnest.files import read_bytes
from earnest.tokenizer import byte_level, sources, tokenizer_json
from earnest.tokenizer.gguf import NAMED, PREFIX
from earnest.tokenizer.sentencepiece_proto import (
    MAX_MODEL_BYTES,
    PieceType,
    byte_of,
    parse_model,
)
from earnest.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from earnest.tokenizer.sources import Source
from earnest.tokenizer.vocabulary import Vocabulary

# One name for each way of splitting text that is known; the others are synonyms.
_PRE_NAMES = ("gpt-2", "smollm", "llama-bpe", "qwen2")


@dataclass
class _Table:
    """A vocabulary as GGUF has it; the index is the token id."""

    kind: str
    tokens: list[str]
    types: list[int]
    scores: list[float]

    def put(self, token_id: int, content: str, *, special: bool) -> None:
        """Enter an added token, beyond the pieces or over one of them."""
        self.extend(token_id + 1)
        self.tokens[token_id] = content
        if self.types[token_id] != PieceType.UNKNOWN:
            self.types[token_id] = PieceType.CONTROL if special else PieceType.USER_DEFINED

    def extend(self, size: int) -> None:
        """Fill up with unused entries to `size`; no text merges to them."""
        if len(self.tokens) >= size:
            return
        lowest = min(self.scores, default=0.0) - 1
        for token_id in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{token_id}]")
            self.types.append(PieceType.UNUSED)
            self.scores.append(lowest)


def metadata(source: Source, size: int | None = None) -> dict[str, Any]:
    """The keys `tokenizer.*` that describe a tokenizer, but for the ids of named end tokens that
    only the model's configuration knows.

    Args:
        source: the tokenizer.
        size: rows of the embedding; None: as many as there are tokens.

    Raises:
        TokenizerError: GGUF has no way to say it, or it has more tokens than `size`.
    """
    vocabulary = source.vocabulary
    found: dict[str, Any] = {}
    if isinstance(vocabulary, SentencePieceVocabulary):
        model = vocabulary.model
        table = _Table("llama", list(model.pieces), list(model.types), list(model.scores))
        for token in vocabulary.added:
            table.put(token.id, token.content, special=token.special)
        found["add_space_prefix"] = model.add_dummy_prefix
        if model.remove_extra_whitespaces:
            found["remove_extra_whitespaces"] = True
    else:
        table = _fast(source, vocabulary, found)
    if size is not None and len(table.tokens) > size:
        raise TokenizerError(
            "the tokenizer has more tokens than the embedding has rows",
            got=f"{len(table.tokens):,} tokens",
            expected=f"at most {size:,}",
        )
    table.extend(size or 0)
    if len(set(table.tokens)) < len(table.tokens):
        raise TokenizerError("the tokenizer has two tokens of the same text, which GGUF cannot say")
    head: dict[str, Any] = {"model": table.kind, "pre": found.pop("pre", "default")}
    head["tokens"] = table.tokens
    if table.kind == "llama":
        head["scores"] = np.array(table.scores, np.float32)
    head["token_type"] = np.array(table.types, np.int32)
    for name, text in source.names.items():
        token_id = vocabulary.find(text)
        if name in NAMED and token_id is not None:
            head[NAMED[name][0]] = token_id
    head["add_bos_token"] = bool(_or(source.add_bos, vocabulary.prefix))
    head["add_eos_token"] = bool(_or(source.add_eos, vocabulary.suffix))
    result = {PREFIX + key: value for key, value in (head | found).items()}
    for name, template in source.templates.items():
        suffix = "" if name == "default" else f".{name}"
        result[f"tokenizer.chat_template{suffix}"] = template.source
    return result


def corrected(metadata: Mapping[str, Any], special_ids: Sequence[int]) -> dict[str, Any]:
    """The metadata of a GGUF file with special tokens marked as such: where a converter left them
    ordinary pieces, they become CONTROL."""
    types = metadata.get(PREFIX + "token_type")
    if types is None:
        return dict(metadata)
    found = np.array(types, np.int32)
    marked = [i for i in special_ids if i < len(found) and found[i] == PieceType.NORMAL]
    found[marked] = PieceType.CONTROL
    return {**metadata, PREFIX + "token_type": found}


def _or(said: bool | None, around: Sequence[int]) -> bool:
    return bool(around) if said is None else said


# --- vocabularies of the `tokenizers` library -----------------------------------------------------


def _fast(source: Source, vocabulary: Vocabulary, found: dict[str, Any]) -> _Table:
    raw = json.loads(vocabulary.files()["tokenizer.json"])
    decoding, begins_with_space = tokenizer_json.check(raw, "the tokenizer")
    vocab: dict[str, int] = raw["model"]["vocab"]
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in raw["model"]["merges"]]
    table = _Table("gpt2", [], [], [])
    for piece, token_id in sorted(vocab.items(), key=lambda item: item[1]):
        table.extend(token_id)
        table.tokens.append(piece)
        table.types.append(PieceType.NORMAL)
        table.scores.append(0.0)
    if decoding is tokenizer_json.Decoding.BYTE_LEVEL:
        found["pre"] = _pre_name(raw)
        found["merges"] = [" ".join(merge) for merge in merges]
    else:
        table.kind = "llama"
        _as_sentencepiece(source, table, raw["model"], merges)
        found["add_space_prefix"] = begins_with_space
    for token in raw["added_tokens"]:
        table.put(token["id"], token["content"], special=token["special"])
    return table


def _pre_name(raw: Mapping[str, Any]) -> str:
    """What GGUF calls the way a `tokenizer.json` splits text before merging."""
    ignores_merges = bool(raw["model"].get("ignore_merges"))
    composes = raw.get("normalizer") is not None
    for name in _PRE_NAMES:
        ours = json.loads(byte_level.pre_tokenizer(name).__getstate__())
        same_splits = _splits(raw.get("pre_tokenizer")) == _splits(ours)
        same_rest = (
            byte_level.ignores_merges(name) == ignores_merges
            and (byte_level.normalizer(name) is not None) == composes
        )
        if same_splits and same_rest:
            return name
    raise TokenizerError(
        "the tokenizer splits text in a way that GGUF has no name for",
        got=str(raw.get("pre_tokenizer"))[:300],
        expected=f"that of {', '.join(_PRE_NAMES)}",
    )


def _splits(step: Any) -> Any:
    """A pre-tokenizer without what changes offsets only."""
    if isinstance(step, Mapping):
        return {key: _splits(value) for key, value in step.items() if key != "trim_offsets"}
    return [_splits(item) for item in step] if isinstance(step, list) else step


def _as_sentencepiece(
    source: Source, table: _Table, model: Mapping[str, Any], merges: list[list[str]]
) -> None:
    """Give the pieces of a BPE with byte fallback the types and scores of SentencePiece."""
    for token_id, piece in enumerate(table.tokens):
        if table.types[token_id] != PieceType.UNUSED and byte_of(piece) is not None:
            table.types[token_id] = PieceType.BYTE
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        table.types[model["vocab"][unknown]] = PieceType.UNKNOWN
    for path in source.files:
        if path.name != sources.TOKENIZER_MODEL:
            continue
        original = parse_model(read_bytes(path, MAX_MODEL_BYTES), str(path))
        if table.tokens[: len(original.pieces)] == original.pieces:
            table.scores[: len(original.pieces)] = original.scores
            return
    _score(table, merges)


def _score(table: _Table, merges: list[list[str]]) -> None:
    """Scores from the order of merges: SentencePiece merges the pair whose result scores highest,
    whichever pair makes it. That is the same only where the merges are those of all pairs, result
    by result.

    Raises:
        TokenizerError: it is not.
    """
    ids = {piece: token_id for token_id, piece in enumerate(table.tokens)}
    scores: dict[str, float] = {}
    for left, right in merges:
        result = left + right
        if result not in scores:
            scores[result] = -float(len(scores))
        elif scores[result] != 1 - len(scores):
            raise _no_scores(f"{result[:40]!r} is merged at two places")
    made = {(left, right) for left, right in merges}
    reachable = scores.keys() | {piece for piece in ids if len(piece) == 1}
    for piece in scores:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in reachable and pair[1] in reachable and pair not in made:
                raise _no_scores(f"no merge {pair[0][:40]!r} {pair[1][:40]!r}")
    for piece, token_id in ids.items():
        table.scores[token_id] = scores.get(piece, -float(len(scores)) - 1)


def _no_scores(got: str) -> TokenizerError:
    return TokenizerError(
        "the order of this tokenizer's merges cannot be said by scores, which GGUF wants",
        got=got,
        expected="the merges of all pairs that make a piece, piece by piece",
        remedy="put the model's tokenizer.model beside tokenizer.json",
    )
