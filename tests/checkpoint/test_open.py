"""`open_checkpoint`: every layout gives the same canonical tensors; every defect a typed error."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.checkpoint.names import Dialect, regions, stored, tensor_specs
from earnest.codecs import codec
from earnest.config import ErnieConfig, preset, to_gguf, to_hf
from earnest.errors import (
    AccessError,
    CheckpointError,
    ConfigError,
    EarnestError,
    FormatError,
    MissingCorrectionBiasError,
    ModelNotFoundError,
    TensorsError,
    UserError,
)

Arrays = dict[str, np.ndarray]

CONFIGS: dict[str, ErnieConfig] = {
    "dense": replace(preset("tiny-dense"), dtype="float32"),
    "dense untied biased": replace(
        preset("tiny-dense"), dtype="float32", tie_word_embeddings=False, use_bias=True
    ),
    "moe": replace(preset("tiny-moe"), dtype="float32"),
    "moe untied biased": replace(
        preset("tiny-moe"), dtype="float32", tie_word_embeddings=False, use_bias=True
    ),
    "moe mtp": replace(preset("tiny-moe"), dtype="float32", num_nextn_predict_layers=1),
    "moe two mtp": replace(preset("tiny-moe"), dtype="float32", num_nextn_predict_layers=2),
}
BIAS = "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def canonical(config: ErnieConfig) -> Arrays:
    """Random weights under canonical names."""
    rng = np.random.default_rng(7)
    return {s.name: rng.standard_normal(s.shape, np.float32) for s in tensor_specs(config, True)}


def laid_out(config: ErnieConfig, dialect: Dialect, weights: Mapping[str, np.ndarray]) -> Arrays:
    """Weights as `dialect` stores them."""
    files: Arrays = {t.name: np.zeros(t.shape, np.float32) for t in stored(config, dialect, True)}
    for name, region in regions(config, dialect, True).items():
        region.extract(files[region.stored], codec("f32"))[...] = weights[name]
    return files


def write_folder(folder: Path, config: ErnieConfig, files: Arrays, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config) | changes))
    save_file({n: np.ascontiguousarray(a) for n, a in files.items()}, folder / "model.safetensors")
    return folder


def write_gguf(path: Path, config: ErnieConfig, files: Arrays, **changes: Any) -> Path:
    import gguf

    metadata = to_gguf(config) | changes
    writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture")))
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    for name, array in files.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equal(checkpoint: Checkpoint, weights: Mapping[str, np.ndarray]) -> None:
    assert list(checkpoint.tensors) == list(weights)
    for name, array in weights.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.name, tensor.shape) == (name, array.shape)
        assert tensor.raw().shape == tensor.codec.stored_shape(tensor.shape)
        assert tensor.raw().dtype == tensor.codec.storage
        np.testing.assert_array_equal(tensor.read(), array, err_msg=name)


@pytest.fixture
def moe(tmp_path: Path) -> tuple[ErnieConfig, Arrays]:
    config = CONFIGS["moe"]
    return config, laid_out(config, "hf", canonical(config))


# --- every layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["hf", "hf_packed", "paddle", "vl", "vl_packed"])
@pytest.mark.parametrize("case", CONFIGS)
def test_layouts_of_safetensors(tmp_path: Path, case: str, dialect: Dialect) -> None:
    config = CONFIGS[case]
    if dialect.startswith("vl") and not config.is_moe:
        pytest.skip("there is no dense vision-language model")
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


# --- defects ------------------------------------------------------------------------------------


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


# --- real files ---------------------------------------------------------------------------------


def test_a_real_tiny_model(shared: Path) -> None:
    checkpoint = open_checkpoint(shared / "data" / "models" / "stories260k-ernie")
    assert len(checkpoint.tensors) == 47 and checkpoint.notes == ()
    assert sum(t.size for t in checkpoint.tensors.values()) == 260_032
    assert np.isfinite(checkpoint.tensors["model.embed_tokens.weight"].read()).all()
