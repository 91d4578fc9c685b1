"""The name table: a bijection for every configuration and dialect, and transformers' own names."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.checkpoint.names import (
    DIALECTS,
    MAX_TENSORS,
    TABLE,
    Dialect,
    Region,
    regions,
    stored,
    tensor_specs,
)
from earnest.codecs import codec
from earnest.config import PRESETS, Accounting, ErnieConfig, preset
from earnest.errors import ConfigError, FormatError


@st.composite
def configs(draw: st.DrawFn) -> ErnieConfig:
    """Small models of every kind, with all sizes different from each other where possible."""
    groups = draw(st.integers(1, 3))
    experts = draw(st.integers(0, 4))
    layers = draw(st.integers(1, 4))
    return ErnieConfig(
        vocab_size=draw(st.integers(1, 11)),
        hidden_size=draw(st.integers(1, 6)),
        intermediate_size=draw(st.integers(1, 7)),
        num_hidden_layers=layers,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        tie_word_embeddings=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        moe_num_experts=experts,
        moe_k=min(experts, 1),
        moe_intermediate_size=draw(st.integers(1, 5)) if experts else 0,
        moe_num_shared_experts=draw(st.integers(0, 2)) if experts else 0,
        moe_layer_start_index=draw(st.integers(0, layers - 1)),
        moe_layer_end_index=draw(st.integers(0, layers - 1)),
        moe_layer_interval=draw(st.integers(1, 2)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
    )


def box(region: Region) -> tuple[tuple[int, int], ...]:
    """The region as an interval per axis of its stored tensor."""
    lead: tuple[tuple[int, int], ...] = ()
    rest = region.stored_shape
    if region.index is not None:
        lead, rest = ((region.index, region.index + 1),), rest[1:]
    span = [(0, n) for n in rest]
    span[region.axis] = (region.start, region.stop)
    return (*lead, *span)


def disjoint(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> bool:
    return any(x[1] <= y[0] or y[1] <= x[0] for x, y in zip(a, b, strict=True))


def check_bijection(config: ErnieConfig, dialect: Dialect, mtp: bool) -> None:
    """Every canonical tensor has one region of its size; the regions of a stored tensor are
    disjoint and fill it, but for the vision experts' row of the `vl` correction bias."""
    specs = tensor_specs(config, mtp)
    shapes = {spec.name: spec.shape for spec in specs}
    assert len(shapes) == len(specs)
    places = regions(config, dialect, mtp)
    expected = [s.name for s in specs if not (dialect == "gguf" and s.part == "mtp")]
    assert list(places) == expected
    tensors = stored(config, dialect, mtp)
    assert len({t.name for t in tensors}) == len(tensors)
    assert {p.name: p.region for t in tensors for p in t.parts} == places
    assert sum(len(t.parts) for t in tensors) == len(places)
    for tensor in tensors:
        boxes = []
        filled = 0
        for name, region in tensor.parts:
            assert (region.stored, region.stored_shape) == (tensor.name, tensor.shape)
            where = box(region)
            assert all(0 <= a < b <= n for (a, b), n in zip(where, tensor.shape, strict=True))
            weights = prod(b - a for a, b in where)
            assert weights == prod(shapes[name])
            filled += weights
            boxes.append(where)
        if len(boxes) <= 64:
            pairs = [(a, b) for n, a in enumerate(boxes) for b in boxes[:n]]
            assert all(disjoint(a, b) for a, b in pairs)
        assert len(set(boxes)) == len(boxes)
        unfilled = 0
        if dialect == "vl" and tensor.name.endswith("e_score_correction_bias"):
            unfilled = config.moe_num_experts
        assert filled == prod(tensor.shape) - unfilled


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_bijection_for_every_preset(name: str, dialect: Dialect) -> None:
    config = replace(preset(name), num_nextn_predict_layers=1)
    check_bijection(config, dialect, mtp=True)
    check_bijection(config, dialect, mtp=False)


