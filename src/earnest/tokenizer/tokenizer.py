"""`Tokenizer`: text to ids and back, whatever files the vocabulary came in.

Everything special about a token (what begins a text, what ends a turn, what is left out of decoded
text) is read from the files; no id is known to the program.

Text that cannot be written as UTF-8: a pair of surrogates is joined, a lone one becomes U+FFFD.
A U+2581 in the text cannot be told from a space in a SentencePiece vocabulary; it decodes to one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from earnest.errors import ChatUnsupportedError, PromptError
from earnest.files import MAX_JSON_BYTES, machine_errors, read_bytes, staged_file
from earnest.tokenizer import gguf, gguf_write, sources
from earnest.tokenizer.detokenizer import Detokenizer
from earnest.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from earnest.tokenizer.sources import Source
from earnest.tokenizer.template import BUILTIN_TEMPLATES, ChatTemplate
from earnest.tokenizer.vocabulary import is_unicode

# No vocabulary reaches this; smaller ids may be unused rows of the embedding.
_MAX_ID = 2**31

# Tokens that models of this family, and of the Llama architecture, close a turn with.
_TURN_ENDS = ("<|end_of_sentence|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>")


class Tokenizer:
    """One vocabulary with its special tokens and its chat templates.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1 (the model may have more, unused rows).
        bos_id, unk_id, pad_id: ids of the named tokens, None where there is none.
        eos_ids: every id that ends a text or a turn, ascending: the end token, GGUF's end-of-turn
            and end-of-message tokens, and the turn markers that the chat template writes. (ERNIE's
            configuration names `</s>` only, but its turns are closed with `<|end_of_sentence|>`.)
        special_tokens: name (`bos_token`, `cls_token`, ...) to text, of tokens that exist.
        chat_templates: by name; the usual one is "default".
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._vocabulary = vocabulary = source.vocabulary
        self.chat_templates: dict[str, ChatTemplate] = dict(source.templates)
        self.special_tokens: dict[str, str] = {
            name: text for name, text in source.names.items() if vocabulary.find(text) is not None
        }
        self.vocab_size: int = vocabulary.size
        self.bos_id: int | None = self._named("bos_token")
        self.unk_id: int | None = self._named("unk_token")
        self.pad_id: int | None = self._named("pad_token")
        self.eos_ids: tuple[int, ...] = self._end_ids()
        self._prefix, self._suffix = self._around()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model folder: `tokenizer.json` or `tokenizer.model`, and the
        configuration files beside it.

        Raises:
            TokenizerError: there is none, or it is broken or of a kind that is not supported.
            FormatError: a JSON file is none.
            AccessError, MachineError: a file cannot be read.
        """
        folder = Path(path)
        with machine_errors(folder, "reading"):
            return cls(sources.read_folder(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that the metadata of a GGUF file describes.

        Raises:
            TokenizerError: there is none, or it is broken or of a kind that is not supported.
        """
        return cls(gguf.read_metadata(metadata))

    # --- text to ids --------------------------------------------------------------------------

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: any string; see the module about surrogates.
            add_special_tokens: put the begin token in front, if this model wants one.
            parse_special: whether the text of a special token (`</s>`) becomes that token. False
                takes it as ordinary text, so that a stranger's text cannot end a turn.

        Raises:
            TokenizerError: the tokenising library failed.
        """
        ids = self._vocabulary.encode(_without_surrogates(text), parse_special=parse_special)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    # --- ids to text --------------------------------------------------------------------------

    def decode(
        self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False
    ) -> str:
        """The text of ids: their bytes, joined; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids; those the vocabulary does not have add nothing.
            skip_special_tokens: leave out special tokens.
            continuation: the ids go on from others. A space that the vocabulary puts before
                every text is taken off only where a text begins.

        Raises:
            PromptError: an id is negative or no id at all.
        """
        detokenizer = self.detokenizer(skip_special_tokens, continuation=continuation)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def detokenizer(
        self, skip_special_tokens: bool = True, *, continuation: bool = False
    ) -> Detokenizer:
        """Decodes ids one at a time; the joined result is that of `decode` with the same
        arguments."""
        return Detokenizer(
            self._visible_bytes if skip_special_tokens else self.token_bytes,
            drop_first_space=self._vocabulary.begins_with_space and not continuation,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; none for ids the vocabulary does not have.

        Raises:
            PromptError: the id is negative or no id at all.
        """
        return self._vocabulary.token_bytes(_checked(token_id))

    def is_special(self, token_id: int) -> bool:
        """Whether a token controls the model rather than being text.

        Raises:
            PromptError: the id is negative or no id at all.
        """
        return _checked(token_id) in self._vocabulary.special_ids

    def piece(self, token_id: int) -> str:
        """How a token is written in the vocabulary; empty for ids it does not have.

        Raises:
            PromptError: the id is negative or no id at all.
        """
        return self._vocabulary.piece(_checked(token_id)) or ""

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if self.is_special(token_id) else self._vocabulary.token_bytes(token_id)

    # --- conversations ------------------------------------------------------------------------

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The usual chat template; None for a Base model without one."""
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        chat_template: ChatTemplate | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. Encode it whole, without adding special tokens.

        Args:
            messages: each a mapping with "role" and "content", and what the template understands.
            tools: JSON descriptions of functions the model may call.
            add_generation_prompt: end with the opening of an answer; None: leave it to the
                template.
            chat_template: use this instead of the model's own, for example
                `builtin_template("ernie")`.
            **variables: what else the template understands.

        Raises:
            ChatUnsupportedError: the model has no template and none was given.
            TemplateError: the template is broken, refuses the messages, or exceeds a bound.
            PromptError: the messages are not a list of mappings.
        """
        template = chat_template
        if template is None and tools is not None:
            template = self.chat_templates.get("tool_use")
        template = template or self.chat_template
        if template is None:
            raise ChatUnsupportedError(
                "this model has no chat template: it is a Base model, trained to continue text "
                "and not to hold a conversation",
                remedy="give it plain text to continue, use the post-trained (-PT) model, or pick "
                f"a built-in template by name: {', '.join(BUILTIN_TEMPLATES)}",
            )
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )

    # --- saving -------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write files from which `from_folder` reads the same tokenizer.

        Files of a folder are copied byte for byte; a GGUF file's tokenizer becomes
        `tokenizer.model` or `tokenizer.json` with its configuration.

        Raises:
            DiskFullError, AccessError, MachineError: a file cannot be written.
        """
        destination = Path(folder)
        with machine_errors(destination, "creating"):
            destination.mkdir(parents=True, exist_ok=True)
        for name, data in self._files().items():
            with staged_file(destination / name) as file:
                file.write(data)

    def to_gguf(self, size: int | None = None) -> dict[str, Any]:
        """The keys `tokenizer.*` of a GGUF file, from which `from_gguf` reads the same tokenizer.

        Args:
            size: rows of the embedding; the vocabulary is filled up with unused tokens to it.

        Raises:
            TokenizerError: GGUF cannot say it, or the vocabulary is larger than `size`.
        """
        found = gguf_write.metadata(self._source, size)
        end = found.get(gguf.PREFIX + "eos_token_id")
        # What ends a turn: a reader stops there only if it is told.
        turn_ends = [token_id for token_id in self.eos_ids if token_id != end]
        if turn_ends:
            found.setdefault(gguf.PREFIX + "eot_token_id", turn_ends[0])
        return found

    def _files(self) -> dict[str, bytes]:
        source = self._source
        if source.files:
            return {path.name: read_bytes(path, MAX_JSON_BYTES) for path in source.files}
        files = dict(self._vocabulary.files())
        sentencepiece = isinstance(self._vocabulary, SentencePieceVocabulary)
        config: dict[str, Any] = {
            "tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast",
            "add_bos_token": bool(source.add_bos),
            "add_eos_token": bool(source.add_eos),
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
            "added_tokens_decoder": {str(token.id): token.to_json() for token in source.added},
        }
        if sentencepiece:
            config["add_prefix_space"] = self._vocabulary.begins_with_space
        if set(self.chat_templates) - {"default"}:
            config["chat_template"] = [
                {"name": name, "template": template.source}
                for name, template in self.chat_templates.items()
            ]
        files[sources.TOKENIZER_CONFIG] = (
            json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        ).encode("utf-8")
        if self.chat_template:
            files[sources.CHAT_TEMPLATE] = self.chat_template.source.encode("utf-8")
        return files

    # --- special tokens -----------------------------------------------------------------------

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._vocabulary.find(text)

    def _end_ids(self) -> tuple[int, ...]:
        ends = {self._named(name) for name in ("eos_token", "eot_token", "eom_token")}
        written = "".join(template.source for template in self.chat_templates.values())
        if not written or "sep_token" in written:  # without one, a built-in one may be used
            ends.add(self._named("sep_token"))
        for text in _TURN_ENDS:
            token_id = self._vocabulary.find(text)
            if text in written and token_id in self._vocabulary.special_ids:
                ends.add(token_id)
        return tuple(sorted(end for end in ends if end is not None))

    def _around(self) -> tuple[Sequence[int], Sequence[int]]:
        source, vocabulary = self._source, self._vocabulary
        if source.add_bos is None and source.add_eos is None:
            return vocabulary.prefix, vocabulary.suffix
        bos = self._named("bos_token") if source.add_bos else None
        eos = self._named("eos_token") if source.add_eos else None
        return [] if bos is None else [bos], [] if eos is None else [eos]


def _checked(token_id: int) -> int:
    try:
        number = index(token_id)
    except TypeError as error:
        raise PromptError("a token id is not a whole number", got=repr(token_id)[:80]) from error
    if not 0 <= number < _MAX_ID:
        raise PromptError("a token id is out of range", got=number, expected="0 or more")
    return number


def _without_surrogates(text: str) -> str:
    if is_unicode(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
