"""Tokenizers of model folders: who says what, broken files, saving."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.errors import (
    ChatUnsupportedError,
    EarnestError,
    FormatError,
    ModelNotFoundError,
    TokenizerError,
)
from earnest.tokenizer import ChatTemplate, Tokenizer, builtin_template
from earnest.tokenizer.sentencepiece_proto import SentencePieceModel

STORIES = Path(__file__).resolve().parents[2] / "src/earnest/hub/stories"
PIECES = ["<unk>", "<s>", "</s>", "<end>", "a", "b", "ab", "\u2581", "<extra_0>"]
MODEL = SentencePieceModel(
    PIECES,
    [0.0, 0.0, 0.0, 0.0, -2.0, -3.0, -1.0, -4.0, 0.0],
    [2, 3, 3, 1, 1, 1, 1, 1, 1],
    add_dummy_prefix=False,
)
USER = [{"role": "user", "content": "a"}]


def folder_with(folder: Path, **files: Any) -> Path:
    """A folder with the small model and JSON files; a `__` in a name stands for a dot."""
    (folder / "tokenizer.model").write_bytes(MODEL.serialized())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_a_model_alone_names_its_own_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(str(folder_with(tmp_path)))
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id, tokenizer.pad_id) == (
        1,
        (2,),
        0,
        None,
    )
    assert tokenizer.encode("ab</s>", add_special_tokens=True) == [6, 2]
    assert tokenizer.chat_template is None


def test_files_add_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(
        tmp_path,
        added_tokens__json={"<one>": 9, "<two>": 10},
        special_tokens_map__json={
            "sep_token": "<end>", "cls_token": "<none>", "mask_token": {"content": "<one>"},
            "additional_special_tokens": [{"content": "<two>"}],
        },
        tokenizer_config__json={
            "pad_token": {"content": "<unk>", "special": True}, "mask_token": "<two>",
            "add_bos_token": True, "model_max_length": 10**30,
            "added_tokens_decoder": {
                "8": {"content": "<renamed>", "special": True},
                "11": {"content": "<strip>", "rstrip": True, "lstrip": True},
            },
        },
    ))  # fmt: skip
    assert tokenizer.vocab_size == 12
    assert tokenizer.special_tokens["mask_token"] == "<two>"  # tokenizer_config.json goes first
    assert "cls_token" not in tokenizer.special_tokens  # the vocabulary does not have it
    assert (tokenizer.pad_id, tokenizer.eos_ids) == (0, (2, 3))
    assert [tokenizer.is_special(i) for i in (3, 8, 9, 10, 11)] == [True, True, True, True, False]
    assert tokenizer.encode("a<renamed><one>b", add_special_tokens=True) == [1, 4, 8, 9, 5]
    assert tokenizer.encode("a  <strip>\tb") == [4, 11, 5]
    assert tokenizer.decode([8], skip_special_tokens=False) == "<renamed>"
    assert tokenizer.encode("<end>") == [3]


def test_the_folder_may_say_that_no_space_goes_before_a_text(tmp_path: Path) -> None:
    shutil.copyfile(STORIES / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.piece(tokenizer.encode("the")[0]) == "t"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


# --- templates and ends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "rendered"),
    [
        ({"tokenizer_config__json": {"chat_template": "config"}}, "config"),
        ({"chat_template__jinja": "file"}, "file"),
        ({"tokenizer_config__json": {"chat_template": "config"}, "chat_template__jinja": "file"},
         "file"),
        ({"tokenizer_config__json": {"chat_template": [
            {"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}]}},
         "listed"),
    ],
)  # fmt: skip
def test_where_templates_come_from(tmp_path: Path, files: dict[str, Any], rendered: str) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, **files))
    assert tokenizer.apply_chat_template(USER) == rendered
    with_tools = tokenizer.apply_chat_template(USER, tools=[{"function": {}}])
    assert with_tools == ("tools" if "tool_use" in tokenizer.chat_templates else rendered)


def test_templates_know_the_named_tokens(tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{{ sep_token }}{{ pad_token is defined }}{{ add_generation_prompt }}{{ x }}"
    )
    tokenizer = Tokenizer.from_folder(folder_with(
        tmp_path, chat_template__jinja=source, tokenizer_config__json={"sep_token": "<end>"},
    ))  # fmt: skip
    assert tokenizer.apply_chat_template(USER, x=5) == "<s><end>FalseTrue5"
    assert tokenizer.apply_chat_template(USER, sep_token="!", x=5) == "<s>!FalseTrue5"


def test_a_base_model_does_not_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path))
    with pytest.raises(ChatUnsupportedError, match=r"Base model(.|\n)*ernie-thinking"):
        tokenizer.apply_chat_template(USER)
    chosen = tokenizer.apply_chat_template(USER, chat_template=builtin_template("ernie"))
    assert chosen == "<|begin_of_sentence|>User: a\nAssistant: "


def test_a_broken_template_does_not_keep_text_from_being_encoded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, chat_template__jinja="{% if %}"))
    assert tokenizer.encode("ab") == [6]
    with pytest.raises(EarnestError, match=r"chat_template.jinja cannot be compiled at line 1"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (None, (2, 3)),  # a built-in template may be used, which closes turns with sep_token
        ("{{ messages[0].content }}{{ sep_token }}", (2, 3)),
        ("{{ messages[0].content }}{{ eos_token }}", (2,)),
        ("{{ messages[0].content }}<|im_end|>", (2, 9)),
    ],
)
def test_what_ends_a_turn(tmp_path: Path, template: str | None, ends: tuple[int, ...]) -> None:
    config = {
        "sep_token": "<end>",
        "added_tokens_decoder": {"9": {"content": "<|im_end|>", "special": True}},
    }
    files = {"chat_template__jinja": template} if template else {}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config__json=config, **files))
    assert tokenizer.eos_ids == ends


# --- broken folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"tokenizer_config__json": "{"}, "not valid JSON"),
        ({"tokenizer_config__json": "[]"}, "not a JSON object"),
        ({"added_tokens__json": {"\ud800": 9}}, "none that is Unicode"),
        ({"added_tokens__json": {"a": "1"}}, "has no id"),
        ({"added_tokens__json": {"a": True}}, "has no id"),
        ({"added_tokens__json": {"a": -1}}, "impossible id"),
        ({"added_tokens__json": {"": 9}}, "no text"),
        ({"added_tokens__json": {f"<{i}>": i for i in range(70_000)}}, "too many added tokens"),
        ({"special_tokens_map__json": {"eos_token": []}}, "eos_token is not a token"),
        ({"chat_template__jinja": "x" * 600_000}, "too large"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path: Path, files: dict[str, Any], problem: str) -> None:
    with pytest.raises((TokenizerError, FormatError), match=problem):
        Tokenizer.from_folder(folder_with(tmp_path, **files))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"bos_token": 5}, "bos_token is not a token"),
        ({"add_bos_token": "yes"}, "add_bos_token is not true or false"),
        ({"added_tokens_decoder": [1]}, "not a JSON object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "is broken"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, "is broken"),
        ({"added_tokens_decoder": {"99999999": {"content": "a"}}}, "impossible id"),
        ({"added_tokens_decoder": {"9": {"content": 1}}}, "not a token"),
        ({"added_tokens_decoder": {"9": {"content": "a", "special": 1}}}, "special is not true"),
        ({"additional_special_tokens": "x"}, "not a list of tokens"),
        ({"extra_special_tokens": [1]}, "not a token"),
        ({"chat_template": 5}, "neither text nor a list"),
        ({"chat_template": [{"name": 1}]}, "chat_template is broken"),
    ],
)
def test_broken_configurations_are_refused(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TokenizerError, match=problem):
        Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config__json=config))


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises((TokenizerError, ModelNotFoundError)):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_a_folder_where_a_file_belongs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        Tokenizer.from_folder(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = [
    "bos_token", "eos_token", "sep_token", "add_bos_token", "add_prefix_space", "chat_template",
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "model_specific_special_tokens",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    config=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
    special=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2),
    added=st.dictionaries(st.text(max_size=4), st.integers(-2, 40) | JSON, max_size=3),
)
def test_any_configuration_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, config: Any, special: Any, added: Any
) -> None:
    folder = folder_with(
        tmp_path_factory.mktemp("any"),
        tokenizer_config__json=config, special_tokens_map__json=special, added_tokens__json=added,
    )  # fmt: skip
    try:
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.decode(tokenizer.encode("ab </s>\x00", add_special_tokens=True))
        tokenizer.apply_chat_template(USER)
    except EarnestError:
        pass
    finally:
        shutil.rmtree(folder)


# --- saving ---------------------------------------------------------------------------------------


def test_files_are_copied_byte_for_byte(
    ernie_folder: Path, ernie: Tokenizer, tmp_path: Path
) -> None:
    ernie.save(tmp_path / "new" / "folder")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "new" / "folder").iterdir()}
    assert set(saved) == {
        "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja",
    }  # fmt: skip
    for name, data in saved.items():
        assert data == (ernie_folder / name).read_bytes()


def test_several_templates_survive_saving(tmp_path: Path) -> None:
    config = {
        "chat_template": [
            {"name": "default", "template": "a"},
            {"name": "tool_use", "template": "b"},
        ]
    }
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config__json=config))
    tokenizer.save(tmp_path / "copy")
    again = Tokenizer.from_folder(tmp_path / "copy")
    assert {name: template.source for name, template in again.chat_templates.items()} == {
        "default": "a", "tool_use": "b",
    }  # fmt: skip


def test_the_ocr_models_tokenizer(shared: Path, tmp_path: Path) -> None:
    """The same vocabulary with other added tokens and its own configuration."""
    for name in (
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copyfile(shared / "data/tokenizer/paddleocr-vl" / name, tmp_path / name)
    shutil.copyfile(shared / "data/tokenizer/tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 101_314
    assert tokenizer.encode("<|image_pad|><nl>3") == [101_304, 101_313, 6]
    assert not tokenizer.is_special(101_313)
    assert tokenizer.decode(tokenizer.encode("1<nl>2</s>")) == "1<nl>2"
    assert tokenizer.eos_ids == (2,)


def test_templates_are_kept_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, chat_template__jinja="a\n"))
    assert isinstance(tokenizer.chat_template, ChatTemplate)
    assert tokenizer.chat_template.source == "a\n"
