"""Byte-level byte-pair encoding: the alphabet that stands for bytes, and who splits text how.

GPT-2's encoder works on bytes, each written as one printable character: a byte that is a printable
Latin-1 character as itself, the others as the characters from U+0100 on, in order (Radford et al.
2019). Before merging, a text is split by a pattern that differs from model to model; GGUF files
name it in `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, normalizers, pre_tokenizers

from earnest.errors import TokenizerError

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
KNOWN_PATTERNS = frozenset({GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN})
"""Patterns known to take linear time; a pattern out of a file may take forever."""

_GPT2 = ("default", "gpt-2", "gpt2", "phi-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
PRE_TOKENIZERS = (*_GPT2, *_DIGITS, *_LLAMA3, *_QWEN2)
"""Values of `tokenizer.ggml.pre` that are understood."""


@cache
def byte_alphabet() -> dict[str, int]:
    """Character to the byte that it stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def bytes_of(piece: str) -> bytes:
    """The bytes a byte-level piece stands for; text in other characters stands for itself."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8")


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How a model of GGUF name `name` splits text before merging.

    "default", which files written before the key existed mean, is GPT-2's.

    Raises:
        TokenizerError: the name is not known.
    """
    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if name in _LLAMA3 or name in _QWEN2:
        pattern = LLAMA3_PATTERN if name in _LLAMA3 else QWEN2_PATTERN
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise TokenizerError(
        "the GGUF file splits text in a way that is not supported (tokenizer.ggml.pre)",
        got=repr(name[:80]),
        expected="one of " + ", ".join(PRE_TOKENIZERS),
    )


def normalizer(name: str) -> normalizers.Normalizer | None:
    """How a model of GGUF name `name` rewrites text first: Qwen2 composes characters (NFC)."""
    return normalizers.NFC() if name in _QWEN2 else None


def ignores_merges(name: str) -> bool:
    """Whether a whole piece in the vocabulary needs no merges to be found (Llama 3)."""
    return name in _LLAMA3
