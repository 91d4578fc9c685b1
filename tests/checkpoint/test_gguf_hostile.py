"""GGUF files that lie, are cut off or damaged: always a typed error, never much memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_files import Q4_0, Q8_0, array, build, finish, info, pair, text, write_valid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from earnest.checkpoint.containers import gguf
from earnest.checkpoint.containers.base import StoredFile
from earnest.errors import AccessError, EarnestError, FormatError, ModelNotFoundError


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
