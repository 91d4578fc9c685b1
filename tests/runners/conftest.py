"""Building blocks of the runner tests: checkpoints made of arrays, and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Codec
from earnest.config import ErnieConfig
from earnest.runners import Batch
from earnest.runners.reference import ReferenceRunner

F32 = Codec("f32", np.dtype(np.float32), 1, 4, lambda raw: raw)
F16 = Codec("f16", np.dtype(np.float16), 1, 2, lambda raw: raw.astype(np.float32))


def make_checkpoint(
    config: ErnieConfig, arrays: Mapping[str, np.ndarray], codec: Codec = F32
) -> Checkpoint:
    """A checkpoint whose tensors are these arrays, under their canonical names."""

    def tensor(name: str, array: np.ndarray) -> LazyTensor:
        stored = array.astype(codec.storage)
        return LazyTensor(name, codec, array.shape, lambda: stored, "memory")

    tensors = {name: tensor(name, array) for name, array in arrays.items()}
    return Checkpoint(Path("memory"), config, "safetensors", "hf", tensors)


def random_arrays(config: ErnieConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for every tensor of a model without biases."""
    rng = np.random.default_rng(seed)
    D, V, E = config.hidden_size, config.vocab_size, config.moe_num_experts

    def ffn(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, D),
            f"{prefix}.up_proj.weight": (width, D),
            f"{prefix}.down_proj.weight": (D, width),
        }

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (config.q_size, D)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (config.kv_size, D)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (config.kv_size, D)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, config.q_size)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        if not config.is_moe_layer(i):
            shapes |= ffn(f"{layer}.mlp", config.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (E, D)
        shapes[f"{layer}.mlp.moe_statics.e_score_correction_bias"] = (E,)
        for e in range(E):
            shapes |= ffn(f"{layer}.mlp.experts.{e}", config.moe_intermediate_size)
        if config.moe_num_shared_experts:
            shapes |= ffn(f"{layer}.mlp.shared_experts", config.shared_intermediate_size)
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return {
        name: (
            rng.standard_normal(shape) * (0.1 if len(shape) == 1 else 0.2) + ("norm" in name)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_batch(
    *sequences: tuple[Sequence[int], int, Sequence[int]], rows: Sequence[int] | None = None
) -> Batch:
    """A batch of (token ids, position of the first, block table) per sequence; all logits."""
    width = max(len(table) for _, _, table in sequences)
    tokens = [np.asarray(ids, np.int32) for ids, _, _ in sequences]
    total = sum(map(len, tokens))
    return Batch(
        tokens=np.concatenate(tokens),
        positions=np.concatenate(
            [np.arange(start, start + len(ids), dtype=np.int32) for ids, start, _ in sequences]
        ),
        sequence_starts=np.cumsum([0, *map(len, tokens)]).astype(np.int32),
        block_tables=np.array(
            [[*table, *[-1] * (width - len(table))] for _, _, table in sequences], np.int32
        ),
        logits_rows=np.arange(total, dtype=np.int32) if rows is None else np.array(rows, np.int32),
    )


@pytest.fixture(scope="session")
def checkpoint_of() -> Callable[..., Checkpoint]:
    """`make_checkpoint`."""
    return make_checkpoint


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Batch]:
    """`make_batch`."""
    return make_batch


@pytest.fixture(scope="session")
def weights_of() -> Callable[..., dict[str, np.ndarray]]:
    """`random_arrays`."""
    return random_arrays


@pytest.fixture(scope="session")
def runner_for() -> Callable[..., ReferenceRunner]:
    """A runner with room for `positions` positions, and any other argument of the class."""

    def make(checkpoint: Checkpoint, positions: int, **options: object) -> ReferenceRunner:
        block_size = int(options.setdefault("block_size", 8))
        return ReferenceRunner(checkpoint, num_blocks=-(-positions // block_size), **options)

    return make


@pytest.fixture
def f16() -> Codec:
    """A codec that takes part in the memory budget."""
    return F16
