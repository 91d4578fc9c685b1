"""The safetensors container: equal to the reference library, and unmoved by hostile files."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from earnest.checkpoint.containers import safetensors as container
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.codecs import codec
from earnest.errors import (
    AccessError,
    EarnestError,
    FormatError,
    ModelNotFoundError,
    TensorsError,
)

STORAGE = {
    "f64": "<f8",
    "f32": "<f4",
    "f16": "<f2",
    "i64": "<i8",
    "i32": "<i4",
    "i16": "<i2",
    "i8": "|i1",
    "u8": "|u1",
    "u16": "<u2",
    "bool": "|b1",
}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def planned(name: str, array: np.ndarray, codec_name: str, rows: int = 2) -> PlannedTensor:
    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, max(1, len(array)), rows):
            yield array[start : start + rows]

    return PlannedTensor(name, codec(codec_name), array.shape, blocks)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], storage: str) -> np.ndarray:
    if storage == "|b1":
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    return np.asarray(rng.standard_normal(shape) * 50).astype(storage)


# --- against the reference library --------------------------------------------------------------


@pytest.mark.parametrize("name", STORAGE)
def test_reads_what_the_reference_library_writes(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"t{n}": random_array(rng, shape, STORAGE[name])
        for n, shape in enumerate([(3, 5), (7,), (), (2, 3, 4), (0, 4)])
    }
    save_file(arrays, tmp_path / "a.safetensors", {"format": "pt", "note": "汉字"})
    opened = container.open_file(tmp_path / "a.safetensors")
    assert opened.metadata == {"format": "pt", "note": "汉字"}
    assert opened.tensors.keys() == arrays.keys()
    for key, array in arrays.items():
        tensor = opened.tensors[key]
        assert (tensor.shape, tensor.codec.name, tensor.nbytes) == (array.shape, name, array.nbytes)
        np.testing.assert_array_equal(tensor.raw().view(array.dtype), array)
        assert not tensor.raw().flags.writeable


def test_reads_and_writes_bf16_as_torch_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    x = torch.randn(5, 7)
    tensors = {"b": x.to(torch.bfloat16), "f": x, "e": x.to(torch.float8_e4m3fn)}
    save_torch(tensors, tmp_path / "a.safetensors")
    opened = container.open_file(tmp_path / "a.safetensors")
    for key in tensors:
        np.testing.assert_array_equal(opened.tensors[key].read(), tensors[key].float().numpy())
    plan = [planned(k, t.raw(), t.codec.name) for k, t in sorted(opened.tensors.items())]
    container.write_shard(tmp_path / "b.safetensors", plan)
    for key, tensor in load_file(tmp_path / "b.safetensors").items():
        assert tensor.dtype == tensors[key].dtype
        assert torch.equal(tensor.float(), tensors[key].float())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(STORAGE)),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        ),
        max_size=6,
    ),
    st.integers(1, 200),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_reference_library_reads_what_is_written(
    tmp_path: Path, kinds: list[tuple[str, tuple[int, ...]]], shard_bytes: int
) -> None:
    rng = np.random.default_rng(1)
    arrays = {f"n{i}": random_array(rng, s, STORAGE[k]) for i, (k, s) in enumerate(kinds)}
    plan = [
        PlannedTensor(
            name,
            codec(kind),
            a.shape,
            lambda a=a, kind=kind: (
                iter([a.view(codec(kind).storage) if a.size else a[:0].view("u1")])
                if kind == "bool"
                else iter([a])
            ),
        )
        for (name, a), (kind, _) in zip(arrays.items(), kinds, strict=True)
    ]
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    names = container.write_shards(folder, plan, shard_bytes)
    found = {}
    for name in names:
        with safe_open(folder / name, "np") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)
    assert container.open_folder(folder).tensors.keys() == arrays.keys()


def test_every_written_tensor_is_aligned(tmp_path: Path) -> None:
    plan = [
        planned("a", np.ones((3, 1), "<u2"), "bf16"),
        planned("b", np.ones((1,), "|i1"), "i8"),
        planned("c", np.ones((3, 1), "<f4"), "f32"),
    ]
    container.write_shard(tmp_path / "a.safetensors", plan)
    opened = container.open_file(tmp_path / "a.safetensors")
    assert list(opened.tensors) == ["c", "a", "b"]
    assert all(tensor.raw().flags.aligned for tensor in opened.tensors.values())


# --- hostile headers ----------------------------------------------------------------------------

F4 = b"\0" * 16  # data of one float32 [4]

HOSTILE: dict[str, tuple[Any, bytes]] = {
    "header is no JSON": (b"{'a': 1}", b""),
    "header is a list": ([], b""),
    "header is not UTF-8": (b'{"\xff": 1}', b""),
    "nested beyond reason": (b'{"a":' + b"[" * 100_000, b""),
    "a number of many digits": (b'{"a":' + b"9" * 10_000 + b"}", b""),
    "key twice": (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        F4,
    ),
    "key twice in an entry": (
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[4],"data_offsets":[0,16]}}',
        F4,
    ),
    "metadata is a list": ({"__metadata__": []}, b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "entry is a number": ({"a": 1}, b""),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, F4),
    "unknown dtype": ({"a": entry([4], 0, 16, "Q7_Z")}, F4),
    "dtype is a list": ({"a": entry([4], 0, 16, ["F32"])}, F4),  # type: ignore[arg-type]
    "negative size": ({"a": entry([-4], 0, 16)}, F4),
    "two negative sizes": ({"a": entry([-2, -2], 0, 16)}, F4),
    "size is a float": ({"a": entry([4.0], 0, 16)}, F4),
    "size is true": ({"a": entry([True, 4], 0, 16)}, F4),
    "size is infinite": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}', F4),
    "product overflows 64 bits to 4": (
        {"a": entry([2**32, 2**32, 4], 0, 16), "b": entry([], 16, 20)},
        F4 + F4[:4],
    ),
    "product overflows behind a zero": ({"a": entry([0, 2**40, 2**40], 0, 0)}, b""),
    "too many axes": ({"a": entry([1] * 100, 0, 4)}, F4[:4]),
    "size larger than offsets": ({"a": entry([5], 0, 16)}, F4),
    "size smaller than offsets": ({"a": entry([3], 0, 16)}, F4),
    "offsets reversed": ({"a": entry([4], 16, 0)}, F4),
    "offsets negative": ({"a": entry([4], -16, 0)}, F4),
    "offsets are three": ({"a": {**entry([4], 0, 16), "data_offsets": [0, 8, 16]}}, F4),
    "offsets beyond the file": ({"a": entry([4], 0, 16)}, F4[:15]),
    "offsets of 2**63": ({"a": entry([4], 2**63, 2**63 + 16)}, F4),
    "overlap": ({"a": entry([4], 0, 16), "b": entry([2], 8, 16)}, F4),
    "the same bytes twice": ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, F4),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([2], 8, 16)}, F4),
    "a hole at the start": ({"a": entry([2], 8, 16)}, F4),
    "bytes after the last tensor": ({"a": entry([4], 0, 16)}, F4 + b"\0"),
    "data without tensors": ({}, F4),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data = HOSTILE[case]
    with pytest.raises(FormatError):
        container.open_file(write(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 0),
        b"GGUF\3\0\0\0" + b"\0" * 64,
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    ],
)
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        container.open_file(path)


def test_zero_sizes_are_no_hole(tmp_path: Path) -> None:
    header = {
        "b": entry([2], 0, 8),
        "z": entry([0, 7], 8, 8),
        "a": entry([2], 8, 16),
        "y": entry([3, 0], 16, 16),
    }
    opened = container.open_file(write(tmp_path / "a.safetensors", header, F4))
    assert {n: t.read().shape for n, t in opened.tensors.items()} == {
        "b": (2,),
        "z": (0, 7),
        "a": (2,),
        "y": (3, 0),
    }


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.mark,))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_state.pdparams", "a.safetensors"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(str(tmp_path / "mark")), protocol))
    with pytest.raises(FormatError, match="can run code"):
        container.open_file(path)
    if not name.endswith(".safetensors"):
        with pytest.raises(FormatError, match="can run code"):
            container.open_folder(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    with pytest.raises(FormatError, match="can run code"):
        container.open_file(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "pipe.safetensors", tmp_path / "folder.safetensors", Path("/dev/zero")):
        with pytest.raises(FormatError, match="regular"):
            container.open_file(path)
    with pytest.raises(ModelNotFoundError):
        container.open_file(tmp_path / "absent.safetensors")
    with pytest.raises(ModelNotFoundError):
        container.open_folder(tmp_path / "absent")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {})
    path.chmod(0)
    with pytest.raises(AccessError):
        container.open_file(path)


# --- fuzz ---------------------------------------------------------------------------------------


def seed_file(folder: Path) -> bytes:
    path = folder / "seed"
    arrays = {
        "model.norm.weight": np.arange(6, dtype="<f4"),
        "model.embed_tokens.weight": np.arange(20, dtype="<f2").reshape(5, 4),
        "empty": np.zeros((0, 3), "<f4"),
    }
    save_file(arrays, path, {"format": "pt"})
    return path.read_bytes()


def open_or_refuse(path: Path) -> None:
    """Opens and reads all of it, or raises a typed error; nothing else, and in little memory."""
    tracemalloc.start()
    try:
        opened = container.open_file(path)
        for tensor in opened.tensors.values():
            assert tensor.raw().shape == tensor.shape
        assert sum(t.nbytes for t in opened.tensors.values()) < path.stat().st_size
    except EarnestError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20 + 30 * path.stat().st_size


NUMBERS = st.sampled_from(
    [
        *("0", "-1", "1", "7", "65536", f"{2**31}", f"{2**63 - 1}", f"{2**64}", "9" * 5000),
        *("1e999", "NaN", '"x"', "null", "true", "[]"),
    ]
)


@given(st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fuzzed_bytes(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(seed_file(tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["byte", "cut", "insert", "delete", "swap"])):
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[max(at, 1) :]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=9))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "swap":
                other = data.draw(st.integers(0, len(content) - 1))
                content[at], content[other] = content[other], content[at]
        if not content:
            content = bytearray(b"\0")
    (tmp_path / "a.safetensors").write_bytes(content)
    open_or_refuse(tmp_path / "a.safetensors")


@given(st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fuzzed_numbers(tmp_path: Path, data: st.DataObject) -> None:
    content = seed_file(tmp_path)
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode()
    numbers = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isdigit()]
    at = data.draw(st.sampled_from(numbers))
    end = at
    while text[end].isdigit():
        end += 1
    header = (text[:at] + data.draw(NUMBERS) + text[end:]).encode()
    open_or_refuse(write(tmp_path / "a.safetensors", header, content[8 + length :]))


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
            ),
            max_leaves=8,
        ),
        max_size=4,
    )
)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fuzzed_json(tmp_path: Path, header: dict[str, Any]) -> None:
    open_or_refuse(write(tmp_path / "a.safetensors", header, F4))


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Four tensors in two files and their index."""
    arrays = {name: np.full((2, 2), n, "<f4") for n, name in enumerate("abcd")}
    plan = [planned(name, array, "f32") for name, array in arrays.items()]
    names = container.write_shards(tmp_path, plan, shard_bytes=32)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    return tmp_path


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / container.INDEX
    index = json.loads(path.read_text())
    for name, shard in changes.items():
        index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def test_a_sharded_folder(sharded: Path) -> None:
    opened = container.open_folder(sharded)
    assert {name: t.read()[0, 0] for name, t in opened.tensors.items()} == dict(
        zip("abcd", range(4), strict=True)
    )
    index = json.loads((sharded / container.INDEX).read_text())
    assert index["metadata"] == {"total_size": 64}
    opened.forget()
    assert opened.tensors["d"].read()[1, 1] == 3


