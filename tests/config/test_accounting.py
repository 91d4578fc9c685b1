"""Accounting: the published numbers, the name table, and the reference's own classes agree."""

from __future__ import annotations

import collections
import math

import pytest
from config_strategies import configs
from hypothesis import given, settings

from earnest.checkpoint.names import tensor_specs
from earnest.config import PRESETS, Accounting, ErnieConfig, preset, to_hf
from earnest.errors import UserError


@pytest.mark.parametrize(
    ("name", "total", "active", "without_embedding", "mtp"),
    [
        ("0.3b", 360_748_032, 360_748_032, 254_841_856, 0),
        ("21b-a3b", 21_825_437_888, 3_352_148_480, 3_087_383_040, 123_217_920),
        ("300b-a47b", 299_484_163_264, 47_926_583_296, 46_232_084_480, 989_888_512),
    ],
)
def test_published_members(
    name: str, total: int, active: int, without_embedding: int, mtp: int
) -> None:
    accounting = Accounting(preset(name))
    assert accounting.total == total
    assert accounting.active == active
    assert accounting.active_without_embedding == without_embedding
    assert accounting.mtp == mtp


def test_the_21b_by_part() -> None:
    assert Accounting(preset("21b-a3b")).parts == {
        "embedding": 264_765_440,
        "attention": 440_401_920,
        "dense_ffn": 94_371_840,
        "routed_experts": 20_384_317_440,
        "shared_experts": 637_009_920,
        "router": 4_423_680,
        "correction_bias": 1_728,
        "norms": 145_920,
        "lm_head": 0,
    }


def test_the_21b_file_has_two_types() -> None:
    accounting = Accounting(preset("21b-a3b"))
    assert accounting.weight_bytes(16) == 4 * 4_425_408 + 2 * 21_821_012_480
    assert accounting.weight_bytes(16, mtp=True) == accounting.weight_bytes(16) + 2 * 123_217_920


def test_bits_by_part() -> None:
    accounting = Accounting(preset("21b-a3b"))
    mixed = accounting.uniform(8) | {"routed_experts": 4.5}
    saved = accounting.weight_bytes(8) - accounting.weight_bytes(mixed)
    assert saved == 20_384_317_440 * 3.5 / 8


@pytest.mark.parametrize("bits", [{"embedding": 16.0}, {"experts": 4.0}])
def test_bits_that_do_not_fit_the_parts_are_refused(bits: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"no attention|unknown experts"):
        Accounting(preset("21b-a3b")).weight_bytes(bits)


def test_a_dense_model_needs_no_bits_for_experts() -> None:
    accounting = Accounting(preset("0.3b"))
    bits = {"embedding": 16, "attention": 16, "dense_ffn": 16, "norms": 16}
    assert accounting.weight_bytes(bits) == 2 * 360_748_032


def test_cache_bytes() -> None:
    # 28 layers, keys and values of 4 heads of 128, two bytes each.
    assert Accounting(preset("21b-a3b")).kv_bytes_per_token() == 28 * 2 * 512 * 2
    assert Accounting(preset("0.3b")).kv_bytes_per_token(1) == 18 * 2 * 256


def test_operations() -> None:
    accounting = Accounting(preset("21b-a3b"))
    norms = accounting.parts["norms"]
    # All active weights but the norms are matrices; the tied head is used once as a matrix.
    assert accounting.flops_per_token(0) == 2 * (accounting.active - norms)
    assert accounting.flops_per_token(1000) - accounting.flops_per_token(0) == 28 * 4 * 2560 * 1000


@settings(max_examples=60, deadline=None)
@given(configs())
def test_parts_are_those_of_the_name_table(config: ErnieConfig) -> None:
    if config.num_hidden_layers * config.moe_num_experts > 2000:
        return  # names by the hundred thousand; the counts do not depend on the size
    counts: collections.Counter[str] = collections.Counter()
    for spec in tensor_specs(config, mtp=True):
        counts[spec.part] += math.prod(spec.shape)
    accounting = Accounting(config)
    parts = accounting.parts | {"mtp": _mtp_by_definition(config)}
    assert {part: n for part, n in parts.items() if n} == dict(counts)
    assert accounting.mtp == parts["mtp"]


def _mtp_by_definition(config: ErnieConfig) -> int:
    """Independent of `Accounting.mtp`: tensor by tensor."""
    h, q, kv, f = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    weights = [h * q, h * kv, h * kv, q * h, f * h, f * h, h * f, h, h, h, h, 2 * h * h]
    biases = [q, kv, kv, h, f, f, h] if config.use_bias else []
    return config.num_nextn_predict_layers * sum(weights + biases)


@settings(max_examples=40, deadline=None)
@given(configs())
def test_operations_are_twice_the_active_matrices(config: ErnieConfig) -> None:
    if config.use_bias:
        return
    accounting = Accounting(config)
    head = config.vocab_size * config.hidden_size
    matrices = accounting.active_without_embedding - accounting.parts["norms"] + head
    assert accounting.flops_per_token(0) == 2 * matrices


@pytest.mark.parametrize("name", ["0.3b", "21b-a3b", "300b-a47b"])
def test_reference_classes_count_the_same(name: str) -> None:
    assert _reference_count(preset(name)) == Accounting(preset(name)).total


def test_reference_classes_count_the_same_for_any_configuration() -> None:
    pytest.importorskip("transformers", reason="compares with transformers")

    @settings(max_examples=25, deadline=None)
    @given(configs())
    def check(config: ErnieConfig) -> None:
        assert _reference_count(config) == Accounting(config).total

    check()


def _reference_count(config: ErnieConfig) -> int:
    """Parameters of the transformers class, made without storage."""
    torch = pytest.importorskip("torch", reason="compares with transformers")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    kind = "Ernie4_5_Moe" if config.is_moe else "Ernie4_5"
    raw = to_hf(config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.device("meta"):
        made = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config").from_dict(raw)
        )
    made.tie_weights()
    return sum(parameter.numel() for parameter in made.parameters())


def test_every_preset_is_counted() -> None:
    for name in PRESETS:
        accounting = Accounting(preset(name))
        assert 0 < accounting.active <= accounting.total
        assert accounting.weight_bytes(16) >= 2 * accounting.total
