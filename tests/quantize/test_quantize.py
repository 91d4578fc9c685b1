"""Quantised files: the right types, the weights that the codec makes of them, the same text."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import earnest
from earnest import codecs
from earnest.checkpoint import Checkpoint, open_checkpoint, synth
from earnest.checkpoint.convert import convert
from earnest.config import preset
from earnest.errors import FormatError, UserError
from earnest.quantize import RECIPES, quantize, synth_gguf, synth_packed

STORIES = Path(earnest.__file__).parent / "hub" / "stories"
# All rows are multiples of 256.
ROOMY = replace(
    preset("small-moe"),
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_nextn_predict_layers=0,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "hf"
    synth.synth(folder, ROOMY, seed=1)
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str, source: Checkpoint, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "m.gguf", name)
    assert report.notes == (*source.notes, report.notes[-1])
    assert "no tokenizer" in report.notes[-1]
    back = open_checkpoint(tmp_path / "m.gguf")
    mix = RECIPES[name]
    for tensor_name, tensor in back.tensors.items():
        original = source.tensors[tensor_name].read()
        vector = tensor.codec.name == "f32"
        assert vector == (original.ndim == 1 or ".mlp.gate." in tensor_name)
        if vector:
            assert np.array_equal(tensor.read(), original)
            continue
        layers = ROOMY.num_hidden_layers
        wanted = codecs.codec(mix.wanted(tensor_name, layers, tied=True))
        assert tensor.codec == wanted and wanted.encode is not None
        assert np.array_equal(tensor.raw(), wanted.encode(original)), tensor_name
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    file_types = {
        **{"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q6_k": 18},
        **{"q4_k": 15, "q4_k_m": 15, "q5_k": 17, "q5_k_m": 17},
    }
    assert fields["general.file_type"].contents() == file_types[name]
    assert fields["general.quantization_version"].contents() == 2


def test_the_mix_of_four_bits(source: Checkpoint, tmp_path: Path) -> None:
    quantize(source, tmp_path / "m.gguf", "q4_k_m")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.0.attn_v.weight"] == "Q4_K" and kinds["blk.3.attn_v.weight"] == "Q6_K"
    assert kinds["blk.2.ffn_down_exps.weight"] == kinds["blk.2.ffn_down_shexp.weight"] == "Q6_K"
    assert kinds["blk.1.ffn_down_exps.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"


def test_it_does_not_depend_on_layout_or_cores(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(source, tmp_path / "a.gguf", "q4_k_m")
    convert(source, tmp_path / "hf-as" / "hf", "paddle")
    monkeypatch.setattr("earnest.checkpoint.plan._BLOCK_WEIGHTS", 5000)
    monkeypatch.setattr("earnest.checkpoint.containers.base.usable_cores", lambda: 7)
    quantize(open_checkpoint(tmp_path / "hf-as" / "hf"), tmp_path / "b.gguf", "q4_k_m")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_blocks_of_the_wanted_type_are_copied(source: Checkpoint, tmp_path: Path) -> None:
    quantize(source, tmp_path / "a.gguf", "q4_k_m")
    first = open_checkpoint(tmp_path / "a.gguf")
    report = quantize(first, tmp_path / "b.gguf", "q4_k_m")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert report.notes == ()
    report = quantize(first, tmp_path / "c.gguf", "q4_k")
    again = open_checkpoint(tmp_path / "c.gguf")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(again.tensors[name].raw(), first.tensors[name].raw())
    assert any("encoded again" in note for note in report.notes)


def test_rows_that_do_not_fit_are_told(tmp_path: Path) -> None:
    report = quantize(open_checkpoint(STORIES), tmp_path / "m.gguf", "q4_k_m")
    kinds = Counter(t.codec.name for t in open_checkpoint(tmp_path / "m.gguf").tensors.values())
    assert set(kinds) <= {"f32", "q5_0", "q8_0", "bf16"}
    assert any("rows of 64 weights" in note and "q5_0" in note for note in report.notes)


@pytest.mark.parametrize(("name", "bound"), [("q8_0", 2e-4), ("q5_1", 0.02), ("q4_0", 0.1)])
def test_the_story_model_still_tells_stories(name: str, bound: float, tmp_path: Path) -> None:
    """Mean divergence of the next-token distributions from those of the original, in nats."""
    quantize(open_checkpoint(STORIES), tmp_path / "m.gguf", name)
    a, b = earnest.load(STORIES), earnest.load(tmp_path / "m.gguf")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    ids = a.tokenizer.encode(text, add_special_tokens=True)
    assert b.tokenizer.encode(text, add_special_tokens=True) == ids

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(a.logits(ids)), log_softmax(b.logits(ids))
    assert 0 <= (np.exp(p) * (p - q)).sum(-1).mean() < bound


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_weights_without_a_place_name_their_tensor(value: float, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    synth.synth(folder, ROOMY, seed=1, dtype="f32")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    tensors[name][7, 9] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        quantize(open_checkpoint(folder), tmp_path / "m.gguf", "q4_k_m")
    assert not (tmp_path / "m.gguf").exists()


def test_unknown_codecs_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown codec"):
        quantize(source, tmp_path / "m.gguf", "bf16")


# --- true shapes, random weights ------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["q4_k_m", "q8_0", "bf16"])
def test_synth_has_the_shapes_and_types_of_quantize(
    codec: str, source: Checkpoint, tmp_path: Path
) -> None:
    report = synth_gguf(tmp_path / "s.gguf", preset("small-moe"), codec, seed=5)
    made = open_checkpoint(tmp_path / "s.gguf")
    assert made.config == replace(preset("small-moe"), num_nextn_predict_layers=0)
    assert report.nbytes == sum(tensor.nbytes for tensor in made.tensors.values())
    if codec != "bf16":
        synth_gguf(tmp_path / "roomy.gguf", ROOMY, codec, seed=5)
        quantize(source, tmp_path / "q.gguf", codec)
        a, b = (gguf.GGUFReader(tmp_path / f).tensors for f in ("roomy.gguf", "q.gguf"))
        assert [(t.name, t.tensor_type, t.shape.tolist()) for t in a] == [
            (t.name, t.tensor_type, t.shape.tolist()) for t in b
        ]


def test_synth_weights_are_plausible(tmp_path: Path) -> None:
    config = replace(
        preset("small-moe"), hidden_size=512, moe_intermediate_size=768, moe_num_experts=16
    )
    synth_gguf(tmp_path / "a.gguf", config, "q4_0", seed=5)
    synth_gguf(tmp_path / "b.gguf", config, "q4_0", seed=5)
    synth_gguf(tmp_path / "c.gguf", config, "q4_0", seed=6)
    data = [(tmp_path / f"{name}.gguf").read_bytes() for name in "abc"]
    assert data[0] == data[1] != data[2]
    made = open_checkpoint(tmp_path / "a.gguf")
    experts = [
        made.tensors[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"].read() for e in range(16)
    ]
    assert all(abs(float(w.std()) * 512**0.5 - 1) < 0.05 for w in experts)
    for i in range(16):
        assert not any(np.array_equal(experts[i], experts[j]) for j in range(i))
    bias = made.tensors["model.layers.1.mlp.moe_statics.e_score_correction_bias"].read()
    assert (bias != 0).all() and made.tensors["model.norm.weight"].codec.name == "f32"
    model = earnest.load(tmp_path / "a.gguf")
    logits = model.logits([1, 2, 3, 500])
    assert np.isfinite(logits).all() and 0.5 < logits.std() < 8


@pytest.mark.parametrize("codec", ["q4_0", "q4_k_m", "bf16"])
@pytest.mark.parametrize("tile", [2**20, 2**14])
def test_synth_gives_the_same_weights_packed_and_as_gguf(
    codec: str, tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earnest.quantize.synthetic._TILE_WEIGHTS", tile)
    config = replace(ROOMY, vocab_size=301, moe_intermediate_size=264, tie_word_embeddings=False)
    synth_gguf(tmp_path / "m.gguf", config, codec, seed=3)
    report = synth_packed(tmp_path / "packed", config, codec, seed=3)
    a, b = open_checkpoint(tmp_path / "m.gguf"), open_checkpoint(tmp_path / "packed")
    assert report.layout == b.container == "panel"
    assert list(a.tensors) == list(b.tensors)
    for name, tensor in a.tensors.items():
        assert tensor.codec == b.tensors[name].codec
        assert np.array_equal(tensor.raw(), b.tensors[name].raw()), name


def test_synth_packs_the_prediction_block_if_asked(tmp_path: Path) -> None:
    config = replace(ROOMY, num_nextn_predict_layers=1)
    synth_packed(tmp_path / "packed", config, "q4_0", seed=3, mtp=True)
    made = open_checkpoint(tmp_path / "packed")
    assert made.has_mtp
    assert made.tensors["model.mtp_block.0.mlp.up_proj.weight"].codec.name == "q4_0"
    with pytest.raises(UserError, match="multi-token-prediction"):
        synth_packed(tmp_path / "none", ROOMY, "q4_0", seed=3, mtp=True)
