"""`quantize`: any checkpoint as a packed folder, or a GGUF file, of smaller weights.

Streaming, staged and resumable; see `checkpoint.pack` and `checkpoint.export`. Tensors that are
stored in the wanted type already are copied, not decoded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earnest.checkpoint import Checkpoint
from earnest.checkpoint.export import keeping_float32, write_gguf
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.names import StoredTensor
from earnest.checkpoint.pack import write_packed
from earnest.checkpoint.writer import WriteReport
from earnest.codecs.base import Codec
from earnest.log import Progress, silent
from earnest.quantize.recipe import Substitutes, recipe


def quantize(
    source: Checkpoint,
    destination: Path,
    codec: str,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> WriteReport:
    """Write `source` as `destination` with the types of a recipe.

    Args:
        source: an opened checkpoint of any container and dialect.
        destination: a GGUF file if its name ends in `.gguf`, else a packed folder, which keeps the
            multi-token-prediction block, too. It appears when it is complete, and an interrupted
            run is taken up again by the same call.
        codec: name of a recipe, a key of `RECIPES`.
        force: replace a destination that exists.
        progress: told about bytes written.

    Raises:
        UserError: there is no such recipe, or the destination exists or overlaps with the source.
        FormatError: weights are not finite, or beyond the range of the type; names the tensor.
        ConfigError: GGUF has no way to describe the model.
        TensorsError: a tensor is missing.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    mix = recipe(codec)
    substitutes = Substitutes(mix, source.config)

    def choose(target: StoredTensor, tensor: LazyTensor) -> Codec:
        return substitutes.codec(tensor.name, tensor.shape[-1])

    if destination.suffix == ".gguf":
        keeping = keeping_float32(source, choose)
        report = write_gguf(
            source, destination, keeping, label=mix.name, force=force, progress=progress
        )
    else:
        report = write_packed(
            source, destination, choose, label=mix.name, force=force, progress=progress
        )
    return replace(report, notes=(*report.notes, *substitutes.notes()))
