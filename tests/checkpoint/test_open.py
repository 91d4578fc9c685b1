"""`open_checkpoint`: every layout gives the same canonical tensors."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from stored_files import (
    BIAS,
    CONFIGS,
    Arrays,
    assert_equal,
    canonical,
    laid_out,
    write_folder,
    write_gguf,
)

from earnest.checkpoint import open_checkpoint
from earnest.checkpoint.names import DIALECTS, Dialect, regions, stored, tensor_specs
from earnest.codecs import codec
from earnest.config import ErnieConfig, preset, to_gguf, to_hf
from earnest.errors import (
    ConfigError,
    FormatError,
    MissingCorrectionBiasError,
    TensorsError,
)


@pytest.fixture
def moe(tmp_path: Path) -> tuple[ErnieConfig, Arrays]:
    config = CONFIGS["moe"]
    return config, laid_out(config, "hf", canonical(config))


# --- every layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dialect"),
    [
        (case, dialect)
        for case, config in CONFIGS.items()
        for dialect in DIALECTS
        if dialect != "gguf" and (config.is_moe or not dialect.startswith("vl"))
    ],
)
def test_layouts_of_safetensors(tmp_path: Path, case: str, dialect: Dialect) -> None:
    config = CONFIGS[case]
    weights = canonical(config)
    files = laid_out(config, dialect, weights)
    if dialect == "vl":
        files["vision_model.ln.weight"] = np.ones(3, np.float32)
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", config, files))
    assert_equal(checkpoint, weights)
    assert (checkpoint.container, checkpoint.path) == ("safetensors", tmp_path / "m")
    # A dense model has nothing that packing would change.
    assert checkpoint.dialect == ("hf" if not config.is_moe and dialect == "hf_packed" else dialect)
    assert checkpoint.config == config
    assert checkpoint.has_mtp == (config.num_nextn_predict_layers > 0)
    if dialect != "vl":
        assert checkpoint.notes == () and checkpoint.left_out == ()


@pytest.mark.parametrize("case", [c for c in CONFIGS if "mtp" not in c])
def test_gguf(tmp_path: Path, case: str) -> None:
    config = CONFIGS[case]
    weights = canonical(config)
    path = write_gguf(tmp_path / "m.gguf", config, laid_out(config, "gguf", weights))
    for given_path in (path, tmp_path):
        checkpoint = open_checkpoint(given_path)
        assert_equal(checkpoint, weights)
        assert (checkpoint.container, checkpoint.dialect) == ("gguf", "gguf")
        assert checkpoint.config == config
        assert (checkpoint.path, checkpoint.notes) == (given_path, ())
    renamed = path.rename(tmp_path / "weights.bin2")
    assert open_checkpoint(renamed).container == "gguf"


def test_gguf_blocks_stay_blocks(tmp_path: Path) -> None:
    """Experts are cut out of a quantised stack as whole rows of blocks."""
    import gguf

    config = replace(CONFIGS["moe"], hidden_size=64, head_dim=16, moe_intermediate_size=32)
    weights = canonical(config)
    files = laid_out(config, "gguf", weights)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "ernie4_5-moe")
    for key, value in to_gguf(config).items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, array in files.items():
        if name.endswith("_exps.weight"):
            writer.add_tensor(name, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    for name, tensor in checkpoint.tensors.items():
        if ".experts." in name:
            assert tensor.codec.name == "q8_0"
            expected = gguf.quants.dequantize(gguf.quants.quantize(weights[name], q8), q8)
            np.testing.assert_array_equal(tensor.read(), expected)
            np.testing.assert_array_equal(tensor.read_rows(slice(3, 5)), expected[3:5])
        else:
            np.testing.assert_array_equal(tensor.read(), weights[name])


def test_spellings_may_be_mixed(tmp_path: Path) -> None:
    """Layer 1 packed, layer 2 one tensor per expert, as half-converted checkpoints are."""
    config = CONFIGS["moe"]
    weights = canonical(config)
    packed, plain = laid_out(config, "hf_packed", weights), laid_out(config, "hf", weights)
    files = {n: a for n, a in plain.items() if ".layers.1.mlp." not in n}
    files |= {n: a for n, a in packed.items() if ".layers.1.mlp." in n}
    assert_equal(open_checkpoint(write_folder(tmp_path / "m", config, files)), weights)


def test_a_tensor_that_is_stored_in_two_spellings(tmp_path: Path) -> None:
    config = CONFIGS["moe"]
    weights = canonical(config)
    files = laid_out(config, "hf_packed", weights) | laid_out(config, "hf", weights)
    with pytest.raises(TensorsError, match=r"unexpected: .*experts\.gate_up_proj"):
        open_checkpoint(write_folder(tmp_path / "m", config, files))


def test_a_single_file_beside_its_config(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    config, files = moe
    folder = write_folder(tmp_path / "m", config, files)
    checkpoint = open_checkpoint(str(folder / "model.safetensors"))
    assert_equal(checkpoint, canonical(config))
    assert checkpoint.path == folder / "model.safetensors"


def test_generation_config_and_raw_config_come_along(
    tmp_path: Path, moe: tuple[ErnieConfig, Arrays]
) -> None:
    folder = write_folder(tmp_path / "m", *moe, moe_group="dummy")
    assert open_checkpoint(folder).generation_config == {}
    (folder / "generation_config.json").write_text('{"temperature": 0.8, "top_p": 0.9}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_config == {"temperature": 0.8, "top_p": 0.9}
    assert checkpoint.metadata["moe_group"] == "dummy"
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(FormatError, match="generation_config"):
        open_checkpoint(folder)


def test_a_sharded_21b_opens_without_reading_weights(tmp_path: Path) -> None:
    """Files of true size and shapes without content (holes in sparse files): reading them would
    take minutes, and their pages would be counted."""
    config = preset("21b-a3b")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    weight_map = {}
    tensors = stored(config, "hf")
    for shard in range(9):
        name = f"model-{shard + 1:05d}-of-00009.safetensors"
        header, end = {}, 0
        for tensor in tensors[shard::9]:
            fp32 = "mlp.gate.weight" in tensor.name or "e_score" in tensor.name
            size = int(np.prod(tensor.shape)) * (4 if fp32 else 2)
            header[tensor.name] = {
                "dtype": "F32" if fp32 else "BF16",
                "shape": tensor.shape,
                "data_offsets": [end, end + size],
            }
            end += size
            weight_map[tensor.name] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tracemalloc.start()
    checkpoint = open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(checkpoint.tensors) == 5492
    assert sum(t.size for t in checkpoint.tensors.values()) == 21_825_437_888
    assert peak < 64 * 2**20
    assert not checkpoint.tensors["model.layers.27.mlp.experts.63.down_proj.weight"].raw().any()


# --- against transformers -----------------------------------------------------------------------


def save_reference(folder: Path, kind: str, suffix: str, fields: dict[str, Any]) -> Arrays:
    """A tiny transformers model with random weights, saved; returns what it holds in memory."""
    transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
    import torch

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}For{suffix}")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(folder, max_shard_size="20KB")
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2}
MOE = TEXT | EXPERTS | {"moe_intermediate_size": 8, "moe_layer_start_index": 1}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Ernie4_5", TEXT | {"head_dim": 6}),
        ("Ernie4_5", TEXT | {"head_dim": 8, "tie_word_embeddings": False, "use_bias": True}),
        ("Ernie4_5_Moe", MOE),
        ("Ernie4_5_Moe", MOE | {"tie_word_embeddings": False}),
        ("Ernie4_5_Moe", MOE | {"use_bias": True, "moe_num_shared_experts": 0}),
        ("Ernie4_5_Moe", MOE | {"moe_layer_start_index": 0, "moe_layer_interval": 2}),
    ],
)
def test_what_transformers_saves(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    memory = save_reference(tmp_path, kind, "CausalLM", fields)
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(tmp_path)
    places = regions(checkpoint.config, "hf_packed")
    assert_equal(
        checkpoint,
        {n: r.extract(memory[r.stored], codec("f32")) for n, r in places.items()},
    )
    assert checkpoint.notes == () and checkpoint.left_out == () and checkpoint.dialect == "hf"


@pytest.mark.parametrize("packed", [False, True])
def test_the_text_model_inside_a_vision_language_model(tmp_path: Path, packed: bool) -> None:
    rope = {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [1, 1, 2]}
    text = TEXT | EXPERTS | {"moe_intermediate_size": [8, 6], "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    memory = save_reference(
        tmp_path,
        "Ernie4_5_VLMoe",
        "ConditionalGeneration",
        {"text_config": text, "vision_config": vision, "tie_word_embeddings": True},
    )
    if packed:
        for file in tmp_path.glob("model*"):
            file.unlink()
        del memory["lm_head.weight"]
        save_file(memory, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    places = regions(checkpoint.config, "vl_packed")
    assert_equal(
        checkpoint, {n: r.extract(memory[r.stored], codec("f32")) for n, r in places.items()}
    )
    assert checkpoint.dialect == ("vl_packed" if packed else "vl")
    left_out = {item.reason: item for item in checkpoint.left_out}
    assert left_out.keys() == {
        "vision experts",
        "router of the vision experts",
        "vision transformer",
        "vision resampler",
    }
    experts = 2 * 4 * 3 * 32 * 6  # layers, experts, matrices, hidden, width
    assert left_out["vision experts"].nbytes == 4 * experts
    text_bytes = sum(t.nbytes for t in checkpoint.tensors.values())
    everything = sum(a.nbytes for n, a in memory.items() if n != "lm_head.weight")
    second_row = 0 if packed else 2 * 4 * 4
    assert text_bytes + sum(i.nbytes for i in checkpoint.left_out) + second_row == everything
    assert any("second row" in note for note in checkpoint.notes) != packed


def test_the_text_model_inside_a_vision_language_model_of_paddle(tmp_path: Path) -> None:
    config = CONFIGS["moe"]
    weights = canonical(config)
    files = laid_out(config, "paddle", weights)
    extra = {
        f"ernie.layers.1.mlp.experts.{e}.{kind}.weight": np.ones((3, 2), np.float32)
        for e in range(4, 8)
        for kind in ("up_gate_proj", "down_proj")
    }
    extra["ernie.layers.1.mlp.gate.weight_1"] = np.ones((16, 4), np.float32)
    extra["vision_model.ln.weight"] = extra["ernie.resampler_model.mlp.bias"] = np.ones(1, "f4")
    for name in files:
        if name.endswith("e_score_correction_bias"):
            files[name] = np.concatenate([files[name], files[name] + 1])
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", config, files | extra))
    assert_equal(checkpoint, weights)
    assert checkpoint.dialect == "paddle"
    assert {name for item in checkpoint.left_out for name in item.names} == extra.keys()
    assert sum(item.nbytes for item in checkpoint.left_out) == sum(a.nbytes for a in extra.values())


# --- what varies --------------------------------------------------------------------------------


def as_bf16(array: np.ndarray) -> np.ndarray:
    encode = codec("bf16").encode
    assert encode is not None
    return encode(array)


@pytest.mark.parametrize("dialect", ["hf", "paddle"])
def test_u16_is_read_as_bf16(tmp_path: Path, dialect: Dialect) -> None:
    config = CONFIGS["moe"]
    weights = canonical(config)
    fp32 = {s.name for s in tensor_specs(config, True) if s.fp32}
    rounded = {n: a if n in fp32 else codec("bf16").decode(as_bf16(a)) for n, a in weights.items()}
    router = ("mlp.gate.weight", "e_score_correction_bias")
    files = {
        n: a if n.endswith(router) else as_bf16(a)
        for n, a in laid_out(config, dialect, weights).items()
    }
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", config, files))
    assert_equal(checkpoint, rounded)
    assert checkpoint.tensors["model.norm.weight"].codec.name == "bf16"
    assert [n for n in checkpoint.notes if "U16" in n and "bf16" in n]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bf16"])
@pytest.mark.parametrize("dialect", ["hf", "hf_packed", "paddle"])
def test_the_correction_bias_in_all_its_forms(
    tmp_path: Path, dialect: Dialect, kind: str, shape: tuple[int, ...]
) -> None:
    config = CONFIGS["moe"]
    weights = canonical(config)
    files = laid_out(config, dialect, weights)
    name = regions(config, dialect)[BIAS].stored
    values = np.array([0.5, -0.25, 3.0, 1e-3], np.float32)
    rows = np.stack([values, values * 100])[: shape[0] if len(shape) == 2 else 1]
    files[name] = (as_bf16(rows) if kind == "bf16" else rows.astype(kind)).reshape(shape)
    expected = (
        codec("bf16").decode(as_bf16(values))
        if kind == "bf16"
        else values.astype(kind).astype(np.float32)
    )
    bias = open_checkpoint(write_folder(tmp_path / "m", config, files)).tensors[BIAS]
    assert (bias.codec.name, bias.shape) == ("f32", (4,))
    assert bias.raw().dtype == np.float32
    np.testing.assert_array_equal(bias.read(), expected)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (3, 4), (2, 2), (1, 1, 4), ()])
def test_a_correction_bias_of_another_shape(
    tmp_path: Path, moe: tuple[ErnieConfig, Arrays], shape: tuple[int, ...]
) -> None:
    config, files = moe
    files[BIAS] = np.zeros(shape, np.float32)
    with pytest.raises(TensorsError, match=r"1 misshaped: .*e_score_correction_bias"):
        open_checkpoint(write_folder(tmp_path / "m", config, files))


@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_a_missing_correction_bias(tmp_path: Path, container: str) -> None:
    config = CONFIGS["moe"]
    weights = canonical(config)
    if container == "gguf":
        files = laid_out(config, "gguf", weights)
        path = write_gguf(
            tmp_path / "m.gguf", config, {n: a for n, a in files.items() if "exp_probs_b" not in n}
        )
    else:
        files = laid_out(config, "hf", weights)
        path = write_folder(
            tmp_path / "m", config, {n: a for n, a in files.items() if "e_score" not in n}
        )
    with pytest.raises(MissingCorrectionBiasError, match=r"wrong experts[^$]*2 layers"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, allow_missing_correction_bias=True)
    zeros = {n: np.zeros_like(a) for n, a in weights.items() if "e_score" in n}
    assert len(zeros) == 2
    assert_equal(checkpoint, weights | zeros)
    assert any("2 layers have no e_score_correction_bias" in note for note in checkpoint.notes)


def test_a_dense_model_needs_no_correction_bias(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    files = laid_out(config, "hf", canonical(config))
    assert open_checkpoint(write_folder(tmp_path / "m", config, files)).notes == ()


def test_a_head_that_is_tied_all_the_same(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    config, files = moe
    head = files["model.embed_tokens.weight"]
    checkpoint = open_checkpoint(
        write_folder(tmp_path / "m", config, files | {"lm_head.weight": head})
    )
    assert_equal(checkpoint, canonical(config))
    (left,) = checkpoint.left_out
    assert (left.names, left.nbytes) == (("lm_head.weight",), head.nbytes)
    assert any("ties it to the embedding" in note for note in checkpoint.notes)


def test_an_untied_head_that_is_absent(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    config, files = moe
    folder = write_folder(tmp_path / "m", replace(config, tie_word_embeddings=False), files)
    with pytest.raises(TensorsError, match=r"1 missing: lm_head\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("transposed", [True, False])
def test_paddle_stores_an_untied_head_either_way(tmp_path: Path, transposed: bool) -> None:
    config = CONFIGS["moe untied biased"]
    weights = canonical(config)
    files = laid_out(config, "paddle", weights)
    head = weights["lm_head.weight"]
    files["lm_head.weight"] = head.T if transposed else head
    assert_equal(open_checkpoint(write_folder(tmp_path / "m", config, files)), weights)


def test_rotary_buffers_are_left_out(tmp_path: Path, moe: tuple[ErnieConfig, Arrays]) -> None:
    config, files = moe
    for name in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        files[name] = np.ones(2, np.float32)
    (left,) = open_checkpoint(write_folder(tmp_path / "m", config, files)).left_out
    assert "rotary" in left.reason and len(left.names) == 2 and left.nbytes == 16


def test_the_files_decide_about_mtp(tmp_path: Path) -> None:
    config = CONFIGS["moe two mtp"]
    weights = canonical(config)
    files = laid_out(config, "hf", weights)
    folder = write_folder(tmp_path / "m", config, files, num_nextn_predict_layers=0)
    checkpoint = open_checkpoint(folder)
    assert_equal(checkpoint, weights)
    assert checkpoint.config == config
    assert any("the files hold 2" in note for note in checkpoint.notes)

    files = {n: a for n, a in files.items() if ".mtp_" not in n}
    checkpoint = open_checkpoint(write_folder(tmp_path / "n", config, files))
    assert not checkpoint.has_mtp and checkpoint.config.num_nextn_predict_layers == 0
    assert any("the files hold 0" in note for note in checkpoint.notes)


def test_mtp_tensors_that_are_not_all_there(tmp_path: Path) -> None:
    config = CONFIGS["moe two mtp"]
    files = laid_out(config, "hf", canonical(config))
    del files["model.mtp_linear_proj.0.weight"], files["model.mtp_block.1.self_attn.q_proj.weight"]
    with pytest.raises(TensorsError, match=r"2 missing: model\.mtp_linear_proj\.0.*q_proj"):
        open_checkpoint(write_folder(tmp_path / "m", config, files))
    files["model.mtp_emb_norm.999999999.weight"] = np.ones(1, np.float32)
    with pytest.raises(ConfigError, match="num_nextn_predict_layers out of range"):
        open_checkpoint(write_folder(tmp_path / "m", config, files))


def test_rotary_scaling_in_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    files = laid_out(config, "gguf", canonical(config))
    files["rope_freqs.weight"] = np.ones(4, np.float32)
    path = write_gguf(tmp_path / "m.gguf", config, files)
    with pytest.raises(TensorsError, match=r"rope_freqs\.weight cannot be ignored"):
        open_checkpoint(path)


# --- real files ---------------------------------------------------------------------------------


def test_a_real_tiny_model(shared: Path) -> None:
    checkpoint = open_checkpoint(shared / "data" / "models" / "stories260k-ernie")
    assert len(checkpoint.tensors) == 47 and checkpoint.notes == ()
    assert sum(t.size for t in checkpoint.tensors.values()) == 260_032
    assert np.isfinite(checkpoint.tensors["model.embed_tokens.weight"].read()).all()
