"""Checkpoints for tests, written without the code under test: any dialect, and GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from earnest.checkpoint.names import Dialect, stored, tensor_specs
from earnest.codecs import codec
from earnest.config import ErnieConfig, to_gguf, to_hf

Arrays = Mapping[str, npt.NDArray[np.generic]]


def random_arrays(config: ErnieConfig, *, mtp: bool = False, seed: int = 0) -> Arrays:
    """Canonical float32 arrays; correction biases and norms are random too."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_normal(spec.shape, dtype=np.float32)
        for spec in tensor_specs(config, mtp)
    }


def write_dialect(folder: Path, config: ErnieConfig, dialect: Dialect, arrays: Arrays) -> Path:
    """A float folder in any dialect, through the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    mtp = any(name.startswith("model.mtp_") for name in arrays)
    tensors = {}
    for target in stored(config, dialect, mtp):
        first = arrays[target.parts[0][0]]
        whole = np.zeros(target.shape, first.dtype)
        for name, region in target.parts:
            region.extract(whole, codec("f32"))[...] = arrays[name]
        tensors[target.name] = whole
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    return folder


def write_gguf(path: Path, config: ErnieConfig, arrays: Arrays, quantised: str | None) -> Path:
    """A GGUF file through the `gguf` package; matrices as `quantised` blocks, or float32."""
    architecture = "ernie4_5-moe" if config.is_moe else "ernie4_5"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in to_gguf(config).items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))
    for target in stored(config, "gguf"):
        whole = np.zeros(target.shape, np.float32)
        for name, region in target.parts:
            region.extract(whole, codec("f32"))[...] = arrays[name]
        plain = len(target.shape) == 1 or "ffn_gate_inp" in target.name or quantised is None
        if plain:
            writer.add_tensor(target.name, whole)
        else:
            kind = gguf.GGMLQuantizationType[quantised.upper()]
            writer.add_tensor(target.name, gguf.quantize(whole, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
