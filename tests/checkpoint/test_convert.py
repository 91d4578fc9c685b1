"""Conversions: every bit survives the way to Paddle and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conversions import assert_same_files, bits, made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import random_arrays, write_dialect, write_gguf
from safetensors.numpy import load_file, save_file

from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.checkpoint.convert import convert
from earnest.config import ErnieConfig, preset
from earnest.errors import (
    DiskFullError,
    FormatError,
    MissingCorrectionBiasError,
    UserError,
)

UNTIED = replace(preset("tiny-moe"), tie_word_embeddings=False)


BIASED = replace(preset("tiny-moe"), use_bias=True)


# Every matrix has rows of whole blocks of 32, as GGUF's quantised types need.
BLOCKY = replace(
    preset("tiny-moe"), hidden_size=64, head_dim=16, intermediate_size=96, moe_intermediate_size=32
)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 700_000], ids=["whole", "shards"])
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
def test_to_paddle_and_back_gives_the_same_files(
    config: ErnieConfig, mtp: bool, shard_bytes: int, dtype: str, tmp_path: Path
) -> None:
    source = made(tmp_path / "hf", config, mtp=mtp, dtype=dtype, shard_bytes=shard_bytes)
    convert(source, tmp_path / "paddle", "paddle", shard_bytes=shard_bytes)
    paddle = open_checkpoint(tmp_path / "paddle")
    assert paddle.dialect == "paddle"
    assert paddle.config == source.config
    assert bits(paddle) == bits(source)
    convert(paddle, tmp_path / "back", "hf", shard_bytes=shard_bytes)
    assert_same_files(tmp_path / "hf", tmp_path / "back")


def test_the_paddle_layout_is_the_published_one(tmp_path: Path) -> None:
    """Facts of the published files, spelled out by hand and read by another library."""
    config = replace(preset("tiny-moe"), tie_word_embeddings=False)
    made(tmp_path / "hf", config, dtype="f32")
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "paddle", "paddle")
    hf = load_file(tmp_path / "hf" / "model.safetensors")
    paddle = load_file(tmp_path / "paddle" / "model.safetensors")
    attention = "layers.1.self_attn"
    q, k, v = (hf[f"model.{attention}.{x}_proj.weight"] for x in "qkv")
    fused = np.concatenate([q.T, k.T, v.T], axis=1)
    assert np.array_equal(paddle[f"ernie.{attention}.qkv_proj.weight"], fused)
    o = hf[f"model.{attention}.o_proj.weight"]
    assert np.array_equal(paddle[f"ernie.{attention}.o_proj.weight"], o.T)
    for block in ("layers.0.mlp", "layers.2.mlp.experts.3", "layers.1.mlp.shared_experts"):
        gate, up, down = (hf[f"model.{block}.{x}_proj.weight"] for x in ("gate", "up", "down"))
        fused = np.concatenate([gate.T, up.T], axis=1)
        assert np.array_equal(paddle[f"ernie.{block}.up_gate_proj.weight"], fused)
        assert np.array_equal(paddle[f"ernie.{block}.down_proj.weight"], down.T)
    assert np.array_equal(
        paddle["ernie.layers.1.mlp.gate.weight"], hf["model.layers.1.mlp.gate.weight"].T
    )
    bias = "layers.1.mlp.moe_statics.e_score_correction_bias"
    assert paddle[f"ernie.{bias}"].shape == (1, 4)
    assert np.array_equal(paddle[f"ernie.{bias}"], hf[f"model.{bias}"])
    assert np.array_equal(paddle["ernie.embed_tokens.weight"], hf["model.embed_tokens.weight"])
    assert np.array_equal(paddle["lm_head.weight"], hf["lm_head.weight"].T)
    assert np.array_equal(paddle["ernie.norm.weight"], hf["model.norm.weight"])
    assert len(paddle) == 2 + 1 + 3 * 4 + 2 + 2 * (2 + 2 + 4 * 2)
    written = json.loads((tmp_path / "paddle" / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert "torch_dtype" not in written, "by this key Paddle's readers tell foreign folders"
    assert written["moe_use_aux_free"] is True


def test_paddle_bf16_written_as_uint16_is_read(tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("small-moe"))
    convert(source, tmp_path / "paddle", "paddle")
    file = tmp_path / "paddle" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length].replace(b'"BF16"', b'"U16"').ljust(length)
    file.write_bytes(data[:8] + head + data[8 + length :])
    convert(open_checkpoint(tmp_path / "paddle"), tmp_path / "back", "hf")
    assert bits(open_checkpoint(tmp_path / "back")) == bits(source)


sizes = st.integers(1, 4)


@st.composite
def configs(draw: st.DrawFn) -> ErnieConfig:
    experts = draw(st.sampled_from([0, 1, 3, 5]))
    layers = draw(st.integers(1, 3))
    kv = draw(st.integers(1, 2))
    return ErnieConfig(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=layers,
        num_attention_heads=kv * draw(sizes),
        num_key_value_heads=kv,
        head_dim=2 * draw(sizes),
        tie_word_embeddings=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        moe_num_experts=experts,
        moe_k=min(experts, draw(sizes)),
        moe_intermediate_size=draw(st.integers(1, 5)) if experts else 0,
        moe_num_shared_experts=draw(st.integers(0, 2)) if experts else 0,
        moe_layer_start_index=draw(st.integers(0, layers)) if experts else 0,
        moe_layer_interval=draw(st.integers(1, 2)) if experts else 1,
        num_nextn_predict_layers=draw(st.integers(0, 2)),
    )


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs(), st.sampled_from(["bf16", "f16", "f32"]), st.integers(500, 5000))
def test_any_model_survives_the_way_there_and_back(
    tmp_path: Path, config: ErnieConfig, dtype: str, shard_bytes: int
) -> None:
    for name in ("hf", "paddle", "back"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    mtp = config.num_nextn_predict_layers > 0
    source = made(tmp_path / "hf", config, mtp=mtp, dtype=dtype, shard_bytes=shard_bytes)
    convert(source, tmp_path / "paddle", "paddle", shard_bytes=shard_bytes)
    convert(open_checkpoint(tmp_path / "paddle"), tmp_path / "back", "hf", shard_bytes=shard_bytes)
    assert_same_files(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("dialect", ["hf", "hf_packed", "paddle", "vl"])
@pytest.mark.parametrize("to", ["hf", "paddle"])
def test_from_every_dialect(dialect: Any, to: Any, tmp_path: Path) -> None:
    config = preset("tiny-moe")
    arrays = random_arrays(config)
    folder = write_dialect(tmp_path / "in", config, dialect, arrays)
    if dialect == "vl":
        _add_vision(folder)
    source = open_checkpoint(folder)
    report = convert(source, tmp_path / "out", to)
    assert bool(report.left_out) == (dialect == "vl")
    result = open_checkpoint(tmp_path / "out")
    assert result.dialect == to
    assert not result.left_out
    for name, array in arrays.items():
        assert np.array_equal(result.tensors[name].read(), array), name


def _add_vision(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for expert in range(4, 8):
        tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = np.zeros(
            (16, 4), np.float32
        )
    tensors["model.layers.1.mlp.gate.weight_1"] = np.zeros((16, 4), np.float32)
    tensors["vision_model.ln.weight"] = np.zeros(5, np.float32)
    save_file(tensors, file, {"format": "pt"})


def test_blocks_of_large_matrices_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row blocks far smaller than the tensors, so that every seam between blocks is crossed."""
    monkeypatch.setattr("earnest.checkpoint.plan._BLOCK_WEIGHTS", 1000)
    monkeypatch.setattr("earnest.checkpoint.plan._TRANSPOSED_ROWS", 7)
    monkeypatch.setattr("earnest.checkpoint.checkpoint._FORGET_BYTES", 4096)
    source = made(tmp_path / "hf", preset("small-moe"), mtp=True)
    convert(source, tmp_path / "paddle", "paddle")
    assert bits(open_checkpoint(tmp_path / "paddle")) == bits(source)
    convert(open_checkpoint(tmp_path / "paddle"), tmp_path / "back", "hf")
    assert_same_files(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("to", ["hf", "paddle"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_another_type(dtype: str, to: Any, tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("small-moe"), dtype="f32")
    convert(source, tmp_path / "out", to, dtype=dtype)
    result = open_checkpoint(tmp_path / "out")
    names = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    assert result.config.dtype == names[dtype]
    bound = {"bf16": 2**-8, "f16": 2**-11, "f32": 0.0}[dtype]
    for name, tensor in result.tensors.items():
        exact = "gate.weight" in name or "e_score" in name
        assert tensor.codec.name == ("f32" if exact else dtype), name
        want, got = source.tensors[name].read(), tensor.read()
        # 2**-25 is half of the smallest step of f16.
        assert (np.abs(got - want) <= (0 if exact else bound) * np.abs(want) + 2**-25).all(), name


def test_weights_beyond_the_range_of_f16_are_refused(tmp_path: Path) -> None:
    config = preset("tiny-dense")
    arrays = dict(random_arrays(config))
    arrays["model.layers.1.mlp.down_proj.weight"] = arrays[
        "model.layers.1.mlp.down_proj.weight"
    ] * np.float32(1e6)
    source = open_checkpoint(write_dialect(tmp_path / "in", config, "hf", arrays))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj.*\n.*\n.*65504"):
        convert(source, tmp_path / "out", "hf", dtype="f16")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", "hf", dtype="bf16")


def _retype(folder: Path, types: dict[str, str]) -> Checkpoint:
    """Change the types of some f32 tensors in a file."""
    tensors = load_file(folder / "model.safetensors")
    for part, kind in types.items():
        for name in tensors:
            if part in name:
                tensors[name] = tensors[name].astype(kind)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder)


def test_fused_parts_of_different_types_are_promoted_without_loss(tmp_path: Path) -> None:
    made(tmp_path / "hf", preset("tiny-dense"), dtype="f32")
    source = _retype(tmp_path / "hf", {"q_proj": "float16"})
    report = convert(source, tmp_path / "paddle", "paddle")
    assert any("fused" in note and "f32" in note for note in report.notes)
    result = open_checkpoint(tmp_path / "paddle")
    for name, tensor in source.tensors.items():
        assert np.array_equal(result.tensors[name].read(), tensor.read())
    back = convert(result, tmp_path / "back", "hf")
    assert not any("fused" in note for note in back.notes)


def test_fused_parts_that_no_type_holds_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "hf", preset("tiny-dense"), dtype="f32")
    source = _retype(tmp_path / "hf", {"q_proj": "float64"})
    with pytest.raises(FormatError, match=r"qkv_proj.*\n.*f32 and f64"):
        convert(source, tmp_path / "paddle", "paddle")
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]
    convert(source, tmp_path / "hf2", "hf")
    assert bits(open_checkpoint(tmp_path / "hf2")) == bits(source)
    convert(source, tmp_path / "paddle", "paddle", dtype="f32")


