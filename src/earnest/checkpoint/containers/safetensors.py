"""The safetensors container: one file, or a folder of shards under an index.

The reader is our own, because nothing in a file from the internet is to be believed: the header's
length, the JSON, each dtype, shape and offset are checked before anything is sized by them, and the
tensors must tile the data exactly: no overlap, no hole, no rest. What passes is handed out as views
of one read-only memory map. Format: 8 bytes little-endian header length N, N bytes of JSON, data.

Files that pickle data (`pytorch_model.bin` and its kin) are refused: opening one can run code.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from earnest.checkpoint.containers.base import (
    PlannedTensor,
    StoredFile,
    map_file,
    mapped_tensor,
    stream,
)
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs import Codec, from_safetensors, to_safetensors
from earnest.errors import FormatError, TensorsError
from earnest.files import machine_errors, parse_json_object, read_json, staged_file, write_json
from earnest.log import Progress, silent

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The format allows 100 MB. The header of the largest published shard has 0.5 MB, and the Python
# objects of hostile JSON take up to 20 times the memory of its text.
MAX_HEADER_BYTES = 32 * 2**20
MAX_INDEX_BYTES = 32 * 2**20
_MAX_RANK = 8
_MAX_WEIGHTS = 2**48  # numpy must be able to count the bytes in 64 bits

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".pkl", ".pickle", ".npz")
_MAGICS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"PK\x05\x06": "a zip archive",
    b"\x80\x02": "a pickle, as torch.save and paddle.save write",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


def open_file(path: Path) -> StoredFile:
    """One safetensors file; its header is read and checked, its data is not touched.

    Raises:
        FormatError: it does not follow the format in any respect, or is a pickle or an archive.
        ModelNotFoundError, AccessError, MachineError: it cannot be opened.
    """
    if path.suffix in _PICKLED:
        raise _refuse_pickle(path, f"a {path.suffix} file")
    mapped = map_file(path)
    for magic, kind in _MAGICS.items():
        # The header of a real file this long would exceed its bound, so no real file is caught,
        # but for the pickles' two bytes: there the `{` of a header tells.
        if mapped[: len(magic)] == magic and mapped[8:9] != b"{":
            raise _refuse_pickle(path, kind)
    header, start = _header(path, mapped)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ is not a table of strings")
    entries = [(name, *_entry(path, name, entry)) for name, entry in header.items()]
    _check_tiling(path, [(begin, end, name) for name, _, _, begin, end in entries], start, mapped)
    data = np.frombuffer(mapped, dtype=np.uint8)
    tensors: dict[str, LazyTensor] = {}
    for name, dtype, shape, begin, end in entries:
        codec = _codec(path, name, dtype)
        if prod(shape) * codec.block_bytes != end - begin:
            raise FormatError(
                f"{path}: tensor {name!r:.200} has a size that contradicts its shape",
                got=f"{end - begin:,} bytes for {dtype} {list(shape)}",
                expected=f"{prod(shape) * codec.block_bytes:,} bytes",
            )
        origin = f"{path}:{name}"
        tensors[name] = mapped_tensor(name, codec, shape, data, start + begin, origin)
    offsets = {name: start + begin for name, _, _, begin, _ in entries}
    return StoredFile(path, tensors, metadata, (mapped,), offsets)


def _refuse_pickle(path: Path, kind: str) -> FormatError:
    return FormatError(
        f"{path} is {kind}: opening it can run code of whoever wrote it, so Earnest never does",
        expected="a .safetensors or .gguf file, or a folder of .safetensors files",
        remedy="take the model's safetensors files; published ERNIE 4.5 repositories have them",
    )


def _header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header's JSON and the offset at which the data begins."""
    size = len(mapped)
    if size < 8:
        raise FormatError(f"{path} is too short", got=f"{size} bytes", expected="at least 8")
    if mapped[:4] == b"GGUF":
        raise FormatError(
            f"{path} is a GGUF file under another name", remedy="rename it to end in .gguf"
        )
    (length,) = struct.unpack("<Q", mapped[:8])
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise FormatError(
            f"{path}: the header's length is impossible",
            got=f"{length:,} bytes in a file of {size:,}",
            expected=f"at most {min(size - 8, MAX_HEADER_BYTES):,}",
            remedy="download the file again; it is cut off, or is no safetensors file",
        )
    return parse_json_object(mapped[8 : 8 + length], f"{path} (header)", unique=True), 8 + length


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry, each of the right type and sane."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
            all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
        ):
            pass
        case _:
            raise FormatError(
                f"{path}: the header's entry for {name!r:.200} is malformed",
                got=f"{entry!r:.200}",
                expected='{"dtype": name, "shape": [sizes], "data_offsets": [begin, end]}',
            )
    # Sizes of zero must not hide the others in the product: numpy multiplies the others too.
    if len(shape) > _MAX_RANK or prod(n for n in shape if n) > _MAX_WEIGHTS:
        raise FormatError(
            f"{path}: tensor {name!r:.200} has an absurd shape",
            got=f"{shape!r:.200}",
            expected=f"at most {_MAX_RANK} axes and 2**48 weights",
        )
    return dtype, tuple(shape), begin, end


