"""`convert`: any checkpoint as a complete folder in the Hugging Face or the Paddle layout.

Weights stream from memory map to file in blocks of rows of the output, so memory does not depend
on the size of the model. Stored types are kept tensor by tensor unless another is asked for, and
then the way to Paddle and back gives every bit again. Only block types have to change, since
safetensors cannot hold them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import get_args

from earnest import codecs
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.names import StoredTensor, tensor_specs
from earnest.checkpoint.plan import (
    Choose,
    plan_notes,
    plan_tensors,
    refuse_file_name,
    refuse_overlap,
    state_of,
)
from earnest.checkpoint.side_files import copy_side_files
from earnest.checkpoint.writer import Layout, WriteReport, write_checkpoint
from earnest.codecs.base import Codec
from earnest.errors import UserError
from earnest.log import Progress, silent

DTYPES = ("bf16", "f16", "f32")


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
        UserError: unknown layout or dtype, the destination exists, overlaps with the source or has
            the name of a GGUF file, or a weight is beyond the range of f16.
        FormatError: Paddle's layout fuses tensors that no one type can hold.
        TensorsError: a tensor is missing that the layout needs.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    if to not in get_args(Layout):
        raise UserError(f"unknown layout {to!r}", expected=", ".join(get_args(Layout)))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    refuse_overlap(source.path, destination)
    refuse_file_name(
        destination, "choose another name for the folder, or pass --to gguf to make a GGUF file"
    )
    plan = plan_tensors(source, to, _choice(source, dtype), mtp=source.has_mtp)
    return write_checkpoint(
        destination,
        plan.tensors,
        source.config,
        layout=to,
        fingerprint={"convert": state_of(source.path), "dtype": dtype},
        shard_bytes=shard_bytes,
        force=force,
        progress=progress,
        side_files=partial(copy_side_files, source),
        left_out=source.left_out,
        notes=[*source.notes, *plan_notes(plan, dtype or "bf16")],
    )


# --- weights ----------------------------------------------------------------------------------


def _choice(source: Checkpoint, dtype: str | None) -> Choose:
    fp32 = {spec.name for spec in tensor_specs(source.config, source.has_mtp) if spec.fp32}

    def choose(target: StoredTensor, tensor: LazyTensor) -> Codec:
        return _kept(tensor, tensor.name in fp32, dtype)

    return choose


def _kept(tensor: LazyTensor, is_fp32: bool, dtype: str | None) -> Codec:
    """The type a tensor is to be written in, before others are fused with it."""
    if dtype is None and tensor.codec.is_plain:
        return tensor.codec
    return codecs.codec("f32" if is_fp32 else dtype or "bf16")