def test_a_router_stored_in_bf16_stays_so_unless_a_type_is_asked_for(tmp_path: Path) -> None:
    made(tmp_path / "hf", preset("tiny-moe"), dtype="f32")
    source = _retype(tmp_path / "hf", {"mlp.gate.weight": "float16"})
    convert(source, tmp_path / "paddle", "paddle")
    assert bits(open_checkpoint(tmp_path / "paddle")) == bits(source)
    convert(source, tmp_path / "out", "hf", dtype="bf16")
    gate = open_checkpoint(tmp_path / "out").tensors["model.layers.1.mlp.gate.weight"]
    assert gate.codec.name == "f32"


@pytest.mark.parametrize("kind", [None, "q8_0", "q4_1", "q5_0"])
@pytest.mark.parametrize("to", ["hf", "paddle"])
def test_from_gguf(kind: str | None, to: Any, tmp_path: Path) -> None:
    arrays = random_arrays(BLOCKY)
    source = open_checkpoint(write_gguf(tmp_path / "m.gguf", BLOCKY, arrays, kind))
    report = convert(source, tmp_path / "out", to)
    result = open_checkpoint(tmp_path / "out")
    assert result.config.hidden_size == 64
    for name, tensor in source.tensors.items():
        quantised = not tensor.codec.is_plain
        assert result.tensors[name].codec.name == ("bf16" if quantised else "f32"), name
        want, got = tensor.read(), result.tensors[name].read()
        assert (np.abs(got - want) <= quantised * 2**-8 * np.abs(want)).all(), name
        if quantised:  # and the decoded values are those of the `gguf` package
            q = gguf.GGMLQuantizationType[(kind or "").upper()]
            assert np.array_equal(
                want, gguf.dequantize(gguf.quantize(np.asarray(arrays[name]), q), q)
            )
    assert any("rounded to bf16" in note for note in report.notes) == (kind is not None)
    convert(source, tmp_path / "exact", to, dtype="f32")
    for name, tensor in open_checkpoint(tmp_path / "exact").tensors.items():
        assert np.array_equal(tensor.read(), source.tensors[name].read()), name


