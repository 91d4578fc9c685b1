"""Integrity: what is wrong is found and named, and a manifest recognises every changed bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import random_arrays, write_dialect, write_gguf
from safetensors.numpy import load_file, save_file

from earnest.checkpoint import Checkpoint, LeftOut, open_checkpoint, synth
from earnest.checkpoint.convert import convert
from earnest.checkpoint.integrity import IntegrityReport, _count, check, read_manifest
from earnest.codecs import codec
from earnest.config import preset
from earnest.errors import EarnestError, FormatError, ModelNotFoundError

BIAS = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"
GATE = "model.layers.{}.mlp.gate.weight"
Tensors = dict[str, npt.NDArray[Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    synth.synth(tmp_path / "hf", preset("tiny-moe"), seed=1, dtype="f32")
    return tmp_path / "hf"


def changed(folder: Path, change: Callable[[Tensors], None]) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder, allow_missing_correction_bias=True)


def test_a_good_checkpoint_passes(folder: Path) -> None:
    report = check(open_checkpoint(folder))
    assert report.passed
    assert not report.warnings
    assert {f.state for f in report.findings} == {"ok"}
    assert len(report.tensors) == len(open_checkpoint(folder).tensors)
    assert all(len(row) == len(report.COLUMNS) for row in report.rows())
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["passed"] is True
    assert "no problem" in report.summary()


def test_a_dense_checkpoint_passes_without_a_word_about_routers(tmp_path: Path) -> None:
    synth.synth(tmp_path / "hf", preset("tiny-dense"), seed=1)
    report = check(open_checkpoint(tmp_path / "hf"))
    assert report.passed
    assert not any("rout" in f.check or "bias" in f.check for f in report.findings)


def _nan(t: Tensors) -> None:
    t["model.layers.2.mlp.experts.3.up_proj.weight"][1, 2] = np.nan
    t["model.layers.2.mlp.experts.3.up_proj.weight"][0, :2] = [np.inf, -np.inf]


def _zero(t: Tensors) -> None:
    t["model.layers.1.self_attn.k_proj.weight"][:] = -0.0


def _flat(t: Tensors) -> None:
    t[BIAS.format(2)][:] = 0.25


def _absent(t: Tensors) -> None:
    del t[BIAS.format(1)]


def _half_router(t: Tensors) -> None:
    t[GATE.format(1)] = t[GATE.format(1)].astype(np.float16)


def _twins(t: Tensors) -> None:
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    t[name.format(3)] = t[name.format(0)].copy()


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        (_nan, "FAIL", ["experts.3.up_proj", "1 NaN", "2 infinite"]),
        (_zero, "FAIL", ["zero", "layers.1.self_attn.k_proj"]),
        (_flat, "FAIL", ["layer 2", "wrong experts"]),
        (_absent, "FAIL", ["layer 1", "wrong experts", "lack"]),
        (_half_router, "warning", ["layers.1.mlp.gate.weight (f16)", "float32"]),
        (_twins, "warning", ["experts.3.down_proj", "experts.0.down_proj"]),
    ],
)
def test_what_is_wrong_is_named(
    change: Callable[[Tensors], None], state: str, words: list[str], folder: Path
) -> None:
    report = check(changed(folder, change))
    found = [f for f in report.findings if f.state != "ok"]
    assert [f.state for f in found] == [state], found
    assert all(word in found[0].detail for word in words), found[0].detail
    assert report.passed == (state == "warning")


def test_all_problems_are_told_at_once_and_long_lists_are_cut(folder: Path) -> None:
    def all_wrong(t: Tensors) -> None:
        for name in t:
            t[name][:] = np.nan if "experts" in name else 0

    report = check(changed(folder, all_wrong))
    assert len(report.problems) == 3
    assert "more" in report.problems[0]


@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "f8_e4m3", "f8_e5m2"])
@given(data=st.binary(min_size=8, max_size=64))
def test_counting_on_bits_equals_counting_on_values(name: str, data: bytes) -> None:
    kind = codec(name)
    raw = np.frombuffer(data[: len(data) // 4 * 4], np.uint8).view(kind.storage)
    values = kind.decode(raw)
    expected = (
        int(np.isnan(values).sum()),
        int(np.isinf(values).sum()),
        not np.count_nonzero(values),
    )
    assert _count(raw, kind) == expected


def test_tensors_left_out_are_mentioned(folder: Path) -> None:
    opened = replace(
        open_checkpoint(folder), left_out=(LeftOut("vision experts", ("a", "b"), 2_000_000),)
    )
    report = check(opened)
    assert report.passed
    assert any(
        "2 tensors not checked: vision experts (2.0 MB)" in f.detail for f in report.findings
    )


def test_progress_counts_bytes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    opened = open_checkpoint(folder)
    check(opened, progress=lambda done, total, _: seen.append((done, total)))
    total = sum(t.nbytes for t in opened.tensors.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


# --- manifests --------------------------------------------------------------------------------


def failures(report: IntegrityReport) -> list[str]:
    return [f.detail for f in report.findings if f.check == "manifest" and f.state == "FAIL"]


def test_what_is_hashed_is_what_the_manifest_says(folder: Path, tmp_path: Path) -> None:
    """A reader in any language can check a manifest: here one in five lines."""
    check(open_checkpoint(folder), write_manifest=tmp_path / "m.json")
    manifest = json.loads((tmp_path / "m.json").read_text())
    assert manifest["version"] == 1
    assert "row-major" in manifest["hashed"]
    tensors = load_file(folder / "model.safetensors")
    assert manifest["tensors"].keys() == tensors.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["codec"] == "f32"
        assert tuple(entry["shape"]) == tensors[name].shape or "e_score" in name
        assert entry["sha256"] == hashlib.sha256(tensors[name].tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_layout_and_file_split_do_not_matter(dtype: str, tmp_path: Path) -> None:
    synth.synth(tmp_path / "hf", preset("small-moe"), seed=1, mtp=True, dtype=dtype)
    source = open_checkpoint(tmp_path / "hf")
    check(source, write_manifest=tmp_path / "m.json")
    convert(source, tmp_path / "paddle", "paddle", shard_bytes=1_000_000)
    report = check(open_checkpoint(tmp_path / "paddle"), manifest=tmp_path / "m.json")
    assert report.passed
    assert any(
        f.check == "manifest" and "all 128 tensors agree" in f.detail for f in report.findings
    )


@pytest.mark.parametrize("dialect", ["hf_packed", "vl_packed"])
def test_packed_and_vision_language_files_have_the_same_hashes(
    dialect: Any, tmp_path: Path
) -> None:
    config = preset("tiny-moe")
    arrays = random_arrays(config)
    plain = open_checkpoint(write_dialect(tmp_path / "hf", config, "hf", arrays))
    check(plain, write_manifest=tmp_path / "m.json")
    other = open_checkpoint(write_dialect(tmp_path / "other", config, dialect, arrays))
    assert check(other, manifest=tmp_path / "m.json").passed


def test_a_gguf_file_has_a_manifest_too(tmp_path: Path) -> None:
    config = replace(preset("tiny-dense"), hidden_size=64, head_dim=16, intermediate_size=96)
    file = write_gguf(tmp_path / "m.gguf", config, random_arrays(config), "q8_0")
    check(open_checkpoint(file), write_manifest=tmp_path / "m.json")
    entries = read_manifest(tmp_path / "m.json")
    assert entries["model.layers.0.self_attn.q_proj.weight"].codec == "q8_0"
    assert check(open_checkpoint(file), manifest=tmp_path / "m.json").passed
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert len(failures(check(open_checkpoint(file), manifest=tmp_path / "m.json"))) == 1


def test_one_changed_bit_is_found_and_named(folder: Path, tmp_path: Path) -> None:
    check(open_checkpoint(folder), write_manifest=tmp_path / "m.json")

    def flip(t: Tensors) -> None:
        t["model.layers.2.mlp.experts.1.gate_proj.weight"].view(np.uint32)[3, 5] ^= 1

    report = check(changed(folder, flip), manifest=tmp_path / "m.json")
    assert not report.passed
    (failure,) = failures(report)
    assert failure.startswith("1 tensors have other bits")
    assert failure.endswith("model.layers.2.mlp.experts.1.gate_proj.weight")


def test_other_types_and_missing_and_extra_tensors_are_told_apart(
    folder: Path, tmp_path: Path
) -> None:
    check(open_checkpoint(folder), write_manifest=tmp_path / "m.json")
    manifest = json.loads((tmp_path / "m.json").read_text())
    manifest["tensors"]["model.gone.weight"] = manifest["tensors"].pop("model.norm.weight")
    (tmp_path / "m.json").write_text(json.dumps(manifest))

    def retype(t: Tensors) -> None:
        name = "model.embed_tokens.weight"
        t[name] = t[name].astype(np.float16)

    report = check(changed(folder, retype), manifest=tmp_path / "m.json")
    kinds, absent, extra = failures(report)
    assert "another type or shape" in kinds
    assert "embed_tokens" in kinds
    assert "model.gone.weight" in absent
    assert "model.norm.weight" in extra


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    def change(m: dict[str, Any]) -> Any:
        del next(iter(m["tensors"].values()))[key]
        return m

    return change


def _with(key: str, value: object) -> Callable[[dict[str, Any]], Any]:
    def change(m: dict[str, Any]) -> Any:
        next(iter(m["tensors"].values()))[key] = value
        return m

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {},
        lambda m: [],
        lambda m: m | {"format": "sha256sum"},
        lambda m: m | {"version": 2},
        lambda m: m | {"version": None},
        lambda m: m | {"tensors": []},
        lambda m: m | {"tensors": {"x": 3}},
        lambda m: m | {"tensors": {"x": None}},
        _without("sha256"),
        _without("codec"),
        _without("shape"),
        _with("sha256", "abc"),
        _with("sha256", "g" * 64),
        _with("sha256", 5),
        _with("codec", 5),
        _with("shape", "3"),
        _with("shape", [-1]),
        _with("shape", [True]),
        _with("shape", [1.5]),
    ],
)
def test_a_broken_manifest_is_a_format_error(
    change: Callable[[dict[str, Any]], Any], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    check(open_checkpoint(folder), write_manifest=path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(FormatError, match=r"m\.json"):
        check(open_checkpoint(folder), manifest=path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(tensors=JSON)
def test_any_other_json_is_a_format_error_or_a_manifest(
    tensors: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.json"
    path.write_text(json.dumps({"format": "earnest-manifest", "version": 1, "tensors": tensors}))
    try:
        entries = read_manifest(path)
    except EarnestError:
        return
    assert entries == {}, "random JSON never makes a whole entry"


def test_a_manifest_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        check(open_checkpoint(folder), manifest=tmp_path / "none.json")
    with pytest.raises(EarnestError):
        check(open_checkpoint(folder), write_manifest=tmp_path / "no" / "folder.json")
