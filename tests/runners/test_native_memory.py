"""What the native runner takes beside the mapped file: promised to be under 600 MB for the 21B."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from earnest.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.checkpoint.names import tensor_specs
from earnest.checkpoint.pack import is_router
from earnest.codecs.registry import codec
from earnest.config import ErnieConfig, preset
from earnest.errors import MemoryBudgetError
from earnest.quantize import RECIPES
from earnest.runners.native import isa

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

if isa.installed():
    from earnest.runners.native.packing import Packing
    from earnest.runners.native.runner import NativeRunner, kv_bytes_per_token

CONTEXT, BLOCK_SIZE = 4096, 32
# Of the 600 MB, what is left to Python, numpy, the tokenizer and the logits. AMX stages activations
# in 57 MB that other tiers do not take.
ELSEWHERE = 60_000_000


def never() -> np.ndarray:
    raise AssertionError("nothing of the weights is read to plan the memory")


def packed(config: ErnieConfig, recipe: str) -> Checkpoint:
    """A packed folder as `earnest quantize` makes it from bf16, without its weights."""
    tensors = {}
    for spec in tensor_specs(config):
        if len(spec.shape) == 1:
            values = np.zeros(spec.shape, np.float32)
            tensors[spec.name] = LazyTensor(
                spec.name, codec("f32"), spec.shape, lambda values=values: values, ""
            )
            continue
        kind = "bf16"
        if not is_router(spec.name):
            layers, tied = config.num_hidden_layers, config.tie_word_embeddings
            kind = RECIPES[recipe].wanted(spec.name, layers, tied=tied)
        tensors[spec.name] = LazyTensor(spec.name, codec(kind), spec.shape, never, "", never)
    return Checkpoint(Path("packed"), config, "panel", "hf", tensors)


class HasRoomError(Exception):
    """The runner went on to place its weights."""


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m", "q8_0"])
@pytest.mark.parametrize("tier", isa.available_tiers() if isa.installed() else [])
def test_the_21b_takes_under_600_mb_beside_its_file(
    tier: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(*arguments: object) -> None:
        raise HasRoomError

    monkeypatch.setattr(Packing, "place", place)
    config = preset("21b-a3b")
    checkpoint = packed(config, recipe)
    keys_values = CONTEXT * kv_bytes_per_token(config)
    routers = 4 * 27 * 64 * 2560  # float32, whatever the file holds
    for free, error in (
        (600_000_000 - ELSEWHERE, HasRoomError),
        (keys_values + routers, MemoryBudgetError),
    ):
        monkeypatch.setattr("earnest.env.free_memory", lambda free=free: free)
        with pytest.raises(error):
            NativeRunner(
                checkpoint,
                num_blocks=CONTEXT // BLOCK_SIZE,
                block_size=BLOCK_SIZE,
                threads=2,
                tier=tier,
            )
