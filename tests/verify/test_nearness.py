"""How near the native runner is to the reference, as `earnest verify --against native` says it.

What the figures are on larger mixtures: tests/runners/test_native_accuracy.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from earnest import compiled
from earnest.checkpoint.open import open_checkpoint
from earnest.cli.main import main
from earnest.runners.native import isa
from earnest.runners.reference import Model
from earnest.verify import nearness

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")


@pytest.fixture(scope="module")
def mixture(random_folder: Callable[..., Path]) -> Path:
    return random_folder("moe", num_hidden_layers=3)


def test_a_real_model_is_near(story_folder: Path) -> None:
    report = nearness(open_checkpoint(story_folder))
    assert report.passed
    assert report.expert_agreement is None
    assert 0 < report.kl_mean < 1e-6
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=1e-3)
    assert json.loads(json.dumps(report.to_dict()))["failures"] == []


def test_a_mixture_is_near_and_text_stands_in_for_a_tokenizer(mixture: Path) -> None:
    report = nearness(open_checkpoint(mixture))
    assert report.passed, report.summary()
    assert report.expert_agreement is not None
    assert "pseudo-random" in report.notes[0]
    assert "same experts" in report.summary()


def test_rough_keys_fail_and_every_other_choice_is_listed(mixture: Path) -> None:
    """Keys and values of 8 bits move the router's scores far more than a near tie."""
    ids = np.random.default_rng(0).integers(199, size=(8, 48)).tolist()
    report = nearness(open_checkpoint(mixture), sequences=ids, kv="int8")
    assert not report.passed
    assert report.expert_agreement is not None and report.other_experts
    pairs = round(len(report.other_experts) / (1 - report.expert_agreement))
    assert pairs % (8 * 48) == 0
    for other in report.other_experts:
        assert 0 <= other.passage < 8 and 0 <= other.token < 48
        assert len(other.native_only) == len(other.reference_only) > 0
    assert "no tie" in report.summary()


def test_another_router_fails(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native runner as it is, the reference without the correction bias."""
    true_router = Model.router

    def without_bias(self: Model, layer: int, x_TD: np.ndarray) -> tuple[np.ndarray, None]:
        return true_router(self, layer, x_TD)[0], None

    monkeypatch.setattr(Model, "router", without_bias)
    report = nearness(open_checkpoint(mixture))
    assert not report.passed
    assert any("experts" in failure for failure in report.failures)


@pytest.mark.parametrize(("against", "missing"), [("native", "kernels"), ("transformers", "torch")])
def test_what_is_missing_is_said_before_anything_is_read(
    against: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as left:
        main(["verify", "no/such/model", "--against", against])
    assert left.value.code == 4
    said = capsys.readouterr().err
    assert missing in said
    assert "no/such/model" not in said


def test_command(mixture: Path, story_folder: Path) -> None:
    def verify(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "earnest", "verify", str(path), "--against", "native"]
        return subprocess.run([*command, *options], capture_output=True, text=True)

    done = verify(story_folder)
    assert done.returncode == 0, done.stderr
    assert "keys and values in int16" in " ".join(done.stdout.split())
    assert json.loads(verify(mixture, "--json").stdout)["nearness"]["passed"]
    refused = verify(mixture, "--layers=1")
    assert refused.returncode == 2
    assert "transformers" in refused.stderr
