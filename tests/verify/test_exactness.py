"""`compare` agrees where the arithmetic is right, and can fail where it is not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from earnest import env
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.convert import convert
from earnest.checkpoint.open import open_checkpoint
from earnest.checkpoint.synth import synth
from earnest.config import preset
from earnest.errors import (
    CheckpointError,
    MachineError,
    MemoryBudgetError,
    MissingPackageError,
    UserError,
)
from earnest.runners.reference import Arithmetic
from earnest.verify import ExactnessReport, compare
from earnest.verify.exactness import NEAR_TIE, _fitting_layers, kl_divergence, score_gaps
from earnest.verify.transformers_reference import _router_outputs, load_packages

BIAS = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"


@pytest.fixture(autouse=True)
def reference_is_installed(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


def well_formed(report: ExactnessReport) -> ExactnessReport:
    """Every report can be printed and written as JSON, and says why it failed."""
    json.dumps(report.to_dict(), allow_nan=False)
    assert len(report.rows()) == report.layers_compared + 1
    assert all(len(row) == len(report.COLUMNS) for row in report.rows())
    assert report.passed == (not report.failures)
    assert all(failure in report.summary() for failure in report.failures)
    return report


def with_tensor(
    checkpoint: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> Checkpoint:
    """A checkpoint of which our side sees one tensor changed, and transformers does not."""
    tensor = checkpoint.tensors[name]
    changed = replace(tensor, view=lambda: change(tensor.read()))
    return replace(checkpoint, tensors={**checkpoint.tensors, name: changed})


# --- agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_folder_agrees(random_folder: Callable[..., Path], kind: str) -> None:
    seen: list[tuple[int, int]] = []
    report = well_formed(
        compare(
            open_checkpoint(random_folder(kind)),
            progress=lambda done, total, what: seen.append((done, total)),
        )
    )
    assert report.passed, report.failures
    assert (report.layers_compared, report.layers_total) == (3, 3)
    assert report.tokens == 192
    assert 0 < report.relative_logit_difference < 1e-5
    assert 0 <= report.kl_mean <= report.kl_max < 1e-9
    assert report.expert_agreement == (1.0 if kind == "moe" else None)
    assert [layer.kind for layer in report.layers] == ["dense", kind, kind]
    assert "transformers read the folder itself" in report.notes
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("form", ["paddle", "gguf", "single file"])
def test_other_forms_agree(
    random_folder: Callable[..., Path],
    as_gguf: Callable[[Checkpoint, Path], Path],
    tmp_path: Path,
    kind: str,
    form: str,
) -> None:
    folder = random_folder(kind)
    source = open_checkpoint(folder)
    if form == "paddle":
        convert(source, tmp_path / "paddle", to="paddle")
        path = tmp_path / "paddle"
    elif form == "gguf":
        path = as_gguf(source, tmp_path / "model.gguf")
    else:
        path = folder / "model.safetensors"
    report = well_formed(compare(open_checkpoint(path)))
    assert report.passed, report.failures
    assert any("converted" in note for note in report.notes)


def test_real_text_of_a_real_model(
    story_folder: Path,
) -> None:
    report = well_formed(compare(open_checkpoint(story_folder)))
    assert report.passed, report.failures
    assert report.tokens > 400  # two passages cut to 160 tokens, and the Chinese one
    assert not any("pseudo-random" in note for note in report.notes)


@pytest.mark.parametrize("end_index", [-1, 2])
def test_first_layers_only(random_folder: Callable[..., Path], end_index: int) -> None:
    """A `moe_layer_end_index` of -1 must not move when the model is cut."""
    checkpoint = open_checkpoint(random_folder("moe", moe_layer_end_index=end_index))
    report = well_formed(compare(checkpoint, num_layers=2))
    assert report.passed, report.failures
    assert (report.layers_compared, report.layers_total) == (2, 3)
    assert [layer.kind for layer in report.layers] == ["dense", "moe"]


def test_published_spelling_of_the_config(
    random_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Files on the hub have the old spelling, and point to code that must never be executed."""
    folder = tmp_path / "published"
    shutil.copytree(random_folder("moe"), folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("rope_parameters", "dtype", "transformers_version"):
        raw.pop(name, None)
    raw |= {
        "rope_theta": 12345.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "moe_layer_end_index": -1,
        "auto_map": {
            "AutoConfig": "configuration_here.HereConfig",
            "AutoModelForCausalLM": "modeling_here.HereForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for module in ("configuration_here", "modeling_here"):
        code = f"open({str(tmp_path / 'executed')!r}, 'w')"
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
    report = well_formed(compare(open_checkpoint(folder)))
    assert report.passed, report.failures
    assert "transformers read the folder itself" in report.notes
    assert not (tmp_path / "executed").exists()


def test_synthetic_checkpoint_with_mtp(tmp_path: Path) -> None:
    synth(tmp_path / "synth", preset("small-moe"), seed=1, mtp=True)
    report = well_formed(compare(open_checkpoint(tmp_path / "synth")))
    assert report.passed, report.failures
    assert report.expert_agreement == 1


def test_first_layers_of_a_converted_model(
    random_folder: Callable[..., Path], tmp_path: Path
) -> None:
    convert(open_checkpoint(random_folder("moe")), tmp_path / "paddle", to="paddle")
    report = well_formed(compare(open_checkpoint(tmp_path / "paddle"), num_layers=2))
    assert report.passed and report.layers_compared == 2


# --- disagreement -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake", [Arithmetic(rope="half-split"), Arithmetic(swap_gate_up=True)], ids=str
)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_wrong_arithmetic_fails(
    random_folder: Callable[..., Path], kind: str, mistake: Arithmetic
) -> None:
    report = well_formed(compare(open_checkpoint(random_folder(kind)), arithmetic=mistake))
    assert not report.passed
    assert report.relative_logit_difference > 1e-3
    assert report.layers[0].hidden_difference > 1e-3


def test_dropped_bias_fails_by_its_experts(random_folder: Callable[..., Path]) -> None:
    report = well_formed(
        compare(
            open_checkpoint(random_folder("moe")), arithmetic=Arithmetic(use_correction_bias=False)
        )
    )
    assert not report.passed
    assert report.expert_agreement is not None and report.expert_agreement < 0.9
    assert report.layers[0].hidden_difference < 1e-5  # dense, before the first router
    assert any("first in layer 1" in failure for failure in report.failures)


def test_bias_of_one_layer_is_located(random_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(random_folder("moe"))
    changed = with_tensor(checkpoint, BIAS.format(2), lambda bias: bias[::-1].copy())
    report = well_formed(compare(changed))
    assert report.layers[1].expert_agreement == 1
    assert any("first in layer 2" in failure for failure in report.failures)


def test_bias_that_is_used_as_a_weight_fails(
    random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same experts with wrong weights: what some engines do with the bias."""
    from earnest.runners.reference import model

    right = model.route

    def weighted_by_score(logits_TE: Any, bias_E: Any, active: int, norm_min: float) -> Any:
        scores_TE = model.softmax(logits_TE.copy()) + bias_E
        experts_TA, _ = right(logits_TE, bias_E, active, norm_min)
        weights_TA = np.take_along_axis(scores_TE, experts_TA, axis=-1)
        return experts_TA, weights_TA / weights_TA.sum(axis=-1, keepdims=True)

    monkeypatch.setattr(model, "route", weighted_by_score)
    report = well_formed(compare(open_checkpoint(random_folder("moe")), num_layers=2))
    assert report.expert_agreement == 1
    assert any("expert weight difference" in failure for failure in report.failures)


def test_one_weight_is_noticed(random_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(random_folder("dense"))

    def nudge(weights: np.ndarray) -> np.ndarray:
        changed = weights.copy()
        changed[3, 5] += 0.25
        return changed

    report = compare(with_tensor(checkpoint, "model.layers.1.mlp.up_proj.weight", nudge))
    assert report.layers[0].hidden_difference < 1e-5 < 1e-4 < report.layers[1].hidden_difference
    assert not report.passed


def test_not_a_number_fails(random_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(random_folder("dense"))
    poisoned = with_tensor(
        checkpoint, "model.norm.weight", lambda weights: np.full_like(weights, np.nan)
    )
    report = well_formed(compare(poisoned))
    assert not report.passed
    assert report.to_dict()["max_logit_difference"] is None


# --- ties ---------------------------------------------------------------------------------------


@pytest.fixture
def tied_folder(random_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of which experts 0 and 1 always have equal scores, and one of them is chosen last."""
    folder = tmp_path / "tied"
    shutil.copytree(random_folder("moe", moe_k=1), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name][1] = tensors[name][0]
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name][:] = 0
        tensors[name][:, :2] = 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def prefer(checkpoint: Checkpoint, expert: int, by: float) -> Checkpoint:
    """Our side sees a slightly larger bias for one expert in every layer."""

    def nudge(bias: np.ndarray) -> np.ndarray:
        changed = bias.copy()
        changed[expert] += by
        return changed

    for layer in (1, 2):
        checkpoint = with_tensor(checkpoint, BIAS.format(layer), nudge)
    return checkpoint


def test_near_ties_are_followed(tied_folder: Path) -> None:
    """Whichever side we take, the reference takes it too, and the logits remain comparable."""
    checkpoint = open_checkpoint(tied_folder)
    reports = [well_formed(compare(prefer(checkpoint, expert, NEAR_TIE / 4))) for expert in (0, 1)]
    for report in reports:
        assert report.passed, report.failures
        assert report.expert_agreement == 1
    # transformers takes one side of every tie by itself; one of ours had to differ.
    assert sum(report.near_ties for report in reports) == 2 * 192


def test_what_is_no_tie_is_not_forgiven(tied_folder: Path) -> None:
    folder_bias = load_file(tied_folder / "model.safetensors")[BIAS.format(1)]
    assert folder_bias[0, 0] == folder_bias[0, 1]
    checkpoint = open_checkpoint(tied_folder)
    third = prefer(checkpoint, 5, 3.0)  # far from a tie with the two
    report = well_formed(compare(third))
    assert not report.passed and report.near_ties == 0
    assert report.expert_agreement == 0


@given(
    st.lists(st.floats(0, 1, width=32), min_size=4, max_size=8, unique=True).map(np.float32),
    st.integers(1, 3),
    st.randoms(),
)
def test_score_gaps(scores_E: Any, active: int, random: Any) -> None:
    """The gap is never negative for the reference's own choice, and 0 for the same set."""
    best = np.argsort(-scores_E)[:active][None]
    other = np.array(random.sample(range(len(scores_E)), active))[None]
    (gap,) = score_gaps(scores_E[None], best, other)
    assert (gap == 0) == (set(best[0]) == set(other[0]))
    assert gap >= 0
    assert score_gaps(scores_E[None], best, best[:, ::-1]) == 0


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=20), st.floats(-5, 5, width=32))
def test_kl_divergence(logits: list[float], shift: float) -> None:
    p_TV = np.array([logits], np.float32)
    q_TV = np.roll(p_TV, 1, axis=-1)
    assert kl_divergence(p_TV, q_TV)[0] >= -1e-12
    assert kl_divergence(p_TV, p_TV)[0] == 0
    assert kl_divergence(p_TV, p_TV + np.float32(shift))[0] == pytest.approx(0, abs=1e-6)


def test_kl_divergence_of_a_known_pair() -> None:
    p_TV, q_TV = np.log(np.float32([[0.5, 0.5]])), np.log(np.float32([[0.25, 0.75]]))
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert kl_divergence(p_TV, q_TV)[0] == pytest.approx(expected, abs=1e-7)


# --- what stands in the way ---------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_package(
    random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    checkpoint = open_checkpoint(random_folder("dense"))
    monkeypatch.setitem(sys.modules, package, None)
    remedy = r"(.|\n)*pip install 'torch>=[0-9.]+' 'transformers>=[0-9.]+'"
    with pytest.raises(MissingPackageError, match=package + remedy):
        compare(checkpoint)


def test_transformers_that_does_not_know_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.1"))
    with pytest.raises(MissingPackageError, match="does not know ERNIE"):
        load_packages()


def test_router_of_an_unknown_version() -> None:
    torch, _ = load_packages()
    with pytest.raises(MachineError, match="router"):
        _router_outputs(torch, torch.zeros(3, 4), None)


def test_layers_that_fit(
    random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(random_folder("moe"))
    counts = set()
    for kib in range(50, 3000, 50):
        monkeypatch.setattr(env, "free_memory", lambda kib=kib: kib * 1024)
        try:
            layers, notes = _fitting_layers(checkpoint, None, 192)
        except MemoryBudgetError as error:
            assert "GB in float32" in str(error)
            layers, notes = 0, ("",)
        assert bool(notes) == (layers < 3)
        assert layers >= max(counts, default=0)
        counts.add(layers)
    assert counts == {0, 1, 2, 3}


def test_too_large_for_memory(
    random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(random_folder("moe"))
    monkeypatch.setattr(env, "free_memory", lambda: 100_000)
    with pytest.raises(MemoryBudgetError, match="with 2 of 3 layers"):
        compare(checkpoint, num_layers=2)


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_layers_out_of_range(random_folder: Callable[..., Path], layers: int) -> None:
    with pytest.raises(UserError, match="num_layers"):
        compare(open_checkpoint(random_folder("dense")), num_layers=layers)


def test_reference_that_lacks_a_tensor(random_folder: Callable[..., Path], tmp_path: Path) -> None:
    """transformers would fill the gap with random numbers; that is no reference."""
    folder = tmp_path / "incomplete"
    shutil.copytree(random_folder("dense"), folder)
    checkpoint = open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors").unlink()  # what is mapped stays whole
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj"):
        compare(checkpoint)


def test_reference_that_cannot_load(random_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(random_folder("dense"), folder)
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        compare(checkpoint)


def test_settings_of_transformers_are_restored(
    random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, transformers = load_packages()
    settings, switch = transformers.utils.logging, "HF_DEACTIVATE_ASYNC_LOAD"
    checkpoint = open_checkpoint(random_folder("dense"))
    before = settings.get_verbosity(), settings.is_progress_bar_enabled()
    for value in ("0", None):
        if value is None:
            monkeypatch.delenv(switch, raising=False)
        else:
            monkeypatch.setenv(switch, value)
        compare(checkpoint, num_layers=1)
        assert os.environ.get(switch) == value
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before
