"""The GGUF writer: read back by the `gguf` package and by our reader; interrupted and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest import codecs
from earnest.checkpoint.containers import gguf as reader
from earnest.checkpoint.containers import sequential
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.containers.gguf_writer import file_bytes, write_file
from earnest.codecs.base import Raw
from earnest.errors import EarnestError, FormatError

METADATA: dict[str, Any] = {
    "general.architecture": "ernie4_5",
    "a.text": "grüße 文心 \N{ROCKET}",
    "a.empty": "",
    "a.yes": True,
    "a.no": False,
    "a.count": 103_424,
    "a.large": 2**32 - 1,
    "a.huge": 2**40,
    "a.negative": -5,
    "a.most_negative": -(2**63),
    "a.float": 0.5,
    "a.integral_float": 2.0,
    "a.texts": ["x", "", "文"],
    "a.nothing": [],
    "a.numbers": [1, -2, 3],
    "a.large_numbers": [1, 2**31],
    "a.floats": [0.5, 2.0],
    "a.flags": [True, False],
    "a.nested": [[1, 2], [3]],
    "a.types": np.array([1, 6], np.int32),
    "a.scores": np.array([-0.5, 2], np.float32),
    "a.bytes": np.array([1, 255], np.uint8),
    "a.doubles": np.array([0.1], np.float64),
}
TYPES = {
    "a.yes": "BOOL",
    "a.count": "UINT32",
    "a.large": "UINT32",
    "a.huge": "UINT64",
    "a.negative": "INT32",
    "a.most_negative": "INT64",
    "a.float": "FLOAT32",
    "a.integral_float": "FLOAT32",
    "a.numbers": "INT32",
    "a.large_numbers": "UINT32",
    "a.floats": "FLOAT32",
    "a.flags": "BOOL",
    "a.texts": "STRING",
    "a.types": "INT32",
    "a.scores": "FLOAT32",
    "a.bytes": "UINT8",
    "a.doubles": "FLOAT64",
}


def planned(name: str, codec: str, shape: tuple[int, ...], seed: int = 0) -> PlannedTensor:
    """A tensor of random bytes, given in several blocks."""
    kind = codecs.codec(codec)
    raw = np.random.default_rng(seed).integers(0, 255, (*shape[:-1], kind.row_bytes(shape[-1])))
    stored = raw.astype(np.uint8).view(kind.storage)

    def blocks() -> Iterator[Raw]:
        rows = stored.reshape(-1, stored.shape[-1])
        for start in range(0, len(rows), 3):
            yield rows[start : start + 3]

    return PlannedTensor(name, kind, shape, blocks)


def plan() -> list[PlannedTensor]:
    return [
        planned("token_embd.weight", "q6_k", (10, 256), 1),
        planned("norm.weight", "f32", (5,), 2),
        planned("odd.weight", "bf16", (3, 7), 3),
        planned("experts.weight", "q4_0", (4, 6, 64), 4),
        planned("half.weight", "f16", (2, 9), 5),
        planned("last.weight", "iq4_nl", (1, 32), 6),
    ]


def contents(tensor: PlannedTensor) -> bytes:
    return b"".join(block.tobytes() for block in tensor.blocks())


def test_our_reader_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    seen: list[tuple[int, int]] = []
    resumed = write_file(path, plan(), METADATA, lambda done, total, _: seen.append((done, total)))
    assert not resumed and [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    stored = reader.open_file(path)
    assert list(stored.tensors) == [tensor.name for tensor in plan()]
    for tensor in plan():
        found = stored.tensors[tensor.name]
        assert (found.codec, found.shape) == (tensor.codec, tensor.shape)
        assert found.raw().tobytes() == contents(tensor)
    for key, value in METADATA.items():
        wanted = value.tolist() if isinstance(value, np.ndarray) else value
        assert stored.metadata[key] == wanted and type(stored.metadata[key]) is type(wanted)
    total = sum(tensor.nbytes for tensor in plan())
    assert seen[-1] == (total, total) and sorted(seen) == seen
    assert path.stat().st_size == file_bytes(plan(), METADATA)


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    # The package cannot read nested arrays and arrays without elements.
    metadata = {k: v for k, v in METADATA.items() if k not in ("a.nested", "a.nothing")}
    write_file(path, plan(), metadata)
    theirs = gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == [tensor.name for tensor in plan()]
    for tensor, found in zip(plan(), theirs.tensors, strict=True):
        assert found.data.tobytes() == contents(tensor)
        assert tuple(found.shape[::-1]) == tensor.shape
        assert found.tensor_type == codecs.to_ggml(tensor.codec)
        assert found.data_offset % 32 == 0
    for key, value in metadata.items():
        field = theirs.fields[key]
        wanted = value.tolist() if isinstance(value, np.ndarray) else value
        assert field.contents() == wanted
        if key in TYPES:
            assert field.types[-1] == gguf.GGUFValueType[TYPES[key]]


def test_bytes_that_are_not_text_survive(tmp_path: Path) -> None:
    tokens = ["ok", b"\xe6\x96".decode("utf-8", "surrogateescape")]
    write_file(tmp_path / "m.gguf", [], {"tokenizer.ggml.tokens": tokens})
    assert reader.open_file(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"] == tokens


keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
numbers = st.integers(-(2**63), 2**64 - 1)
reals = st.floats(width=32, allow_nan=False)
values = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.booleans(),
    numbers,
    reals,
    st.lists(st.text(st.characters(codec="utf-8"))),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1),
    st.lists(reals, min_size=1),
)


@settings(max_examples=60, deadline=None)
@given(metadata=st.dictionaries(keys.filter(lambda k: k != "general.alignment"), values))
def test_any_metadata(metadata: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    write_file(path, [planned("w", "f32", (2, 2))], metadata)
    assert reader.open_file(path).metadata == metadata


@pytest.mark.parametrize(
    "value",
    [None, 2**64, -(2**63) - 1, b"bytes", {"a": 1}, [1, "x"], [None], np.zeros((2, 2)), ["a", 1]],
)
def test_values_without_a_type_are_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.key"):
        write_file(tmp_path / "m.gguf", [], {"a.key": value})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([planned("w", "f32", (2,)), planned("w", "f32", (2,))], "two tensors are called w"),
        ([planned("w", "f8_e4m3", (2,))], "f8_e4m3"),
        ([planned("w", "f32", (1, 1, 1, 1, 2))], "cannot hold w"),
        ([planned("w", "f32", (0, 2))], "cannot hold w"),
        ([PlannedTensor("w", codecs.codec("q4_0"), (2, 33), lambda: iter(()))], "whole blocks"),
    ],
)
def test_tensors_without_a_place_are_refused(
    tensors: list[PlannedTensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        write_file(tmp_path / "m.gguf", tensors, {})


def test_blocks_must_add_up(tmp_path: Path) -> None:
    short = PlannedTensor("w", codecs.codec("f32"), (4,), lambda: iter([np.zeros(3, np.float32)]))
    long = PlannedTensor("w", codecs.codec("f32"), (4,), lambda: iter([np.zeros(5, np.float32)]))
    other = PlannedTensor("w", codecs.codec("f32"), (4,), lambda: iter([np.zeros(2, np.float64)]))
    for tensor in (short, long, other):
        with pytest.raises(FormatError, match="do not make up"):
            write_file(tmp_path / "m.gguf", [tensor], {})


def test_another_alignment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="alignment"):
        write_file(tmp_path / "m.gguf", [], {"general.alignment": 64})


# --- interruption -------------------------------------------------------------------------------


class HalfWayError(EarnestError):
    """What a run that fails half-way looks like from inside."""


def counting(tensors: list[PlannedTensor], read: list[str], fail_at: str = "") -> Any:
    def watched(tensor: PlannedTensor) -> PlannedTensor:
        def blocks() -> Iterator[Raw]:
            read.append(tensor.name)
            for number, block in enumerate(tensor.blocks()):
                if tensor.name == fail_at and number == 1:
                    raise HalfWayError("half-way")
                yield block

        return PlannedTensor(tensor.name, tensor.codec, tensor.shape, blocks)

    return [watched(tensor) for tensor in tensors]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "_SYNC_BYTES", 1)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    write_file(tmp_path / "whole.gguf", plan(), METADATA)
    return (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.usefixtures("synced")
def test_an_interrupted_run_is_continued(tmp_path: Path, whole: bytes) -> None:
    path, read = tmp_path / "model.gguf", []
    with pytest.raises(HalfWayError):
        write_file(path, counting(plan(), [], "experts.weight"), METADATA)
    assert write_file(path, counting(plan(), read), METADATA)
    assert read == ["experts.weight", "half.weight", "last.weight"]
    assert path.read_bytes() == whole
    assert not path.with_name("model.gguf.done").exists()


@pytest.mark.usefixtures("synced")
@pytest.mark.parametrize(
    "damage", ["other metadata", "other tensors", "cut", "no record", "odd record", "far record"]
)
def test_what_does_not_fit_is_begun_anew(damage: str, tmp_path: Path, whole: bytes) -> None:
    path, record = tmp_path / "model.gguf", tmp_path / "model.gguf.done"
    metadata, tensors = dict(METADATA), plan()
    if damage == "other metadata":
        metadata["a.count"] = 7
    if damage == "other tensors":
        tensors[1] = planned("norm.weight", "f16", (5,))
    with pytest.raises(HalfWayError):
        write_file(path, counting(tensors, [], "experts.weight"), metadata)
    assert record.read_text() == "3"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    if damage == "no record":
        record.unlink()
    if damage == "odd record":
        record.write_bytes(b"3\xff")
    if damage == "far record":
        record.write_text("9")
    read: list[str] = []
    assert not write_file(path, counting(plan(), read), METADATA)
    assert len(read) == len(plan()) and path.read_bytes() == whole


def test_errors_are_typed(tmp_path: Path) -> None:
    with pytest.raises(EarnestError):
        write_file(tmp_path / "absent" / "m.gguf", plan(), METADATA)
