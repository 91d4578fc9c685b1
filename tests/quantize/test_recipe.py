"""The usual mix per tensor kind, spelled out by hand."""

from __future__ import annotations

import pytest

from earnest.config import preset
from earnest.errors import UserError
from earnest.quantize import RECIPES, recipe
from earnest.quantize.recipe import fitting, is_sensitive_layer


def test_sensitive_layers_of_the_published_models() -> None:
    def layers(count: int) -> list[int]:
        return [i for i in range(count) if is_sensitive_layer(i, count)]

    assert layers(28) == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert layers(18) == [0, 1, 4, 7, 10, 13, 15, 16, 17]
    assert layers(1) == [0] and 0 < len(layers(2)) <= 2


LAYER = "model.layers.{}.{}.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "wanted"),
    [
        ("q4_k_m", "model.embed_tokens.weight", "q6_k"),
        ("q4_k_m", LAYER.format(3, "self_attn.q_proj"), "q4_k"),
        ("q4_k_m", LAYER.format(3, "self_attn.v_proj"), "q4_k"),
        ("q4_k_m", LAYER.format(5, "self_attn.v_proj"), "q6_k"),
        ("q4_k_m", LAYER.format(5, "self_attn.o_proj"), "q4_k"),
        ("q4_k_m", LAYER.format(0, "mlp.down_proj"), "q6_k"),
        ("q4_k_m", LAYER.format(27, "mlp.experts.63.down_proj"), "q6_k"),
        ("q4_k_m", LAYER.format(26, "mlp.shared_experts.down_proj"), "q6_k"),
        ("q4_k_m", LAYER.format(4, "mlp.experts.63.down_proj"), "q4_k"),
        ("q4_k_m", LAYER.format(5, "mlp.experts.63.up_proj"), "q4_k"),
        ("q5_k_m", LAYER.format(5, "mlp.experts.0.down_proj"), "q6_k"),
        ("q5_k_m", LAYER.format(5, "mlp.experts.0.gate_proj"), "q5_k"),
        ("q4_0", "model.embed_tokens.weight", "q6_k"),
        ("q4_0", LAYER.format(0, "mlp.down_proj"), "q4_0"),
        ("q8_0", "model.embed_tokens.weight", "q8_0"),
        ("q6_k", LAYER.format(0, "mlp.down_proj"), "q6_k"),
    ],
)
def test_types_of_the_21b_model(name: str, tensor: str, wanted: str) -> None:
    layers = preset("21b-a3b").num_hidden_layers
    assert recipe(name).wanted(tensor, layers, tied=True) == wanted


def test_an_untied_head_is_the_head() -> None:
    mix = recipe("q4_k_m")
    assert mix.wanted("lm_head.weight", 54, tied=False) == "q6_k"
    assert mix.wanted("model.embed_tokens.weight", 54, tied=False) == "q4_k"


@pytest.mark.parametrize(
    ("wanted", "columns", "got"),
    [
        ("q4_k", 2560, "q4_k"),
        ("q4_k", 576, "q5_0"),
        ("q5_k", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        ("q4_0", 576, "q4_0"),
        ("q4_0", 100, "bf16"),
        ("q6_k", 100, "bf16"),
        ("bf16", 7, "bf16"),
    ],
)
def test_rows_that_blocks_do_not_divide(wanted: str, columns: int, got: str) -> None:
    assert fitting(wanted, columns).name == got


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="q4_k_m") as caught:
        recipe("q3_xxl")
    assert all(name in str(caught.value) for name in RECIPES)