def _codec(path: Path, name: str, dtype: str) -> Codec:
    try:
        return from_safetensors(dtype)
    except FormatError as error:
        raise FormatError(
            f"{path}: tensor {name!r:.200}: {error.problem}", got=error.got, expected=error.expected
        ) from error


def _check_tiling(
    path: Path, spans: list[tuple[int, int, str]], start: int, mapped: mmap.mmap
) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    position, before = 0, "the start of the data"
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps with" if begin < position else "leaves a hole after"
            raise FormatError(
                f"{path}: tensor {name!r:.200} {kind} {before:.200}",
                got=f"begin at byte {begin:,}",
                expected=f"{position:,}",
            )
        position, before = end, repr(name)
    size = len(mapped) - start
    if position != size:
        raise FormatError(
            f"{path} is cut off" if position > size else f"{path} has bytes after its last tensor",
            got=f"{size:,} bytes of data",
            expected=f"{position:,}, as its header says",
            remedy="download the file again",
        )


# --- folders ----------------------------------------------------------------------------------


def open_folder(path: Path) -> StoredFile:
    """All tensors of a folder: `model.safetensors`, or the shards of its index, or its only
    safetensors file. (A complete single file goes before an index, as in transformers.)

    Raises:
        FormatError: no weights, pickles only, several files and no index, an index that names
            files outside the folder, or a broken file.
        TensorsError: shards are missing, a tensor is not where the index says, or comes twice.
        ModelNotFoundError, AccessError, MachineError: something cannot be opened.
    """
    with machine_errors(path, "reading"):
        names = sorted(entry.name for entry in path.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if SINGLE in found:
        return open_file(path / SINGLE)
    if INDEX in names:
        return _open_shards(path, names)
    if len(found) == 1:
        return open_file(path / found[0])
    if found:
        raise FormatError(
            f"{path} holds {len(found)} safetensors files and no {INDEX}",
            got=", ".join(found[:5]),
            remedy="download the index file too, or name one file",
        )
    pickles = [name for name in names if name.endswith(_PICKLED)]
    if pickles:
        raise _refuse_pickle(path / pickles[0], "the only kind of weights in its folder, a pickle")
    raise FormatError(
        f"{path} holds no weights",
        got=", ".join(names[:8]) or "an empty folder",
        expected=f"{SINGLE}, {INDEX} with its shards, or a .gguf file",
        remedy="download the model again, with its large files",
    )


def _open_shards(path: Path, names: list[str]) -> StoredFile:
    weight_map = _weight_map(path / INDEX)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if shard not in names]:
        raise TensorsError(
            f"{path}: {len(missing)} of {len(shards)} files that {INDEX} names are missing",
            got=_some(missing),
            remedy="download the missing files",
        )
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, Any] = {}
    maps: list[mmap.mmap] = []
    offsets: dict[str, int] = {}
    homes: dict[str, str] = {}
    twice: list[str] = []
    for shard in shards:
        opened = open_file(path / shard)
        twice += [
            f"{name} (in {homes[name]} and {shard})" for name in opened.tensors.keys() & homes
        ]
        tensors |= opened.tensors
        metadata = opened.metadata | metadata
        maps += opened.maps
        offsets |= opened.offsets
        homes |= dict.fromkeys(opened.tensors, shard)
    astray = [
        f"{name} (not in {shard})" for name, shard in weight_map.items() if homes.get(name) != shard
    ]
    if twice or astray:
        raise TensorsError(
            f"{path}: the files contradict {INDEX}",
            got="; ".join(
                f"{len(bad)} tensors {what}: {_some(bad)}"
                for bad, what in ((sorted(twice), "come twice"), (astray, "are not where it says"))
                if bad
            ),
            remedy="the folder mixes files of different downloads; download it again",
        )
    return StoredFile(path, tensors, metadata, tuple(maps), offsets)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name; only plain names of files inside the folder pass."""
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{index} has no weight_map",
            got=type(weight_map).__name__,
            expected="a table of tensor names and file names",
        )
    for name, shard in weight_map.items():
        if not _is_plain_name(shard):
            raise FormatError(
                f"{index}: tensor {name!r:.200} is said to be in a file that is not a safetensors "
                "file of this folder",
                got=f"{shard!r:.200}",
                expected="the name of a .safetensors file beside the index",
            )
    return weight_map


def _is_plain_name(shard: object) -> bool:
    """A file name and nothing else. What a name links to is the business of whoever made the link:
    the Hugging Face cache links every file of a snapshot to a folder of blobs."""
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and len(shard) <= 255
        and not any(c in shard for c in "/\\:\0")
        and shard.isprintable()
    )


def _some(names: Sequence[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(islice(names, limit)) + (f" and {rest:,} more" if rest > 0 else "")


# --- writing ----------------------------------------------------------------------------------


def write_shard(
    path: Path,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> None:
    """Write one file, streaming the tensors' blocks; it appears when it is complete.

    Tensors of wider numbers go first (else in the given order), so that every tensor is aligned:
    PyTorch's reader needs that.

    Args:
        path: the file; replaced if it exists.
        tensors: what to write.
        metadata: strings for the header; `format: pt` unless given, which transformers asks for.
        progress: told about bytes of data written.

    Raises:
        FormatError: safetensors cannot hold a codec, a name comes twice, or the blocks of a tensor
            do not add up to its size.
        DiskFullError, AccessError, MachineError: it cannot be written; no trace is left.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.codec.storage.itemsize)
    head = encode_header(path, ordered, metadata)
    total, done = sum(tensor.nbytes for tensor in ordered), 0
    with staged_file(path) as file:
        file.write(head)
        for tensor, block in stream(path, ordered):
            if block is not None:
                file.write(block)
                done += block.nbytes
                progress(done, total, tensor.name)
    progress(total, total, path.name)


