"""What a tokenizer is made of, read out of a model folder.

A folder says the same thing in up to five files. The vocabulary is `tokenizer.json` if there is
one (the reference implementation takes it too, and it may hold tokens that `tokenizer.model`
lacks), else `tokenizer.model`. What the other files say about one token is merged, the more
explicit file first: `added_tokens_decoder` of `tokenizer_config.json`, then `added_tokens.json`,
then the names in `tokenizer_config.json` and `special_tokens_map.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from earnest.errors import TokenizerError
from earnest.files import MAX_JSON_BYTES, read_bytes, read_json
from earnest.tokenizer.fast_vocabulary import read_tokenizer_json
from earnest.tokenizer.sentencepiece_proto import (
    MAX_MODEL_BYTES,
    SPACE,
    PieceType,
    SentencePieceModel,
    parse_model,
)
from earnest.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from earnest.tokenizer.template import MAX_SOURCE_CHARACTERS, ChatTemplate
from earnest.tokenizer.vocabulary import AddedToken, Vocabulary

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TOKENIZER_CONFIG,
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    CHAT_TEMPLATE,
)
"""Every file of a folder that says something about its tokenizer."""

MAX_ADDED_TOKENS = 2**16


@dataclass(frozen=True)
class Source:
    """Everything a `Tokenizer` is made of.

    Attributes:
        vocabulary: text to ids and back.
        names: `bos_token` and the like to the token's text.
        add_bos, add_eos: whether the begin and end tokens go around a text; None: as the
            vocabulary's own file says.
        templates: chat templates by name; the usual one is "default".
        added: the tokens found in text, for writing them down again.
        files: the files this was read from; empty for a GGUF file.
    """

    vocabulary: Vocabulary
    names: Mapping[str, str]
    add_bos: bool | None = None
    add_eos: bool | None = None
    templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()
    files: tuple[Path, ...] = ()


def read_folder(folder: Path) -> Source:
    """The tokenizer of a model folder.

    Raises:
        TokenizerError: there is none, or it is broken or of a kind that is not supported.
        FormatError: a JSON file is none, or a file is absurdly large.
        AccessError, ModelNotFoundError, MachineError: a file cannot be read.
    """
    present = {name: folder / name for name in FILES if (folder / name).exists()}
    config = _optional_json(present.get(TOKENIZER_CONFIG))
    special_map = _optional_json(present.get(SPECIAL_TOKENS_MAP))
    listed = _optional_json(present.get(ADDED_TOKENS))
    names = _names(special_map, SPECIAL_TOKENS_MAP) | _names(config, TOKENIZER_CONFIG)
    declared = _declared(config, listed)
    specials = _specials(config, special_map)
    if path := present.get(TOKENIZER_JSON):
        added = _flagged(declared, set(specials), known={})
        data = read_bytes(path, MAX_JSON_BYTES)
        vocabulary: Vocabulary = read_tokenizer_json(data, str(path), added, specials)
    elif path := present.get(TOKENIZER_MODEL):
        model = parse_model(read_bytes(path, MAX_MODEL_BYTES), str(path))
        prefix_space = _flag(config, "add_prefix_space")
        if prefix_space is not None:
            model = replace(model, add_dummy_prefix=prefix_space)
        names = names_of_model(model) | names
        added = added_tokens(model, declared, specials)
        vocabulary = SentencePieceVocabulary(model, added)
    else:
        raise TokenizerError(
            f"{folder} has no tokenizer",
            expected=f"{TOKENIZER_MODEL} or {TOKENIZER_JSON}",
            remedy="copy these files from the model's repository into the folder",
        )
    add_bos, add_eos = _flag(config, "add_bos_token"), _flag(config, "add_eos_token")
    if (add_bos, add_eos) != (None, None):  # one that is said overrides the file's own way
        add_bos, add_eos = bool(add_bos), bool(add_eos)
    return Source(
        vocabulary,
        names,
        add_bos,
        add_eos,
        _templates(config, present.get(CHAT_TEMPLATE)),
        added,
        tuple(present.values()),
    )


# --- SentencePiece models -----------------------------------------------------------------------


def names_of_model(model: SentencePieceModel) -> dict[str, str]:
    """Named tokens as the SentencePiece model itself has them."""
    controls = {
        piece
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind == PieceType.CONTROL
    }
    names = {"bos_token": model.bos_piece, "eos_token": model.eos_piece}
    names = {name: piece for name, piece in names.items() if piece in controls}
    return names | {"unk_token": model.pieces[model.unk_id]}


def added_tokens(
    model: SentencePieceModel, declared: Iterable[AddedToken], specials: Iterable[str]
) -> tuple[AddedToken, ...]:
    """The tokens to look for in text.

    Args:
        model: its control, unknown and user-defined pieces are among them.
        declared: tokens that other files give ids to; they go first.
        specials: text of tokens that are special, whether declared or only pieces of the model.

    Raises:
        TokenizerError: more than a vocabulary can sensibly have.
    """
    kinds = zip(model.pieces, model.types, strict=True)
    known = {piece: token_id for token_id, piece in enumerate(model.pieces)}
    wanted = set(specials)
    tokens = list(_flagged(declared, wanted, known))
    for token_id, (piece, kind) in enumerate(kinds):
        # The library finds user-defined pieces with spaces in them itself.
        user_defined = kind == PieceType.USER_DEFINED and SPACE not in piece
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN) or user_defined:
            tokens.append(AddedToken(token_id, piece, special=not user_defined))
    if len(tokens) > MAX_ADDED_TOKENS:
        raise TokenizerError(
            "the tokenizer has too many added tokens",
            got=f"{len(tokens):,}",
            expected=f"at most {MAX_ADDED_TOKENS:,}",
        )
    return _first_of_each(tokens)


def _flagged(
    declared: Iterable[AddedToken], specials: set[str], known: Mapping[str, int]
) -> tuple[AddedToken, ...]:
    tokens = [
        replace(token, special=True) if token.content in specials else token for token in declared
    ]
    stated = {token.content for token in tokens}
    tokens += [
        AddedToken(known[content], content)
        for content in sorted(specials - stated)
        if content in known
    ]
    return tuple(tokens)


def _first_of_each(tokens: Iterable[AddedToken]) -> tuple[AddedToken, ...]:
    by_id: dict[int, AddedToken] = {}
    contents: set[str] = set()
    for token in tokens:
        if token.id not in by_id and token.content not in contents:
            by_id[token.id] = token
            contents.add(token.content)
    return tuple(by_id[token_id] for token_id in sorted(by_id))


# --- JSON files ---------------------------------------------------------------------------------


def _optional_json(path: Path | None) -> dict[str, Any]:
    return read_json(path) if path else {}


def _flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{TOKENIZER_CONFIG}: {key} is not true or false", got=value)
    return value


def _names(raw: Mapping[str, Any], origin: str) -> dict[str, str]:
    """`*_token` keys to the token's text, which is a string or a described token."""
    nested = raw.get("model_specific_special_tokens")  # how transformers 5 saves unusual names
    merged = {**(nested if isinstance(nested, Mapping) else {}), **raw}
    names = {}
    for key, value in merged.items():
        if not key.endswith("_token") or isinstance(value, bool) or value is None:
            continue
        names[key] = _content(value, key, origin)
    return names


