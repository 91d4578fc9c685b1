"""config.json: every spelling is read, what would change the arithmetic is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from config_strategies import configs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from earnest.config import Accounting, ErnieConfig, from_hf, preset, to_hf
from earnest.config.keys import HF_HARMLESS, HF_NEUTRAL
from earnest.errors import ConfigError

DENSE = to_hf(preset("0.3b"))
MOE = to_hf(preset("21b-a3b"))
# The published 28B vision-language model; its text part is the 21B without MTP.
VISION = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe_vl",
    "moe_capacity": [128, 128, 128],
    "moe_gate": "topk",
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_layer_start_index": [1, 1],
    "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
    "moe_num_experts": [64, 64],
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_3d": True,
    "freq_allocation": 20,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "vision_config": {"depth": 32, "hidden_act": "quick_gelu"},
    "vocab_size": 103424,
}
TEXT_OF_28B = {**MOE, "num_nextn_predict_layers": 0}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


# --- what is out there ------------------------------------------------------------------------


def published(shared: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shared / "data" / name).read_text(encoding="utf-8"))
    return loaded


def test_published_dense(shared: Path) -> None:
    raw = published(shared, "tokenizer/ernie-4.5-0.3b-base-pt/config.json")
    assert from_hf(raw) == preset("0.3b")


def test_published_moe(shared: Path) -> None:
    raw = published(shared, "tokenizer/ernie-4.5-21b-a3b-thinking/config.json")
    config = from_hf(raw)
    assert config == from_hf(TEXT_OF_28B)
    assert Accounting(config).total == 21_825_437_888


def test_pretraining_configurations(shared: Path) -> None:
    small = from_hf(published(shared, "tokenizer/ernie-pretrain/model_config_21b_a3b.json"))
    large = from_hf(published(shared, "tokenizer/ernie-pretrain/model_config_300b_a47b.json"))
    assert (small.num_hidden_layers, small.rope_theta) == (28, 10_000)  # 30 less 2 empty ones
    assert (large.num_hidden_layers, large.moe_layer_end_index) == (54, 53)
    assert (small.tie_word_embeddings, large.tie_word_embeddings) == (True, False)
    assert Accounting(small).total == 21_825_437_888
    for config in (small, large):
        ids = config.bos_token_id, config.eos_token_ids, config.pad_token_id
        assert ids == (1, (2,), 0)


def test_paddleocr_vl_is_refused_with_the_reason(shared: Path) -> None:
    with pytest.raises(ConfigError, match="rope_is_neox_style"):
        from_hf(published(shared, "tokenizer/paddleocr-vl/config.json"))


def test_story_model(shared: Path) -> None:
    config = from_hf(published(shared, "models/stories260k-ernie/config.json"))
    assert Accounting(config).total == 260_032


# --- spellings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None},
        {"rope_theta": None},
        {"dtype": None},
        {"torch_dtype": None},
        {"torch_dtype": None, "dtype": "torch.bfloat16"},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
        {"rope_theta": 500000},
        {"moe_layer_end_index": -1},
        {"moe_layer_end_index": None},
        {"architectures": ["Ernie4_5_MoEForCausalLM"]},
        {"architectures": None},
        {"model_type": None},
        {"head_dim": None},
        {"eos_token_id": [2]},
        {"moe_norm_min": None},
        {"moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512]},
        {"moe_gate": "top2_fused", "moe_capacity": [6, 6, 6]},
        {"sliding_window": None, "hidden_dropout_prob": 0.1},
        {"layer_types": ["full_attention"] * 28},
        {"compression_ratio": 1},
        {"num_hidden_layers": 30, "remove_tail_layer": 2, "moe_layer_end_index": -1},
        {"num_hidden_layers": 29, "remove_tail_layer": True, "moe_layer_end_index": -1},
        {"remove_tail_layer": False},
        {"use_moe": True},
        {"rope_3d": False},
    ],
)
def test_spellings_of_the_same_model(changes: dict[str, Any]) -> None:
    raw = {**MOE, **changes}
    assert from_hf(raw) == preset("21b-a3b")
    absent = without(raw, *(key for key, value in changes.items() if value is None))
    assert from_hf(absent) == preset("21b-a3b")


def test_multi_head_attention_may_be_spelled_null() -> None:
    assert from_hf({**DENSE, "num_key_value_heads": None}).num_key_value_heads == 16


def test_shared_experts_left_out_are_none() -> None:
    assert from_hf(without(MOE, "moe_num_shared_experts")).moe_num_shared_experts == 0


def test_token_ids() -> None:
    config = from_hf({**DENSE, "bos_token_id": None, "eos_token_id": [2, 7], "pad_token_id": -1})
    ids = config.bos_token_id, config.eos_token_ids, config.pad_token_id
    assert ids == (None, (2, 7), None)
    assert from_hf({**DENSE, "eos_token_id": None}).eos_token_ids == ()


def test_routing_keys_are_inert_in_a_dense_model() -> None:
    assert from_hf({**DENSE, "moe_num_experts": 0, "moe_use_aux_free": False}) == preset("0.3b")


def test_text_part_of_a_vision_model() -> None:
    assert from_hf(VISION) == from_hf({**TEXT_OF_28B, "moe_layer_end_index": 29})


def test_nested_text_part() -> None:
    text = without(VISION, "vision_config", "architectures", "moe_layer_start_index")
    text = without(text, "moe_layer_end_index", "moe_layer_interval", "rope_scaling", "rope_theta")
    text |= {
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": 64,
        "mlp_layer_types": ["dense"] + ["sparse"] * 27,
        "rope_parameters": {
            "rope_theta": 5e5,
            "rope_type": "default",
            "mrope_section": [22, 22, 20],
        },
        "bos_token_id": None,
    }
    raw = {
        "model_type": "ernie4_5_vl_moe",
        "text_config": text,
        "vision_config": {"depth": 32},
        "image_token_id": 100295,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
    }
    assert from_hf(raw) == from_hf(TEXT_OF_28B)
    # The head is the outer model's.
    assert not from_hf({**raw, "tie_word_embeddings": False}).tie_word_embeddings


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("dss", (1, 2, 1)),
        ("dsds", (1, 3, 2)),
        ("ddsdds", (2, 5, 3)),
        ("dsd", (1, 1, 1)),
        ("sss", (0, 2, 1)),
    ],
)
def test_listed_kinds_of_layers(kinds: str, expected: tuple[int, int, int]) -> None:
    config = from_hf(
        {
            **without(TEXT_OF_28B, "moe_layer_start_index", "moe_layer_end_index"),
            "num_hidden_layers": len(kinds),
            "mlp_layer_types": [{"d": "dense", "s": "sparse"}[kind] for kind in kinds],
        }
    )
    found = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    assert found == expected
    assert [config.is_moe_layer(i) for i in range(len(kinds))] == [k == "s" for k in kinds]


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(HF_NEUTRAL))
def test_a_key_that_changes_the_arithmetic_is_refused_by_name(key: str) -> None:
    for value in HF_NEUTRAL[key].values:
        assert from_hf({**MOE, key: value}) == preset("21b-a3b")
    assert from_hf({**MOE, key: None}) == preset("21b-a3b")
    with pytest.raises(ConfigError, match=key):
        from_hf({**MOE, key: "something else"})


@pytest.mark.parametrize("key", sorted(HF_HARMLESS))
def test_harmless_keys_change_nothing(key: str) -> None:
    for value in (None, True, 0.5, "x", [1], {"a": 1}):
        assert from_hf({**DENSE, key: value}) == preset("0.3b")


def test_no_key_stands_in_two_tables() -> None:
    assert not HF_NEUTRAL.keys() & HF_HARMLESS.keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ({"use_rmsnorm": False}, "use_rmsnorm"),
        ({"rope_is_neox_style": True}, "rope_is_neox_style"),
        ({"rope_reorder": True}, "rope_reorder"),
        ({"compression_ratio": 2.0}, "compression_ratio"),
        ({"moe_norm_gate_logits": False}, "moe_norm_gate_logits"),
        ({"moe_use_aux_free": False}, "moe_use_aux_free"),
        ({"quantization_config": {"quant_method": "wint4"}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5}}, "rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "differs"),
        ({"rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]}}, "mrope_section"),
        ({"use_3d_rope": True}, "use_3d_rope"),
        ({"rope_3d": True}, "rope_3d"),
        ({"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": "int8", "torch_dtype": "int8"}, "dtype"),
        ({"use_moe": False}, "use_moe"),
        ({"moe_num_experts": None}, "moe_num_experts"),
        ({"moe_num_experts": [64, 64, 64]}, "moe_num_experts"),
        ({"moe_layer_start_index": [1, 2]}, "moe_layer_start_index"),
        ({"mlp_layer_types": ["dense"] * 28}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense"] * 27}, "mlp_layer_types"),
        ({"mlp_layer_types": (["dense", "sparse", "sparse"] * 10)[:28]}, "mlp_layer_types"),
        ({"remove_tail_layer": 28}, "num_hidden_layers"),
        ({"remove_tail_layer": -1}, "remove_tail_layer"),
        ({"model_type": "llama"}, "another order"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"model_type": 7}, "model_type"),
        ({"text_config": []}, "text_config"),
        ({"engram_layers": [3]}, "engram_layers"),
        ({"moe_k": 65}, "moe_k"),
        ({"head_dim": 127}, "head_dim"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf({**MOE, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_num_experts": 8}, "contradicts"),
        ({"rope_theta": None, "rope_parameters": None}, "rope_theta is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is missing"),
        ({"hidden_size": 1000, "head_dim": None}, "head_dim is missing"),
    ],
)
def test_refusals_of_dense_models(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf({**DENSE, **changes})


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "moe_k",
        "moe_num_experts",
        "moe_intermediate_size",
        "moe_layer_start_index",
        "moe_layer_interval",
    ],
)
def test_what_implementations_fill_in_differently_must_be_there(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        from_hf(without(MOE, key))


def test_dense_head_size_must_be_there_unless_all_agree() -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        from_hf(without(DENSE, "head_dim"))  # 1024 / 16 = 64, but transformers would take 128
    assert from_hf({**without(DENSE, "head_dim"), "hidden_size": 2048}).head_dim == 128


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layer_start_index": [1, 3]},
        {"moe_use_hard_gate": False},
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
        {"rope_scaling": {"type": "default", "mrope_section": [22, 22, 22]}},
        {"rope_scaling": {"type": "default", "mrope_section": "22"}},
    ],
)
def test_vision_models_whose_text_would_differ(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_hf({**VISION, **changes})


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf({**MOE, "hidden_act": "gelu", "moe_k": "6", "rope_reorder": True, "novelty": 1})
    for name in ("hidden_act", "moe_k", "rope_reorder", "novelty"):
        assert name in str(caught.value)


# --- hostile values ---------------------------------------------------------------------------

HOSTILE = [
    "28",
    True,
    28.0,
    math.nan,
    math.inf,
    -1,
    10**400,
    2**63,
    [28],
    {"n": 28},
    "x" * 10_000,
    [[[]]],
    b"28",
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "moe_k", "vocab_size"])
def test_hostile_sizes(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf({**MOE, key: value})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", ["1e-5", True, math.nan, math.inf, -math.inf, 10**400, [1e-5]])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "initializer_range"])
def test_hostile_numbers(key: str, value: object) -> None:
    with pytest.raises(ConfigError):
        from_hf({**MOE, key: value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "use_bias"])
@pytest.mark.parametrize("value", ["false", 0, 1.0, []])
def test_hostile_switches(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        from_hf({**MOE, key: value})


@pytest.mark.parametrize("value", ["2", [2, "3"], True, 2.0, list(range(1000)), {"a": 2}])
def test_hostile_end_ids(value: object) -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        from_hf({**MOE, "eos_token_id": value})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([DENSE, MOE, VISION]),
    st.dictionaries(
        st.sampled_from(sorted(MOE.keys() | VISION.keys() | HF_NEUTRAL.keys() | {"text_config"})),
        json_values,
        max_size=3,
    ),
)
@example(MOE, {"moe_num_experts": -1})
@example(MOE, {"moe_num_experts": 0})
def test_any_value_anywhere_is_read_or_refused(base: dict[str, Any], changes: dict) -> None:
    try:
        config = from_hf({**base, **changes})
    except ConfigError:
        return
    assert from_hf(to_hf(config)) == config


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=20), json_values, max_size=6))
def test_any_object_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_hf(raw)


# --- writing ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(configs())
def test_what_is_written_is_read_back(config: ErnieConfig) -> None:
    raw = json.loads(json.dumps(to_hf(config)))
    assert from_hf(raw) == config


def test_transformers_reads_the_same_numbers_and_we_read_what_it_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")

    @settings(max_examples=60, deadline=None)
    @given(configs())
    def check(config: ErnieConfig) -> None:
        (tmp_path / "config.json").write_text(json.dumps(to_hf(config)), encoding="utf-8")
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.model_type == ("ernie4_5_moe" if config.is_moe else "ernie4_5")
        fields = set(config.__dataclass_fields__) - {"rope_theta", "eos_token_ids", "dtype"}
        if not config.is_moe:
            fields = {name for name in fields if not name.startswith("moe_")}
            fields.discard("num_nextn_predict_layers")
        for name in fields:
            assert getattr(theirs, name) == getattr(config, name), name
        assert theirs.rope_parameters == {"rope_theta": config.rope_theta, "rope_type": "default"}
        ends = theirs.eos_token_id
        assert config.eos_token_ids == tuple(
            ends if isinstance(ends, list) else [] if ends is None else [ends]
        )
        assert str(theirs.dtype).removeprefix("torch.") == config.dtype
        theirs.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
        assert from_hf(saved) == config

    check()


@pytest.mark.parametrize("name", ["Ernie4_5Config", "Ernie4_5_MoeConfig", "Ernie4_5_VLMoeConfig"])
def test_what_transformers_saves_by_default(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    getattr(transformers, name)().save_pretrained(tmp_path)
    config = from_hf(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    total = 360_748_032 if name == "Ernie4_5Config" else 21_825_437_888
    assert Accounting(config).total == total
