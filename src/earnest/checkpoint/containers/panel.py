"""The packed container: a safetensors file whose matrices are panels. docs/formats/panel.md.

`__metadata__` says which tensors are panels, of which codec and which size; whatever it says is
checked against the file. A matrix is handed out as every other tensor is, its rows unpacked on
request, and also as the view of its panels that the kernels read in place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from earnest import codecs
from earnest.checkpoint.containers.base import PlannedTensor, StoredFile
from earnest.checkpoint.containers.safetensors import encode_header
from earnest.checkpoint.containers.sequential import write_sequential
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Raw
from earnest.codecs.bits import Bytes
from earnest.codecs.panel import PANEL_VERSION, PANELS
from earnest.errors import FormatError, UserError
from earnest.files import parse_json_object
from earnest.log import Progress, silent

# Every tensor begins at a multiple of this many bytes of the file: a cache line.
ALIGNMENT = 64

_FORMAT = "panel"
_VERSION_KEY, _TABLE_KEY = "panel_version", "panels"
_PADDING = re.compile(r"padding\.\d{1,9}")


def is_packed(stored: StoredFile) -> bool:
    """Whether opened safetensors files say that they hold panels."""
    return _VERSION_KEY in stored.metadata or stored.metadata.get("format") == _FORMAT


def unpacking(stored: StoredFile) -> StoredFile:
    """The file with its matrices as what they are: tensors of their codec and logical shape.

    Nothing is read but the header. Tensors that the table does not name stay as they are; padding
    is dropped.

    Raises:
        FormatError: the version is unknown, or the table is malformed, names a tensor that is not
            there, a codec without panels, or a size that contradicts the tensor.
    """
    version = stored.metadata.get(_VERSION_KEY)
    if version != str(PANEL_VERSION):
        raise FormatError(
            f"{stored.path} is packed in a version of the panel format that this Earnest does not "
            "know",
            got=f"panel_version {version!r:.40}",
            expected=f"{PANEL_VERSION}",
            remedy="update Earnest, or pack the original checkpoint again",
        )
    table = parse_json_object(
        stored.metadata.get(_TABLE_KEY, "").encode("utf-8", "surrogatepass"),
        f"{stored.path} (table of panels)",
        unique=True,
    )
    if absent := [name for name in table if name not in stored.tensors]:
        raise FormatError(
            f"{stored.path}: its table of panels names {len(absent):,} tensors that are not there",
            got=f"{absent[0]!r:.200}",
        )
    tensors = {
        name: _matrix(stored, tensor, table[name]) if name in table else tensor
        for name, tensor in stored.tensors.items()
        if not (_PADDING.fullmatch(name) and tensor.codec.name == "u8")
    }
    return replace(stored, tensors=tensors)


def _matrix(file: StoredFile, stored: LazyTensor, entry: object) -> LazyTensor:
    """The matrix that `entry` of the table says a stored tensor is."""
    path = file.path
    match entry:
        case [str(codec), int(rows), int(columns)] if (
            codec in PANELS and type(rows) is type(columns) is int
        ):
            layout = PANELS[codec]
        case _:
            raise _contradiction(
                path, stored, f"{entry!r:.200}", f"[codec, rows, columns], codec of {list(PANELS)}"
            )
    try:
        shape = layout.shape(rows, columns)
    except UserError as error:
        raise _contradiction(path, stored, error.got, error.expected) from error
    if stored.codec.name != "u8" or stored.shape != shape:
        raise _contradiction(
            path,
            stored,
            f"{stored.codec.name} {list(stored.shape)}",
            f"u8 {list(shape)} for {rows:,} x {columns:,} weights in {codec}",
        )

    def panels() -> Bytes:
        return stored.view().view(np.uint8)

    if file.offsets[stored.name] % ALIGNMENT:
        raise _contradiction(
            path,
            stored,
            f"begin at byte {file.offsets[stored.name]:,}",
            f"a multiple of {ALIGNMENT} bytes",
        )
    return LazyTensor(
        stored.name,
        layout.codec,
        (rows, columns),
        lambda: layout.unpack(panels(), rows, columns),
        stored.origin,
        panels,
    )


def _contradiction(path: Path, stored: LazyTensor, got: object, expected: object) -> FormatError:
    return FormatError(
        f"{path}: tensor {stored.name!r:.200} is not the panels that the metadata speak of",
        got=got,
        expected=expected,
        remedy="pack the original checkpoint again",
    )


# --- writing ----------------------------------------------------------------------------------


def write_file(path: Path, tensors: Sequence[PlannedTensor], progress: Progress = silent) -> bool:
    """Write a packed file, streaming the tensors' blocks; see `write_sequential`.

    Args:
        path: the file, in a folder that only runs with the same input write to.
        tensors: matrices with their `layout`, everything else without; in the order of the file.
        progress: told about bytes of data written.

    Returns:
        Whether an earlier, interrupted call was continued.

    Raises:
        FormatError: safetensors cannot hold the codec of a tensor without layout, a name comes
            twice, or the blocks of a tensor do not add up to its size.
        DiskFullError, AccessError, MachineError: it cannot be written.
    """
    table = {tensor.name: [tensor.codec.name, *tensor.shape] for tensor in tensors if tensor.layout}
    metadata = {
        "format": _FORMAT,
        _VERSION_KEY: str(PANEL_VERSION),
        _TABLE_KEY: json.dumps(table, separators=(",", ":"), ensure_ascii=False),
    }
    padded = list(_padded(tensors))
    head = encode_header(path, padded, metadata, ALIGNMENT)
    starts = [len(head)]
    for tensor in padded:
        starts.append(starts[-1] + tensor.nbytes)
    return write_sequential(path, head, padded, starts, progress)


def _padded(tensors: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
    """The tensors, and tensors of zeros before those that would not begin at a cache line: the
    format allows no other gaps."""
    position = count = 0
    for tensor in tensors:
        if gap := -position % ALIGNMENT:
            yield _zeros(f"padding.{count}", gap)
            position, count = position + gap, count + 1
        yield tensor
        position += tensor.nbytes


def _zeros(name: str, nbytes: int) -> PlannedTensor:
    def blocks() -> Iterator[Raw]:
        yield np.zeros(nbytes, np.uint8)

    return PlannedTensor(name, codecs.codec("u8"), (nbytes,), blocks)
