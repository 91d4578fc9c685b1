"""`pack`: any checkpoint as the panels that the kernels read in place, without loss.

A packed model is a folder as `convert` makes it in the Hugging Face layout, but that the one
safetensors file in it holds its matrices as panels (`containers.panel`). Bits are permuted, not
changed; norms, biases and correction biases stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from earnest import codecs
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.containers.base import Block, PlannedTensor
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.names import StoredTensor
from earnest.checkpoint.plan import (
    Choose,
    plan_notes,
    plan_tensors,
    refuse_file_name,
    refuse_overlap,
    state_of,
)
from earnest.checkpoint.side_files import copy_side_files
from earnest.checkpoint.writer import WriteReport, write_checkpoint
from earnest.codecs.base import Codec, Raw
from earnest.codecs.encode import GENERATION
from earnest.codecs.panel import PANEL_VERSION, PANELS, Panel
from earnest.log import Progress, silent


def pack(
    source: Checkpoint, destination: Path, *, force: bool = False, progress: Progress = silent
) -> WriteReport:
    """Write `source` as the packed folder `destination`, every matrix in its own codec.

    Args:
        source: an opened checkpoint of any container and dialect.
        destination: the folder to make; it appears when it is complete, and an interrupted run is
            taken up again by the same call.
        force: replace a destination that exists.
        progress: told about bytes written.

    Raises:
        UserError: the destination exists, overlaps with the source or has the name of a GGUF file.
        TensorsError: a tensor is missing.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    refuse_overlap(source.path, destination)
    refuse_file_name(
        destination,
        "choose another name for the packed folder, or make a GGUF file with "
        f"earnest convert SRC {destination} --to gguf",
    )
    return write_packed(
        source,
        destination,
        lambda target, tensor: panel_codec(tensor),
        label="q8_0",
        force=force,
        progress=progress,
    )


def panel_codec(tensor: LazyTensor) -> Codec:
    """The codec of a matrix as panels: its own wherever there are panels for it.

    Other plain types become the smallest one that holds them (f32 for f64), other blocks q8_0 or,
    where rows do not divide into its blocks, f32. A router is never rounded to blocks.
    """
    codec = tensor.codec
    if codec.name in PANELS:
        return codec
    if codec.is_plain:
        return codecs.codec("bf16" if codec.name.startswith("f8") else "f32")
    coarse = codecs.codec("q8_0")
    whole_blocks = tensor.shape[-1] % coarse.block_weights == 0
    return coarse if whole_blocks and not is_router(tensor.name) else codecs.codec("f32")


def is_router(name: str) -> bool:
    """Whether a canonical tensor is the matrix that chooses experts."""
    return name.endswith(".mlp.gate.weight")


def write_packed(
    source: Checkpoint,
    destination: Path,
    choose: Choose,
    *,
    label: str,
    force: bool,
    progress: Progress,
) -> WriteReport:
    """Write `source` as a packed folder with the codecs that `choose` names for its matrices; see
    `pack`. The router and all vectors stay as they are stored.

    Args:
        label: what blocks that are decoded become, for the notes.
    """
    refuse_overlap(source.path, destination)

    def kept(target: StoredTensor, tensor: LazyTensor) -> Codec:
        if len(tensor.shape) == 1:
            return tensor.codec if tensor.codec.is_plain else codecs.codec("f32")
        return panel_codec(tensor) if is_router(tensor.name) else choose(target, tensor)

    plan = plan_tensors(source, "hf", kept, mtp=source.has_mtp)
    matrices = {name for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    return write_checkpoint(
        destination,
        [as_panels(tensor) if tensor.name in matrices else tensor for tensor in plan.tensors],
        source.config,
        layout="panel",
        fingerprint={
            "pack": state_of(source.path),
            "panel_version": PANEL_VERSION,
            "encoders": GENERATION,
        },
        force=force,
        progress=progress,
        side_files=partial(copy_side_files, source),
        left_out=source.left_out,
        notes=[*source.notes, *plan_notes(plan, label)],
    )


def as_panels(tensor: PlannedTensor) -> PlannedTensor:
    """A planned matrix as panels; its blocks must be rows of whole panels."""
    layout = PANELS[tensor.codec.name]

    def blocks() -> Iterator[Block]:
        for block in tensor.blocks():
            yield partial(_packed, block, layout, tensor.shape[1])

    return replace(tensor, blocks=blocks, layout=layout)


def _packed(block: Block, layout: Panel, columns: int) -> Raw:
    return layout.pack(block() if callable(block) else block, columns)
