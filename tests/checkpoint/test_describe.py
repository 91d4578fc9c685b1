"""The facts of a checkpoint, as `earnest inspect` prints them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import random_arrays, write_gguf

from earnest.checkpoint import LeftOut, open_checkpoint, synth
from earnest.checkpoint.describe import describe, describe_config
from earnest.config import preset


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return found


@pytest.mark.parametrize(
    ("name", "total", "active", "bare", "mtp", "cache"),
    [
        ("0.3b", 360_748_032, 360_748_032, 254_841_856, 0, 18_432),
        ("21b-a3b", 21_825_437_888, 3_352_148_480, 3_087_383_040, 123_217_920, 57_344),
    ],
)
def test_the_numbers_of_published_members(
    name: str, total: int, active: int, bare: int, mtp: int, cache: int
) -> None:
    facts = as_json(describe_config(preset(name)))
    assert facts["parameters"]["total"] == total
    assert facts["parameters"]["active"] == active
    assert facts["parameters"]["active_without_embedding"] == bare
    assert facts["parameters"]["mtp"] == mtp
    assert sum(facts["parameters"]["parts"].values()) == total
    assert facts["kv_bytes_per_token"]["bf16"] == cache
    assert facts["config"]["vocab_size"] == 103_424
    assert facts["weight_bytes"]["f32"] == 4 * total


def test_a_folder(tmp_path: Path) -> None:
    config = preset("small-moe")
    report = synth.synth(tmp_path / "hf", config, seed=1, mtp=True)
    facts = as_json(describe(open_checkpoint(tmp_path / "hf")))
    assert facts["path"] == str(tmp_path / "hf")
    assert (facts["container"], facts["dialect"]) == ("safetensors", "hf")
    assert facts["architecture"] == "Ernie4_5_MoeForCausalLM"
    assert facts["has_mtp"] is True
    stored = facts["stored"]
    assert stored["bytes"] == report.nbytes
    assert stored["tensors"] == report.tensors
    assert stored["weights"] == facts["parameters"]["total"] + facts["parameters"]["mtp"]
    router = 3 * (8 * 128 + 8)
    assert stored["types"]["f32"] == {"tensors": 6, "weights": router, "bytes": 4 * router}
    assert list(stored["types"]) == ["bf16", "f32"], "the largest first"
    assert 16 < stored["bits_per_weight"] < 16.1
    assert facts["tokenizer"]["source"] is None
    assert "no tokenizer" in facts["tokenizer"]["error"]
    assert facts["left_out"] == []


def test_nothing_is_read(tmp_path: Path) -> None:
    synth.synth(tmp_path / "hf", preset("tiny-moe"), seed=1)
    opened = open_checkpoint(tmp_path / "hf")

    def fail() -> Any:
        raise AssertionError("read")

    tensors = {n: replace(t, view=fail) for n, t in opened.tensors.items()}
    describe(replace(opened, tensors=tensors))


def test_what_was_left_out_and_what_is_absent(tmp_path: Path) -> None:
    synth.synth(tmp_path / "hf", preset("tiny-moe"), seed=1)
    opened = open_checkpoint(tmp_path / "hf")
    bias = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    absent = replace(opened.tensors[bias], origin="absent: zeros")
    opened = replace(
        opened,
        tensors={**opened.tensors, bias: absent},
        left_out=(LeftOut("vision experts", ("a", "b"), 12),),
        notes=("one thing",),
    )
    facts = as_json(describe(opened))
    assert facts["stored"]["tensors"] == len(opened.tensors) - 1
    assert facts["left_out"] == [{"reason": "vision experts", "tensors": 2, "bytes": 12}]
    assert facts["notes"] == ["one thing"]


def test_a_gguf_file(tmp_path: Path) -> None:
    config = replace(preset("tiny-dense"), hidden_size=64, head_dim=16, intermediate_size=96)
    file = write_gguf(tmp_path / "m.gguf", config, random_arrays(config), "q4_1")
    facts = as_json(describe(open_checkpoint(file)))
    assert (facts["container"], facts["dialect"]) == ("gguf", "gguf")
    assert facts["architecture"] == "ernie4_5"
    assert set(facts["stored"]["types"]) == {"q4_1", "f32"}
    matrices = facts["stored"]["types"]["q4_1"]
    assert np.isclose(8 * matrices["bytes"] / matrices["weights"], 5)
    assert "error" in facts["tokenizer"]


def test_the_tokenizer_of_a_real_folder(shared: Path, tmp_path: Path) -> None:
    synth.synth(tmp_path / "hf", preset("tiny-moe"), seed=1)
    real = shared / "data" / "tokenizer" / "ernie-4.5-0.3b-base-pt"
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(real / name, tmp_path / "hf")
    shutil.copy(real.parent / "tokenizer.model", tmp_path / "hf")
    facts = as_json(describe(open_checkpoint(tmp_path / "hf")))
    assert facts["tokenizer"] == {
        "source": "tokenizer.model",
        "vocab_size": 101_304,
        "chat_template": True,
    }
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{")
    assert "JSON" in as_json(describe(open_checkpoint(tmp_path / "hf")))["tokenizer"]["error"]
