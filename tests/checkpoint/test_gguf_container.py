"""GGUF files: valid ones are read as the gguf package wrote them; split ones open whole."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFWriter
from gguf_files import build, finish, info, pair, write_valid

from earnest.checkpoint.containers import gguf
from earnest.errors import FormatError


@pytest.fixture
def valid(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "model.gguf"
    return path, write_valid(path)


def test_tensors_equal_what_was_written(valid: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, decoded = valid
    stored = gguf.open_file(path)
    assert stored.path == path
    assert list(stored.tensors) == list(decoded)
    for name, expected in decoded.items():
        tensor = stored.tensors[name]
        assert tensor.name == name
        assert tensor.shape == expected.shape
        assert name in tensor.origin
        assert path.name in tensor.origin
        assert tensor.raw().nbytes == tensor.nbytes
        assert np.array_equal(tensor.read(), expected, equal_nan=True)
        assert np.array_equal(tensor.read_rows(slice(1, 2)), expected[1:2], equal_nan=True)


def test_metadata_equal_what_was_written(valid: tuple[Path, dict[str, np.ndarray]]) -> None:
    metadata = gguf.open_file(valid[0]).metadata
    expected = {
        "general.architecture": "ernie4_5",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "no": False,
        "text": "文心 4.5 🙂",
        "empty": "",
        "ints": [1, -2, 3],
        "floats": [0.5, -1.5],
        "switches": [True, False],
        "tokenizer.ggml.tokens": ["a", "", "文", "▁the"],
        "nested": [[1, 2], [3]],
    }
    assert metadata == expected
    for key, value in expected.items():
        assert type(metadata[key]) is type(value)


def test_tensors_are_views_that_cannot_be_written(
    valid: tuple[Path, dict[str, np.ndarray]],
) -> None:
    raw = gguf.open_file(valid[0]).tensors["token_embd.weight"].raw()
    assert not raw.flags.owndata
    assert not raw.flags.writeable


def test_forgetting_keeps_the_arrays_valid(valid: tuple[Path, dict[str, np.ndarray]]) -> None:
    stored = gguf.open_file(valid[0])
    raw = stored.tensors["token_embd.weight"].raw()
    before = raw.copy()
    stored.forget()
    assert np.array_equal(raw, before)


def test_forgetting_gives_memory_back(tmp_path: Path) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is measured through /proc")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("w", np.ones((1024, 16384), np.float32))  # 64 MiB
    finish(writer)
    stored = gguf.open_file(path)
    start = resident()
    assert stored.tensors["w"].raw().sum() == 2**24
    full = resident()
    stored.forget()
    assert full - start > 50e6
    assert resident() - start < 20e6


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    arrays = {f"t{i}": np.arange(i + 1, dtype=np.float32) for i in range(4)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    finish(writer)
    stored = gguf.open_file(path)
    assert stored.metadata["general.alignment"] == alignment
    for name, array in arrays.items():
        assert np.array_equal(stored.tensors[name].read(), array)


def test_a_vocabulary_without_weights(tmp_path: Path) -> None:
    """As large as ERNIE's with its merges."""
    path = tmp_path / "vocab.gguf"
    tokens = [f"piece{i}" for i in range(103_424)]
    writer = GGUFWriter(path, "ernie4_5")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [-float(i) for i in range(len(tokens))])
    finish(writer)
    stored = gguf.open_file(path)
    assert stored.tensors == {}
    assert stored.metadata["tokenizer.ggml.tokens"] == tokens
    assert stored.metadata["tokenizer.ggml.scores"][-1] == -103_423.0


def test_big_endian_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = GGUFWriter(path, "llama", False, GGUFEndian.BIG)
    writer.add_tensor("w", np.ones(4, np.float32))
    finish(writer)
    with pytest.raises(FormatError, match="big-endian"):
        gguf.open_file(path)


def write_split(folder: Path) -> dict[str, np.ndarray]:
    writer = GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=2)
    writer.add_string("general.name", "split")
    arrays = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    finish(writer)
    assert len(list(folder.glob("*.gguf"))) == 3
    return arrays


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_split_file_opens_whole_by_any_part(tmp_path: Path, number: int) -> None:
    arrays = write_split(tmp_path)
    stored = gguf.open_file(tmp_path / f"model-0000{number}-of-00003.gguf")
    assert stored.path.name == "model-00001-of-00003.gguf"
    assert list(stored.tensors) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(stored.tensors[name].read(), array)
    assert stored.metadata == {"general.architecture": "llama", "general.name": "split"}
    stored.forget()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_split(tmp_path)
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(FormatError, match="model-00002-of-00003"):
        gguf.open_file(tmp_path / "model-00001-of-00003.gguf")


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path)
    odd = (tmp_path / "model-00001-of-00003.gguf").rename(tmp_path / "first.gguf")
    with pytest.raises(FormatError, match="split"):
        gguf.open_file(odd)


def test_swapped_parts_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path)
    two, three = (tmp_path / f"model-0000{n}-of-00003.gguf" for n in (2, 3))
    two.rename(tmp_path / "x")
    three.rename(two)
    (tmp_path / "x").rename(three)
    with pytest.raises(FormatError, match="not the part its name says"):
        gguf.open_file(tmp_path / "model-00001-of-00003.gguf")


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        pairs = [
            pair("split.no", 2, struct.pack("<H", number - 1)),
            pair("split.count", 2, struct.pack("<H", 2)),
        ]
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(build(pairs=pairs))
    with pytest.raises(FormatError, match="'w'"):
        gguf.open_file(tmp_path / "m-00002-of-00002.gguf")


def test_parts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    for number, name in ((1, "a"), (2, "b")):
        pairs = [
            pair("split.no", 2, struct.pack("<H", number - 1)),
            pair("split.count", 2, struct.pack("<H", 2)),
            pair("split.tensors.count", 5, struct.pack("<i", 3)),
        ]
        part = path.with_name(f"m-0000{number}-of-00002.gguf")
        part.write_bytes(build(pairs=pairs, infos=[info(name)]))
    with pytest.raises(FormatError, match="add up"):
        gguf.open_file(path)
