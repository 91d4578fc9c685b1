"""Files are written from files: memory does not grow with the model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from earnest.checkpoint import open_checkpoint, synth
from earnest.checkpoint.convert import convert
from earnest.config import preset

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="what memory is given back differs by system"
)

# Two threads whatever the machine has: each has a few blocks in hand.
_CHILD = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from pathlib import Path
from earnest.checkpoint import open_checkpoint
from earnest.checkpoint.convert import convert
from earnest.checkpoint.export import export
from earnest.checkpoint.pack import pack
from earnest.measure.machine import peak_memory
from earnest.quantize import quantize

verb, source, destination, *options = sys.argv[1:]
write = {"convert": convert, "export": export, "pack": pack, "quantize": quantize}[verb]
opened = open_checkpoint(source)
baseline = peak_memory()
report = write(opened, Path(destination), *options)
print(peak_memory() - baseline, report.nbytes)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of 386 MB, a tensor of it at most 102."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    config = replace(preset("0.3b"), num_hidden_layers=6, vocab_size=50_000, intermediate_size=6144)
    assert synth.synth(folder, config, seed=1).nbytes > 385e6
    yield folder
    shutil.rmtree(folder)


# 32 MiB of pages between two forgettings, one tensor's pages, and the blocks in hand: 44 to 105 MB
# seen. If nothing were forgotten, 386 MB of pages read would be on top; of blocks at least 108.
BOUND = 180e6


@pytest.mark.parametrize(
    ("verb", "name", "options"),
    [
        ("convert", "paddle", ["paddle"]),
        ("convert", "hf", ["hf"]),
        ("pack", "packed", []),
        ("export", "m.gguf", []),
        ("quantize", "packed", ["q4_0"]),
        ("quantize", "m.gguf", ["q4_0"]),
    ],
)
def test_memory_stays_far_below_the_size_of_the_model(
    verb: str, name: str, options: list[str], model: Path, tmp_path: Path
) -> None:
    source = model
    if options == ["hf"]:
        source = tmp_path / "source"
        convert(open_checkpoint(model), source, "paddle")
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, verb, source, tmp_path / name, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    grown, written = map(int, run.stdout.split())
    assert written > 105e6
    print(f"{verb} {name}: {grown / 1e6:.0f} MB")
    assert grown < BOUND
    shutil.rmtree(tmp_path)  # pytest would keep it
