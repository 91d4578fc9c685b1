"""Packed models: nothing is lost on the way in or out; they serve wherever a checkpoint does."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conversions import assert_same_files, bits, made
from layouts import random_arrays, write_dialect
from safetensors.numpy import load_file

import earnest
from earnest import codecs
from earnest.checkpoint import Checkpoint, describe, difference, open_checkpoint
from earnest.checkpoint.containers import sequential
from earnest.checkpoint.convert import convert
from earnest.checkpoint.export import export
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.pack import pack, panel_codec
from earnest.codecs.panel import PANELS
from earnest.config import preset
from earnest.quantize import quantize

STORIES = Path(earnest.__file__).parent / "hub" / "stories"
# Rows of whole blocks of every type; head and vocabulary are not whole panels.
ROOMY = replace(
    preset("small-moe"),
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=256,
    tie_word_embeddings=False,
    num_nextn_predict_layers=1,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return made(tmp_path_factory.mktemp("source") / "hf", ROOMY, mtp=True)


def raw_bits(tensor: LazyTensor) -> bytes:
    return np.ascontiguousarray(tensor.raw()).tobytes()


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_hugging_face_and_back_is_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    original = made(tmp_path / "hf", ROOMY, mtp=True, dtype=dtype)
    report = pack(original, tmp_path / "packed")
    assert (report.layout, report.notes) == ("panel", (report.notes[-1],))
    packed = open_checkpoint(tmp_path / "packed")
    assert (packed.container, packed.dialect) == ("panel", "hf")
    assert packed.config == original.config and packed.has_mtp
    assert bits(packed) == bits(original)
    for name, tensor in packed.tensors.items():
        assert (tensor.panels is not None) == (len(tensor.shape) == 2), name
        if tensor.panels is not None:
            panels = tensor.panels()
            assert panels.shape == PANELS[tensor.codec.name].shape(*tensor.shape)
            assert panels.ctypes.data % 64 == 0 and not panels.flags.writeable
    convert(packed, tmp_path / "back", "hf")
    assert_same_files(tmp_path / "back", tmp_path / "hf")


BLOCKS = ["q8_0", "q6_k", "q5_k_m", "q5_k", "q4_k_m", "q4_k", "q5_1", "q5_0", "q4_1", "q4_0"]


@pytest.mark.parametrize("codec", ["bf16", "f16", "f32", *BLOCKS])
def test_gguf_and_back_is_the_same_file(codec: str, source: Checkpoint, tmp_path: Path) -> None:
    # The name of a model is that of the folder it was made from.
    name = source.path.name
    if codec in BLOCKS:
        quantize(source, tmp_path / "m.gguf", codec)
    else:
        export(source, tmp_path / "m.gguf", dtype=codec)
    original = open_checkpoint(tmp_path / "m.gguf")
    report = pack(original, tmp_path / name)
    assert not any("decoded" in note for note in report.notes)
    packed = open_checkpoint(tmp_path / name)
    assert bits(packed) == bits(original)
    export(packed, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_paddle_goes_in_and_out(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "paddle", "paddle")
    pack(open_checkpoint(tmp_path / "paddle"), tmp_path / "packed")
    packed = open_checkpoint(tmp_path / "packed")
    assert bits(packed) == bits(source)
    convert(packed, tmp_path / "again", "paddle")
    assert_same_files(tmp_path / "again", tmp_path / "paddle")


def test_sizes_that_fill_no_panel_are_padded(tmp_path: Path) -> None:
    config = replace(
        preset("tiny-moe"), vocab_size=37, hidden_size=40, intermediate_size=24, use_bias=True
    )
    write_dialect(tmp_path / "hf", config, "hf_packed", random_arrays(config))
    original = open_checkpoint(tmp_path / "hf")
    pack(original, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert any(name.startswith("padding.") for name in stored)
    packed = open_checkpoint(tmp_path / "packed")
    assert bits(packed) == bits(original)
    pack(packed, tmp_path / "twice")
    assert_same_files(tmp_path / "twice", tmp_path / "packed")


def test_every_tensor_begins_at_a_cache_line(source: Checkpoint, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed")
    data = (tmp_path / "packed" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    table = json.loads(metadata["panels"])
    assert (metadata["format"], metadata["panel_version"]) == ("panel", "1")
    assert table["model.embed_tokens.weight"] == ["bf16", 300, 256]
    assert set(table) == {name for name, t in source.tensors.items() if len(t.shape) == 2}
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
    assert not any(at % 64 for name, at in starts.items() if not name.startswith("padding."))
    # The numbers of the document, byte by byte, for one matrix.
    entry = header["model.layers.0.self_attn.q_proj.weight"]
    begin, end = (8 + length + at for at in entry["data_offsets"])
    tensor = source.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert data[begin:end] == PANELS["bf16"].pack(tensor.raw(), 256).tobytes()


@pytest.mark.parametrize("codec", PANELS)
def test_some_rows_are_those_of_the_whole(codec: str) -> None:
    layout = PANELS[codec]
    rng = np.random.default_rng(1)
    shape = (83, 512)
    encode = layout.codec.encode
    assert encode is not None
    raw = encode(rng.standard_normal(shape, np.float32))
    panels = layout.pack(raw, shape[1])
    tensor = LazyTensor(
        "w", layout.codec, shape, lambda: layout.unpack(panels, *shape), "", lambda: panels
    )
    for rows in (
        *(slice(0, 83), slice(5, 6), slice(15, 17), slice(70, None), slice(-3, None)),
        *(slice(40, 40), slice(2, 60, 7), np.array([82, 0, -1, 17, 17]), np.array([], int)),
        np.array([[1, 2], [80, 3]]),
    ):
        assert np.array_equal(tensor.raw_rows(rows), raw[rows])
    blocks = list(tensor.row_blocks(512 * 20))
    assert [block.start for block, _ in blocks] == [0, 16, 32, 48, 64, 80]
    assert np.array_equal(np.concatenate([block for _, block in blocks]), raw)


def test_every_verb_takes_it(source: Checkpoint, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed")
    packed = open_checkpoint(tmp_path / "packed")
    facts = describe.describe(packed)
    assert facts["container"] == "panel"
    assert facts["stored"] == describe.describe(source)["stored"]
    assert all(t.state == "identical" for t in difference.diff(source, packed).tensors)
    quantize(packed, tmp_path / "a.gguf", "q4_k_m")
    quantize(source, tmp_path / "b.gguf", "q4_k_m")
    assert bits(open_checkpoint(tmp_path / "a.gguf")) == bits(open_checkpoint(tmp_path / "b.gguf"))


@pytest.mark.parametrize("codec", BLOCKS)
def test_quantised_folders_hold_what_quantised_gguf_files_hold(
    codec: str, source: Checkpoint, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "packed", codec)
    quantize(source, tmp_path / "m.gguf", codec)
    packed, gguf = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "m.gguf")
    assert packed.container == "panel" and packed.has_mtp and not gguf.has_mtp
    for name, tensor in packed.tensors.items():
        if len(tensor.shape) == 1 or name.endswith(".mlp.gate.weight"):
            original = source.tensors[name]
            assert tensor.codec == original.codec and raw_bits(tensor) == raw_bits(original)
        elif name in gguf.tensors:
            assert tensor.codec == gguf.tensors[name].codec
            assert raw_bits(tensor) == raw_bits(gguf.tensors[name])
        else:
            assert not tensor.codec.is_plain, name


def test_types_without_panels_are_encoded_anew_and_told() -> None:
    def of(codec: str, shape: tuple[int, int] = (4, 256), name: str = "w") -> str:
        return panel_codec(
            LazyTensor(name, codecs.codec(codec), shape, lambda: np.zeros(0), "")
        ).name

    assert [of(codec) for codec in PANELS] == list(PANELS)
    assert (of("q3_k"), of("iq4_nl"), of("q2_k", name="model.layers.1.mlp.gate.weight")) == (
        *("q8_0", "q8_0"),
        "f32",
    )
    assert (of("f8_e4m3", (4, 7)), of("f64")) == ("bf16", "f32")


@pytest.mark.parametrize("model", ["stories", "q4_0"])
def test_the_story_model_computes_the_same_bits(model: str, tmp_path: Path) -> None:
    path = STORIES
    if model != "stories":
        path = tmp_path / "m.gguf"
        quantize(open_checkpoint(STORIES), path, model)
    pack(open_checkpoint(path), tmp_path / "packed")
    text = "Once upon a time, there was a little girl named Lily."
    a = earnest.load(path, runner="reference")
    b = earnest.load(tmp_path / "packed", runner="reference")
    ids = a.tokenizer.encode(text, add_special_tokens=True)
    assert b.tokenizer.encode(text, add_special_tokens=True) == ids
    assert np.array_equal(a.logits(ids), b.logits(ids))


# The command line, but that it gets a signal when a share of the weights is written.
_CHILD = """
import os, sys
from earnest.checkpoint.containers import sequential
from earnest.cli.main import main

