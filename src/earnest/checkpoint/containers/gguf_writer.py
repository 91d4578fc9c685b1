"""Writing GGUF files, version 3, little-endian: header, metadata, tensor infos, aligned tensors.

Source: the GGUF specification in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from earnest import codecs
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.containers.gguf import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_STRING_BYTES,
)
from earnest.checkpoint.containers.sequential import write_sequential
from earnest.errors import FormatError
from earnest.log import Progress, silent

_VERSION = 3
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32, _INT32, _FLOAT32, _UINT64, _INT64 = 4, 5, 6, 10, 11
_FORMATS = {_BOOL: "<?", _UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _UINT64: "<Q", _INT64: "<q"}
_ARRAY_TYPES = {
    np.dtype("<u1"): 0,
    np.dtype("<i1"): 1,
    np.dtype("<u2"): 2,
    np.dtype("<i2"): 3,
    np.dtype("<u4"): _UINT32,
    np.dtype("<i4"): _INT32,
    np.dtype("<f4"): _FLOAT32,
    np.dtype("?"): _BOOL,
    np.dtype("<u8"): _UINT64,
    np.dtype("<i8"): _INT64,
    np.dtype("<f8"): 12,
}


def write_file(
    path: Path,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, Any],
    progress: Progress = silent,
) -> bool:
    """Write a GGUF file, streaming the tensors' blocks.

    What an earlier call with the same tensors and metadata began at `path` is continued, if its
    record lies beside it: `path` must be in a folder that only runs with the same input write to.

    Args:
        path: the file; replaced if it exists and cannot be continued.
        tensors: what to write, in order.
        metadata: keys to values. Whole numbers become uint32 (int32 if negative, 64 bits if too
            large), floats float32; arrays take the type of a numpy array, or int32 or float32 for
            a list. Strings may hold lone surrogates for bytes that are not UTF-8.
        progress: told about bytes of data written.

    Returns:
        Whether an earlier call was continued.

    Raises:
        FormatError: GGUF cannot hold a codec, a shape or a value, a name comes twice, or the
            blocks of a tensor do not add up to its size.
        DiskFullError, AccessError, MachineError: it cannot be written.
    """
    head = _header(path, tensors, metadata)
    return write_sequential(path, head, tensors, _starts(tensors, len(head)), progress)


def file_bytes(tensors: Sequence[PlannedTensor], metadata: Mapping[str, Any]) -> int:
    """Size of the file that `write_file` writes.

    Raises:
        FormatError: GGUF cannot hold them.
    """
    return _starts(tensors, len(_header(Path("the file"), tensors, metadata)))[-1]


def _aligned(position: int) -> int:
    return -(-position // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _starts(tensors: Sequence[PlannedTensor], head: int) -> list[int]:
    """Where each tensor begins in the file and, last, where the file ends."""
    starts = [head]
    for tensor in tensors:
        starts.append(_aligned(starts[-1] + tensor.nbytes))
    return starts


def _header(path: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, Any]) -> bytes:
    """Everything before the first tensor, padding included."""
    if metadata.get("general.alignment", DEFAULT_ALIGNMENT) != DEFAULT_ALIGNMENT:
        raise FormatError(
            "GGUF files are written with the usual alignment only",
            got=f"general.alignment {metadata['general.alignment']}",
            expected=DEFAULT_ALIGNMENT,
        )
    out = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(key, value)
    names: set[str] = set()
    for tensor, start in zip(tensors, _starts(tensors, 0), strict=False):
        if tensor.name in names:
            raise FormatError(f"{path}: two tensors are called {tensor.name}")
        names.add(tensor.name)
        out += _info(path, tensor, start)
    return bytes(out.ljust(_aligned(len(out)), b"\0"))


def _info(path: Path, tensor: PlannedTensor, offset: int) -> bytes:
    shape, codec = tensor.shape, tensor.codec
    if not 0 < len(shape) <= MAX_DIMENSIONS or 0 in shape or shape[-1] % codec.block_weights:
        raise FormatError(
            f"{path}: GGUF cannot hold {tensor.name}",
            got=f"shape {list(shape)} as {codec.name}",
            expected=f"1 to {MAX_DIMENSIONS} dimensions, none empty, rows of whole blocks of "
            f"{codec.block_weights}",
        )
    return (
        _string(tensor.name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        + struct.pack("<IQ", codecs.to_ggml(codec), offset)
    )


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if len(data) > MAX_STRING_BYTES:
        raise FormatError(
            "a text is too long for a GGUF file",
            got=f"{len(data):,} bytes",
            expected=f"at most {MAX_STRING_BYTES:,}",
        )
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Any) -> bytes:
    """The type and the value of a key-value pair."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list | tuple | np.ndarray):
        return struct.pack("<I", _ARRAY) + _array(key, value)
    kind = _number_type(key, value)
    return struct.pack("<I", kind) + struct.pack(_FORMATS[kind], value)


def _number_type(key: str, value: Any) -> int:
    match value:
        case bool():
            return _BOOL
        case int():
            if 0 <= value < 2**64:
                return _UINT32 if value < 2**32 else _UINT64
            if -(2**63) <= value < 0:
                return _INT32 if value >= -(2**31) else _INT64
        case float():
            return _FLOAT32
    raise FormatError(
        f"GGUF cannot hold the value of {key}",
        got=f"{value!r:.80}",
        expected="text, true or false, a number of at most 64 bits, or a list of one of these",
    )


def _array(key: str, value: Any) -> bytes:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        head = struct.pack("<IQ", _STRING, len(value))
        return head + b"".join(_string(item) for item in value)
    if isinstance(value, list | tuple) and all(isinstance(i, list | tuple) for i in value):
        return struct.pack("<IQ", _ARRAY, len(value)) + b"".join(_array(key, i) for i in value)
    array = value if isinstance(value, np.ndarray) else _numbers(key, value)
    little = array.dtype.newbyteorder("<")
    if array.ndim != 1 or little not in _ARRAY_TYPES:
        _number_type(key, value)  # raises
    kind = _ARRAY_TYPES[little]
    return struct.pack("<IQ", kind, array.size) + array.astype(little, copy=False).tobytes()


def _numbers(key: str, values: Sequence[Any]) -> np.ndarray[Any, Any]:
    for value in values:
        _number_type(key, value)
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return np.array(values, np.bool_)
    if kinds == {int}:
        least, most = min(values), max(values)
        for kind in (np.int32, np.uint32, np.int64, np.uint64):
            if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
                return np.array(values, kind)
    if kinds <= {int, float}:
        return np.array(values, np.float32)
    raise FormatError(f"GGUF cannot hold the list of {key}, which mixes kinds of values")
