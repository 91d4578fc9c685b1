"""GGUF files: one memory map, a typed header, tensors in ggml's block formats.

A reader of its own, since the one in the `gguf` package trusts what it reads. Here every length is
checked against the bytes that remain before anything is allocated for it, every tensor must lie
inside the file and beside the others, and whatever is wrong ends in one `FormatError` that says
where. Versions 2 and 3, little-endian; files split by `gguf-split` are opened as one.

Layout: magic, version, two counts; key-value pairs; tensor infos; padding; tensor data. Source: the
GGUF specification in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from earnest import codecs
from earnest.checkpoint.containers.base import StoredFile, map_file, mapped_tensor
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Codec
from earnest.errors import FormatError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Bounds that no real file comes near. The largest known header (a vocabulary of 262,144 with its
# merges) is 20 MB with 1.6 million array elements.
MAX_HEADER_BYTES = 256 * 2**20
MAX_ARRAY_ELEMENTS = 2**22
MAX_PAIRS = 2**16
MAX_TENSORS = 2**18
MAX_NAME_BYTES = 2**16 - 1
MAX_STRING_BYTES = 16 * 2**20
MAX_ALIGNMENT = 2**20
MAX_DIMENSIONS = 4
MAX_NESTING = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _NUMBERS[4], _NUMBERS[10]

# Fewest bytes that a key-value pair and a tensor info can take: what a claimed count must fit in.
_LEAST_PAIR = 8 + 4 + 1
_LEAST_INFO = 8 + 4 + 4 + 8

_OLD_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_file(path: str | Path) -> StoredFile:
    """Open a GGUF file, or all parts of a split one (naming any of them); reads only the header.

    Numbers, booleans and strings of the metadata become their Python kinds, arrays become lists.
    Strings that are not UTF-8 keep their odd bytes as lone surrogates (`surrogateescape`) in the
    arrays under `tokenizer.`, where a token may be part of a character, and get U+FFFD elsewhere,
    where text is for people. Of split files the metadata are those of the first part, without
    `split.*`. Shapes are row-major: ggml's order reversed.

    Raises:
        FormatError: it is no GGUF file, breaks the format, is cut off, is big-endian, or holds a
            tensor type that is not supported.
        ModelNotFoundError, AccessError, MachineError: it cannot be opened.
    """
    path = Path(path)
    stored = _read(path)
    count = stored.metadata.get("split.count", 1)
    if count in (0, 1):
        return stored
    return _join(path, count)


def _join(path: Path, count: object) -> StoredFile:
    """All parts of the split file that `path` is one of, as one."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FormatError(
            f"{path} is one part of a split model, and its name does not say which",
            got=f"{path.name} with split.count = {count}",
            expected="the name it was published under, such as model-00001-of-00003.gguf",
            remedy="rename the parts, or join them with llama-gguf-split --merge",
        )
    total = int(match["count"])
    parts: list[StoredFile] = []
    tensors: dict[str, LazyTensor] = {}
    for number in range(1, total + 1):
        part_path = path.with_name(f"{match['stem']}-{number:05d}-of-{total:05d}.gguf")
        if not part_path.exists():
            raise FormatError(
                f"{path} is part of a split model, and a part of it is missing",
                got=f"no {part_path.name}",
                expected=f"{total} parts in one folder",
                remedy="download the missing part",
            )
        part = _read(part_path)
        said = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if said != (number - 1, total):
            raise FormatError(
                f"{part_path} is not the part its name says",
                got=f"split.no, split.count = {said}",
                expected=(number - 1, total),
                remedy="download this part again",
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise FormatError(f"{part_path}: tensor {min(twice)!r} is in an earlier part, too")
        tensors |= part.tensors
        parts.append(part)
    metadata = parts[0].metadata
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise FormatError(
            f"{path}: the parts do not add up", got=f"{len(tensors)} tensors", expected=expected
        )
    merged = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    maps = tuple(mapped for part in parts for mapped in part.maps)
    return StoredFile(parts[0].path, tensors, merged, maps)


def _read(path: Path) -> StoredFile:
    mapped = map_file(path)
    data = np.frombuffer(mapped, np.uint8)
    reader = _Reader(path, data)
    _check_magic(path, data[:8].tobytes())
    reader.position = 8
    tensor_count = reader.count(_LEAST_INFO, MAX_TENSORS, "tensors")
    pair_count = reader.count(_LEAST_PAIR, MAX_PAIRS, "metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = reader.name("a metadata key")
        if key in metadata:
            reader.fail(f"metadata key {key!r} is there twice")
        metadata[key] = reader.pair_value(key)
    alignment = _alignment(reader, metadata)
    infos: dict[str, _Info] = {}
    for _ in range(tensor_count):
        info = _tensor_info(reader)
        if info.name in infos:
            reader.fail(f"tensor {info.name!r} is there twice")
        infos[info.name] = info
    start = -(-reader.position // alignment) * alignment
    _check_places(reader, list(infos.values()), start, alignment)
    tensors = {
        i.name: mapped_tensor(
            i.name, i.codec, i.shape, data, start + i.offset, f"{path.name}: {i.name}"
        )
        for i in infos.values()
    }
    return StoredFile(path, tensors, metadata, (mapped,))


def _check_magic(path: Path, head: bytes) -> None:
    magic, version = head[:4], int.from_bytes(head[4:8], "little")
    if magic != MAGIC:
        old = _OLD_MAGICS.get(magic)
        raise FormatError(
            f"{path} is not a GGUF file",
            got=f"an old {old} file" if old else f"first bytes {magic!r}",
            expected=f"first bytes {MAGIC!r}",
            remedy="convert it to GGUF" if old else "check that the download is complete",
        )
    if version in (2, 3) and len(head) == 8:
        return
    # The magic is the same in both byte orders; only the version tells them apart.
    swapped = int.from_bytes(head[4:8], "big")
    raise FormatError(
        f"{path}: this GGUF version is not supported",
        got=f"version {swapped}, big-endian" if swapped in (2, 3) else f"version {version}",
        expected="version 2 or 3, little-endian",
        remedy="download a little-endian file of a present version",
    )


def _alignment(reader: _Reader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    good = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT
    if not good or alignment & (alignment - 1):
        reader.fail(
            "general.alignment is wrong",
            got=f"{alignment!r:.80}",
            expected=f"a power of two up to {MAX_ALIGNMENT:,}",
        )
    return int(alignment)


@dataclass(frozen=True)
class _Info:
    """What the header says of one tensor; `offset` counts from the start of the tensor data."""

    name: str
    codec: Codec
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.codec.block_weights * self.codec.block_bytes


def _tensor_info(reader: _Reader) -> _Info:
    name = reader.name("a tensor name")
    dimensions = reader.unpack(_U32)
    if dimensions > MAX_DIMENSIONS:
        reader.fail(
            f"tensor {name!r:.200} has too many dimensions",
            got=f"{dimensions:,}",
            expected=f"at most {MAX_DIMENSIONS}",
        )
    sizes = tuple(reader.unpack(_U64) for _ in range(dimensions))
    type_id, offset = reader.unpack(_U32), reader.unpack(_U64)
    try:
        codec = codecs.from_ggml(type_id)
    except FormatError as error:
        raise FormatError(
            f"{reader.path}: tensor {name!r:.200}: {error.problem}",
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    # ggml takes a tensor without dimensions for one of one element.
    shape = sizes[::-1] or (1,)
    if 0 in shape:
        reader.fail(f"tensor {name!r:.200} is empty", got=f"shape {list(shape)}")
    if shape[-1] % codec.block_weights:
        reader.fail(
            f"tensor {name!r:.200}: its rows are not whole blocks of {codec.name}",
            got=f"rows of {shape[-1]:,}",
            expected=f"a multiple of {codec.block_weights}",
        )
    return _Info(name, codec, shape, offset)


def _check_places(reader: _Reader, infos: list[_Info], start: int, alignment: int) -> None:
    """Every tensor lies inside the file, is aligned, and overlaps no other."""
    end, before = 0, ""
    for info in sorted(infos, key=lambda i: i.offset):
        where = f"tensor {info.name!r:.200}"
        if info.offset % alignment:
            reader.fail(
                f"{where} is not aligned",
                got=f"offset {info.offset:,}",
                expected=f"a multiple of {alignment}",
            )
        if info.offset < end:
            reader.fail(
                f"{where} overlaps {before!r:.200}",
                got=f"offset {info.offset:,}",
                expected=f"at least {end:,}",
            )
        end, before = info.offset + info.nbytes, info.name
        if start + end > len(reader.data):
            raise FormatError(
                f"{reader.path}: the file ends before the end of {where}",
                got=f"{len(reader.data):,} bytes",
                expected=f"at least {start + end:,} (shape {list(info.shape)}, {info.codec.name})",
                remedy="download it again; it is cut off, or its header is damaged",
            )


class _Reader:
    """Reads the header front to back; nothing is taken that does not lie inside the file."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path, self.data, self.position = path, data, 0
        self._buffer = data.data
        self._end = min(len(data), MAX_HEADER_BYTES)
        self._elements_left = MAX_ARRAY_ELEMENTS

    def fail(self, problem: str, *, got: object = None, expected: object = None) -> NoReturn:
        raise FormatError(
            f"{self.path}: {problem} (header, byte {self.position:,})",
            got=got,
            expected=expected,
            remedy="download the file again; its header is damaged",
        )

    def _advance(self, size: int) -> int:
        """Step over `size` bytes; returns where they begin."""
        begin, end = self.position, self.position + size
        if end > self._end:
            if self._end < len(self.data):
                self.fail("the header is beyond reason", expected=f"<= {MAX_HEADER_BYTES:,} bytes")
            self.fail(
                "the file ends inside its header",
                got=f"{len(self.data) - begin:,} bytes left",
                expected=f"{size:,}",
            )
        self.position = end
        return begin

    def count(self, least: int, limit: int, what: str) -> int:
        """A claimed number of things, of at least `least` bytes each; they must fit in the rest."""
        count = int(self.unpack(_U64))
        most = min(limit, (self._end - self.position) // least)
        if count > most:
            self.fail(
                f"the file claims more {what} than it has room for",
                got=f"{count:,}",
                expected=f"at most {most:,}",
            )
        return count

    def unpack(self, kind: struct.Struct) -> Any:
        return kind.unpack_from(self._buffer, self._advance(kind.size))[0]

    def _bytes(self, limit: int, what: str) -> bytes:
        size = self.unpack(_U64)
        if size > limit:
            self.fail(f"{what} is too long", got=f"{size:,} bytes", expected=f"at most {limit:,}")
        begin = self._advance(size)
        return self._buffer[begin : self.position].tobytes()

    def name(self, what: str) -> str:
        """A key or a tensor name: UTF-8 of bounded length, not empty."""
        raw = self._bytes(MAX_NAME_BYTES, what)
        if not raw:
            self.fail(f"{what} is empty")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", got=repr(raw[:80]))

    def pair_value(self, key: str) -> Any:
        """The value of a key-value pair: its type, then itself."""
        type_id = self.unpack(_U32)
        if type_id == _STRING:
            text = self._bytes(MAX_STRING_BYTES, f"the value of {key!r:.200}")
            return text.decode("utf-8", "replace")
        if type_id == _ARRAY:
            return self._array(key, MAX_NESTING)
        return self.unpack(self._number(type_id, key))

    def _number(self, type_id: int, key: str) -> struct.Struct:
        if type_id not in _NUMBERS:
            self.fail(
                f"the value of {key!r:.200} is of an unknown type", got=type_id, expected="0 to 12"
            )
        return _NUMBERS[type_id]

    def _array(self, key: str, nesting: int) -> list[Any]:
        type_id = self.unpack(_U32)
        if type_id == _ARRAY and nesting == 1:
            self.fail(f"the arrays in {key!r:.200} are nested too deeply", expected=MAX_NESTING)
        size = {_STRING: 8, _ARRAY: 12}.get(type_id) or self._number(type_id, key).size
        count = self.count(size, self._elements_left, f"array elements in {key!r:.200}")
        self._elements_left -= count
        if type_id == _STRING:
            return self._strings(count, _decoder(key))
        if type_id == _ARRAY:
            return [self._array(key, nesting - 1) for _ in range(count)]
        number = self._number(type_id, key)
        begin = self._advance(count * number.size)
        values: list[Any] = self.data[begin : self.position].view(number.format).tolist()
        return values

    def _strings(self, count: int, decode: Callable[[bytes], str]) -> list[str]:
        """`count` strings. A vocabulary and its merges are 200,000, so this loop is kept bare."""
        buffer, position, end, unpack = self._buffer, self.position, self._end, _U64.unpack_from
        strings = []
        for _ in range(count):
            begin = position + 8
            if begin > end:
                break
            position = begin + unpack(buffer, position)[0]
            if position > end:
                break
            strings.append(decode(buffer[begin:position].tobytes()))
        if len(strings) < count:
            self._advance(end)  # always fails: it says that the file ends here
        self.position = position
        return strings


def _decoder(key: str) -> Callable[[bytes], str]:
    errors = "surrogateescape" if key.startswith("tokenizer.") else "replace"
    return lambda raw: raw.decode("utf-8", errors)
