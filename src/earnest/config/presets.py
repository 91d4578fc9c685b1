"""Configurations that are known by name: the published members, and small ones for tests."""

from __future__ import annotations

from types import MappingProxyType

from earnest.config.ernie import ErnieConfig
from earnest.errors import UserError

# The numbers of the published config.json files; see docs/model.md.
PRESETS = MappingProxyType(
    {
        "0.3b": ErnieConfig(
            vocab_size=103_424,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=18,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=128,
        ),
        "21b-a3b": ErnieConfig(
            vocab_size=103_424,
            hidden_size=2560,
            intermediate_size=12_288,
            num_hidden_layers=28,
            num_attention_heads=20,
            num_key_value_heads=4,
            head_dim=128,
            moe_num_experts=64,
            moe_k=6,
            moe_intermediate_size=1536,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            num_nextn_predict_layers=1,
        ),
        "300b-a47b": ErnieConfig(
            vocab_size=103_424,
            hidden_size=8192,
            intermediate_size=28_672,
            num_hidden_layers=54,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=False,
            moe_num_experts=64,
            moe_k=8,
            moe_intermediate_size=3584,
            moe_num_shared_experts=0,
            moe_layer_start_index=3,
            num_nextn_predict_layers=1,
        ),
        # The two models whose logits are known number by number: tests/runners holds the goldens.
        "tiny-dense": ErnieConfig(
            vocab_size=64,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            dtype="float32",
        ),
        "tiny-moe": ErnieConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            dtype="float32",
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=8,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
        ),
        # Every kind of tensor at a size (20 MB in bf16) that a test can write and convert.
        "small-moe": ErnieConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=896,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            num_nextn_predict_layers=1,
        ),
    }
)


def preset(name: str) -> ErnieConfig:
    """The configuration of that name.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UserError(
            f"there is no preset {name!r}", expected=f"one of {', '.join(PRESETS)}"
        ) from None
