"""Models for the verify tests: tiny random ones that transformers writes, and the real 260K story
model, intact, damaged in known ways, and grown into a mixture of experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from story_damage import Tensors

from earnest import hub
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.names import stored
from earnest.checkpoint.open import open_checkpoint
from earnest.codecs import codec
from earnest.config import to_gguf


@pytest.fixture(scope="session")
def story_folder() -> Path:
    """The story model that ships with the package, a Hugging Face folder."""
    return Path(hub.__file__).with_name("stories")


@pytest.fixture
def changed_story(story_folder: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """The story model after a function has changed its tensors and its config."""

    def make(change: Callable[[Tensors, dict[str, Any]], None], **options: Any) -> Checkpoint:
        tensors = load_file(story_folder / "model.safetensors")
        config = json.loads((story_folder / "config.json").read_text(encoding="utf-8"))
        change(tensors, config)
        folder = tmp_path / "changed"
        shutil.copytree(story_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return open_checkpoint(folder, **options)

    return make


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model that transformers wrote: `random_folder(kind, seed, **configuration)`."""
    made: dict[str, Path] = {}

    def make(kind: str, seed: int = 0, **overrides: Any) -> Path:
        key = repr((kind, seed, sorted(overrides.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            _write_random(made[key], kind, seed, overrides)
        return made[key]

    return make


def _write_random(folder: Path, kind: str, seed: int, overrides: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    if kind == "moe":
        sizes |= {
            "moe_num_experts": 8,
            "moe_k": 3,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "head_dim": 8,
        }
    prefix = "Ernie4_5_Moe" if kind == "moe" else "Ernie4_5"
    config = getattr(transformers, f"{prefix}Config")(**sizes | overrides)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "e_score_correction_bias" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def as_gguf() -> Callable[[Checkpoint, Path], Path]:
    """Writes a checkpoint as a float32 GGUF file, without a tokenizer."""

    def write(checkpoint: Checkpoint, path: Path) -> Path:
        metadata = to_gguf(checkpoint.config)
        writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
        for key, value in metadata.items():
            if key != "general.architecture":
                _add(writer, key, value)
        f32 = codec("f32")
        for tensor in stored(checkpoint.config, "gguf"):
            array = np.zeros(tensor.shape, np.float32)
            for part in tensor.parts:
                part.region.extract(array, f32)[...] = checkpoint.tensors[part.name].read()
            writer.add_tensor(tensor.name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))