def test_a_folder_of_links_into_a_cache(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    snapshot = tmp_path_factory.mktemp("hub") / "snapshots" / "0"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{n}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{n}")
    assert len(container.open_folder(snapshot).tensors) == 4


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "C:x.safetensors",
        "x.safetensors\0",
        "x\n.safetensors",
        "x" * 5000 + ".safetensors",
        "pytorch_model.bin",
        7,
        None,
        ["x.safetensors"],
        {},
    ],
)
def test_an_index_must_not_point_elsewhere(sharded: Path, name: Any) -> None:
    change_index(sharded, c=name)
    with pytest.raises(FormatError, match="not a safetensors file of this folder"):
        container.open_folder(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 1])
def test_an_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    (sharded / container.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="weight_map"):
        container.open_folder(sharded)


def test_missing_shards_are_listed_together(sharded: Path) -> None:
    change_index(
        sharded, e="model-00003-of-00004.safetensors", f="model-00004-of-00004.safetensors"
    )
    with pytest.raises(TensorsError, match=r"2 of 4 files.*\n.*00003-of-00004.*00004-of-00004"):
        container.open_folder(sharded)


def test_a_tensor_that_is_elsewhere(sharded: Path) -> None:
    change_index(
        sharded, a="model-00002-of-00002.safetensors", x="model-00001-of-00002.safetensors"
    )
    with pytest.raises(
        TensorsError, match=r"2 tensors are not where it says: a .*; x|2 tensors"
    ) as e:
        container.open_folder(sharded)
    assert "a (not in model-00002" in str(e.value) and "x (not in model-00001" in str(e.value)


