"""`synth_gguf`: a GGUF file of true shapes with random weights, for benchmarks.

Unlike a folder of `checkpoint.synth`, each large tensor is one random tile over and over, encoded
once: a 21B model is written in minutes, at the speed of the disk. The number of rows of a tile is
odd, so that neighbouring experts do not get the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from earnest import codecs
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.export import DTYPES, NO_TOKENIZER, of_weights, write_staged
from earnest.checkpoint.names import StoredTensor, stored, tensor_specs
from earnest.checkpoint.synth import random_blocks
from earnest.checkpoint.writer import WriteReport
from earnest.codecs.base import Codec, Raw
from earnest.config import ErnieConfig, to_gguf
from earnest.log import Progress, silent
from earnest.quantize.recipe import fitting, recipe

# Counts up when the same seed gives other weights than before; part of the resume fingerprint.
_GENERATION = 1
_TILE_WEIGHTS = 2**20

_NOTES = (
    "no tokenizer was written: random weights have no vocabulary; run them on token ids",
    "large tensors repeat one random tile: good for timing, not for judging quality",
)


def synth_gguf(
    destination: Path,
    config: ErnieConfig,
    codec: str,
    *,
    seed: int,
    force: bool = False,
    progress: Progress = silent,
) -> WriteReport:
    """Write a GGUF file of the shapes of `config` with random weights.

    Args:
        destination: a name that ends in `.gguf`; the file appears when it is complete, and an
            interrupted run is taken up again by the same call.
        config: the model's numbers.
        codec: a recipe of `RECIPES`, or "bf16", "f16" or "f32".
        seed: the same seed gives the same bytes.
        force: replace a destination that exists.
        progress: told about bytes written.

    Raises:
        UserError: there is no such codec, or the destination exists.
        ConfigError: GGUF has no way to describe the model.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    config = replace(config, num_nextn_predict_layers=0)
    wanted = _wanted(codec, config)
    fp32 = {spec.name for spec in tensor_specs(config) if spec.fp32}
    plan = []
    for target in stored(config, "gguf"):
        name, columns = target.parts[0].name, target.shape[-1]
        whole = len(target.shape) == 1 or name in fp32
        kind = codecs.codec("f32") if whole else fitting(wanted(name), columns)
        plan.append(PlannedTensor(target.name, kind, target.shape, _tiles(target, kind, seed)))
    resumed = write_staged(
        destination,
        plan,
        of_weights(to_gguf(config) | NO_TOKENIZER, plan),
        fingerprint={"synth": _GENERATION, "seed": seed},
        force=force,
        progress=progress,
    )
    return WriteReport(
        path=str(destination),
        layout="gguf",
        tensors=len(plan),
        nbytes=sum(tensor.nbytes for tensor in plan),
        files=(destination.name,),
        resumed=resumed,
        notes=_NOTES,
    )


def _wanted(codec: str, config: ErnieConfig) -> Callable[[str], str]:
    """Canonical name to the codec of a matrix."""
    if codec in DTYPES:
        return lambda name: codec
    mix = recipe(codec)
    layers, tied = config.num_hidden_layers, config.tie_word_embeddings
    return lambda name: mix.wanted(name, layers, tied=tied)


def _tiles(target: StoredTensor, codec: Codec, seed: int) -> Callable[[], Iterator[Raw]]:
    rows, columns = prod(target.shape[:-1]), target.shape[-1]
    tile_rows = min(rows, (_TILE_WEIGHTS // columns) | 1)

    def blocks() -> Iterator[Raw]:
        name, shape = target.parts[0].name, (tile_rows, columns)
        values = np.concatenate(list(random_blocks(name, shape, codecs.codec("f32"), seed)))
        assert codec.encode is not None
        tile = codec.encode(values.astype(np.float32, copy=False).reshape(shape))
        for start in range(0, rows, tile_rows):
            yield tile[: rows - start]

    return blocks
