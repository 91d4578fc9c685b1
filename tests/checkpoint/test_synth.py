"""Random checkpoints: true shapes, the same bytes everywhere, and numbers a model can work with."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from earnest.checkpoint import open_checkpoint, synth
from earnest.checkpoint.names import tensor_specs
from earnest.codecs import codec
from earnest.config import ErnieConfig, preset
from earnest.errors import UserError

UNTIED = replace(preset("tiny-moe"), tie_word_embeddings=False)
BIASED = replace(preset("tiny-moe"), use_bias=True)
NO_SHARED = replace(preset("small-moe"), moe_num_shared_experts=0)


def weights(folder: Path) -> dict[str, bytes]:
    tensors = open_checkpoint(folder).tensors
    return {name: np.ascontiguousarray(t.raw()).tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", synth.DTYPES)
@pytest.mark.parametrize(
    ("config", "mtp"),
    [
        (preset("tiny-dense"), False),
        (preset("tiny-moe"), False),
        (preset("small-moe"), True),
        (preset("small-moe"), False),
        (UNTIED, False),
        (BIASED, False),
        (NO_SHARED, True),
    ],
    ids=["dense", "moe", "small+mtp", "small", "untied", "biased", "no shared"],
)
def test_every_tensor_is_there_in_its_type(
    config: ErnieConfig, mtp: bool, dtype: str, tmp_path: Path
) -> None:
    report = synth.synth(tmp_path / "m", config, seed=3, mtp=mtp, dtype=dtype)
    opened = open_checkpoint(tmp_path / "m")
    specs = tensor_specs(config, mtp)
    assert list(opened.tensors) == [spec.name for spec in specs]
    assert report.tensors == len(specs)
    for spec in specs:
        tensor = opened.tensors[spec.name]
        assert tensor.shape == spec.shape
        assert tensor.codec.name == ("f32" if spec.fp32 else dtype), spec.name
        assert np.isfinite(tensor.read()).all()
    assert opened.has_mtp == mtp
    assert opened.notes == ()
    stored_dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype]
    assert opened.config == replace(config, dtype=stored_dtype, num_nextn_predict_layers=int(mtp))
    assert any("tokenizer" in note for note in report.notes)


def test_bytes_depend_on_seed_and_name_and_on_nothing_else(tmp_path: Path) -> None:
    config = preset("small-moe")
    synth.synth(tmp_path / "a", config, seed=1)
    synth.synth(tmp_path / "b", config, seed=1, shard_bytes=1_000_000)
    synth.synth(tmp_path / "c", config, seed=2)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 10
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert a == b
    assert not any(a[name] == c[name] for name in a)
    assert len(set(a.values())) == len(a), "no two tensors are alike"


def test_the_first_layers_of_a_deep_model_are_those_of_a_short_one(tmp_path: Path) -> None:
    config = preset("small-moe")
    short = synth.truncated(config, 2)
    assert short.num_hidden_layers == 2
    assert [short.is_moe_layer(i) for i in range(2)] == [False, True]
    synth.synth(tmp_path / "deep", config, seed=5)
    synth.synth(tmp_path / "short", short, seed=5)
    deep, cut = weights(tmp_path / "deep"), weights(tmp_path / "short")
    assert cut.items() <= deep.items()


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_a_model_is_not_cut_to_a_depth_it_does_not_have(layers: int) -> None:
    with pytest.raises(UserError, match="layers"):
        synth.truncated(preset("small-moe"), layers)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "digest"),
    [
        ("model.norm.weight", (7,), "f32", "9e774992"),
        ("model.layers.3.mlp.gate.weight", (8, 128), "f32", "78a384dc"),
        ("model.layers.0.self_attn.q_proj.weight", (33, 21), "bf16", "084fffe3"),
        ("model.layers.0.self_attn.o_proj.weight", (1025, 1024), "f16", "6ffa1aa5"),
    ],
)
def test_the_weights_are_the_same_on_every_machine(
    name: str, shape: tuple[int, ...], kind: str, digest: str
) -> None:
    blocks = list(synth.random_blocks(name, shape, codec(kind), seed=1))
    data = b"".join(block.tobytes() for block in blocks)
    assert len(data) == np.prod(shape) * codec(kind).block_bytes
    assert hashlib.sha256(data).hexdigest()[:8] == digest


def test_the_distribution_is_normal() -> None:
    q = np.concatenate(list(synth.random_blocks("x.q_proj.weight", (4096, 1024), codec("f32"), 9)))
    z = q.astype(np.float64) * 32  # 1/sqrt(1024)
    n = z.size
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * n)
    assert abs((z**4).mean() / z.var() ** 2 - 3) < 0.02
    assert abs((np.abs(z) < 1).mean() - 0.6827) < 0.002
    # Neighbours, and the four weights of one random word, are uncorrelated.
    for lag in (1, 2, 3, 4, 1024):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / np.sqrt(n)


def test_the_router_is_neither_flat_nor_blind_to_its_bias() -> None:
    experts, hidden, k = 64, 2560, 6

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.concatenate(list(synth.random_blocks(name, shape, codec("f32"), 1)))

    gate_EH = read("model.layers.1.mlp.gate.weight", (experts, hidden)).reshape(experts, hidden)
    bias_E = read("model.layers.1.mlp.moe_statics.e_score_correction_bias", (experts,))
    x_TH = np.random.default_rng(0).standard_normal((2000, hidden))
    logits_TE = x_TH @ gate_EH.T
    p_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
    p_TE /= p_TE.sum(1, keepdims=True)
    assert 1.5 / experts < np.median(p_TE.max(1)) < 0.5
    with_bias = np.sort(np.argsort(-(p_TE + bias_E), 1)[:, :k], 1)
    without = np.sort(np.argsort(-p_TE, 1)[:, :k], 1)
    changed = (with_bias != without).any(1).mean()
    assert changed > 0.3, "a runner that drops the bias must be seen to choose other experts"
    assert np.bincount(with_bias.ravel(), minlength=experts).max() < 0.8 * len(x_TH)


def test_activations_neither_vanish_nor_explode(tmp_path: Path) -> None:
    """Through the forward pass of another program, at the depth of the 21B model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = replace(
        preset("small-moe"),
        num_hidden_layers=28,
        moe_layer_end_index=27,
        intermediate_size=128,
        moe_intermediate_size=64,
    )
    synth.synth(tmp_path / "m", config, seed=1, dtype="f32")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor([np.random.default_rng(0).integers(0, config.vocab_size, 64).tolist()])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    rms = [float(h.pow(2).mean().sqrt()) for h in out.hidden_states]
    assert all(0.05 < r < 20 for r in rms), rms
    assert 0.5 < float(out.logits.std()) < 8


