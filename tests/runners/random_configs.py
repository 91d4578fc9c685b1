"""The random configurations on which the runners are compared: with transformers, with each other.

Every shape that the model family has, small: dense and mixtures of experts, grouped heads, biases,
tied heads, layers with and without experts.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from earnest.config import ErnieConfig

SEEDS = range(44)
CONTEXT = 131_072


def draw(seed: int) -> dict[str, object]:
    """The arguments of a random small configuration; every fourth is dense."""
    rng = np.random.default_rng([seed, 45])

    def pick(*options: object) -> object:
        return options[rng.integers(len(options))]

    far = seed % 5 == 4
    kv_heads = pick(1, 2) if far else pick(1, 2, 4)
    groups = seed % 8 + 1
    square = seed % 4 == 1  # hidden size equal to the width of all query heads together
    head_dim = pick(4, 8) if far or square else pick(8, 16, 24, 64)
    layers = pick(2, 3) if far else pick(2, 3, 4, 5)
    kwargs: dict[str, object] = {
        "vocab_size": int(rng.integers(90, 400)),
        "hidden_size": kv_heads * groups * head_dim if square else pick(32, 48, 80, 96),
        "intermediate_size": pick(40, 96, 128),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": pick(1e-5, 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": pick(10_000.0, 500_000.0)},
        "tie_word_embeddings": bool(rng.integers(2)),
        "use_bias": seed % 6 == 2,
        "attn_implementation": pick("eager", "sdpa"),
    }
    if seed % 4 == 0:
        return kwargs
    experts = pick(4, 6, 8, 16, 32, 64)
    interval = pick(1, 1, 2)
    # At least one layer of each model has experts, and its last index is given both ways.
    start = int(rng.integers(0, layers - interval + 1))
    end = pick(-1, layers - 1, int(rng.integers(start + interval - 1, layers)))
    return kwargs | {
        "moe_num_experts": experts,
        "moe_k": min(experts - 1, seed // 4 % 8 + 1),
        "moe_intermediate_size": pick(8, 24, 32),
        "moe_num_shared_experts": pick(0, 1, 2, 3),
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
    }


def ernie_config(seed: int, columns: int = 1) -> ErnieConfig:
    """The configuration that `draw` describes in transformers' words. Its widths are filled up to
    multiples of `columns`, what a row of a block codec must be; those of many experts are left."""
    kwargs = draw(seed)
    del kwargs["attn_implementation"]
    rope = kwargs.pop("rope_parameters")
    assert isinstance(rope, dict)
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if name in kwargs and (columns <= 32 or not name.startswith("moe") or seed % 4 == 2):
            kwargs[name] = columns * ceil(kwargs[name] / columns)  # type: ignore[operator]
    experts = {"moe_layer_end_index": -1} | kwargs if "moe_k" in kwargs else kwargs
    if experts.get("moe_layer_end_index") == -1:
        experts["moe_layer_end_index"] = kwargs["num_hidden_layers"] - 1  # type: ignore[operator]
    return ErnieConfig(**experts, rope_theta=rope["rope_theta"])  # type: ignore[arg-type]
