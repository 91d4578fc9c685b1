"""Presets."""

from __future__ import annotations

import pytest

from earnest.config import PRESETS, Accounting, preset
from earnest.errors import UserError


def test_names() -> None:
    assert {"0.3b", "21b-a3b", "300b-a47b", "tiny-dense", "tiny-moe", "small-moe"} <= set(PRESETS)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UserError) as caught:
        preset("21b")
    assert all(name in str(caught.value) for name in PRESETS)


def test_which_layers_route() -> None:
    large, middle = preset("300b-a47b"), preset("21b-a3b")
    assert [i for i in range(54) if not large.is_moe_layer(i)] == [0, 1, 2]
    assert [i for i in range(28) if not middle.is_moe_layer(i)] == [0]
    assert not any(preset("0.3b").is_moe_layer(i) for i in range(18))


def test_the_small_one_is_small_and_has_everything() -> None:
    config = preset("small-moe")
    accounting = Accounting(config)
    assert 18e6 < accounting.weight_bytes(16) < 22e6
    assert accounting.mtp > 0
    assert config.moe_num_shared_experts == 1
    assert (config.moe_num_experts, config.moe_k) == (8, 2)
    assert config.q_size != config.hidden_size
