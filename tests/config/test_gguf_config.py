"""GGUF metadata to configuration and back."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from config_strategies import configs
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.config import ErnieConfig, from_gguf, preset, to_gguf
from earnest.config.keys import GGUF_HARMLESS, GGUF_NEUTRAL
from earnest.errors import ConfigError

# What the converter of llama.cpp writes for SmolLM2-135M-Instruct.
SMOLLM2: dict[str, Any] = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.file_type": 3,
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.tokens": ["x"] * 49152,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}
MOE = to_gguf(preset("21b-a3b"))


def test_smollm2() -> None:
    assert from_gguf(SMOLLM2, tied=True) == ErnieConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        pad_token_id=2,
    )


def test_numpy_values_are_numbers_too() -> None:
    converted = {
        key: np.uint32(value)
        if type(value) is int
        else np.float32(value)
        if type(value) is float
        else value
        for key, value in SMOLLM2.items()
    }
    assert from_gguf(converted, tied=True) == from_gguf(SMOLLM2, tied=True)


def test_token_list_counts_and_vocab_size_stands_in_for_it() -> None:
    assert from_gguf({**SMOLLM2, "llama.vocab_size": 32000}, tied=True).vocab_size == 49152
    alone = {k: v for k, v in SMOLLM2.items() if k != "tokenizer.ggml.tokens"}
    assert from_gguf(alone, tied=True).vocab_size == 49152


def test_defaults_are_those_of_llama_cpp() -> None:
    bare = {
        k: v
        for k, v in SMOLLM2.items()
        if k not in ("llama.rope.freq_base", "llama.attention.head_count_kv", "llama.vocab_size")
    }
    config = from_gguf({**bare, "general.file_type": 0}, tied=False)
    assert (config.rope_theta, config.num_key_value_heads, config.dtype) == (10_000.0, 9, "float32")
    assert not config.tie_word_embeddings


def test_end_of_turn_ids_join_the_end_of_text() -> None:
    changes = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    assert from_gguf({**SMOLLM2, **changes}, tied=True).eos_token_ids == (2, 7)
    unsigned_minus_one = {"tokenizer.ggml.padding_token_id": 2**32 - 1}
    assert from_gguf({**SMOLLM2, **unsigned_minus_one}, tied=True).pad_token_id is None


@pytest.mark.parametrize("width", [3072, 12288 // 4])
def test_shared_width_and_the_converters_quirk(width: int) -> None:
    raw = {**MOE, "ernie4_5-moe.expert_shared_feed_forward_length": width}
    assert from_gguf(raw, tied=True).shared_intermediate_size == 3072


def test_the_quirk_where_it_is_wrong() -> None:
    config = preset("tiny-moe")
    raw = to_gguf(config)
    key = "ernie4_5-moe.expert_shared_feed_forward_length"
    assert raw[key] == 16
    assert from_gguf({**raw, key: 24 // 2}, tied=True).shared_intermediate_size == 16
    with pytest.raises(ConfigError, match="expert_shared_feed_forward_length"):
        from_gguf({**raw, key: 17}, tied=True)


def test_per_layer_lists_that_agree() -> None:
    raw = {**SMOLLM2, "llama.feed_forward_length": [1536] * 30}
    assert from_gguf(raw, tied=True).intermediate_size == 1536
    with pytest.raises(ConfigError, match="feed_forward_length"):
        from_gguf({**SMOLLM2, "llama.feed_forward_length": [1536, 768] * 15}, tied=True)


@pytest.mark.parametrize("key", sorted(GGUF_NEUTRAL))
def test_keys_that_change_the_arithmetic(key: str) -> None:
    for value in GGUF_NEUTRAL[key].values:
        assert from_gguf({**SMOLLM2, f"llama.{key}": value}, tied=True)
    with pytest.raises(ConfigError, match=key):
        from_gguf({**SMOLLM2, f"llama.{key}": 17}, tied=True)


@pytest.mark.parametrize("key", sorted(GGUF_HARMLESS))
def test_harmless_keys(key: str) -> None:
    for value in (True, 4096, "x"):
        assert from_gguf({**SMOLLM2, f"llama.{key}": value}, tied=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "qwen3"}, "qwen3"),
        ({"general.architecture": None}, "architecture"),
        ({"general.architecture": ["llama"]}, "architecture"),
        ({"general.type": "adapter"}, "adapter"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "factor"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count"),
        ({"llama.attention.value_length": 32}, "value_length"),
        ({"llama.attention.scale": 0.5}, "attention.scale"),
        ({"llama.attention.q_lora_rank": 512}, "q_lora_rank"),
        ({"llama.attention.head_count": 7}, "key_length is missing"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.block_count": "30"}, "block_count"),
        ({"llama.block_count": True}, "block_count"),
        ({"llama.block_count": 2**63}, "block_count"),
        ({"llama.block_count": 0}, "num_hidden_layers"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon"),
        ({"llama.rope.freq_base": math.inf}, "rope.freq_base"),
        ({"tokenizer.ggml.tokens": None, "llama.vocab_size": None}, "vocab_size is missing"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_gguf({**SMOLLM2, **changes}, tied=True)


def test_scale_that_says_what_is_done_anyway() -> None:
    assert from_gguf({**SMOLLM2, "llama.attention.scale": 0.125}, tied=True)


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count", "leading_dense_block_count"])
def test_what_a_mixture_must_say(key: str) -> None:
    raw = {k: v for k, v in MOE.items() if k != f"ernie4_5-moe.{key}"}
    with pytest.raises(ConfigError, match=key):
        from_gguf(raw, tied=True)


@settings(max_examples=200, deadline=None)
@given(configs(gguf=True))
def test_what_is_written_is_read_back(config: ErnieConfig) -> None:
    found = from_gguf(to_gguf(config), tied=config.tie_word_embeddings, use_bias=config.use_bias)
    assert found == config


def test_numbers_survive_the_float32_of_the_file() -> None:
    def as_stored(value: object) -> object:
        if type(value) is not float:
            return value
        return struct.unpack("<f", struct.pack("<f", value))[0]

    for name in ("0.3b", "tiny-dense", "tiny-moe"):
        config = preset(name)
        stored = {key: as_stored(value) for key, value in to_gguf(config).items()}
        assert from_gguf(stored, tied=True) == config


def test_what_gguf_cannot_say_is_not_written() -> None:
    base = preset("tiny-moe")
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    with pytest.raises(ConfigError, match="moe_layer_end_index"):
        to_gguf(ErnieConfig(**{**fields, "moe_layer_end_index": 1}))
    with pytest.raises(ConfigError, match="moe_norm_min"):
        to_gguf(ErnieConfig(**{**fields, "moe_norm_min": 1e-3}))


def test_mtp_has_no_place_in_gguf() -> None:
    assert from_gguf(MOE, tied=True).num_nextn_predict_layers == 0


hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=4),
    st.binary(max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([SMOLLM2, MOE]),
    st.dictionaries(st.sampled_from(sorted(SMOLLM2.keys() | MOE.keys())), hostile, max_size=3),
)
def test_any_value_anywhere_is_read_or_refused(base: dict[str, Any], changes: dict) -> None:
    try:
        from_gguf({**base, **changes}, tied=True)
    except ConfigError as error:
        assert len(str(error)) < 3000
