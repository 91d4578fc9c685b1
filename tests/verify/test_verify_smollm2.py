"""A real model of another author, 30 layers in 4-bit blocks: intact, damaged, and by the reference.

Runs where the default model has been fetched already.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from earnest import hub
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.open import open_checkpoint
from earnest.errors import EarnestError
from earnest.verify import compare, selfcheck
from earnest.verify.selfcheck import half_split_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    """The default model, if it is in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EARNEST_OFFLINE", "1")
        try:
            return open_checkpoint(hub.locate("smollm2"))
        except EarnestError as error:
            pytest.skip(f"the default model has not been fetched: {error.problem}")


def test_intact_model_reads_both_languages(smollm2: Checkpoint) -> None:
    report = selfcheck(smollm2)
    assert report.passed and len(report.trials) == 1
    for score in report.trials[0].scores:
        # It has never seen the passages, and knows them when it reads them again.
        assert score.second_reading_ratio is not None and score.second_reading_ratio < 0.2


def test_half_split_rows_are_named(smollm2: Checkpoint) -> None:
    report = selfcheck(replace(smollm2, tensors=half_split_rows(smollm2)))
    assert report.suspected == "half-split RoPE"


def test_exact_against_the_reference(smollm2: Checkpoint) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report = compare(smollm2)
    assert report.passed, report.failures
    assert report.layers_compared == 30
    assert report.top1_agreement == 1