def encode_header(
    path: Path,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, str] | None,
    multiple: int = 8,
) -> bytes:
    """Everything before the data, which begins at a multiple of `multiple` bytes.

    Raises:
        FormatError: safetensors cannot hold a codec, or a name comes twice.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for tensor in tensors:
        if tensor.name in header:
            raise FormatError(f"{path}: two tensors are called {tensor.name}")
        layout = tensor.layout
        header[tensor.name] = {
            "dtype": "U8" if layout else to_safetensors(tensor.codec),
            "shape": list(layout.shape(*tensor.shape) if layout else tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % multiple)
    return struct.pack("<Q", len(text)) + text


def plan_shards(
    tensors: Sequence[PlannedTensor], shard_bytes: int
) -> list[tuple[str, list[PlannedTensor]]]:
    """Tensors in order, split into files of at most `shard_bytes` (or of one larger tensor), under
    the names that transformers expects."""
    groups: list[list[PlannedTensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    count = len(groups)
    return [
        (f"model-{n:05d}-of-{count:05d}.safetensors", group) for n, group in enumerate(groups, 1)
    ]


def write_index(folder: Path, shards: Sequence[tuple[str, Sequence[PlannedTensor]]]) -> None:
    """Write the index of sharded files; does nothing for a single file, which needs none.

    Raises:
        DiskFullError, AccessError, MachineError: it cannot be written.
    """
    if len(shards) == 1:
        return
    total = sum(tensor.nbytes for _, group in shards for tensor in group)
    weight_map = {tensor.name: name for name, group in shards for tensor in group}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_shards(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Write tensors to a folder as one or several files with an index; returns the file names.

    A file of that name that an earlier, interrupted run completed (same header, right size) is
    kept: `folder` must be one that only runs with the same input write to (`StagedFolder`).

    Raises:
        FormatError, DiskFullError, AccessError, MachineError: as `write_shard`.
    """
    shards = plan_shards(tensors, shard_bytes)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    for name, group in shards:
        if not _is_complete(folder / name, group, metadata):
            write_shard(folder / name, group, metadata, _shifted(progress, done, total))
        done += sum(tensor.nbytes for tensor in group)
        progress(done, total, name)
    write_index(folder, shards)
    return [name for name, _ in shards]


def _shifted(progress: Progress, before: int, whole: int) -> Progress:
    def shifted(done: int, total: int, what: str) -> None:
        progress(before + done, whole, what)

    return shifted


def _is_complete(
    path: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str] | None
) -> bool:
    ordered = sorted(tensors, key=lambda tensor: -tensor.codec.storage.itemsize)
    head = encode_header(path, ordered, metadata)
    with machine_errors(path, "reading"):
        if not path.is_file():
            return False
        if path.stat().st_size != len(head) + sum(tensor.nbytes for tensor in tensors):
            return False
        with path.open("rb") as file:
            return file.read(len(head)) == head
