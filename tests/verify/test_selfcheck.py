"""The self-check passes what is in order and names what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from story_damage import Tensors, permute_rows, set_bias, swap_gate_up, upcycle

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.open import open_checkpoint
from earnest.verify import PASSAGES, SelfCheckReport, selfcheck
from earnest.verify.selfcheck import (
    CLEAR_BITS_PER_BYTE,
    MISSING_BIAS,
    MISTAKES,
    OTHER_DAMAGE,
    UNTRAINED,
    correction_bias_problem,
)

Change = Callable[[Tensors, dict[str, Any]], None]


def half_split(tensors: Tensors, config: dict[str, Any]) -> None:
    permute_rows(tensors, to_half_split=True)


def needlessly_permuted(tensors: Tensors, config: dict[str, Any]) -> None:
    permute_rows(tensors, to_half_split=False)


def swapped(tensors: Tensors, config: dict[str, Any]) -> None:
    swap_gate_up(tensors)


def both(tensors: Tensors, config: dict[str, Any]) -> None:
    permute_rows(tensors, to_half_split=True)
    swap_gate_up(tensors)


DAMAGE: dict[str, Change] = {
    "half-split RoPE": half_split,
    "swapped gate and up": swapped,
    "half-split RoPE and swapped gate and up": both,
    "needlessly permuted RoPE": needlessly_permuted,
}


def well_formed(report: SelfCheckReport) -> SelfCheckReport:
    """Every report can be printed and written as JSON."""
    json.dumps(report.to_dict(), allow_nan=False)
    assert all(len(row) == len(report.COLUMNS) for row in report.rows())
    assert report.verdict in report.summary()
    assert report.passed or report.suspected or report.verdict.startswith("not done")
    return report


def test_story_model_passes_in_one_reading(
    story_folder: Path,
) -> None:
    seen: list[tuple[int, int]] = []
    report = well_formed(
        selfcheck(
            open_checkpoint(story_folder),
            progress=lambda done, total, what: seen.append((done, total)),
        )
    )
    assert report.passed and report.suspected is None
    assert [trial.name for trial in report.trials] == ["as stored"]
    assert report.trials[0].best.passage == "story"
    assert report.trials[0].best.bits_per_byte == pytest.approx(0.562, abs=0.01)
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize("mistake", DAMAGE)
def test_damage_is_named(changed_story: Callable[..., Checkpoint], mistake: str) -> None:
    report = well_formed(selfcheck(changed_story(DAMAGE[mistake])))
    assert not report.passed
    assert report.suspected == mistake
    # Read with the same mistake, the text is as plausible as the intact model finds it.
    assert report.trials[-1].name == mistake
    assert report.trials[-1].best.bits_per_byte == pytest.approx(0.562, abs=0.01)


@pytest.mark.parametrize("mistake", DAMAGE)
def test_damage_is_named_in_a_mixture(
    changed_story: Callable[..., Checkpoint], mistake: str
) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        DAMAGE[mistake](tensors, config)
        upcycle(tensors, config)

    assert selfcheck(changed_story(change)).suspected == mistake


def test_mixture_with_its_bias_reads_like_the_dense_model(
    changed_story: Callable[..., Checkpoint],
) -> None:
    report = well_formed(selfcheck(changed_story(upcycle)))
    assert report.passed and not report.notes
    assert report.trials[0].best.bits_per_byte == pytest.approx(0.562, abs=0.01)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (np.zeros_like, "the same for all experts"),
        (lambda bias: np.full_like(bias, 0.25), "the same for all experts"),
        (None, "the same for all experts"),  # absent, opened with zeros in its place
    ],
    ids=["zero", "constant", "absent"],
)
def test_lost_correction_bias_is_named(
    changed_story: Callable[..., Checkpoint],
    change: Callable[[np.ndarray], np.ndarray] | None,
    told: str,
) -> None:
    def lose(tensors: Tensors, config: dict[str, Any]) -> None:
        upcycle(tensors, config)
        if change is not None:
            set_bias(tensors, change)
        else:
            for name in [name for name in tensors if name.endswith("correction_bias")]:
                del tensors[name]

    report = well_formed(selfcheck(changed_story(lose, allow_missing_correction_bias=True)))
    assert not report.passed
    assert report.suspected == MISSING_BIAS
    assert any(told in note for note in report.notes)
    assert "wrong correction bias" not in [trial.name for trial in report.trials]


def test_bias_that_does_harm_is_named(changed_story: Callable[..., Checkpoint]) -> None:
    def misplace(tensors: Tensors, config: dict[str, Any]) -> None:
        upcycle(tensors, config, good=8)  # every expert a copy, ...
        for name in [name for name in tensors if ".experts.7.down_proj" in name]:
            tensors[name] *= 40  # ... but for one that the bias now insists on
        for name in [name for name in tensors if name.endswith(".mlp.gate.weight")]:
            tensors[name] = np.zeros_like(tensors[name])
        set_bias(tensors, lambda bias: 0.01 * np.arange(8, dtype=np.float32)[None])

    assert selfcheck(changed_story(misplace)).suspected == "wrong correction bias"


def test_constant_bias_is_noted_even_where_the_text_is_plausible(
    changed_story: Callable[..., Checkpoint],
) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        upcycle(tensors, config, good=8)
        set_bias(tensors, np.zeros_like)

    report = selfcheck(changed_story(change))
    assert report.passed
    assert report.notes == (
        "e_score_correction_bias is the same for all experts in layers 0, 1, 2, 3, 4",
    )


def test_random_weights_are_called_untrained(changed_story: Callable[..., Checkpoint]) -> None:
    def scramble(tensors: Tensors, config: dict[str, Any]) -> None:
        rng = np.random.default_rng(3)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                tensors[name] = (0.05 * rng.standard_normal(tensor.shape)).astype(np.float32)

    report = well_formed(selfcheck(changed_story(scramble)))
    assert not report.passed
    assert report.suspected == UNTRAINED


def test_unknown_damage_is_not_given_a_name(changed_story: Callable[..., Checkpoint]) -> None:
    def shuffle_layers(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".layers.0.", ".layers.4.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    report = well_formed(selfcheck(changed_story(shuffle_layers)))
    assert not report.passed
    assert report.suspected == OTHER_DAMAGE


def test_numbers_that_are_not_finite_fail(changed_story: Callable[..., Checkpoint]) -> None:
    def poison(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = np.nan

    assert not well_formed(selfcheck(changed_story(poison))).passed


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
def test_rounding_noise_is_not_damage(
    changed_story: Callable[..., Checkpoint], noise: float
) -> None:
    """Quantisation to few bits must not be called a mistake: noise of 20% is cruder than 2 bits."""

    def blur(tensors: Tensors, config: dict[str, Any]) -> None:
        rng = np.random.default_rng(5)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                blurred = tensor + noise * tensor.std() * rng.standard_normal(tensor.shape)
                tensors[name] = blurred.astype(np.float32)

    assert well_formed(selfcheck(changed_story(blur))).passed


@pytest.mark.parametrize("context", [1, 2, 3, 60, 300])
def test_short_contexts(changed_story: Callable[..., Checkpoint], context: int) -> None:
    def shorten(tensors: Tensors, config: dict[str, Any]) -> None:
        config["max_position_embeddings"] = context

    report = well_formed(selfcheck(changed_story(shorten)))
    assert report.passed == (context >= 60)
    assert report.suspected is None


def test_without_tokenizer_nothing_is_claimed(random_folder: Callable[..., Path]) -> None:
    report = well_formed(selfcheck(open_checkpoint(random_folder("moe"))))
    assert not report.passed and report.suspected is None
    assert report.verdict.startswith("not done")


def test_dense_models_have_no_bias_problem(
    story_folder: Path,
) -> None:
    assert correction_bias_problem(open_checkpoint(story_folder)) is None


def test_table_of_mistakes_is_covered() -> None:
    assert set(MISTAKES) == {*DAMAGE, "wrong correction bias"}


def test_passages_are_what_they_say() -> None:
    assert {passage.language for passage in PASSAGES} == {"en", "zh"}
    for passage in PASSAGES:
        assert 400 < passage.utf8_bytes < 1000
        assert passage.text == passage.text.strip()
    assert CLEAR_BITS_PER_BYTE < 1
