"""`open_checkpoint`: every defect gives a typed error that tells all of it."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_files import (
    BIAS,
    CONFIGS,
    Arrays,
    canonical,
    laid_out,
    write_folder,
    write_gguf,
)

from earnest.checkpoint import open_checkpoint
from earnest.config import ErnieConfig, to_hf
from earnest.errors import (
    AccessError,
    CheckpointError,
    EarnestError,
    FormatError,
    ModelNotFoundError,
    TensorsError,
    UserError,
)


@pytest.fixture
def moe(tmp_path: Path) -> tuple[ErnieConfig, Arrays]:
    config = CONFIGS["moe"]
    return config, laid_out(config, "hf", canonical(config))


def test_one_error_lists_everything(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    config, files = moe
    del files["model.norm.weight"], files["model.layers.2.self_attn.k_proj.weight"], files[BIAS]
    files["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 15), np.float32)
    files["model.layers.0.mlp.up_proj.weight"] = np.zeros((24,), np.float32)
    files["model.layers.7.input_layernorm.weight"] = np.zeros(16, np.float32)
    files["surprise"] = np.zeros(1, np.float32)
    files["model.layers.1.mlp.gate.weight"] = np.zeros((4, 16), np.int32)
    with pytest.raises(TensorsError) as caught:
        open_checkpoint(write_folder(tmp_path / "m", config, files))
    message = str(caught.value)
    for part in (
        "3 missing:",
        "model.norm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        BIAS,
        "2 unexpected:",
        "model.layers.7.input_layernorm.weight",
        "surprise",
        "2 misshaped:",
        "model.layers.0.self_attn.q_proj.weight: [16, 15], expected [16, 16]",
        "model.layers.0.mlp.up_proj.weight: [24], expected [24, 16]",
        "1 mistyped: model.layers.1.mlp.gate.weight: i32",
    ):
        assert part in message


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    config = CONFIGS["moe"]
    files = {"model.norm.weight": np.ones(16, np.float32)}
    with pytest.raises(TensorsError, match=r"56 missing: [^$]* and 36 more") as caught:
        open_checkpoint(write_folder(tmp_path / "m", config, files))
    assert len(str(caught.value)) < 3000


def test_a_misshaped_stack_is_named_once(tmp_path: Path) -> None:
    config = CONFIGS["moe"]
    files = laid_out(config, "hf_packed", canonical(config))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    files[name] = files[name][:3]
    with pytest.raises(TensorsError, match=r"1 misshaped: .*gate_up_proj: \[3, 16, 16\]"):
        open_checkpoint(write_folder(tmp_path / "m", config, files))


def test_weights_without_a_config(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    folder = write_folder(tmp_path / "m", *moe)
    (folder / "config.json").unlink()
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(FormatError, match=r"no config\.json"):
            open_checkpoint(path)


def test_one_shard_of_several(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    folder = write_folder(tmp_path / "m", *moe)
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"model.norm.weight": shard.name, "lm_head.weight": "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match=r"one of several files[^$]*open the folder"):
        open_checkpoint(shard)


def test_several_gguf_models_in_a_folder(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    path = write_gguf(tmp_path / "a.gguf", config, laid_out(config, "gguf", canonical(config)))
    shutil.copy(path, tmp_path / "b.gguf")
    with pytest.raises(FormatError, match=r"2 GGUF models[^$]*name the file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_state.pdparams", "x.pt", "m.ckpt"])
def test_a_folder_of_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match=r"can run code[^$]*safetensors"):
            open_checkpoint(path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text").write_text("not a model")
    cases: list[tuple[Path | str, type[EarnestError]]] = [
        (tmp_path / "absent", ModelNotFoundError),
        (tmp_path / "text" / "below", ModelNotFoundError),
        (tmp_path / "pipe", FormatError),
        ("/dev/zero", FormatError),
        (tmp_path / "empty", FormatError),
        (tmp_path / "text", FormatError),
        (tmp_path / "loop", EarnestError),
        ("a\0b", UserError),
        ("x" * 10_000, EarnestError),
    ]
    for path, error in cases:
        with pytest.raises(error):
            open_checkpoint(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    folder = write_folder(tmp_path / "m", *moe)
    for path in (folder / "model.safetensors", folder):
        path.chmod(0)
        with pytest.raises(AccessError):
            open_checkpoint(folder)
        path.chmod(0o700)


def drop_key(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: {k: v for k, v in raw.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        drop_key("hidden_size"),
        lambda raw: raw | {"hidden_size": -1},
        lambda raw: raw | {"hidden_size": "16"},
        lambda raw: raw | {"num_hidden_layers": 10**30},
        lambda raw: raw | {"moe_num_experts": 2**14, "num_hidden_layers": 4096},
        lambda raw: raw | {"hidden_act": "gelu"},
        lambda raw: {},
        lambda raw: [raw],
    ],
)
def test_a_broken_config(
    tmp_path: Path, moe: tuple[ErnieConfig, Arrays], change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = write_folder(tmp_path / "m", *moe)
    (folder / "config.json").write_text(json.dumps(change(to_hf(moe[0]))))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_fuzzed_configurations(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever config.json says of given weights: a checkpoint or a typed error, quickly."""
    config = CONFIGS["moe"]
    folder = tmp_path / "m"
    if not folder.exists():
        write_folder(folder, config, laid_out(config, "hf", canonical(config)))
    raw = to_hf(config)
    for key in data.draw(st.lists(st.sampled_from(sorted(raw)), min_size=1, max_size=3)):
        raw[key] = data.draw(
            st.integers(-2, 70)
            | st.sampled_from([2**14, 2**31, 2**63, 2**80, 1e308, float("nan"), True, None, [], {}])
            | st.text(max_size=3)
        )
    (folder / "config.json").write_text(json.dumps(raw))
    tracemalloc.start()
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            assert tensor.read().shape == tensor.shape
    except EarnestError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * 2**20
