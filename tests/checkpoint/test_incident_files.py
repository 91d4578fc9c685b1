"""Incidents with model files (docs/incidents.md), by their numbers."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf_files import F32, Q4_0, array, build, info, pair, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import earnest.hub
from earnest.checkpoint.containers import gguf
from earnest.checkpoint.export import export
from earnest.checkpoint.open import open_checkpoint
from earnest.config.gguf import from_gguf
from earnest.engine import SamplingParams
from earnest.errors import CheckpointError, EarnestError, FormatError
from earnest.quantize import quantize
from earnest.tokenizer.gguf import read_metadata

STORIES = Path(earnest.hub.__file__).parent / "stories"
HUGE = 2**64 - 1


@contextmanager
def in_time() -> Iterator[None]:
    """A second of this thread's time: what a malformed file may take."""
    begun = time.thread_time()
    yield
    seconds = time.thread_time() - begun
    assert seconds < 1, f"{seconds:.2f} s"


@contextmanager
def in_memory() -> Iterator[None]:
    """64 MB: what a malformed file may take. (Counting makes everything slow.)"""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64e6, f"{peak:,} bytes"


def refused(path: Path, content: bytes | None = None, match: str = "gguf") -> None:
    """`path`, after `content` was written to it if given, ends in a typed error, soon."""
    path = path / "bad.gguf" if path.is_dir() else path
    if content is not None:
        path.write_bytes(content)
    for budget in (in_time, in_memory):
        with budget(), pytest.raises(FormatError, match=match):
            gguf.open_file(path)


@pytest.fixture(scope="module")
def story_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model as GGUF."""
    path = tmp_path_factory.mktemp("incidents") / "stories.gguf"
    export(open_checkpoint(STORIES), path)
    return path


# --- 1 to 4: where tensors lie ------------------------------------------------------------------


def test_incident_01_cve_2026_7482_tensor_beyond_the_end(story_file: Path, tmp_path: Path) -> None:
    """Quantising reads every tensor: nothing may be read from behind the file's end."""
    whole = story_file.read_bytes()
    open_checkpoint(story_file)
    rng = random.Random(1)
    path = tmp_path / "cut.gguf"
    for size in (0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(50))):
        path.write_bytes(whole[:size])
        with in_time(), pytest.raises(FormatError):
            quantize(open_checkpoint(path), tmp_path / "out.gguf", "q8_0")
    assert not list(tmp_path.glob("*out*"))
    for offset in (128, 2**31, 2**63 - 32, 2**64 - 32):
        refused(tmp_path, build(infos=[info(offset=offset)]), "ends before")


def test_incident_02_cve_2025_53630_sizes_that_add_up_to_nothing(tmp_path: Path) -> None:
    for size in (2**31, 2**32, 2**61, 2**62, 2**63):
        infos = [info(f"w{n}", dims=(size,), offset=n * 4 * size % 2**64) for n in range(8)]
        refused(tmp_path, build(infos=infos))


SIZES = st.sampled_from([1, 2, 4, 31, 32, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, HUGE])


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(SIZES, min_size=1, max_size=4),
            st.sampled_from([0, 32, 64, 96, 2**32, 2**63, 2**64 - 32]),
            st.sampled_from([F32, Q4_0]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_incident_03_cve_2026_27940_what_is_taken_fits(
    tmp_path: Path, wanted: list[tuple[list[int], int, int]]
) -> None:
    """The fix of the incident before was passed by: so, whatever is accepted is counted again with
    numbers that cannot overflow."""
    infos = [info(f"w{n}", dims, kind, place) for n, (dims, place, kind) in enumerate(wanted)]
    path = tmp_path / "drawn.gguf"
    path.write_bytes(build(infos=infos, data_bytes=256))
    try:
        stored = gguf.open_file(path)
    except FormatError:
        return
    data = 256
    ranges = []
    for (dims, place, kind), tensor in zip(wanted, stored.tensors.values(), strict=True):
        size = math.prod(dims) * 4 if kind == F32 else math.prod(dims) // 32 * 18
        assert size == tensor.raw().nbytes and place + size <= data
        ranges.append((place, place + size))
    ranges.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))


def test_incident_04_cve_2026_33298_dimensions_that_wrap(tmp_path: Path) -> None:
    for dims in ((2**32, 2**32), (2**63, 2), (2**16,) * 4, (HUGE,) * 4, (2**61, 2, 4), (3, 2**62)):
        refused(tmp_path, build(infos=[info(dims=dims)]), "ends before")
    for dims in ((0,), (4, 0), (0, HUGE), (2**63, 0, 2**63)):
        refused(tmp_path, build(infos=[info(dims=dims)]), "empty")


# --- 5 to 8: strings, tokens, types -------------------------------------------------------------


@pytest.mark.parametrize("length", [129, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, HUGE])
def test_incident_05_cve_2024_23496_lengths_of_strings(tmp_path: Path, length: int) -> None:
    claimed = struct.pack("<Q", length)
    for content in (
        build(pairs=[claimed + b"key"]),
        build(pairs=[pair("k", 8, claimed + b"value")]),
        build(pairs=[pair("k", 9, array(8, 2, text("a") + claimed))]),
        build(infos=[claimed + b"name"]),
    ):
        refused(tmp_path, content)


