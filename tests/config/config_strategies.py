"""Hypothesis strategies for configurations."""

from __future__ import annotations

from hypothesis import strategies as st

from earnest.config import ErnieConfig


@st.composite
def configs(draw: st.DrawFn, *, gguf: bool = False) -> ErnieConfig:
    """Valid configurations, dense and mixture of experts; with `gguf`, those GGUF can describe."""
    kv_heads = draw(st.integers(1, 8))
    layers = draw(st.integers(1, 60))
    fields = {
        "vocab_size": draw(st.integers(1, 200_000)),
        "hidden_size": draw(st.integers(1, 8192)),
        "intermediate_size": draw(st.integers(1, 32_768)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.integers(1, 8)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 128)),
        "max_position_embeddings": draw(st.integers(1, 2**20)),
        # GGUF holds float32, so there the numbers are short decimals, as people write them.
        "rms_norm_eps": draw(
            st.integers(0, 999).map(lambda n: n / 1e8) if gguf else st.floats(0, 0.1)
        ),
        "rope_theta": draw(st.integers(1, 999_999) if gguf else st.floats(1, 1e7)),
        "tie_word_embeddings": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "bos_token_id": draw(st.none() | st.integers(0, 1000)),
        "eos_token_ids": tuple(
            draw(st.lists(st.integers(0, 1000), max_size=3 if gguf else 5, unique=True))
        ),
        "pad_token_id": draw(st.none() | st.integers(0, 1000)),
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    }
    if not gguf:
        fields["initializer_range"] = draw(st.floats(0, 1))
        fields["num_nextn_predict_layers"] = draw(st.integers(0, 4))
    if draw(st.booleans()):
        experts = draw(st.integers(1, 128))
        fields |= {
            "moe_num_experts": experts,
            "moe_k": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(st.integers(1, 8192)),
            "moe_num_shared_experts": draw(st.integers(0, 4)),
            "moe_layer_start_index": draw(st.integers(0, layers)),
            "moe_layer_interval": draw(st.integers(1, 4)),
        }
        if not gguf:
            fields["moe_layer_end_index"] = draw(st.integers(-1, layers + 2))
            fields["moe_norm_min"] = draw(st.floats(0, 0.5))
    return ErnieConfig(**fields)