def test_a_tensor_that_comes_twice(sharded: Path) -> None:
    (sharded / "extra.safetensors").write_bytes(
        (sharded / "model-00001-of-00002.safetensors").read_bytes()
    )
    change_index(sharded, z="extra.safetensors")
    with pytest.raises(TensorsError, match="come twice"):
        container.open_folder(sharded)


def test_several_files_and_no_index(sharded: Path) -> None:
    (sharded / container.INDEX).unlink()
    with pytest.raises(FormatError, match=r"no model\.safetensors\.index\.json"):
        container.open_folder(sharded)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert len(container.open_folder(sharded).tensors) == 2  # a single file needs no index


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no weights"):
        container.open_folder(tmp_path)
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(FormatError, match=r"no weights[^$]*README"):
        container.open_folder(tmp_path)


# --- writing ------------------------------------------------------------------------------------


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    plan = [planned(n, np.ones((4, 2), "<f4"), "f32") for n in "abc"]
    container.write_shards(tmp_path, plan, 64, progress=lambda *a: seen.append(a))
    done = [d for d, _, _ in seen]
    assert done == sorted(done) and seen[-1][0] == 96 and {t for _, t, _ in seen} == {96}


def test_a_complete_shard_is_kept_and_another_is_not(tmp_path: Path) -> None:
    calls: list[str] = []

    def plan(name: str, rows: int) -> PlannedTensor:
        def blocks() -> Iterator[np.ndarray]:
            calls.append(name)
            yield np.ones((rows, 2), "<f4")

        return PlannedTensor(name, codec("f32"), (rows, 2), blocks)

    container.write_shards(tmp_path, [plan("a", 4), plan("b", 4)], 32)
    container.write_shards(tmp_path, [plan("a", 4), plan("b", 4)], 32)
    assert calls == ["a", "b"]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"cut")
    container.write_shards(tmp_path, [plan("a", 4), plan("b", 4)], 32)
    assert calls == ["a", "b", "b"]
    container.write_shards(tmp_path, [plan("c", 4), plan("b", 4)], 32)
    assert calls == ["a", "b", "b", "c"]


@pytest.mark.parametrize(
    "blocks",
    [
        [np.ones((3, 2), "<f4")],
        [np.ones((4, 2), "<f4"), np.ones((1, 2), "<f4")],
        [np.ones((4, 2), "<i4")],
        [np.ones((2, 2), "<f8")],
        [],
    ],
)
def test_blocks_that_do_not_make_up_the_tensor(tmp_path: Path, blocks: list[np.ndarray]) -> None:
    plan = PlannedTensor("a", codec("f32"), (4, 2), lambda: iter(blocks))
    with pytest.raises(FormatError, match="do not make up"):
        container.write_shard(tmp_path / "a.safetensors", [plan])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(tmp_path: Path) -> None:
    a = planned("a", np.ones((4, 2), "<f4"), "f32")
    with pytest.raises(FormatError, match="two tensors"):
        container.write_shard(tmp_path / "a.safetensors", [a, a])
    block = PlannedTensor("q", codec("q4_0"), (1, 32), lambda: iter([np.zeros((1, 18), "u1")]))
    with pytest.raises(FormatError, match="q4_0"):
        container.write_shard(tmp_path / "a.safetensors", [block])
    assert list(tmp_path.iterdir()) == []