percent, number, *arguments = sys.argv[1:]
stream = sequential.stream

def interrupted(path, tensors):
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    for tensor, block in stream(path, tensors):
        yield tensor, block
        done += 0 if block is None else block.nbytes
        if done > int(percent) * total / 100:
            os.kill(os.getpid(), int(number))

sequential._SYNC_BYTES = 1
sequential.stream = interrupted
main(arguments)
"""

# What is made, its name, the command line's verb and options, and the same as a call.
WRITERS = {
    "packed": ("out", ["pack"], pack),
    "quantised": ("out", ["quantize", "--codec", "q4_k_m"], partial(quantize, codec="q4_k_m")),
    "quantised gguf": (
        "out.gguf",
        ["quantize", "--codec", "q5_0"],
        partial(quantize, codec="q5_0"),
    ),
    "gguf": ("out.gguf", ["convert", "--to", "gguf"], export),
}


@pytest.mark.parametrize(
    ("kind", "percent", "how"),
    [
        ("packed", 0, signal.SIGKILL),
        ("packed", 60, signal.SIGKILL),
        ("packed", 99, signal.SIGKILL),
        ("quantised", 60, signal.SIGKILL),
        ("quantised", 60, signal.SIGINT),
        ("quantised gguf", 60, signal.SIGKILL),
        ("quantised gguf", 60, signal.SIGINT),
        ("gguf", 60, signal.SIGKILL),
    ],
)
def test_an_interrupted_run_is_taken_up_where_it_was(
    kind: str, percent: int, how: signal.Signals, source: Checkpoint, tmp_path: Path
) -> None:
    name, arguments, write = WRITERS[kind]
    out, whole = tmp_path / name, tmp_path / "whole" / name
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, str(percent), str(int(how)), *arguments, source.path, out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == (130 if how == signal.SIGINT else -how), run.stderr
    assert not out.exists()
    seen: list[int] = []
    report = write(source, out, progress=lambda done, total, what: seen.append(done))
    assert report.resumed
    # A tensor is at most a tenth of this model; what was finished is not written again.
    assert min(seen) >= (percent / 100 - 0.1) * report.nbytes
    whole.parent.mkdir()
    write(source, whole)
    if out.is_dir():
        assert_same_files(out, whole)
    else:
        assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "whole"]


def test_another_source_is_begun_anew(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "_SYNC_BYTES", 1)

    def fail(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", progress=fail)
    other = made(tmp_path / "other", ROOMY, mtp=True)
    assert not pack(other, tmp_path / "out").resumed
    assert bits(open_checkpoint(tmp_path / "out")) == bits(other)
