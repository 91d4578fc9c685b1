"""`open_checkpoint`: from a path to a `Checkpoint`, finding out by itself what lies there.

A path is a folder (Hugging Face, Paddle or vision-language layout in safetensors files, a packed
model, or one GGUF model), a single safetensors file with its `config.json` beside it, or a GGUF
file. Only headers and small JSON files are read; every tensor stays where it is until it is asked
for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earnest import config as configs
from earnest.checkpoint.assemble import assemble, family_of
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.containers import gguf, panel, safetensors
from earnest.checkpoint.containers.base import StoredFile
from earnest.errors import FormatError, UserError
from earnest.files import machine_errors, read_json

_MAX_CONFIG_BYTES = 16 * 2**20
_GGUF_PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf", re.DOTALL)

# GGUF files may bring sampling defaults; these are their names in a generation_config.json.
GGUF_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def open_checkpoint(path: str | Path, *, allow_missing_correction_bias: bool = False) -> Checkpoint:
    """Open a checkpoint in place; container and dialect are detected.

    `Checkpoint.config` says what is stored: its `num_nextn_predict_layers` is the number of MTP
    blocks that the files hold, whatever the configuration claims (a note tells of a difference).
    Of a vision-language checkpoint the text model is opened; the rest is listed in `left_out`.

    Args:
        path: a folder, a .safetensors file or a .gguf file.
        allow_missing_correction_bias: open a mixture-of-experts model that lacks correction biases,
            with zeros in their place. It will not choose the experts it was trained to choose.

    Raises:
        ModelNotFoundError, AccessError, MachineError: the path cannot be read.
        FormatError: a file is broken, or of a kind that is not (or, as pickles, never) opened.
        ConfigError: the configuration is broken, or asks for arithmetic that is not supported.
        TensorsError: tensors are missing, unknown, misshaped or no weights; lists all of them.
        MissingCorrectionBiasError: correction biases are missing and that was not allowed.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError("a path cannot contain a null character")
    with machine_errors(path, "reading"):
        path.stat()
        is_folder = path.is_dir()
    target = _gguf_in(path) if is_folder else path if _is_gguf(path) else None
    if target is not None:
        return _open_gguf(path, target, allow_missing_correction_bias)
    folder = path if is_folder else path.parent
    stored = safetensors.open_folder(path) if is_folder else _open_single(path)
    return _open_safetensors(path, folder, stored, allow_missing_correction_bias)


# --- safetensors --------------------------------------------------------------------------------


def _open_single(path: Path) -> StoredFile:
    stored = safetensors.open_file(path)
    index = path.parent / safetensors.INDEX
    if path.name != safetensors.SINGLE and index.is_file():
        shards = read_json(index, safetensors.MAX_INDEX_BYTES).get("weight_map")
        if isinstance(shards, dict) and path.name in shards.values():
            raise FormatError(
                f"{path} is one of several files that make up the model",
                remedy=f"open the folder: {path.parent}",
            )
    return stored


def _open_safetensors(
    path: Path, folder: Path, stored: StoredFile, allow_missing_correction_bias: bool
) -> Checkpoint:
    config_path = folder / "config.json"
    with machine_errors(config_path, "reading"):
        if not config_path.exists():
            raise FormatError(
                f"{folder} has weights and no config.json",
                expected="the config.json that the model was published with, beside the weights",
                remedy="download it too; the weights alone do not say how to compute with them",
            )
    raw = read_json(config_path, _MAX_CONFIG_BYTES)
    config = configs.from_hf(raw)
    is_packed = panel.is_packed(stored)
    if is_packed:
        stored = panel.unpacking(stored)
    assembly = assemble(
        str(path),
        stored.tensors,
        config,
        "hf" if is_packed else family_of(stored.tensors),
        allow_missing_correction_bias=allow_missing_correction_bias,
    )
    return Checkpoint(
        path=path,
        config=assembly.config,
        container="panel" if is_packed else "safetensors",
        dialect=assembly.dialect,
        tensors=assembly.tensors,
        left_out=assembly.left_out,
        notes=assembly.notes,
        generation_config=_optional_json(folder / "generation_config.json"),
        metadata=raw,
        forget=stored.forget,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, _MAX_CONFIG_BYTES) if path.exists() else {}


# --- GGUF ---------------------------------------------------------------------------------------


def _is_gguf(path: Path) -> bool:
    """By name or, whatever the name, by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with machine_errors(path, "opening"):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == gguf.MAGIC


def _gguf_in(folder: Path) -> Path | None:
    """The one GGUF model of a folder without safetensors; None where there is no GGUF file."""
    with machine_errors(folder, "reading"):
        names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.lower().endswith(".gguf")]
    if not found or any(name.endswith((".safetensors", safetensors.INDEX)) for name in names):
        return None
    models = {m[1] if (m := _GGUF_PART.fullmatch(name)) else name for name in found}
    if len(models) > 1:
        raise FormatError(
            f"{folder} holds {len(models)} GGUF models",
            got=", ".join(found[:8]),
            remedy="name the file to open",
        )
    return folder / found[0]


def _open_gguf(path: Path, target: Path, allow_missing_correction_bias: bool) -> Checkpoint:
    stored = gguf.open_file(target)
    config = configs.from_gguf(
        stored.metadata,
        tied="output.weight" not in stored.tensors,
        use_bias="blk.0.attn_q.bias" in stored.tensors,
    )
    assembly = assemble(
        str(target),
        stored.tensors,
        config,
        "gguf",
        allow_missing_correction_bias=allow_missing_correction_bias,
    )
    return Checkpoint(
        path=path,
        config=assembly.config,
        container="gguf",
        dialect=assembly.dialect,
        tensors=assembly.tensors,
        left_out=assembly.left_out,
        notes=assembly.notes,
        generation_config=_gguf_generation(stored.metadata),
        metadata=stored.metadata,
        forget=stored.forget,
    )


def _gguf_generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of a GGUF file, under the names of a generation_config.json."""
    return {
        name: metadata[key]
        for key, name in GGUF_SAMPLING.items()
        if isinstance(metadata.get(key), int | float)
    }
