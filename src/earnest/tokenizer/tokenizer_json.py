"""`tokenizer.json`: what of it is supported, checked before the library sees the file.

The file format can say much more than language models use, including things that make a short text
take forever or all memory (patterns that backtrack, replacements that grow). What ERNIE, Llama,
GPT-2, Qwen and SmolLM files say is allowed; everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from earnest.errors import TokenizerError
from earnest.tokenizer.byte_level import KNOWN_PATTERNS
from earnest.tokenizer.sentencepiece_proto import SPACE

MAX_STEPS = 16
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


class Decoding(Enum):
    """How pieces become text."""

    BYTE_LEVEL = "byte level"
    SPACES_AND_BYTES = "U+2581 for spaces, <0xAB> for bytes"


def check(raw: Mapping[str, Any], origin: str) -> tuple[Decoding, bool]:
    """Check a parsed `tokenizer.json`.

    Returns:
        how it decodes, and whether a space at the start of a decoded text is taken off.

    Raises:
        TokenizerError: something in it is not supported; the message names it.
    """
    model = _part(raw, "model", origin)
    if model is None or model.get("type", "BPE") != "BPE":
        raise _refusal(origin, "model", model and model.get("type"), "BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(origin, f"model.{key}", model[key], "none")
    for key, check_step in (
        ("normalizer", _check_normalizer),
        ("pre_tokenizer", _check_pre_tokenizer),
        ("post_processor", _check_post_processor),
    ):
        for step in _steps(raw, key, origin):
            check_step(step, origin)
    return _decoding(_steps(raw, "decoder", origin), origin)


def _check_normalizer(step: Mapping[str, Any], origin: str) -> None:
    kind = step.get("type")
    grows = not (
        kind in _UNICODE_FORMS
        or (kind == "Replace" and _replacement(step) == (" ", SPACE))
        or (kind == "Prepend" and step.get("prepend") == SPACE)
    )
    if grows:
        raise _refusal(origin, "normalizer", step, "NFC, Replace ' ' by U+2581, Prepend U+2581")


def _check_pre_tokenizer(step: Mapping[str, Any], origin: str) -> None:
    kind = step.get("type")
    if kind == "Split":
        pattern = step.get("pattern")
        known = isinstance(pattern, Mapping) and pattern.get("Regex") in KNOWN_PATTERNS
    elif kind == "Metaspace":
        known = step.get("replacement") == SPACE
    else:
        known = kind in ("ByteLevel", "Digits")
    if not known:
        raise _refusal(
            origin,
            "pre_tokenizer",
            step,
            "ByteLevel, Digits, Metaspace, or Split by the pattern of GPT-2, Llama 3 or Qwen2",
        )


def _check_post_processor(step: Mapping[str, Any], origin: str) -> None:
    single = step.get("single")
    if step.get("type") == "TemplateProcessing" and isinstance(single, list):
        if len(single) <= MAX_STEPS:
            return
    elif step.get("type") == "ByteLevel":
        return
    raise _refusal(origin, "post_processor", step, "TemplateProcessing (short) or ByteLevel")


def _decoding(steps: list[Mapping[str, Any]], origin: str) -> tuple[Decoding, bool]:
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding.BYTE_LEVEL, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _replacement(steps[0]) == (SPACE, " "):
        strip = steps[3:]
        if not strip:
            return Decoding.SPACES_AND_BYTES, False
        one_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if len(strip) == 1 and dict(strip[0]) == one_space:
            return Decoding.SPACES_AND_BYTES, True
    raise _refusal(
        origin, "decoder", kinds, "ByteLevel, or Replace U+2581, ByteFallback, Fuse (and Strip)"
    )


def _replacement(step: Mapping[str, Any]) -> tuple[Any, Any]:
    pattern = step.get("pattern")
    return (pattern.get("String") if isinstance(pattern, Mapping) else None, step.get("content"))


def _steps(raw: Mapping[str, Any], key: str, origin: str) -> list[Mapping[str, Any]]:
    """The steps of a part that may be absent, one step, or a sequence of them."""
    part = _part(raw, key, origin)
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    lists = [value for value in part.values() if isinstance(value, list)]
    if len(lists) != 1 or len(lists[0]) > MAX_STEPS:
        raise _refusal(origin, key, part, f"a sequence of at most {MAX_STEPS} steps")
    return [_mapping(step, key, origin) for step in lists[0]]


def _part(raw: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any] | None:
    value = raw.get(key)
    return None if value is None else _mapping(value, key, origin)


def _mapping(value: object, key: str, origin: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refusal(origin, key, value, "a JSON object")
    return value


def _refusal(origin: str, what: str, got: object, expected: str) -> TokenizerError:
    return TokenizerError(
        f"{origin} has a {what} that is not supported",
        got=str(got)[:200],
        expected=expected,
        remedy="use the model's tokenizer.model, if it has one",
    )