def test_incident_06_cve_2025_49847_a_token_of_two_gigabytes(tmp_path: Path) -> None:
    """Declared only, and present: a file with a hole in it."""
    for length in (2**31 - 1, 2**31, 2**32 + 1):
        entries = array(8, 2, text("a") + struct.pack("<Q", length))
        head = build(pairs=[pair("tokenizer.ggml.tokens", 9, entries)], data_bytes=0)
        refused(tmp_path, head)
        path = tmp_path / "bad.gguf"
        os.truncate(path, len(head) + length + 4096)
        refused(path, None, "beyond reason")


def test_incident_08_llama_cpp_26690_arrays_of_another_type(
    story_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores declared as bytes, and every other key as everything it is not."""
    metadata = gguf.open_file(story_file).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    path = tmp_path / "scores.gguf"
    scores = array(0, len(tokens), bytes(len(tokens)))
    path.write_bytes(build(pairs=[pair("tokenizer.ggml.scores", 9, scores)]))
    assert gguf.open_file(path).metadata["tokenizer.ggml.scores"] == [0] * len(tokens)
    others: tuple[Any, ...] = (
        *(True, -1, 0, 2**63, HUGE, 0.5, float("nan"), float("inf"), "", "x" * 100, [], [0] * 7),
        *([0] * len(tokens), [0.5] * len(tokens), ["a"] * len(tokens), [True], [[1], ["a"]]),
    )
    for key, right in metadata.items():
        for wrong in others:
            changed = metadata | {key: wrong}
            try:
                from_gguf(changed, tied=True)
                read_metadata(changed)
            except EarnestError:
                continue
            same_kind = type(wrong) is type(right) or {type(wrong), type(right)} <= {int, float}
            listed = isinstance(wrong, list) and isinstance(right, list)
            unread = key.startswith("general.") or key.endswith((".pre", "_id", ".vocab_size"))
            assert same_kind or listed or unread or wrong == right, (key, wrong)
    assert all(len(record.getMessage()) < 300 for record in caplog.records)


# --- 9 and 10: bombs ----------------------------------------------------------------------------

BOMBS: dict[str, Callable[[], bytes]] = {
    "43 bytes, an array of 2^63": lambda: (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 0, 2**63)
    ),
    "an array of arrays of nothing": lambda: build(
        pairs=[pair("k", 9, array(9, 2**40, array(0, 0, b"")))]
    ),
    "as many empty arrays as fit": lambda: build(
        pairs=[pair("k", 9, array(9, 2**16, array(0, 0, b"") * 2**16))] * 2
    ),
    "counts of everything": lambda: build(pair_count=2**63, tensor_count=2**63),
    "empty strings": lambda: build(pairs=[pair("k", 9, array(8, 2**30, bytes(4096)))]),
    "many dimensions": lambda: build(infos=[text("w") + struct.pack("<I", 2**31) + bytes(64)]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_incident_09_llama_cpp_27188_time_and_memory(tmp_path: Path, name: str) -> None:
    refused(tmp_path, BOMBS[name]())


def test_incident_10_ggml_1516_small_files_that_ask_for_gigabytes(tmp_path: Path) -> None:
    assert gguf.MAX_STRING_BYTES <= 64 * 2**20 and gguf.MAX_ALIGNMENT <= 2**20
    for alignment in (2**21, 2**30, 2**31):
        content = build(pairs=[pair("general.alignment", 4, struct.pack("<I", alignment))])
        refused(tmp_path, content, "alignment")
    for length in (gguf.MAX_STRING_BYTES + 1, 2**30, 2**40):
        content = build(pairs=[pair("k", 8, struct.pack("<Q", length))])
        assert len(content) < 300
        refused(tmp_path, content, "too long")
    for dims in ((2**28,), (2**20, 2**10)):
        refused(tmp_path, build(infos=[info(dims=dims)]), "ends before")


# --- 22 and 23: files that are programs ---------------------------------------------------------


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "model.pdparams", "weights.ckpt", "model.safetensors", "x"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_incident_22_cve_2025_32434_pickled_weights(
    tmp_path: Path, name: str, protocol: int
) -> None:
    """Not opened at all, by whatever name."""
    mark = tmp_path / "was here"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((STORIES / "config.json").read_bytes())
    (folder / name).write_bytes(pickle.dumps(Payload(mark), protocol=protocol))
    for path in (folder, folder / name):
        with pytest.raises(EarnestError):
            open_checkpoint(path)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())  # the payload works
    assert mark.exists()


def test_incident_23_cve_2025_66448_a_config_that_names_code(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in STORIES.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "config.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    for target in ("modeling_evil.Evil", "elsewhere/repo--modeling_evil.Evil", f"{folder}/x.Evil"):
        config["auto_map"] = dict.fromkeys(kinds, target)
        (folder / "config.json").write_text(json.dumps(config))
        model = earnest.load(str(folder), runner="reference")
        assert model.generate("Once", SamplingParams(max_tokens=2)).text
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.compile("evil|model_type")):
        open_checkpoint(folder)
    assert not mark.exists()
