"""The verbs that write GGUF files and packed folders, as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest


def earnest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "earnest", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"EARNEST_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small"
    done = earnest("synth", str(path), "--preset", "small-moe", "--mtp")
    assert done.returncode == 0, done.stderr
    return path


def test_quantize(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    done = earnest("quantize", str(folder), str(target), "--codec", "q4_k_m", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layout"] == "gguf" and report["path"] == str(target)
    assert any("rows of 128 weights" in note for note in report["notes"])
    assert len(gguf.GGUFReader(target).tensors) == report["tensors"]
    again = earnest("quantize", str(folder), str(target), "--codec", "q8_0")
    assert again.returncode == 2 and "--force" in again.stderr
    forced = earnest("quantize", str(folder), str(target), "--codec", "q8_0", "--force")
    assert forced.returncode == 0 and "wrote" in forced.stdout
    assert "multi-token-prediction" in forced.stderr


def test_convert_to_gguf(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    done = earnest("convert", str(folder), str(target), "--to", "gguf", "--dtype", "f16")
    assert done.returncode == 0, done.stderr
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    assert kinds["token_embd.weight"] == "F16" and kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    shown = earnest("inspect", str(target), "--json")
    assert shown.returncode == 0, shown.stderr
    wrong = earnest("convert", str(folder), str(tmp_path / "m"), "--to", "gguf")
    assert wrong.returncode == 2 and ".gguf" in wrong.stderr


def test_synth_to_gguf(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    arguments = ("--preset", "small-moe", "--layers", "2")
    done = earnest("synth", str(target), *arguments, "--codec", "q4_0")
    assert done.returncode == 0, done.stderr
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q4_0"
    assert not any(name.startswith("blk.2.") for name in kinds)
    refused = earnest("synth", str(tmp_path / "n.gguf"), *arguments, "--mtp")
    assert refused.returncode == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_pack_and_the_way_back(folder: Path, tmp_path: Path) -> None:
    packed, gguf_file = tmp_path / "small", tmp_path / "m.gguf"
    done = earnest("pack", str(folder), str(packed), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layout"] == "panel" and "model.safetensors" in report["files"]
    again = earnest("pack", str(folder), str(packed))
    assert again.returncode == 2 and "--force" in again.stderr
    shown = json.loads(earnest("inspect", str(packed), "--json").stdout)
    assert (shown["container"], shown["has_mtp"]) == ("panel", True)
    assert earnest("diff", str(folder), str(packed)).returncode == 0
    done = earnest("convert", str(packed), str(gguf_file), "--to", "gguf")
    assert done.returncode == 0, done.stderr
    direct = tmp_path / "direct.gguf"
    assert earnest("convert", str(folder), str(direct), "--to", "gguf").returncode == 0
    assert gguf_file.read_bytes() == direct.read_bytes()


def test_packed_folders_of_smaller_and_of_random_weights(folder: Path, tmp_path: Path) -> None:
    smaller, made = tmp_path / "q8", tmp_path / "made"
    done = earnest("quantize", str(folder), str(smaller), "--codec", "q8_0")
    assert done.returncode == 0, done.stderr
    assert json.loads(earnest("inspect", str(smaller), "--json").stdout)["container"] == "panel"
    arguments = ("--preset", "small-moe", "--layers", "2", "--codec", "q4_0", "--mtp")
    done = earnest("synth", str(made), *arguments)
    assert done.returncode == 0, done.stderr
    ran = earnest("verify", str(made), "--json")
    assert json.loads(ran.stdout)


@pytest.mark.parametrize("name", ["made", "made.gguf"])
def test_synth_says_where_blocks_do_not_fit_as_quantize_does(name: str, tmp_path: Path) -> None:
    plain, target = tmp_path / "plain", tmp_path / name
    assert earnest("synth", str(plain), "--preset", "tiny-moe").returncode == 0
    done = earnest("synth", str(target), "--preset", "tiny-moe", "--codec", "q4_0")
    assert done.returncode == 0, done.stderr
    said = {line for line in done.stderr.splitlines() if "do not divide" in line}
    assert said and all("stored as bf16" in line for line in said)
    done = earnest("quantize", str(plain), str(tmp_path / f"q{name}"), "--codec", "q4_0")
    assert said == {line for line in done.stderr.splitlines() if "do not divide" in line}