@given(configs(), st.sampled_from(DIALECTS), st.booleans())
@settings(max_examples=150, deadline=None)
def test_bijection_for_any_configuration(config: ErnieConfig, dialect: Dialect, mtp: bool) -> None:
    check_bijection(config, dialect, mtp)


@given(configs(), st.sampled_from(DIALECTS), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_what_is_written_through_a_dialect_is_read_back(
    config: ErnieConfig, dialect: Dialect, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    f32 = codec("f32")
    places = regions(config, dialect, mtp=True)
    canonical = {
        spec.name: rng.standard_normal(spec.shape, np.float32)
        for spec in tensor_specs(config, mtp=True)
        if spec.name in places
    }
    files = {
        t.name: np.full(t.shape, np.nan, np.float32) for t in stored(config, dialect, mtp=True)
    }
    for name, array in canonical.items():
        target = places[name].extract(files[places[name].stored], f32)
        assert np.shares_memory(target, files[places[name].stored])
        target[...] = array
    for name, array in canonical.items():
        found = places[name].extract(files[places[name].stored], f32)
        np.testing.assert_array_equal(found, array)
    if dialect != "vl":
        assert not any(np.isnan(array).any() for array in files.values())


@given(configs())
@settings(max_examples=60, deadline=None)
def test_counts_agree_with_the_accounting(config: ErnieConfig) -> None:
    parts: dict[str, int] = {}
    for spec in tensor_specs(config, mtp=True):
        parts[spec.part] = parts.get(spec.part, 0) + prod(spec.shape)
    accounting = Accounting(config)
    expected = accounting.parts | {"mtp": accounting.mtp}
    assert parts == {part: count for part, count in expected.items() if count}


@pytest.mark.parametrize(
    ("name", "tensors", "weights"),
    [
        ("0.3b", 164, 360_748_032),
        ("21b-a3b", 5_492, 21_825_437_888),
        ("300b-a47b", 10_230, 299_484_163_264),
    ],
)
def test_published_sizes(name: str, tensors: int, weights: int) -> None:
    specs = tensor_specs(preset(name))
    assert len(specs) == tensors
    assert sum(prod(spec.shape) for spec in specs) == weights
    fp32 = {spec.part for spec in specs if spec.fp32}
    assert fp32 == ({"router", "correction_bias"} if name != "0.3b" else set())


def test_published_shapes_of_the_paddle_files() -> None:
    """Facts published elsewhere than in this table: the fused shapes of the real files."""
    small = {t.name: t.shape for t in stored(preset("21b-a3b"), "paddle")}
    large = {t.name: t.shape for t in stored(preset("300b-a47b"), "paddle")}
    assert small["ernie.layers.1.self_attn.qkv_proj.weight"] == (2560, 3584)
    assert large["ernie.layers.1.self_attn.qkv_proj.weight"] == (8192, 10240)
    assert large["ernie.layers.9.mlp.experts.63.up_gate_proj.weight"] == (8192, 7168)
    assert small["ernie.layers.27.mlp.moe_statics.e_score_correction_bias"] == (1, 64)
    assert small["ernie.embed_tokens.weight"] == (103424, 2560)
    assert large["lm_head.weight"] == (8192, 103424)
    assert "lm_head.weight" not in small


def test_order_inside_fused_tensors() -> None:
    config = preset("21b-a3b")
    for dialect, name, order in (
        ("paddle", "ernie.layers.3.self_attn.qkv_proj.weight", "q_proj k_proj v_proj"),
        ("paddle", "ernie.layers.3.mlp.experts.7.up_gate_proj.weight", "gate_proj up_proj"),
    ):
        (tensor,) = [t for t in stored(config, dialect) if t.name == name]  # type: ignore[arg-type]
        assert [p.name.split(".")[-2] for p in tensor.parts] == order.split()
        starts = [p.region.start for p in tensor.parts]
        assert starts == sorted(starts) and starts[0] == 0
    packed = regions(config, "hf_packed")
    gate = packed["model.layers.3.mlp.experts.7.gate_proj.weight"]
    up = packed["model.layers.3.mlp.experts.7.up_proj.weight"]
    assert (gate.index, gate.start, gate.stop) == (7, 0, 1536)
    assert (up.index, up.start, up.stop) == (7, 1536, 3072)


def test_a_hostile_configuration_cannot_ask_for_billions_of_names() -> None:
    config = replace(
        preset("tiny-moe"), num_hidden_layers=4096, moe_num_experts=2**14, moe_layer_end_index=4095
    )
    tracemalloc.start()
    for ask in (tensor_specs, lambda c: regions(c, "hf"), lambda c: stored(c, "paddle")):
        with pytest.raises(ConfigError, match="absurd number"):
            ask(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert len(tensor_specs(preset("300b-a47b"))) < MAX_TENSORS / 10


def test_blocks_are_cut_at_rows_only() -> None:
    q4 = codec("q4_0")
    stack = Region("s", (2, 4, 64), 1, False, 0, 1, 3)
    raw = np.arange(2 * 4 * 36, dtype=np.uint8).reshape(2, 4, 36)
    np.testing.assert_array_equal(stack.extract(raw, q4), raw[1, 1:3])
    for bad in (
        Region("s", (4, 64), None, True, 1, 0, 32),
        Region("s", (64,), None, False, 0, 0, 32),
    ):
        with pytest.raises(FormatError, match="q4_0 blocks"):
            bad.extract(raw[0] if len(bad.stored_shape) == 2 else raw[0, 0], q4)


def test_every_row_of_the_table_is_used() -> None:
    used = set()
    for config in (
        replace(preset("tiny-moe"), tie_word_embeddings=False, num_nextn_predict_layers=1),
        replace(preset("tiny-moe"), use_bias=True),
    ):
        used |= {spec.name for spec in tensor_specs(config, mtp=True)}
    for row in TABLE:
        assert {row.name.format(i=i, e=0, d=0) for i in (0, 1)} & used, row.name


# --- against transformers -----------------------------------------------------------------------

transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
torch = pytest.importorskip("torch", reason="the test extra is not installed")

SHAPES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"use_bias": True},
    "biased untied": {"use_bias": True, "tie_word_embeddings": False},
}
DENSE = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = DENSE | {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 7,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"dense {name}": ("Ernie4_5", DENSE | change) for name, change in SHAPES.items()
} | {
    f"moe {name}": ("Ernie4_5_Moe", MOE | change)
    for name, change in (
        SHAPES
        | {"no shared": {"moe_num_shared_experts": 0}, "every 2nd": {"moe_layer_interval": 2}}
    ).items()
}


def reference(case: str) -> tuple[Any, ErnieConfig]:
    """A tiny transformers model and the same configuration as ours."""
    kind, fields = MODELS[case]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(theirs)
    ours = {k: v for k, v in fields.items() if k != "eos_token_id"}
    return model, ErnieConfig(**(ours | {"tie_word_embeddings": theirs.tie_word_embeddings}))


@pytest.mark.parametrize("case", MODELS)
def test_transformers_holds_these_names_and_shapes_in_memory(case: str) -> None:
    model, config = reference(case)
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert {t.name: t.shape for t in stored(config, "hf_packed")} == theirs


@pytest.mark.parametrize("case", MODELS)
def test_transformers_saves_these_names_shapes_and_numbers(case: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model, config = reference(case)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert {t.name: t.shape for t in stored(config, "hf")} == {n: a.shape for n, a in files.items()}
    memory = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    on_disk, packed = regions(config, "hf"), regions(config, "hf_packed")
    for name, region in on_disk.items():
        np.testing.assert_array_equal(
            region.extract(files[region.stored], codec("f32")),
            packed[name].extract(memory[packed[name].stored], codec("f32")),
        )
