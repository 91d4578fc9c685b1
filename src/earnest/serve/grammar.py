"""Structured output: JSON, a JSON schema, a regular expression, a choice, a grammar.

llguidance compiles them and says which tokens may come next. Compiling happens outside the engine's
step and is bounded: by the size and nesting of what is asked for, by the limits of its parser, and
in time. Nothing is written to disk and nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from earnest.engine.constraint import Constraint
from earnest.errors import GrammarError
from earnest.tokenizer import Tokenizer

MAX_CHARACTERS = 2**16
MAX_NESTING = 64
MAX_CHOICES = 4096


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: whose tokens are to spell the text.
        vocab_size: rows of the model's logits, at least as many as the tokenizer has tokens.
        end_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, sorted(end_ids)

    def json_object(self) -> str:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool) -> str:
        """JSON that follows a schema.

        Raises:
            GrammarError: it is no schema, too large, or uses what cannot be enforced.
        """
        if not isinstance(schema, Mapping | bool):
            raise GrammarError("a JSON schema must be an object", got=type(schema).__name__)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return self._made(LLMatcher.grammar_from_json_schema, _schema_text(schema))

    def regex(self, pattern: str) -> str:
        """Text that a regular expression (of Rust's syntax) matches as a whole."""
        _check_size(pattern)
        return self._made(LLMatcher.grammar_from_regex, pattern)

    def choice(self, options: Sequence[str]) -> str:
        """One of several texts."""
        if not options or len(options) > MAX_CHOICES or not all(options):
            raise GrammarError(
                "a choice needs texts to choose from",
                got=f"{len(options)}, of which {sum(not o for o in options)} are empty",
                expected=f"1 to {MAX_CHOICES}, none of them empty",
            )
        rule = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
        _check_size(rule)
        return self.lark(f"start: {rule}")

    def lark(self, text: str) -> str:
        """A context-free grammar in Lark's notation."""
        _check_size(text)
        return json.dumps({"grammars": [{"lark_grammar": text}]})

    def calls(self, schema: Mapping[str, Any], *, several: bool) -> str:
        """Nothing but blocks of tool calls, whose inside follows `schema`."""
        repeated = "+" if several else ""
        return self.lark(
            f"start: call{repeated}\n"
            'call: "<tool_call>" /\\n?/ inside /\\n?/ "</tool_call>" /\\n?/\n'
            f"inside: %json {_schema_text(schema)}\n"
        )

    def call(self, schema: Mapping[str, Any]) -> str:
        """What stands in a block of tool calls, its end included."""
        return self.lark(
            f'start: /\\n?/ inside /\\n?/ "</tool_call>"\ninside: %json {_schema_text(schema)}\n'
        )

    def spelled(self, text: str) -> list[int]:
        """Tokens that spell exactly this text, wherever it stands."""
        return self._vocabulary(text)

    def after_thinking(self, grammar: str) -> str:
        """The same, after a block of thoughts that is open already and ends with `</think>`."""
        return json.dumps(
            {
                "grammars": [
                    {
                        "lark_grammar": "start: thoughts answer\n"
                        'thoughts[suffix="</think>"]: /(.|\\n)*/\n'
                        "answer: /\\n*/ @answer\n"
                    },
                    {"name": "answer", **json.loads(grammar)["grammars"][0]},
                ]
            }
        )

    def constraint(self, grammar: str) -> Callable[[], Constraint]:
        """Check a grammar against the vocabulary; what is returned makes fresh states of it.

        Raises:
            GrammarError: it does not compile within the limits.
        """
        problem = LLMatcher.validate_grammar(grammar, self._compiler)
        if problem:
            raise GrammarError(f"the grammar cannot be used: {_first_line(problem)}")
        matcher = LLMatcher(self._compiler, grammar, log_level=0, limits=_LIMITS)
        _State(matcher.deep_copy(), self._vocab_size).allowed()
        return lambda: _State(matcher.deep_copy(), self._vocab_size)

    @staticmethod
    def _made(make: Callable[[str], str], text: str) -> str:
        try:
            return make(text)
        except ValueError as error:
            raise GrammarError(f"the grammar cannot be used: {_first_line(str(error))}") from error

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._tokenizer, self._vocab_size, self._end_ids)

    @cached_property
    def _compiler(self) -> LLTokenizer:
        return LLTokenizer(
            TokenizerWrapper(self._vocabulary),
            n_vocab=self._vocab_size,
            eos_token=self._end_ids,
        )


# Between JSON's tokens one space at most: models lose themselves in white space otherwise.
_COMPACT = {"whitespace_flexible": False}
_LIMITS = LLParserLimits(max_grammar_size=100_000)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        known = range(min(vocab_size, tokenizer.vocab_size))
        special = {i for i in known if tokenizer.is_special(i)} | set(end_ids)
        self.tokens = [
            tokenizer.piece(i).encode() if i in special else tokenizer.token_bytes(i) for i in known
        ] + [b""] * (vocab_size - len(known))
        self.special_token_ids = sorted(special)
        self.eos_token_id = end_ids[0] if end_ids else 0
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens that spell exactly `text`. Many vocabularies put a space before what they take for
        the beginning of a text, which this is not: then the longest pieces that fit."""
        wanted = text if isinstance(text, bytes) else text.encode()
        plain = wanted.decode("utf-8", "replace")
        ids = self._tokenizer.encode(plain, add_special_tokens=False, parse_special=False)
        if b"".join(self.tokens[i] for i in ids) == wanted:
            return ids
        ids, at = [], 0
        while at < len(wanted):
            for length in range(min(self._longest, len(wanted) - at), 0, -1):
                if (found := self._pieces.get(wanted[at : at + length])) is not None:
                    ids.append(found)
                    at += length
                    break
            else:
                at += 1  # no token for this byte: llguidance will find out
        return ids

    @cached_property
    def _pieces(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {t: i for i, t in reversed(list(enumerate(self.tokens))) if t and i not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._pieces))


class _State(Constraint):
    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {_first_line(self._matcher.get_error())}")
        bits = np.unpackbits(mask, bitorder="little")[: self._vocab_size]
        if not bits.any():
            raise GrammarError("the grammar allows no text at all")
        return bits.astype(np.bool_)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


def _schema_text(schema: Mapping[str, Any]) -> str:
    _check_nesting(schema)
    text = json.dumps({**schema, "x-guidance": _COMPACT})
    _check_size(text)
    return text


def _check_size(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(
            "the grammar is too large",
            got=f"{len(text):,} characters",
            expected=f"at most {MAX_CHARACTERS:,}",
        )


def _check_nesting(value: object) -> None:
    """Without recursion: this is what keeps others from recursing too deeply."""
    level: list[object] = [value]
    for _ in range(MAX_NESTING):
        level = [
            part
            for item in level
            if isinstance(item, Mapping | list)
            for part in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return
    raise GrammarError("the schema is nested too deeply", expected=f"at most {MAX_NESTING} levels")


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:500]
