"""What a writer streams: the stored tensors of a layout, made of the canonical ones of a source.

Weights stream from memory map to file in blocks of rows of the output, so memory does not depend
on the size of the model. A block is planned as work, which `containers.base.stream` does on all
cores, a few blocks ahead of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from earnest import codecs
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.containers.base import Block, PlannedTensor
from earnest.checkpoint.lazy import LazyTensor, contiguous
from earnest.checkpoint.names import Dialect, Region, StoredTensor, stored
from earnest.codecs.base import Codec, Raw
from earnest.errors import FormatError, TensorsError, UserError
from earnest.files import StagedFolder, machine_errors

_BLOCK_WEIGHTS = 2**21
# Rows of a transposed output are columns of the source: whole blocks of any block type (256 is a
# multiple of every block length) and whole cache lines.
_TRANSPOSED_ROWS = 256

# Every one of these is exact in float32, so mixing them in one stored tensor loses nothing there.
_EXACT_IN_F32 = {"f32", "f16", "bf16", "f8_e4m3", "f8_e5m2"}

Choose = Callable[[StoredTensor, LazyTensor], Codec]
"""The type that a tensor of the source shall have in a stored tensor of the target."""


_Work = tuple[Block, int]
"""What makes a part of a stored tensor, and how many bytes it reads."""


@dataclass
class Plan:
    """What to write, and what there is to say about it.

    Attributes:
        tensors: in the order of the layout.
        promoted: stored tensors that are float32 because their parts have different types.
        decoded: codec to the number of tensors whose blocks are decoded, not copied.
        absent: how many correction biases the source lacks; they are not written: zeros would
            pass for the real thing.
    """

    tensors: list[PlannedTensor] = field(default_factory=list)
    promoted: list[str] = field(default_factory=list)
    decoded: Counter[str] = field(default_factory=Counter)
    absent: int = 0


def plan_tensors(source: Checkpoint, dialect: Dialect, choose: Choose, *, mtp: bool) -> Plan:
    """Plan all stored tensors of a layout.

    Raises:
        TensorsError: a tensor is missing that the layout needs.
        FormatError: the layout fuses tensors that no one type can hold.
    """
    targets = stored(source.config, dialect, mtp)
    missing = [name for t in targets for name, _ in t.parts if name not in source.tensors]
    if missing:
        raise TensorsError(
            f"{source.path} lacks {len(missing):,} tensors that a complete checkpoint has",
            got=f"no {', '.join(missing[:5])}",
            remedy="convert a complete checkpoint",
        )
    forget = source.forgetter()
    plan = Plan()
    for target in targets:
        parts = [(source.tensors[name], region) for name, region in target.parts]
        if any(tensor.is_absent for tensor, _ in parts):
            plan.absent += 1
            continue
        kept = {choose(target, tensor).name for tensor, _ in parts}
        codec = codecs.codec(_joined(target.name, kept))
        if len(kept) > 1:
            plan.promoted.append(target.name)
        for tensor, _ in parts:
            if not tensor.codec.is_plain and tensor.codec != codec:
                plan.decoded[tensor.codec.name] += 1
        blocks = partial(_blocks, target.shape, parts, codec, forget)
        plan.tensors.append(PlannedTensor(target.name, codec, target.shape, blocks))
    return plan


def _joined(name: str, kept: set[str]) -> str:
    """The type that holds all parts of a stored tensor exactly."""
    if len(kept) == 1:
        return next(iter(kept))
    if kept <= _EXACT_IN_F32:
        return "f32"
    raise FormatError(
        f"{name} fuses tensors of types that no one type can hold exactly",
        got=" and ".join(sorted(kept)),
        expected=f"one type, or a mixture of {', '.join(sorted(_EXACT_IN_F32))}",
        remedy="pass --dtype f32 to choose a type for all weights",
    )


def plan_notes(plan: Plan, dtype: str) -> Iterator[str]:
    """What a careful reader should know about a plan whose decoded blocks become `dtype`."""
    if plan.promoted:
        yield (
            f"{len(plan.promoted):,} fused tensors have parts of different types and were stored "
            f"as f32, which holds them exactly (the first is {plan.promoted[0]})"
        )
    if plan.decoded:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in plan.decoded.most_common())
        loss = {
            "bf16": ", rounded to bf16 (a relative error of up to 2**-8)",
            "f16": ", rounded to f16 (a relative error of up to 2**-11)",
            "f32": "",
        }.get(dtype, f" and encoded again as {dtype}")
        yield (
            f"quantised blocks ({kinds}) were decoded{loss}; the quality is that of the quantised "
            "file, not of the model it was made from"
        )
    if plan.absent:
        yield f"{plan.absent} correction biases that the source lacks are missing here too"


def _blocks(
    shape: tuple[int, ...],
    parts: Sequence[tuple[LazyTensor, Region]],
    codec: Codec,
    streamed: Callable[[int], None],
) -> Iterator[Block]:
    """A stored tensor of `shape` in row-major order, made of canonical tensors; blocks of whole
    rows, of whole panels where nothing is transposed."""
    blocks = _transposed if parts[0][1].transposed else _stacked
    for block, nbytes in blocks(shape, parts, codec):
        yield block
        streamed(nbytes)


def _stacked(
    shape: tuple[int, ...], parts: Sequence[tuple[LazyTensor, Region]], codec: Codec
) -> Iterator[_Work]:
    """Parts that lie one after the other, rows in order."""
    for tensor, _ in parts:
        row_bytes = tensor.nbytes // max(1, tensor.shape[0])
        for rows in tensor.row_slices(_BLOCK_WEIGHTS):
            yield partial(_some_rows, tensor, rows, codec), (rows.stop - rows.start) * row_bytes


def _some_rows(tensor: LazyTensor, rows: slice, codec: Codec) -> Raw:
    return _recoded(contiguous(tensor.raw_rows(rows)), tensor, codec)


def _transposed(
    shape: tuple[int, ...], parts: Sequence[tuple[LazyTensor, Region]], codec: Codec
) -> Iterator[_Work]:
    """Parts that lie side by side, each transposed: `[in, out]`."""
    rows, width = shape
    step = max(1, _BLOCK_WEIGHTS // width // _TRANSPOSED_ROWS) * _TRANSPOSED_ROWS
    # A view of the file, or what was unpacked from it: once, not for every strip.
    sources = [(tensor, tensor.raw(), region) for tensor, region in parts]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        nbytes = (stop - start) * width * codec.storage.itemsize
        yield partial(_strip, sources, start, stop, width, codec), nbytes


def _strip(
    sources: Sequence[tuple[LazyTensor, Raw, Region]],
    start: int,
    stop: int,
    width: int,
    codec: Codec,
) -> Raw:
    """Columns `[start, stop)` of the sources as rows of the output."""
    out = np.empty((stop - start, width), codec.storage)
    for tensor, raw, region in sources:
        per_block = tensor.codec.block_weights
        # In units of the stored array: numbers of plain types, bytes of block types.
        unit = 1 if tensor.codec.is_plain else tensor.codec.block_bytes
        columns = slice(start // per_block * unit, stop // per_block * unit)
        block = _recoded(raw[:, columns], tensor, codec)
        out[:, region.start : region.stop] = contiguous(block.T)
    return out


def _recoded(block: Raw, tensor: LazyTensor, codec: Codec) -> Raw:
    if tensor.codec == codec:
        return block
    assert codec.encode is not None
    values = tensor.codec.decode(block)
    try:
        encoded = codec.encode(values)
    except FormatError as error:
        raise FormatError(
            f"{tensor.name}: {error.problem}",
            got=error.got,
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    if codec.name == "f16" and (np.isinf(encoded) & np.isfinite(values)).any():
        raise UserError(
            f"{tensor.name} has weights beyond the range of f16",
            got=f"{float(np.abs(values[np.isfinite(values)]).max()):.6g}",
            expected="at most 65504",
            remedy="choose --dtype bf16 or f32",
        )
    return encoded


# --- source and destination ------------------------------------------------------------------


def refuse_overlap(source: Path, destination: Path) -> None:
    """Refuse to write where the source lies.

    Raises:
        UserError: one of the two lies in the other.
    """
    src, dst = source.resolve(), destination.resolve()
    inside_source = src.is_dir() and dst.is_relative_to(src)
    for taken in (dst, StagedFolder.partial_path(destination).resolve()):
        if inside_source or src.is_relative_to(taken):
            raise UserError(
                f"the destination {destination} overlaps with the source {source}",
                remedy="choose a folder outside the source",
            )


def refuse_file_name(destination: Path, remedy: str) -> None:
    """Refuse to make a folder under the name of a GGUF file, which would not be one.

    Args:
        destination: where the folder shall appear.
        remedy: how a GGUF file is made.

    Raises:
        UserError: its name ends in `.gguf`.
    """
    if destination.suffix == ".gguf":
        raise UserError(
            f"{destination} is the name of a GGUF file, and this makes a folder",
            expected="a name that does not end in .gguf",
            remedy=remedy,
        )


def state_of(source: Path) -> list[list[Any]]:
    """Names, sizes and times of the source's files: an interrupted run of another state of them
    must not be continued."""
    with machine_errors(source, "reading"):
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        states = [(file.resolve(), file.stat()) for file in files if file.is_file()]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in states]


def tensors_digest(tensors: Sequence[PlannedTensor]) -> str:
    """A digest of names, types and shapes: the part of a run's identity that a plan is."""
    text = json.dumps([[t.name, t.codec.name, t.shape] for t in tensors])
    return hashlib.sha256(text.encode()).hexdigest()
