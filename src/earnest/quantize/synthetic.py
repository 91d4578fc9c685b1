"""Packed folders and GGUF files of true shapes with random weights, for benchmarks.

Unlike a folder of `checkpoint.synth`, each large matrix is one random tile over and over, encoded
(and packed) once: a 21B model is written in minutes, at the speed of the disk. The experts of a
layer begin at different places of one tile, so that neighbours do not get the same weights. The
same seed gives the same weights packed and as GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from math import gcd
from pathlib import Path

import numpy as np

from earnest import codecs
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.export import DTYPES, NO_TOKENIZER, of_weights, write_staged
from earnest.checkpoint.names import StoredTensor, TensorSpec, stored, tensor_specs
from earnest.checkpoint.synth import random_blocks, require_mtp
from earnest.checkpoint.writer import WriteReport, write_checkpoint
from earnest.codecs.base import Codec, Raw
from earnest.codecs.bits import Bytes
from earnest.codecs.encode import GENERATION
from earnest.codecs.panel import PANEL_ROWS, PANEL_VERSION, PANELS
from earnest.config import ErnieConfig, to_gguf
from earnest.log import Progress, silent
from earnest.quantize.recipe import Substitutes, fitting, recipe

# Counts up when the same seed gives other weights than before; part of the resume fingerprint.
_GENERATION = 2
_TILE_WEIGHTS = 2**20
# Tiles in use at a time: gate, up and down of the experts of a layer, which come in turn.
_TILES_KEPT = 4

_EXPERT = re.compile(r"\.experts\.(\d+)\.")

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
    specs = {spec.name: spec for spec in tensor_specs(config)}
    types = _Types(codec, config)
    plan = []
    for target in stored(config, "gguf"):
        spec = specs[target.parts[0].name]
        plan.append(_planned(target, spec, types.of(spec, len(target.parts)), config, seed))
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
        notes=types.notes(),
    )


def synth_packed(
    destination: Path,
    config: ErnieConfig,
    codec: str,
    *,
    seed: int,
    mtp: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> WriteReport:
    """Write a packed folder of the shapes of `config` with random weights.

    Args:
        destination: the folder to make; it appears when it is complete, and an interrupted run is
            taken up again by the same call.
        config: the model's numbers.
        codec: a recipe of `RECIPES`, or "bf16", "f16" or "f32".
        seed: the same seed gives the same bytes.
        mtp: also write the multi-token-prediction block the configuration speaks of.
        force: replace a destination that exists.
        progress: told about bytes written.

    Raises:
        UserError: there is no such codec, the destination exists, `mtp` for a model that has none.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    if mtp:
        require_mtp(config)
    else:
        config = replace(config, num_nextn_predict_layers=0)
    specs = {spec.name: spec for spec in tensor_specs(config, mtp)}
    types = _Types(codec, config)
    plan = []
    for target in stored(config, "hf", mtp):
        spec = specs[target.parts[0].name]
        tensor = _planned(target, spec, types.of(spec, len(target.parts)), config, seed)
        if len(spec.shape) == 2:
            layout = PANELS[tensor.codec.name]
            blocks = partial(_panel_blocks, spec, tensor.codec.name, config.moe_num_experts, seed)
            tensor = replace(tensor, layout=layout, blocks=blocks)
        plan.append(tensor)
    return write_checkpoint(
        destination,
        plan,
        config,
        layout="panel",
        fingerprint={
            "synth": _GENERATION,
            "seed": seed,
            "panel_version": PANEL_VERSION,
            "encoders": GENERATION,
        },
        force=force,
        progress=progress,
        notes=types.notes(),
    )