def test_small_files_come_along_and_others_do_not(tmp_path: Path) -> None:
    made(tmp_path / "hf", preset("tiny-moe"))
    along = {
        "LICENSE": b"Apache\n",
        "README.md": "# 模型\n".encode(),
        "generation_config.json": b'{"temperature":   0.8}',
        "tokenizer.model": b"\x00\x01",
        "tokenizer_config.json": b"{}",
        "added_tokens.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
    }
    for name, data in along.items():
        (tmp_path / "hf" / name).write_bytes(data)
    for name in ("pytorch_model.bin", "x.pdparams", ".hidden", "m.gguf", "notes.txt.lock"):
        (tmp_path / "hf" / name).write_bytes(b"x")
    (tmp_path / "hf" / "modeling_ernie.py").write_text("import os")
    (tmp_path / "hf" / "folder").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"linked, as in the hub's cache")
    (tmp_path / "hf" / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    source = open_checkpoint(tmp_path / "hf")
    report = convert(source, tmp_path / "paddle", "paddle")
    expected = {*along, "tokenizer.json", "config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "paddle").iterdir()} == expected == set(report.files)
    for name, data in along.items():
        assert (tmp_path / "paddle" / name).read_bytes() == data
    assert not (tmp_path / "paddle" / "tokenizer.json").is_symlink()
    assert any("modeling_ernie.py" in note for note in report.notes)
    assert not any("no tokenizer" in note for note in report.notes)


def test_the_tokenizer_of_a_real_folder_comes_along(shared: Path, tmp_path: Path) -> None:
    made(tmp_path / "hf", preset("tiny-moe"))
    real = shared / "data" / "tokenizer" / "ernie-4.5-0.3b-base-pt"
    for file in real.iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copy(file, tmp_path / "hf")
    shutil.copy(real.parent / "tokenizer.model", tmp_path / "hf")
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "paddle", "paddle")
    result = open_checkpoint(tmp_path / "paddle")
    text = "Why is the sky blue? 天空为什么是蓝色的？"
    assert result.tokenizer.decode(result.tokenizer.encode(text)) == text
    assert result.tokenizer.chat_template is not None


def test_a_published_trained_model_survives_the_way_there_and_back(
    shared: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(shared / "data" / "models" / "stories260k-ernie")
    convert(source, tmp_path / "paddle", "paddle")
    convert(open_checkpoint(tmp_path / "paddle"), tmp_path / "hf", "hf")
    result = open_checkpoint(tmp_path / "hf")
    assert result.config == source.config
    assert bits(result) == bits(source)
    assert (tmp_path / "hf" / "tok512.json").exists()


def test_a_gguf_file_without_a_tokenizer_is_converted_with_a_note(tmp_path: Path) -> None:
    source = open_checkpoint(write_gguf(tmp_path / "m.gguf", BLOCKY, random_arrays(BLOCKY), "q8_0"))
    report = convert(source, tmp_path / "out", "hf")
    assert any("tokenizer" in note for note in report.notes)


def test_a_single_file_is_a_source_too(tmp_path: Path) -> None:
    made(tmp_path / "hf", preset("tiny-moe"))
    (tmp_path / "hf" / "LICENSE").write_text("Apache")
    source = open_checkpoint(tmp_path / "hf" / "model.safetensors")
    convert(source, tmp_path / "paddle", "paddle")
    assert (tmp_path / "paddle" / "LICENSE").exists()


def test_a_missing_bias_stays_missing(tmp_path: Path) -> None:
    """A conversion must not launder a broken checkpoint into one that opens without a word."""
    made(tmp_path / "hf", preset("tiny-moe"), dtype="f32")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if "e_score" not in name}
    save_file(kept, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    source = open_checkpoint(tmp_path / "hf", allow_missing_correction_bias=True)
    report = convert(source, tmp_path / "paddle", "paddle")
    assert any("missing here too" in note for note in report.notes)
    with pytest.raises(MissingCorrectionBiasError):
        open_checkpoint(tmp_path / "paddle")


@pytest.mark.parametrize(
    "destination", ["hf", "hf/inside", "hf/a/b", ".", "link", "link/inside", "hf/../hf"]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_destination_that_overlaps_with_the_source_is_refused(
    destination: str, force: bool, tmp_path: Path
) -> None:
    made(tmp_path / "hf", preset("tiny-moe"))
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    source = open_checkpoint(tmp_path / "hf")
    with pytest.raises(UserError, match="overlaps"):
        convert(source, tmp_path / destination, "paddle", force=force)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "link"]


def test_the_partial_folder_of_the_destination_is_never_the_source(tmp_path: Path) -> None:
    source = made(tmp_path / ".x.partial", preset("tiny-moe"))
    with pytest.raises(UserError, match="overlaps"):
        convert(source, tmp_path / "x", "paddle")
    assert (tmp_path / ".x.partial" / "model.safetensors").exists()


def test_a_gguf_file_can_be_converted_beside_itself_but_not_over_itself(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", BLOCKY, random_arrays(BLOCKY), None)
    source = open_checkpoint(file)
    for destination in (file, tmp_path):
        with pytest.raises(UserError, match="overlaps"):
            convert(source, destination, "hf", force=True)
    convert(source, tmp_path / "hf", "hf")
    assert file.exists()


def test_an_existing_destination_is_kept_unless_forced(tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("tiny-moe"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        convert(source, tmp_path / "out", "paddle")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    convert(source, tmp_path / "out", "paddle", force=True)
    assert open_checkpoint(tmp_path / "out").dialect == "paddle"
    assert not (tmp_path / "out" / "mine").exists()


def test_unknown_layouts_and_types_are_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "hf", preset("tiny-moe"))
    with pytest.raises(UserError, match="layout"):
        convert(source, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dtype"):
        convert(source, tmp_path / "out", "hf", dtype="int4")


def test_what_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "hf", preset("tiny-moe"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(DiskFullError, match="fit"):
        convert(source, tmp_path / "out", "paddle")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
