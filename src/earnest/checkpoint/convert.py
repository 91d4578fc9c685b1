"""`convert`: any checkpoint as a complete folder in the Hugging Face or the Paddle layout.

Weights stream from memory map to file in blocks of rows of the output, so memory does not depend
on the size of the model. Stored types are kept tensor by tensor unless another is asked for, and
then the way to Paddle and back gives every bit again. Only block types have to change, since
safetensors cannot hold them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from earnest import codecs
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.lazy import LazyTensor, contiguous
from earnest.checkpoint.names import Region, stored, tensor_specs
from earnest.checkpoint.writer import Layout, WriteReport, write_checkpoint
from earnest.codecs.base import Codec, Raw
from earnest.errors import FormatError, TensorsError, TokenizerError, UserError
from earnest.files import StagedFolder, machine_errors, read_bytes, staged_file, write_json
from earnest.log import Progress, silent

DTYPES = ("bf16", "f16", "f32")

_BLOCK_WEIGHTS = 2**21
# Rows of a transposed output are columns of the source: whole blocks of any block type (256 is a
# multiple of every block length) and whole cache lines.
_TRANSPOSED_ROWS = 256

# Every one of these is exact in float32, so mixing them in one stored tensor loses nothing there.
_EXACT_IN_F32 = {"f32", "f16", "bf16", "f8_e4m3", "f8_e5m2"}

# Beside the weights of a folder, small plain files belong to the model: tokenizer, templates,
# licence, card. Not code: it would describe the layout that is left behind.
_MAX_SIDE_FILE = 64 * 2**20
_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pdparams|gguf|npz|npy|pkl|pickle|h5|msgpack|onnx|pyc|part|lock"
    r"|index\.json)$"
)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "spiece.model")


def convert(
    source: Checkpoint,
    destination: Path,
    to: Layout,
    *,
    dtype: str | None = None,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
    progress: Progress = silent,
) -> WriteReport:
    """Write `source` as the folder `destination`: weights, index, configuration, generation
    configuration, tokenizer and what else lay beside them.

    Args:
        source: an opened checkpoint of any container and dialect.
        destination: the folder to make; it appears when it is complete, and an interrupted run is
            taken up again by the same call.
        to: "hf" (published `-PT`) or "paddle" (published `-Paddle`).
        dtype: "bf16", "f16" or "f32" for all weights but router and correction bias, which become
            float32; None keeps each stored type, but for block types, which become bf16.
        force: replace a destination that exists.
        shard_bytes: the largest file, unless a single tensor is larger.
        progress: told about bytes written.

    Raises:
        UserError: unknown layout or dtype, the destination exists or overlaps with the source, or
            a weight is beyond the range of f16.
        FormatError: Paddle's layout fuses tensors that no one type can hold.
        TensorsError: a tensor is missing that the layout needs.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    if to not in get_args(Layout):
        raise UserError(f"unknown layout {to!r}", expected=", ".join(get_args(Layout)))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    _refuse_overlap(source.path, destination)
    plan, notes = _plan(source, to, dtype)
    return write_checkpoint(
        destination,
        plan,
        source.config,
        layout=to,
        fingerprint={"convert": _state_of(source.path), "dtype": dtype},
        shard_bytes=shard_bytes,
        force=force,
        progress=progress,
        side_files=partial(_side_files, source),
        left_out=source.left_out,
        notes=[*source.notes, *notes],
    )


def _refuse_overlap(source: Path, destination: Path) -> None:
    src, dst = source.resolve(), destination.resolve()
    inside_source = src.is_dir() and dst.is_relative_to(src)
    for taken in (dst, StagedFolder.partial_path(destination).resolve()):
        if inside_source or src.is_relative_to(taken):
            raise UserError(
                f"the destination {destination} overlaps with the source {source}",
                remedy="choose a folder outside the source",
            )


def _state_of(source: Path) -> list[list[Any]]:
    """Names, sizes and times of the source's files: an interrupted run of another state of them
    must not be continued."""
    with machine_errors(source, "reading"):
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        states = [(file.resolve(), file.stat()) for file in files if file.is_file()]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in states]


# --- weights ----------------------------------------------------------------------------------


def _plan(
    source: Checkpoint, to: Layout, dtype: str | None
) -> tuple[list[PlannedTensor], list[str]]:
    mtp = source.has_mtp
    fp32 = {spec.name for spec in tensor_specs(source.config, mtp) if spec.fp32}
    targets = stored(source.config, to, mtp)
    missing = [name for t in targets for name, _ in t.parts if name not in source.tensors]
    if missing:
        raise TensorsError(
            f"{source.path} lacks {len(missing):,} tensors that a complete checkpoint has",
            got=f"no {', '.join(missing[:5])}",
            remedy="convert a complete checkpoint",
        )
    forget = source.forgetter()
    plan, promoted, requantised, absent = [], [], Counter[str](), 0
    for target in targets:
        parts = [(source.tensors[name], region) for name, region in target.parts]
        if any(tensor.is_absent for tensor, _ in parts):
            absent += 1  # zeros stand in for it; written down they would pass for the real thing
            continue
        kept = {_kept(tensor, tensor.name in fp32, dtype).name for tensor, _ in parts}
        codec = codecs.codec(_joined(target.name, kept))
        if len(kept) > 1:
            promoted.append(target.name)
        for tensor, _ in parts:
            if not tensor.codec.is_plain:
                requantised[tensor.codec.name] += 1
        blocks = partial(_blocks, target.shape, parts, codec, forget)
        plan.append(PlannedTensor(target.name, codec, target.shape, blocks))
    notes = list(_notes(promoted, requantised, dtype))
    if absent:
        notes.append(f"{absent} correction biases that the source lacks are missing here too")
    return plan, notes


