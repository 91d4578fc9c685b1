"""The GGUF reader: valid files of the `gguf` package's writer, and files that lie."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from earnest.checkpoint.containers import gguf
from earnest.checkpoint.containers.base import StoredFile
from earnest.errors import AccessError, EarnestError, FormatError, ModelNotFoundError

F32, Q4_0, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


# --- valid files ----------------------------------------------------------------------------------


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_valid(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """A file with every kind of metadata and tensors of several types; returns them decoded."""
    writer = GGUFWriter(path, "ernie4_5", **options)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "文心 4.5 🙂")
    writer.add_key_value("empty", "", GGUFValueType.STRING)  # add_string would leave it out
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("switches", [True, False])
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "文", "▁the"])
    writer.add_key_value("nested", [[1, 2], [3]], GGUFValueType.ARRAY, GGUFValueType.ARRAY)
    rng = np.random.default_rng(0)
    plain = {
        "token_embd.weight": rng.normal(size=(5, 32)).astype(np.float32),
        "half": rng.normal(size=(3, 7)).astype(np.float16),
        "vector": np.arange(3, dtype=np.float32),
        "cube": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "ids": np.arange(5, dtype=np.int32),
    }
    decoded = {name: array.astype(np.float32) for name, array in plain.items()}
    for name, array in plain.items():
        writer.add_tensor(name, array)
    for kind, shape in ((Q4_0, (2, 64)), (Q8_0, (4, 3, 32)), (GGMLQuantizationType.Q6_K, (2, 512))):
        weights, size = GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 100, (*shape[:-1], shape[-1] // weights * size), dtype=np.uint8)
        writer.add_tensor(kind.name, stored, raw_dtype=kind)
        with np.errstate(all="ignore"):
            decoded[kind.name] = package.dequantize(stored, kind)
    finish(writer)
    return decoded


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


# --- split files ----------------------------------------------------------------------------------


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


# --- files that lie -------------------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: bytes | str, type_id: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + payload


def array(type_id: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", type_id, count) + payload


def info(
    name: bytes | str = "w", dims: Sequence[int] = (4, 2), type_id: int = F32, offset: int = 0
) -> bytes:
    body = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)
    return text(name) + body


def build(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] | None = None,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    data_bytes: int = 128,
) -> bytes:
    """A file from its parts, any of which may be wrong; by default one tensor `w` f32 [2, 4]."""
    infos = [info()] if infos is None else infos
    counts = (
        len(infos) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *infos])
    return head + b"\0" * (-len(head) % 32) + bytes(range(256))[:data_bytes]


@contextmanager
def bounded_memory(limit: int = 4 * 2**20) -> Iterator[None]:
    """Nothing in here may hold more than `limit` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes"


def refuse(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with bounded_memory(), pytest.raises(FormatError, match=match) as caught:
        gguf.open_file(path)
    message = str(caught.value)
    assert "bad.gguf" in message
    assert len(message) < 2000


@pytest.mark.parametrize("version", [2, 3])
def test_the_smallest_file_opens(tmp_path: Path, version: int) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build(version=version))
    tensor = gguf.open_file(path).tensors["w"]
    assert tensor.shape == (2, 4)
    assert tensor.raw().tobytes() == bytes(range(32))


def test_a_tensor_without_dimensions_has_one_element(tmp_path: Path) -> None:
    path = tmp_path / "scalar.gguf"
    path.write_bytes(build(infos=[info(dims=())]))
    assert gguf.open_file(path).tensors["w"].shape == (1,)


U32_ONE = struct.pack("<I", 1)
HUGE = 2**64 - 1

LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "one byte": (lambda: b"G", "not a GGUF"),
    "web page": (lambda: b"<!DOCTYPE html>", "not a GGUF"),
    "safetensors": (lambda: struct.pack("<Q", 2) + b"{}", "not a GGUF"),
    "old format": (lambda: b"tjgg" + b"\0" * 99, "GGJT"),
    "magic only": (lambda: b"GGUF", "version"),
    "cut in the version": (lambda: b"GGUF\3\0", "version"),
    "version 1": (lambda: build(version=1), "version 1"),
    "version 4": (lambda: build(version=4), "version 4"),
    "cut in the counts": (lambda: build()[:13], "ends inside its header"),
    "huge tensor count": (lambda: build(tensor_count=HUGE), "claims more tensors"),
    "a few tensors too many": (lambda: build(tensor_count=9), "claims more tensors"),
    "one tensor too many": (lambda: build(tensor_count=2), "tensor name is empty"),
    "huge pair count": (lambda: build(pair_count=HUGE), "claims more metadata keys"),
    "pairs that are tensors": (lambda: build(pair_count=5), "too long"),
    "no key": (lambda: build(pairs=[pair("", 4, U32_ONE)]), "key is empty"),
    "huge key": (lambda: build(pairs=[struct.pack("<Q", HUGE)]), "too long"),
    "long key": (lambda: build(pairs=[pair(b"k" * 70_000, 4, U32_ONE)]), "too long"),
    "key not UTF-8": (lambda: build(pairs=[pair(b"\xff\xfe", 4, U32_ONE)]), "not UTF-8"),
    "key twice": (lambda: build(pairs=[pair("k", 4, U32_ONE)] * 2), "'k' is there twice"),
    "unknown value type": (lambda: build(pairs=[pair("k", 13, U32_ONE)]), "unknown type"),
    "huge value type": (lambda: build(pairs=[pair("k", 2**32 - 1, b"")]), "unknown type"),
    "huge string": (lambda: build(pairs=[pair("k", 8, struct.pack("<Q", HUGE))]), "too long"),
    "long string": (lambda: build(pairs=[pair("k", 8, struct.pack("<Q", 9999))]), "ends inside"),
    "huge array": (lambda: build(pairs=[pair("k", 9, array(4, HUGE, b""))]), "array elements"),
    "long array": (lambda: build(pairs=[pair("k", 9, array(4, 1000, b""))]), "array elements"),
    "huge array of strings": (
        lambda: build(pairs=[pair("k", 9, array(8, 2**40, b""))]),
        "array elements",
    ),
    "array of huge strings": (
        lambda: build(pairs=[pair("k", 9, array(8, 2, text("a") + struct.pack("<Q", HUGE)))]),
        "ends inside",
    ),
    "array of unknown type": (lambda: build(pairs=[pair("k", 9, array(77, 0, b""))]), "unknown"),
    "arrays all the way down": (
        lambda: build(pairs=[pair("k", 9, array(9, 1, b"") * 5000)]),
        "nested too deeply",
    ),
    "alignment 0": (lambda: aligned(4, struct.pack("<I", 0)), "general.alignment"),
    "alignment 3": (lambda: aligned(4, struct.pack("<I", 3)), "general.alignment"),
    "alignment huge": (lambda: aligned(10, struct.pack("<Q", 2**63)), "general.alignment"),
    "alignment negative": (lambda: aligned(5, struct.pack("<i", -32)), "general.alignment"),
    "alignment a string": (lambda: aligned(8, text("32")), "general.alignment"),
    "alignment a float": (lambda: aligned(6, struct.pack("<f", 32)), "general.alignment"),
    "name not UTF-8": (lambda: build(infos=[info(b"\x80")]), "not UTF-8"),
    "huge name": (lambda: build(infos=[struct.pack("<Q", HUGE) + b"\0" * 64]), "too long"),
    "name twice": (lambda: build(infos=[info(), info(offset=32)]), "'w' is there twice"),
    "five dimensions": (lambda: build(infos=[info(dims=(1,) * 5)]), "dimensions"),
    "huge dimensions": (
        lambda: build(infos=[text("w") + struct.pack("<I", 2**32 - 1) + b"\0" * 64]),
        "dimensions",
    ),
    "an empty dimension": (lambda: build(infos=[info(dims=(4, 0))]), "empty"),
    "overflowing shape": (lambda: build(infos=[info(dims=(2**32, 2**32))]), "file ends before"),
    "wrapping shape": (lambda: build(infos=[info(dims=(2**63, 2, 1, 1))]), "file ends before"),
    "huge shape": (lambda: build(infos=[info(dims=(HUGE,) * 4)]), "file ends before"),
    "type 4": (lambda: build(infos=[info(type_id=4)]), "'w': GGUF tensor type 4 .q4_2."),
    "type 999": (lambda: build(infos=[info(type_id=999)]), "'w': GGUF tensor type 999"),
    "part of a block": (lambda: build(infos=[info(dims=(48, 2), type_id=Q4_0)]), "whole blocks"),
    "odd offset": (lambda: build(infos=[info(offset=16)]), "not aligned"),
    "offset outside": (lambda: build(infos=[info(offset=128)]), "file ends before"),
    "huge offset": (lambda: build(infos=[info(offset=2**64 - 32)]), "file ends before"),
    "overlap": (
        lambda: build(infos=[info("a", (16, 1)), info("b", offset=32)]),
        "'b' overlaps 'a'",
    ),
    "same place": (lambda: build(infos=[info("a"), info("b")]), "overlaps"),
    "cut in the data": (lambda: build(data_bytes=31), "file ends before"),
    "no data": (lambda: build(data_bytes=0), "file ends before"),
}