class _Types:
    """The codec of a tensor: that of the recipe for matrices but the router, else float32."""

    def __init__(self, codec: str, config: ErnieConfig) -> None:
        self._plain = codec if codec in DTYPES else None
        self._mixed = None if self._plain else Substitutes(recipe(codec), config)

    def of(self, spec: TensorSpec, count: int) -> Codec:
        """The codec of `count` tensors, of which `spec` is the first."""
        if spec.fp32 or len(spec.shape) == 1:
            return codecs.codec("f32")
        columns = spec.shape[-1]
        if self._mixed:
            return self._mixed.codec(spec.name, columns, count)
        assert self._plain
        return fitting(self._plain, columns)

    def notes(self) -> tuple[str, ...]:
        """What a careful reader should know of what was written."""
        return (*_NOTES, *(self._mixed.notes() if self._mixed else ()))


def _planned(
    target: StoredTensor, spec: TensorSpec, codec: Codec, config: ErnieConfig, seed: int
) -> PlannedTensor:
    """A stored tensor in rows: random numbers, or a matrix (or stack of them) made of a tile."""
    if len(spec.shape) == 1:
        blocks = partial(random_blocks, spec.name, spec.shape, codec, seed)
    else:
        names = tuple(part.name for part in target.parts)
        blocks = partial(_row_blocks, names, spec, codec.name, config.moe_num_experts, seed)
    return PlannedTensor(target.name, codec, target.shape, blocks)


def _row_blocks(
    names: tuple[str, ...], spec: TensorSpec, codec: str, experts: int, seed: int
) -> Iterator[Raw]:
    rows, columns = spec.shape
    tile = _tile(*_tile_of(spec, experts), columns, codec, seed)
    for name in names:
        yield from _cycled(tile, _first_panel(name, rows) * PANEL_ROWS, rows)


def _panel_blocks(spec: TensorSpec, codec: str, experts: int, seed: int) -> Iterator[Raw]:
    rows, columns = spec.shape
    whole, rest = divmod(rows, PANEL_ROWS)
    first = _first_panel(spec.name, rows)
    name, panels = _tile_of(spec, experts)
    yield from _cycled(_packed_tile(name, panels, columns, codec, seed), first, whole)
    if rest:
        tile = _tile(name, panels, columns, codec, seed)
        last = np.concatenate(list(_cycled(tile, (first + whole) * PANEL_ROWS, rest)))
        yield PANELS[codec].pack(last, columns)


def _cycled(tile: Raw, start: int, count: int) -> Iterator[Raw]:
    """`count` entries of a tile that goes on at its beginning."""
    start %= len(tile)
    while count:
        part = tile[start : start + count]
        yield part
        count, start = count - len(part), 0


def _first_panel(name: str, rows: int) -> int:
    """Where in its tile a matrix begins: an expert behind the one before it."""
    expert = _EXPERT.search(name)
    return int(expert[1]) * -(-rows // PANEL_ROWS) if expert else 0


def _tile_of(spec: TensorSpec, experts: int) -> tuple[str, int]:
    """Name and panels of the tile that a matrix is made of."""
    rows, columns = spec.shape
    panels = -(-rows // PANEL_ROWS)
    most = max(1, _TILE_WEIGHTS // columns // PANEL_ROWS)
    if not _EXPERT.search(spec.name):
        return spec.name, min(panels, most)
    if panels * experts > most:
        # No divisor in common, so that as many experts as the tile has panels differ.
        while gcd(panels, most) > 1:
            most -= 1
    return _EXPERT.sub(".experts.0.", spec.name), min(panels * experts, most)


@lru_cache(_TILES_KEPT)
def _tile(name: str, panels: int, columns: int, codec: str, seed: int) -> Raw:
    shape = (panels * PANEL_ROWS, columns)
    values = np.concatenate(list(random_blocks(name, shape, codecs.codec("f32"), seed)))
    encode = codecs.codec(codec).encode
    assert encode is not None
    return encode(values.astype(np.float32, copy=False).reshape(shape))


@lru_cache(_TILES_KEPT)
def _packed_tile(name: str, panels: int, columns: int, codec: str, seed: int) -> Bytes:
    return PANELS[codec].pack(_tile(name, panels, columns, codec, seed), columns)