def _content(value: object, key: str, origin: str) -> str:
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str):
        raise TokenizerError(
            f"{origin}: {key} is not a token", got=str(value)[:100], expected="text"
        )
    return content


def _specials(*raws: Mapping[str, Any]) -> list[str]:
    """Text of every token that a configuration file calls special."""
    found: list[str] = []
    for raw in raws:
        found += _names(raw, "special tokens").values()
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = raw.get(key)
            if isinstance(value, Mapping):
                value = list(value.values())
            if value is None:
                continue
            if not isinstance(value, list):
                raise TokenizerError(f"{key} is not a list of tokens", got=str(value)[:100])
            found += [_content(item, key, "special tokens") for item in value]
    return [content for content in found if content]


def _declared(config: Mapping[str, Any], listed: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Tokens that `tokenizer_config.json` and `added_tokens.json` give ids to."""
    tokens = []
    described = config.get("added_tokens_decoder") or {}
    if not isinstance(described, Mapping):
        raise TokenizerError(f"{TOKENIZER_CONFIG}: added_tokens_decoder is not a JSON object")
    if len(described) + len(listed) > MAX_ADDED_TOKENS:
        raise TokenizerError(
            "the tokenizer has too many added tokens",
            got=f"{len(described) + len(listed):,}",
            expected=f"at most {MAX_ADDED_TOKENS:,}",
        )
    for key, value in described.items():
        if not isinstance(value, Mapping) or not (key.isascii() and key.isdigit() and len(key) < 9):
            raise TokenizerError(
                f"{TOKENIZER_CONFIG}: an entry of added_tokens_decoder is broken",
                got=f"{key}: {str(value)[:80]}",
                expected="id: {content, special, ...}",
            )
        flags = {
            name: _flag(value, name) or False
            for name in ("special", "single_word", "lstrip", "rstrip", "normalized")
        }
        tokens.append(AddedToken(int(key), _content(value, key, TOKENIZER_CONFIG), **flags))
    for content, token_id in listed.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TokenizerError(f"{ADDED_TOKENS}: {content[:40]!r} has no id", got=token_id)
        tokens.append(AddedToken(token_id, content, special=False))
    return _first_of_each(tokens)


def _templates(config: Mapping[str, Any], path: Path | None) -> dict[str, ChatTemplate]:
    """The folder's chat templates: the file first, then what `tokenizer_config.json` holds."""
    templates: dict[str, ChatTemplate] = {}
    stored = config.get("chat_template")
    if isinstance(stored, str):
        stored = [{"name": "default", "template": stored}]
    for item in stored if isinstance(stored, list) else []:
        name, source = (
            (item.get("name"), item.get("template")) if isinstance(item, dict) else 2 * (None,)
        )
        if not (isinstance(name, str) and isinstance(source, str)):
            raise TokenizerError(f"{TOKENIZER_CONFIG}: an entry of chat_template is broken")
        templates[name] = ChatTemplate(source, origin=f"{TOKENIZER_CONFIG}: chat_template {name!r}")
    if stored is not None and not isinstance(stored, list):
        raise TokenizerError(f"{TOKENIZER_CONFIG}: chat_template is neither text nor a list")
    if path:
        try:
            source = read_bytes(path, 4 * MAX_SOURCE_CHARACTERS).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text") from error
        templates["default"] = ChatTemplate(source, origin=str(path))
    return templates
