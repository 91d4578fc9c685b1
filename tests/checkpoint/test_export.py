"""GGUF files written from every layout: the same weights, numbers and ids, read by two readers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from layouts import random_arrays, write_dialect, write_gguf
from safetensors.numpy import load_file, save_file

import earnest
from earnest.checkpoint import Checkpoint, open_checkpoint, synth
from earnest.checkpoint.containers import sequential
from earnest.checkpoint.convert import convert
from earnest.checkpoint.export import export
from earnest.checkpoint.names import stored
from earnest.config import ErnieConfig, preset
from earnest.errors import ConfigError, MachineError, UserError

STORIES = Path(earnest.__file__).parent / "hub" / "stories"
UNTIED = replace(preset("tiny-moe"), tie_word_embeddings=False)
BIASED = replace(preset("tiny-dense"), use_bias=True)
# Every matrix has rows of whole blocks of 32.
BLOCKY = replace(
    preset("tiny-moe"), hidden_size=64, head_dim=16, intermediate_size=96, moe_intermediate_size=32
)


def made(folder: Path, config: ErnieConfig, **options: Any) -> Checkpoint:
    synth.synth(folder, config, seed=1, **options)
    return open_checkpoint(folder)


def said_in_gguf(config: ErnieConfig) -> ErnieConfig:
    """What of a configuration a GGUF file can say."""
    default = ErnieConfig.__dataclass_fields__["initializer_range"].default
    return replace(config, num_nextn_predict_layers=0, initializer_range=default)


def assert_same_weights(a: Checkpoint, b: Checkpoint) -> None:
    """Exactly the same numbers, but for MTP."""
    names = [name for name in a.tensors if not name.startswith("model.mtp_")]
    assert list(b.tensors) == names
    for name in names:
        assert np.array_equal(a.tensors[name].read(), b.tensors[name].read()), name


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(
    ("config", "mtp"),
    [
        (preset("tiny-dense"), False),
        (preset("tiny-moe"), False),
        (preset("small-moe"), True),
        (UNTIED, False),
        (BIASED, False),
    ],
    ids=["dense", "moe", "small+mtp", "untied", "biased"],
)
def test_a_folder_becomes_the_same_model(
    config: ErnieConfig, mtp: bool, dtype: str, tmp_path: Path
) -> None:
    source = made(tmp_path / "hf", config, mtp=mtp, dtype=dtype)
    report = export(source, tmp_path / "m.gguf")
    back = open_checkpoint(tmp_path / "m.gguf")
    assert_same_weights(source, back)
    assert back.config == said_in_gguf(source.config)
    for name, tensor in back.tensors.items():
        vector = len(tensor.shape) == 1 or ".mlp.gate." in name
        assert tensor.codec.name == ("f32" if vector else dtype)
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    wanted = {t.name: t.shape for t in stored(config, "gguf")}
    assert {t.name: tuple(int(n) for n in t.shape[::-1]) for t in theirs.tensors} == wanted
    assert ("output.weight" in wanted) is not config.tie_word_embeddings
    file_type = {"f32": 0, "f16": 1, "bf16": 32}[dtype]
    assert theirs.fields["general.file_type"].contents() == file_type
    assert (report.layout, report.tensors, report.files) == ("gguf", len(wanted), ("m.gguf",))
    assert any("no tokenizer" in note for note in report.notes)


def test_paddle_folders_become_the_same_file(tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("small-moe"), mtp=True)
    convert(source, tmp_path / "paddle" / "hf", "paddle")
    export(source, tmp_path / "a.gguf")
    export(open_checkpoint(tmp_path / "paddle" / "hf"), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_text_model_of_a_vision_checkpoint(tmp_path: Path) -> None:
    arrays = random_arrays(preset("tiny-moe"))
    write_dialect(tmp_path / "vl", preset("tiny-moe"), "vl_packed", arrays)
    source = open_checkpoint(tmp_path / "vl")
    export(source, tmp_path / "m.gguf")
    assert_same_weights(source, open_checkpoint(tmp_path / "m.gguf"))


def test_mtp_is_left_out_and_said_so(tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("small-moe"), mtp=True)
    report = export(source, tmp_path / "m.gguf")
    (left,) = report.left_out
    assert "multi-token-prediction" in left.reason
    assert set(left.names) == {n for n in source.tensors if n.startswith("model.mtp_")}
    assert any("multi-token-prediction" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_another_type_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("small-moe"), dtype="f32")
    export(source, tmp_path / "m.gguf", dtype=dtype)
    back = open_checkpoint(tmp_path / "m.gguf")
    for name, tensor in back.tensors.items():
        original = source.tensors[name].read()
        if tensor.codec.name != "f32":
            assert tensor.codec.name == dtype and tensor.codec.encode is not None
            original = tensor.codec.decode(tensor.codec.encode(original))
        assert np.array_equal(tensor.read(), original), name


# --- from GGUF ----------------------------------------------------------------------------------


def tensor_bytes(path: Path) -> Mapping[str, tuple[int, bytes]]:
    return {t.name: (int(t.tensor_type), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("quantised", [None, "q4_0", "q5_1", "q8_0"])
def test_gguf_to_gguf_keeps_every_bit(quantised: str | None, tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", BLOCKY, random_arrays(BLOCKY), quantised)
    export(open_checkpoint(first), tmp_path / "b.gguf")
    assert tensor_bytes(tmp_path / "b.gguf") == tensor_bytes(first)
    a, b = open_checkpoint(first), open_checkpoint(tmp_path / "b.gguf")
    assert a.config == replace(b.config, dtype=a.config.dtype)  # the helper's files claim float32


def test_gguf_metadata_are_taken_along(tmp_path: Path) -> None:
    config = preset("tiny-dense")
    arrays = random_arrays(config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    numbers = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "general.file_type": 0,
    }
    for key, value in numbers.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    writer.add_string("general.license", "apache-2.0")
    writer.add_array("general.tags", ["text", "文"])
    writer.add_string("quantize.imatrix.file", "gone")
    writer.add_string("tokenizer.ggml.model", "rwkv")
    for target in stored(config, "gguf"):
        writer.add_tensor(target.name, arrays[target.parts[0].name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export(open_checkpoint(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    a, b = (gguf.GGUFReader(tmp_path / name).fields for name in ("a.gguf", "b.gguf"))
    gone = {"quantize.imatrix.file"}
    mine = {key for key in a if not key.startswith("GGUF.")} - gone
    assert {key for key in b if not key.startswith("GGUF.")} == mine
    for key in mine:
        assert (a[key].types, a[key].contents()) == (b[key].types, b[key].contents())


def test_blocks_become_plain_on_request(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", BLOCKY, random_arrays(BLOCKY), "q8_0")
    source = open_checkpoint(first)
    report = export(source, tmp_path / "b.gguf", dtype="f32")
    assert_same_weights(source, open_checkpoint(tmp_path / "b.gguf"))
    assert any("quantised blocks" in note for note in report.notes)
    fields = gguf.GGUFReader(tmp_path / "b.gguf").fields
    assert fields["general.file_type"].contents() == 0
    assert "general.quantization_version" not in fields


# --- tokenizer and behaviour ----------------------------------------------------------------------


def test_the_story_model_says_the_same(tmp_path: Path) -> None:
    export(open_checkpoint(STORIES), tmp_path / "stories.gguf")
    a, b = earnest.load(STORIES), earnest.load(tmp_path / "stories.gguf")
    text = "Once upon a time, there was a little girl named Lily.\n\nShe 123 文"
    ids = a.tokenizer.encode(text, add_special_tokens=True)
    assert b.tokenizer.encode(text, add_special_tokens=True) == ids
    assert b.tokenizer.decode(ids) == a.tokenizer.decode(ids)
    assert np.array_equal(a.logits(ids), b.logits(ids))


def test_tokenizer_template_and_sampling_of_ernie(shared: Path, tmp_path: Path) -> None:
    config = replace(preset("tiny-dense"), vocab_size=103_424)
    source = made(tmp_path / "hf", config, dtype="bf16")
    for file in (shared / "data/tokenizer/ernie-4.5-0.3b-base-pt").iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, tmp_path / "hf" / file.name)
    shutil.copyfile(shared / "data/tokenizer/tokenizer.model", tmp_path / "hf/tokenizer.model")
    source = open_checkpoint(tmp_path / "hf")
    report = export(source, tmp_path / "m.gguf")
    assert report.notes == ()
    back = open_checkpoint(tmp_path / "m.gguf")
    # GGUF readers stop at the end-of-turn token only if they are told of it.
    assert back.config == said_in_gguf(replace(source.config, eos_token_ids=(2, 100272)))
    a, b = source.tokenizer, back.tokenizer
    chat = a.apply_chat_template([{"role": "user", "content": "你好 hello 42"}])
    assert b.apply_chat_template([{"role": "user", "content": "你好 hello 42"}]) == chat
    assert b.encode(chat) == a.encode(chat)
    assert a.eos_ids == b.eos_ids
    for key in ("temperature", "top_p"):
        assert back.generation_config[key] == pytest.approx(source.generation_config[key])
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "hf"


# --- what can go wrong --------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return made(tmp_path / "hf", preset("tiny-moe"), dtype="f32")


@pytest.mark.parametrize("name", ["m.bin", "m", "sub"])
def test_the_name_must_be_that_of_a_gguf_file(
    name: str, source: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        export(source, tmp_path / name)


def test_an_existing_file_is_replaced_only_by_force(source: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        export(source, path)
    assert path.read_bytes() == b"precious"
    export(source, path, force=True)
    assert_same_weights(source, open_checkpoint(path))


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", BLOCKY, random_arrays(BLOCKY), None)
    before = first.read_bytes()
    with pytest.raises(UserError, match="overlaps"):
        export(open_checkpoint(first), first, force=True)
    assert first.read_bytes() == before


def test_unknown_types_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype"):
        export(source, tmp_path / "m.gguf", dtype="f64")


def test_a_model_that_gguf_cannot_describe(tmp_path: Path) -> None:
    config = replace(preset("tiny-moe"), moe_layer_end_index=1)
    source = made(tmp_path / "hf", config)
    with pytest.raises(ConfigError, match="no way to describe"):
        export(source, tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_missing_correction_biases_stay_missing(tmp_path: Path) -> None:
    folder = write_dialect(tmp_path / "hf", BLOCKY, "hf", random_arrays(BLOCKY))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if "correction_bias" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    source = open_checkpoint(folder, allow_missing_correction_bias=True)
    report = export(source, tmp_path / "m.gguf")
    assert any("correction biases" in note for note in report.notes)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert not any("exp_probs_b" in name for name in names)


def test_an_interrupted_run_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "_SYNC_BYTES", 1)
    source = made(tmp_path / "hf", preset("small-moe"))
    export(source, tmp_path / "whole.gguf")

    def fail(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise MachineError("stopped")

    path = tmp_path / "m.gguf"
    with pytest.raises(MachineError, match="stopped"):
        export(source, path, progress=fail)
    assert not path.exists()
    seen: list[int] = []
    report = export(source, path, progress=lambda done, total, what: seen.append(done))
    assert report.resumed and min(seen) > report.nbytes // 4
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_source_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "_SYNC_BYTES", 1)
    source = made(tmp_path / "hf", preset("small-moe"))

    def fail(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise MachineError("stopped")

    with pytest.raises(MachineError):
        export(source, tmp_path / "m.gguf", progress=fail)
    shutil.rmtree(tmp_path / "hf")
    synth.synth(tmp_path / "hf", preset("small-moe"), seed=2)
    source = open_checkpoint(tmp_path / "hf")
    assert not export(source, tmp_path / "m.gguf").resumed
    assert_same_weights(source, open_checkpoint(tmp_path / "m.gguf"))