def test_unusable_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype"):
        synth.synth(tmp_path / "m", preset("tiny-moe"), seed=0, dtype="q4_0")
    with pytest.raises(UserError, match="multi-token"):
        synth.synth(tmp_path / "m", preset("tiny-moe"), seed=0, mtp=True)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        synth.synth(tmp_path / "m", preset("tiny-moe"), seed=0)
    assert (tmp_path / "m" / "mine.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    synth.synth(tmp_path / "m", preset("tiny-moe"), seed=0, force=True)
    assert not (tmp_path / "m" / "mine.txt").exists()


_KILLED = """
import os, signal, sys
from pathlib import Path
from earnest.checkpoint import synth
from earnest.config import preset

def progress(done, total, what):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

synth.synth(Path(sys.argv[1]), preset("small-moe"), seed=4, shard_bytes=2_000_000,
            progress=progress)
"""


def test_a_killed_run_is_taken_up_again(tmp_path: Path) -> None:
    out = tmp_path / "m"
    run = subprocess.run([sys.executable, "-c", _KILLED, str(out)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / ".m.partial"
    finished = {p.name: p.stat().st_mtime_ns for p in partial.glob("model-*.safetensors")}
    assert len(finished) >= 3
    report = synth.synth(out, preset("small-moe"), seed=4, shard_bytes=2_000_000)
    assert report.resumed
    assert {n: (out / n).stat().st_mtime_ns for n in finished} == finished, "kept, not redone"
    synth.synth(tmp_path / "whole", preset("small-moe"), seed=4, shard_bytes=2_000_000)
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_run_of_another_seed_is_not_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "m"
    subprocess.run([sys.executable, "-c", _KILLED, str(out)], check=False)
    report = synth.synth(out, preset("small-moe"), seed=5, shard_bytes=2_000_000)
    assert not report.resumed
    synth.synth(tmp_path / "whole", preset("small-moe"), seed=5, shard_bytes=2_000_000)
    assert weights(out) == weights(tmp_path / "whole")


def test_the_report_is_json(tmp_path: Path) -> None:
    report = synth.synth(tmp_path / "m", preset("tiny-moe"), seed=0)
    assert json.loads(json.dumps(report.to_dict()))["tensors"] == report.tensors
