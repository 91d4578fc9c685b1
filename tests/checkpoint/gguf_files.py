"""GGUF files for tests: valid ones by the gguf package, others byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

F32, Q4_0, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_valid(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """A file with every kind of metadata and tensors of several types; returns them decoded."""
    writer = GGUFWriter(path, "ernie4_5", **options)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "文心 4.5 🙂")
    writer.add_key_value("empty", "", GGUFValueType.STRING)  # add_string would leave it out
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("switches", [True, False])
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "文", "▁the"])
    writer.add_key_value("nested", [[1, 2], [3]], GGUFValueType.ARRAY, GGUFValueType.ARRAY)
    rng = np.random.default_rng(0)
    plain = {
        "token_embd.weight": rng.normal(size=(5, 32)).astype(np.float32),
        "half": rng.normal(size=(3, 7)).astype(np.float16),
        "vector": np.arange(3, dtype=np.float32),
        "cube": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "ids": np.arange(5, dtype=np.int32),
    }
    decoded = {name: array.astype(np.float32) for name, array in plain.items()}
    for name, array in plain.items():
        writer.add_tensor(name, array)
    for kind, shape in ((Q4_0, (2, 64)), (Q8_0, (4, 3, 32)), (GGMLQuantizationType.Q6_K, (2, 512))):
        weights, size = GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 100, (*shape[:-1], shape[-1] // weights * size), dtype=np.uint8)
        writer.add_tensor(kind.name, stored, raw_dtype=kind)
        with np.errstate(all="ignore"):
            decoded[kind.name] = package.dequantize(stored, kind)
    finish(writer)
    return decoded


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: bytes | str, type_id: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_id) + payload


def array(type_id: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", type_id, count) + payload


def info(
    name: bytes | str = "w", dims: Sequence[int] = (4, 2), type_id: int = F32, offset: int = 0
) -> bytes:
    body = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)
    return text(name) + body


def build(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] | None = None,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    data_bytes: int = 128,
) -> bytes:
    """A file from its parts, any of which may be wrong; by default one tensor `w` f32 [2, 4]."""
    infos = [info()] if infos is None else infos
    counts = (
        len(infos) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *infos])
    return head + b"\0" * (-len(head) % 32) + bytes(range(256))[:data_bytes]
