"""What lies beside the weights of a folder: tokenizer, templates, generation configuration."""

from __future__ import annotations

import re
from pathlib import Path

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.errors import TokenizerError
from earnest.files import machine_errors, read_bytes, staged_file, write_json

# Beside the weights of a folder, small plain files belong to the model: tokenizer, templates,
# licence, card. Not code: it would describe the layout that is left behind.
_MAX_SIDE_FILE = 64 * 2**20
_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pdparams|gguf|npz|npy|pkl|pickle|h5|msgpack|onnx|pyc|part|lock"
    r"|index\.json)$"
)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "spiece.model")


def copy_side_files(source: Checkpoint, folder: Path) -> list[str]:
    """Copy or make everything but weights and configuration; returns notes.

    Raises:
        DiskFullError, AccessError, MachineError: a file cannot be read or written.
    """
    if source.container == "gguf":
        return _made_side_files(source, folder)
    origin = source.path if source.path.is_dir() else source.path.parent
    notes = []
    for file in _small_files(origin):
        if file.suffix == ".py":
            notes.append(f"{file.name} was not copied: code describes the layout it came with")
            continue
        data = read_bytes(file, _MAX_SIDE_FILE)
        with staged_file(folder / file.name) as copy:
            copy.write(data)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        notes.append("the source has no tokenizer, so the result has none")
    return notes


def _small_files(origin: Path) -> list[Path]:
    with machine_errors(origin, "reading"):
        return [
            file
            for file in sorted(origin.iterdir())
            if file.is_file()
            and file.name != "config.json"
            and not file.name.startswith(".")
            and not _NOT_COPIED.search(file.name)
            and file.stat().st_size <= _MAX_SIDE_FILE
        ]


def _made_side_files(source: Checkpoint, folder: Path) -> list[str]:
    if source.generation_config:
        write_json(folder / "generation_config.json", dict(source.generation_config))
    try:
        source.tokenizer.save(folder)
    except TokenizerError as error:
        return [f"the tokenizer could not be taken along: {error.problem}"]
    return []