def _kept(tensor: LazyTensor, is_fp32: bool, dtype: str | None) -> Codec:
    """The type a tensor is to be written in, before others are fused with it."""
    if dtype is None and tensor.codec.is_plain:
        return tensor.codec
    return codecs.codec("f32" if is_fp32 else dtype or "bf16")


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


def _notes(promoted: list[str], requantised: Counter[str], dtype: str | None) -> Iterator[str]:
    if promoted:
        yield (
            f"{len(promoted):,} fused tensors have parts of different types and were stored as "
            f"f32, which holds them exactly (the first is {promoted[0]})"
        )
    if requantised:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in requantised.most_common())
        loss = {
            "bf16": ", rounded to bf16 (a relative error of up to 2**-8)",
            "f16": ", rounded to f16 (a relative error of up to 2**-11)",
            "f32": "",
        }[dtype or "bf16"]
        yield (
            f"quantised blocks ({kinds}) were decoded{loss}; the quality is that of the quantised "
            "file, not of the model it was made from"
        )


def _blocks(
    shape: tuple[int, ...],
    parts: Sequence[tuple[LazyTensor, Region]],
    codec: Codec,
    streamed: Callable[[int], None],
) -> Iterator[Raw]:
    """A stored tensor of `shape` in row-major order, made of canonical tensors."""
    blocks = _transposed if parts[0][1].transposed else _stacked
    for block in blocks(shape, parts, codec):
        yield block
        streamed(block.nbytes)


def _stacked(
    shape: tuple[int, ...], parts: Sequence[tuple[LazyTensor, Region]], codec: Codec
) -> Iterator[Raw]:
    """Parts that lie one after the other, rows in order."""
    for tensor, _ in parts:
        for _, block in tensor.row_blocks(_BLOCK_WEIGHTS):
            yield _recoded(block, tensor, codec)


def _transposed(
    shape: tuple[int, ...], parts: Sequence[tuple[LazyTensor, Region]], codec: Codec
) -> Iterator[Raw]:
    """Parts that lie side by side, each transposed: `[in, out]`."""
    rows, width = shape
    step = max(1, _BLOCK_WEIGHTS // width // _TRANSPOSED_ROWS) * _TRANSPOSED_ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out = np.empty((stop - start, width), codec.storage)
        for tensor, region in parts:
            per_block = tensor.codec.block_weights
            # In units of the stored array: numbers of plain types, bytes of block types.
            unit = 1 if tensor.codec.is_plain else tensor.codec.block_bytes
            columns = slice(start // per_block * unit, stop // per_block * unit)
            block = tensor.raw()[:, columns]
            if tensor.codec != codec:
                block = _recoded(block, tensor, codec)
            out[:, region.start : region.stop] = contiguous(block.T)
        yield out


def _recoded(block: Raw, tensor: LazyTensor, codec: Codec) -> Raw:
    if tensor.codec == codec:
        return block
    assert codec.encode is not None
    values = tensor.codec.decode(block)
    encoded = codec.encode(values)
    if codec.name == "f16" and (np.isinf(encoded) & np.isfinite(values)).any():
        raise UserError(
            f"{tensor.name} has weights beyond the range of f16",
            got=f"{float(np.abs(values[np.isfinite(values)]).max()):.6g}",
            expected="at most 65504",
            remedy="choose --dtype bf16 or f32",
        )
    return encoded


# --- what lies beside the weights -------------------------------------------------------------


def _side_files(source: Checkpoint, folder: Path) -> list[str]:
    """Copy or make everything but weights and configuration; returns notes."""
    if source.container == "gguf":
        return _made_side_files(source, folder)
    origin = source.path if source.path.is_dir() else source.path.parent
    notes = []
    for file in _small_files(origin):
        if file.suffix == ".py":
            notes.append(f"{file.name} was not copied: code describes the layout it came with")
            continue
        data = read_bytes(file, _MAX_SIDE_FILE)
        with staged_file(folder / file.name) as copy:
            copy.write(data)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        notes.append("the source has no tokenizer, so the result has none")
    return notes


def _small_files(origin: Path) -> list[Path]:
    with machine_errors(origin, "reading"):
        return [
            file
            for file in sorted(origin.iterdir())
            if file.is_file()
            and file.name != "config.json"
            and not file.name.startswith(".")
            and not _NOT_COPIED.search(file.name)
            and file.stat().st_size <= _MAX_SIDE_FILE
        ]


def _made_side_files(source: Checkpoint, folder: Path) -> list[str]:
    if source.generation_config:
        write_json(folder / "generation_config.json", dict(source.generation_config))
    try:
        source.tokenizer.save(folder)
    except TokenizerError as error:
        return [f"the tokenizer could not be taken along: {error.problem}"]
    return []
