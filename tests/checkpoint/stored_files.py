"""Small models as dictionaries of stored arrays, for the tests of opening to damage and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from earnest.checkpoint import Checkpoint
from earnest.checkpoint.names import Dialect, regions, stored, tensor_specs
from earnest.codecs import codec
from earnest.config import ErnieConfig, preset, to_gguf, to_hf

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
