"""Differences of checkpoints: found across layouts, measured right, and never invented."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import random_arrays, write_dialect, write_gguf

from earnest.checkpoint import Checkpoint, open_checkpoint, synth
from earnest.checkpoint.convert import convert
from earnest.checkpoint.difference import DiffReport, TensorDifference, diff
from earnest.config import preset

UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def by_name(report: DiffReport) -> dict[str, TensorDifference]:
    return {t.name: t for t in report.tensors}


def made(folder: Path, changes: dict[str, Any] | None = None) -> Checkpoint:
    """tiny-moe in float32 with some tensors replaced."""
    config = preset("tiny-moe")
    arrays = {**random_arrays(config), **(changes or {})}
    return open_checkpoint(write_dialect(folder, config, "hf", arrays))


def test_the_same_path_is_identical_and_not_read(tmp_path: Path) -> None:
    opened = made(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")

    def fail() -> Any:
        raise AssertionError("read")

    unread = replace(
        open_checkpoint(tmp_path / "link"),
        tensors={n: replace(t, view=fail) for n, t in opened.tensors.items()},
    )
    report = diff(opened, unread)
    assert report.same
    assert {t.state for t in report.tensors} == {"identical"}


@pytest.mark.parametrize("to", ["hf", "paddle"])
def test_another_layout_of_the_same_weights_is_identical(to: Any, tmp_path: Path) -> None:
    synth.synth(tmp_path / "hf", preset("small-moe"), seed=1, mtp=True)
    a = open_checkpoint(tmp_path / "hf")
    convert(a, tmp_path / "b", to, shard_bytes=3_000_000)
    report = diff(a, open_checkpoint(tmp_path / "b"))
    assert report.same
    assert {t.state for t in report.tensors} == {"identical"}
    assert report.rows() == []
    assert len(report.rows(show_all=True)) == 128
    assert report.summary() == "128 tensors: 128 identical."


def test_the_same_values_in_a_wider_type_are_equal_and_rounded_ones_differ(tmp_path: Path) -> None:
    synth.synth(tmp_path / "bf16", preset("small-moe"), seed=1)
    bf16 = open_checkpoint(tmp_path / "bf16")
    convert(bf16, tmp_path / "f32", "hf", dtype="f32")
    f32 = open_checkpoint(tmp_path / "f32")
    report = diff(bf16, f32)
    assert report.same
    assert {t.state for t in report.tensors} == {"identical", "equal"}
    synth.synth(tmp_path / "true", preset("small-moe"), seed=1, dtype="f32")
    report = diff(open_checkpoint(tmp_path / "true"), bf16)
    assert not report.same
    q = by_name(report)["model.layers.0.self_attn.q_proj.weight"]
    assert (q.state, q.codec_a, q.codec_b) == ("differs", "f32", "bf16")
    assert q.relative_rms is not None
    assert 1e-4 < q.relative_rms < 2**-8
    assert by_name(report)["model.layers.1.mlp.gate.weight"].state == "identical"


def test_a_quantised_file_against_what_it_was_made_from(tmp_path: Path) -> None:
    config = replace(preset("tiny-dense"), hidden_size=64, head_dim=16, intermediate_size=96)
    arrays = random_arrays(config)
    a = open_checkpoint(write_dialect(tmp_path / "hf", config, "hf", arrays))
    b = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, arrays, "q8_0"))
    found = by_name(diff(a, b))
    assert found["model.norm.weight"].state == "identical"
    q = found["model.layers.0.self_attn.q_proj.weight"]
    assert q.state == "differs"
    assert q.relative_rms is not None
    assert q.cosine is not None
    assert 1e-4 < q.relative_rms < 0.01
    assert 0.9999 < q.cosine < 1


@pytest.mark.parametrize("block", [2**20, 20], ids=["one block", "many blocks"])
def test_measures_are_those_of_their_definitions(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earnest.checkpoint.difference._BLOCK_WEIGHTS", block)
    base = random_arrays(preset("tiny-moe"))[UP]
    other = base.copy()
    other[3:5] += np.random.default_rng(5).standard_normal((2, 16), dtype=np.float32)
    other[7, 7] = -other[7, 7]
    report = diff(made(tmp_path / "a"), made(tmp_path / "b", {UP: other}))
    assert [t.name for t in report.tensors if not t.same] == [UP]
    t = by_name(report)[UP]
    x, y = base.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    assert t.state == "differs"
    assert t.changed == np.count_nonzero(x != y) / x.size
    assert t.max_abs == pytest.approx(np.abs(y - x).max())
    assert t.relative_rms == pytest.approx(sqrt(((y - x) ** 2).mean() / (x**2).mean()))
    assert t.cosine == pytest.approx(x @ y / sqrt((x @ x) * (y @ y)))
    assert t.non_finite == 0


def test_numbers_that_are_not_finite_do_not_spoil_the_measures(tmp_path: Path) -> None:
    base = random_arrays(preset("tiny-moe"))[UP]
    a, b = base.copy(), base.copy()
    a[0, :3] = [np.nan, np.inf, 1.0]
    b[0, :3] = [np.nan, np.inf, np.nan]
    b[1, 1] += 0.5
    t = by_name(diff(made(tmp_path / "a", {UP: a}), made(tmp_path / "b", {UP: b})))[UP]
    assert t.state == "differs"
    assert t.non_finite == 1
    assert t.changed == 2 / base.size
    assert t.max_abs == pytest.approx(0.5, rel=1e-6)
    json.dumps(t.max_abs, allow_nan=False)
    same = diff(made(tmp_path / "a2", {UP: a}), made(tmp_path / "b2", {UP: a}))
    assert same.same, "NaN is equal to itself here"


def test_zeros_have_no_direction(tmp_path: Path) -> None:
    base = random_arrays(preset("tiny-moe"))[UP]
    t = by_name(diff(made(tmp_path / "a", {UP: base * 0}), made(tmp_path / "b")))[UP]
    assert t.state == "differs"
    assert t.relative_rms is None
    assert t.cosine is None
    minus = by_name(
        diff(made(tmp_path / "c", {UP: base * 0}), made(tmp_path / "d", {UP: base * -0.0}))
    )
    assert minus[UP].state == "equal", "+0 and -0 are the same number"


def test_other_shapes_and_tensors_only_on_one_side(tmp_path: Path) -> None:
    small = preset("small-moe")
    synth.synth(tmp_path / "a", small, seed=1, mtp=True)
    synth.synth(tmp_path / "b", replace(synth.truncated(small, 3), vocab_size=1000), seed=1)
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    report = diff(a, b)
    states = by_name(report)
    assert states["model.embed_tokens.weight"].state == "shape"
    assert states["model.layers.3.input_layernorm.weight"].state == "only in A"
    assert states["model.mtp_emb_norm.0.weight"].state == "only in A"
    assert states["model.layers.2.input_layernorm.weight"].state == "identical"
    assert {c.field for c in report.config} == {
        "vocab_size", "num_hidden_layers", "moe_layer_end_index", "num_nextn_predict_layers"
    }  # fmt: skip
    assert not report.same
    mirrored = by_name(diff(b, a))
    assert mirrored["model.mtp_emb_norm.0.weight"].state == "only in B"
    rows = report.rows()
    assert ["vocab_size", "", "config", "1024 -> 1000", "", "", "", ""] in rows
    assert any("[1024, 128] -> [1000, 128]" in row[3] for row in rows)
    assert "only in A" in report.summary()


def test_the_same_weights_under_other_numbers_are_not_the_same_model(tmp_path: Path) -> None:
    a = made(tmp_path / "a")
    b = made(tmp_path / "b")
    report = diff(a, replace(b, config=replace(b.config, rope_theta=10_000.0)))
    assert all(t.same for t in report.tensors)
    assert not report.same
    assert "rope_theta" in report.summary()
    inert = replace(b.config, dtype="bfloat16", initializer_range=0.1)
    assert diff(a, replace(b, config=inert)).same


def test_long_tables_are_condensed_and_json_has_everything(tmp_path: Path) -> None:
    synth.synth(tmp_path / "a", preset("small-moe"), seed=1)
    synth.synth(tmp_path / "b", preset("small-moe"), seed=2)
    report = diff(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"))
    assert all(t.state == "differs" for t in report.tensors)
    rows = report.rows()
    assert len(rows) < 25
    counts = {row[0]: row[1] for row in rows}
    assert counts["model.layers.*.mlp.experts.*.up_proj.weight"] == "24"
    assert counts["model.layers.0.mlp.up_proj.weight"] == "1"
    assert sum(map(int, counts.values())) == len(report.tensors)
    assert all(len(row) == len(report.COLUMNS) for row in rows)
    value = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(value["tensors"]) == len(report.tensors)
    assert value["same"] is False


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    diff(a, b, progress=lambda done, total, _: seen.append((done, total)))
    total = sum(t.nbytes for t in a.tensors.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
