"""What the tests of conversion share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from earnest.checkpoint import Checkpoint, open_checkpoint, synth
from earnest.config import ErnieConfig


def made(folder: Path, config: ErnieConfig, **options: Any) -> Checkpoint:
    synth.synth(folder, config, seed=1, **options)
    return open_checkpoint(folder)


def bits(checkpoint: Checkpoint) -> dict[str, tuple[str, bytes]]:
    return {
        name: (t.codec.name, np.ascontiguousarray(t.raw()).tobytes())
        for name, t in checkpoint.tensors.items()
    }


def assert_same_files(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