def aligned(type_id: int, payload: bytes) -> bytes:
    return build(pairs=[pair("general.alignment", type_id, payload)])


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(tmp_path: Path, lie: str) -> None:
    content, match = LIES[lie]
    refuse(tmp_path, content(), match)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Cut anywhere before the last tensor's last byte."""
    path = tmp_path / "model.gguf"
    pairs = [pair("text", 8, text("hello")), pair("list", 9, array(8, 2, text("a") + text("b")))]
    infos = [info("a", (64, 1), Q8_0), info("b", offset=96)]
    content = build(pairs=pairs, infos=infos)
    path.write_bytes(content)
    gguf.open_file(path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(FormatError):
            gguf.open_file(path)


def test_many_array_elements_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound counts all arrays together."""
    monkeypatch.setattr(gguf, "MAX_ARRAY_ELEMENTS", 10)
    pairs = [pair(key, 9, array(0, 6, b"\0" * 6)) for key in ("a", "b")]
    path = tmp_path / "one.gguf"
    path.write_bytes(build(pairs=pairs[:1]))
    assert gguf.open_file(path).metadata == {"a": [0] * 6}
    refuse(tmp_path, build(pairs=pairs), "array elements in 'b'")


def test_a_header_beyond_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 100)
    refuse(tmp_path, build(pairs=[pair("k", 8, text("x" * 200))]), "beyond reason")


def test_odd_bytes_in_text(tmp_path: Path) -> None:
    """Tokens keep theirs, so that none is lost; text for people gets a replacement character."""
    odd = b"Z\xfcrich"
    pairs = [
        pair("general.name", 8, text(odd)),
        pair("general.tags", 9, array(8, 1, text(odd))),
        pair("tokenizer.chat_template", 8, text(odd)),
        pair("tokenizer.ggml.tokens", 9, array(8, 1, text(odd))),
    ]
    path = tmp_path / "odd.gguf"
    path.write_bytes(build(pairs=pairs))
    metadata = gguf.open_file(path).metadata
    (token,) = metadata["tokenizer.ggml.tokens"]
    assert token.encode("utf-8", "surrogateescape") == odd
    assert metadata["general.name"] == "Z\ufffdrich"
    assert metadata["general.tags"] == ["Z\ufffdrich"]
    assert metadata["tokenizer.chat_template"] == "Z\ufffdrich"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        gguf.open_file(tmp_path)
    with pytest.raises(ModelNotFoundError):
        gguf.open_file(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError):
        gguf.open_file(tmp_path / "model.gguf" / "below-a-file.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        gguf.open_file(tmp_path / "pipe.gguf")


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 0)() == 0, reason="permissions do not bind this user"
)
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "closed.gguf"
    path.write_bytes(build())
    path.chmod(0)
    with pytest.raises(AccessError):
        gguf.open_file(path)


# --- fuzz -----------------------------------------------------------------------------------------

INTERESTING = [0, 1, 7, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, HUGE]


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("seed") / "seed.gguf"
    write_valid(path)
    return path.read_bytes()


@st.composite
def mutations(draw: st.DrawFn, size: int) -> list[tuple[int, bytes]]:
    """Some places (the header more often than the data) and what to overwrite them with."""
    place = st.integers(0, 1700) | st.integers(0, size - 1)
    overwrite = (
        st.binary(min_size=1, max_size=4)
        | st.sampled_from(INTERESTING).map(lambda n: struct.pack("<Q", n))
        | st.sampled_from(INTERESTING).map(lambda n: struct.pack("<I", n % 2**32))
    )
    return draw(st.lists(st.tuples(place, overwrite), min_size=1, max_size=6))


def touch_everything(stored: StoredFile) -> None:
    for tensor in stored.tensors.values():
        assert tensor.raw().shape == tensor.codec.stored_shape(tensor.shape)
        assert tensor.read().shape == tensor.shape
    stored.forget()


@given(data=st.data())
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_files_end_in_a_typed_error(
    tmp_path: Path, seed_file: bytes, data: st.DataObject
) -> None:
    content = bytearray(seed_file)
    for place, overwrite in data.draw(mutations(len(content))):
        content[place : place + len(overwrite)] = overwrite
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with bounded_memory():
        try:
            stored = gguf.open_file(path)
        except EarnestError as error:
            assert len(str(error)) < 3000
            return
        touch_everything(stored)


@given(content=st.binary(max_size=200))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_noise_behind_the_magic_ends_in_a_typed_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + content)
    with bounded_memory():
        try:
            stored = gguf.open_file(path)
        except FormatError:
            return
        touch_everything(stored)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(shapes=st.lists(shapes, max_size=6), alignment=st.sampled_from([None, 8, 32, 256]))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_is_written_is_read(
    tmp_path: Path, shapes: list[list[int]], alignment: int | None
) -> None:
    path = tmp_path / "any.gguf"
    writer = GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    rng = np.random.default_rng(len(shapes))
    arrays = {f"t{i}": rng.normal(size=s).astype(np.float32) for i, s in enumerate(shapes)}
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    finish(writer)
    stored = gguf.open_file(path)
    assert list(stored.tensors) == list(arrays)
    for name, values in arrays.items():
        assert np.array_equal(stored.tensors[name].read(), values)
