"""Packed files that lie: a typed error that names the tensor, or an answer, and nothing else."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from earnest.checkpoint import open_checkpoint
from earnest.checkpoint.pack import pack
from earnest.config import preset
from earnest.errors import EarnestError, FormatError, TensorsError

CONFIG = replace(preset("tiny-moe"), num_nextn_predict_layers=0)
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    pack(made(folder / "hf", CONFIG), folder / "packed")
    return folder / "packed"


Header = dict[str, Any]


def parts(folder: Path) -> tuple[Header, Header, bytes]:
    """Header without metadata, metadata with the table parsed, data."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    metadata["panels"] = json.loads(metadata["panels"])
    return header, metadata, content[8 + length :]


def write(folder: Path, like: Path, header: Header, metadata: Header, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    if not isinstance(metadata.get("panels", ""), str):
        metadata = metadata | {"panels": json.dumps(metadata["panels"])}
    text = json.dumps({"__metadata__": metadata} | header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    return folder


def entry(value: object) -> Callable[[Header, Header], None]:
    def change(header: Header, metadata: Header) -> None:
        metadata["panels"][Q] = value

    return change


def changed(key: str, value: object) -> Callable[[Header, Header], None]:
    def change(header: Header, metadata: Header) -> None:
        metadata[key] = value

    return change


def without(key: str) -> Callable[[Header, Header], None]:
    def change(header: Header, metadata: Header) -> None:
        del metadata[key]

    return change


def unnamed(header: Header, metadata: Header) -> None:
    del metadata["panels"][Q]


def vector(header: Header, metadata: Header) -> None:
    metadata["panels"][NORM] = ["bf16", 1, 64]


def ghost(header: Header, metadata: Header) -> None:
    metadata["panels"]["ghost"] = ["bf16", 16, 32]


def retyped(header: Header, metadata: Header) -> None:
    header[Q]["dtype"] = "I8"


def reshaped(header: Header, metadata: Header) -> None:
    panels, size = header[Q]["shape"]
    header[Q]["shape"] = [panels * 2, size // 2]


H = CONFIG.hidden_size
ROWS = CONFIG.q_size


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed("panel_version", "2"), FormatError, "panel_version '2'"),
        (changed("panel_version", "01"), FormatError, "panel_version '01'"),
        (without("panel_version"), FormatError, "panel_version None"),
        (without("panels"), FormatError, "not valid JSON"),
        (changed("panels", "[]"), FormatError, "not a JSON object"),
        (changed("panels", '{"a":1,"a":2}'), FormatError, "comes twice"),
        (changed("panels", "[" * 100_000), FormatError, "not valid JSON"),
        (ghost, FormatError, "ghost"),
        (entry(None), FormatError, "None"),
        (entry("bf16"), FormatError, "bf16"),
        (entry(["bf16", ROWS]), FormatError, "codec, rows, columns"),
        (entry(["bf16", ROWS, H, 1]), FormatError, "codec, rows, columns"),
        (entry(["bf16", True, H]), FormatError, "codec, rows, columns"),
        (entry(["bf16", float(ROWS), H]), FormatError, "codec, rows, columns"),
        (entry(["q3_k", ROWS, H]), FormatError, "codec, rows, columns"),
        (entry(["q9", ROWS, H]), FormatError, "codec, rows, columns"),
        (entry([["bf16"], ROWS, H]), FormatError, "codec, rows, columns"),
        (entry(["bf16", 0, H]), FormatError, "0 rows"),
        (entry(["bf16", -16, H]), FormatError, "-16 rows"),
        (entry(["q8_0", ROWS, H + 1]), FormatError, "multiple of 32"),
        (entry(["bf16", 10**30, 10**30]), FormatError, "weights in bf16"),
        (entry(["f32", ROWS, H]), FormatError, "weights in f32"),
        (entry(["bf16", ROWS + 16, H]), FormatError, "weights in bf16"),
        (entry(["bf16", ROWS, H + 32]), FormatError, "weights in bf16"),
        (entry(["bf16", ROWS - 1, H]), TensorsError, "misshaped"),
        (entry(["f16", ROWS, H]), None, ""),  # nothing in the file contradicts that
        (unnamed, TensorsError, "mistyped"),
        (vector, FormatError, NORM),
        (retyped, FormatError, "i8"),
        (reshaped, FormatError, "weights in bf16"),
    ],
)
def test_what_contradicts_itself_is_refused(
    change: Callable[[Header, Header], None],
    error: type[EarnestError] | None,
    message: str,
    packed: Path,
    tmp_path: Path,
) -> None:
    header, metadata, data = parts(packed)
    change(header, metadata)
    folder = write(tmp_path / "bad", packed, header, metadata, data)
    if error is None:
        assert open_checkpoint(folder).tensors[Q].read().shape == (ROWS, H)
        return
    with pytest.raises(error, match=re.escape(message)):
        open_checkpoint(folder)


def test_a_matrix_beside_its_cache_line_is_refused(packed: Path, tmp_path: Path) -> None:
    header, metadata, data = parts(packed)
    for name in header:
        header[name]["data_offsets"] = [at + 16 for at in header[name]["data_offsets"]]
    header["padding.99"] = {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}
    folder = write(tmp_path / "bad", packed, header, metadata, bytes(16) + data)
    with pytest.raises(FormatError, match="multiple of 64 bytes"):
        open_checkpoint(folder)


def test_padding_must_be_bytes(packed: Path, tmp_path: Path) -> None:
    header, metadata, data = parts(packed)
    end = max(e["data_offsets"][1] for e in header.values())
    header["padding.77"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    folder = write(tmp_path / "bad", packed, header, metadata, data + bytes(4))
    with pytest.raises(TensorsError, match=r"padding\.77"):
        open_checkpoint(folder)


def test_panels_are_not_taken_for_a_plain_folder(packed: Path, tmp_path: Path) -> None:
    header, _, data = parts(packed)
    folder = write(tmp_path / "bad", packed, header, {"format": "pt"}, data)
    with pytest.raises(TensorsError, match="mistyped"):
        open_checkpoint(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["bf16", "f32", "q4_0", "q6_k", 16, 32, 64, ROWS, H]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)  # fmt: skip


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_table_is_answered_or_refused(
    data: st.DataObject, packed: Path, tmp_path: Path
) -> None:
    header, metadata, content = parts(packed)
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        metadata["panels"][name] = data.draw(
            json_values
            | st.tuples(
                st.sampled_from(["bf16", "f16", "f32", "q8_0"]), st.integers(-1, 99), st.just(H)
            )
        )
    folder = write(tmp_path / "any", packed, header, metadata, content)
    try:
        opened = open_checkpoint(folder)
    except EarnestError:
        return
    for tensor in opened.tensors.values():
        with np.errstate(all="ignore"):
            assert tensor.read().shape == tensor.shape


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, 4000), byte=st.integers(0, 255))
def test_any_changed_byte_of_the_header(
    position: int, byte: int, packed: Path, tmp_path: Path
) -> None:
    content = bytearray((packed / "model.safetensors").read_bytes())
    content[position] = byte
    folder = tmp_path / "byte"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_bytes((packed / "config.json").read_bytes())
    try:
        opened = open_checkpoint(folder)
    except EarnestError:
        return
    assert opened.tensors[Q].read().shape == (ROWS, H)
