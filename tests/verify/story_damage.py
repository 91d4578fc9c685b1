"""Ways to damage the tensors of the story model, and to grow it into a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

LAYERS, HEADS, KV_HEADS = 5, 8, 4  # of the story model


def permute_rows(tensors: Tensors, *, to_half_split: bool) -> None:
    """Reorder the rows of q and k as a converter for half-split (or interleaved) pairs does."""
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        for layer in range(LAYERS):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            rows = np.arange(len(tensors[key]))
            pairs = (-1, 2) if to_half_split else (2, -1)
            order = rows.reshape(heads, *pairs).swapaxes(1, 2).ravel()
            tensors[key] = tensors[key][order]


def swap_gate_up(tensors: Tensors) -> None:
    """Exchange every gate and up projection."""
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def upcycle(tensors: Tensors, config: dict[str, Any], *, experts: int = 8, good: int = 3) -> None:
    """Grow the dense model into a mixture whose correction bias matters.

    The first `good` experts are copies of the dense block, the others are loud noise; the router
    knows nothing, and only the bias steers every choice to the copies. Since weights are
    normalised, the mixture then computes what the dense model does; without the bias it does not.
    """
    rng = np.random.default_rng(7)
    width, hidden = tensors["model.layers.0.mlp.gate_proj.weight"].shape
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = tensors.pop(f"{prefix}.{name}.weight")
            for expert in range(experts):
                noise = rng.standard_normal(dense.shape).astype(np.float32)
                tensors[f"{prefix}.experts.{expert}.{name}.weight"] = (
                    dense.copy() if expert < good else 4 * dense.std() * noise
                )
        router = 0.05 * rng.standard_normal((experts, hidden))
        tensors[f"{prefix}.gate.weight"] = router.astype(np.float32)
        bias = 2.0 * (np.arange(experts) < good) + 0.01 * rng.standard_normal(experts)
        tensors[f"{prefix}.moe_statics.e_score_correction_bias"] = bias[None].astype(np.float32)
    config |= {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "moe_num_experts": experts,
        "moe_k": 2,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    }


def set_bias(tensors: Tensors, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change every correction bias."""
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name] = change(tensors[name])
