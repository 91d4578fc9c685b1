"""All codecs by name, and what safetensors and GGUF call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from earnest.codecs.base import Codec
from earnest.codecs.blocks import BLOCKS
from earnest.codecs.encode import with_encoder
from earnest.codecs.iquants import IQUANTS
from earnest.codecs.kquants import KQUANTS
from earnest.codecs.plain import PLAIN
from earnest.errors import FormatError

_BLOCK_CODECS = map(with_encoder, (*BLOCKS, *KQUANTS, *IQUANTS))
CODECS: dict[str, Codec] = {c.name: c for c in (*PLAIN, *_BLOCK_CODECS)}

_SAFETENSORS = {
    "F64": "f64",
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "F8_E4M3": "f8_e4m3",
    "F8_E5M2": "f8_e5m2",
    "I8": "i8",
    "I16": "i16",
    "I32": "i32",
    "I64": "i64",
    "U8": "u8",
    "U16": "u16",
    "U32": "u32",
    "U64": "u64",
    "BOOL": "bool",
}

# Type numbers of the GGUF specification. 4, 5 and 31-33, 36-38 were withdrawn from it; q8_1 (9) and
# q8_k (15) are formats of activations, which no file holds.
_GGML = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    20: "iq4_nl",
    21: "iq3_s",
    22: "iq2_s",
    23: "iq4_xs",
    24: "i8",
    25: "i16",
    26: "i32",
    27: "i64",
    28: "f64",
    29: "iq1_m",
    30: "bf16",
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
    40: "nvfp4",
}

# Types that exist and are not supported, so that a message can name them.
_GGML_UNSUPPORTED = {
    4: "q4_2",
    5: "q4_3",
    9: "q8_1",
    15: "q8_k",
    31: "q4_0_4_4",
    32: "q4_0_4_8",
    33: "q4_0_8_8",
    36: "iq4_nl_4_4",
    37: "iq4_nl_4_8",
    38: "iq4_nl_8_8",
    41: "q1_0",
}

_TO_SAFETENSORS = {name: dtype for dtype, name in _SAFETENSORS.items()}
_TO_GGML = {name: type_id for type_id, name in _GGML.items()}


T = TypeVar("T", str, int)


def codec(name: str) -> Codec:
    """The codec called `name`, for example "bf16" or "q4_k".

    Raises:
        FormatError: there is none.
    """
    return CODECS[_look_up(name, {known: known for known in CODECS}, "codec")]


def from_safetensors(dtype: str) -> Codec:
    """The codec of a safetensors dtype, for example "BF16".

    "U16" is the codec `u16`, which refuses to decode: whether it is bf16 seen through numpy (as
    Paddle writes it) only the dialect above can know.

    Raises:
        FormatError: the dtype is not supported.
    """
    return CODECS[_look_up(dtype, _SAFETENSORS, "safetensors dtype")]


def to_safetensors(codec: Codec) -> str:
    """What safetensors calls a codec.

    Raises:
        FormatError: safetensors cannot hold it (block formats).
    """
    return _look_up(codec.name, _TO_SAFETENSORS, "codec for safetensors")


def from_ggml(type_id: int) -> Codec:
    """The codec of a GGUF tensor type number, for example 12 for q4_k.

    Raises:
        FormatError: the type is not supported.
    """
    if type_id not in _GGML:
        name = _GGML_UNSUPPORTED.get(type_id, "unknown to this version")
        raise FormatError(
            f"GGUF tensor type {type_id} ({name}) is not supported",
            expected=", ".join(f"{n} ({i})" for i, n in _GGML.items()),
            remedy="use a file in one of these types",
        )
    return CODECS[_GGML[type_id]]


def to_ggml(codec: Codec) -> int:
    """The GGUF tensor type number of a codec.

    Raises:
        FormatError: GGUF cannot hold it (fp8, unsigned integers, bool).
    """
    return _look_up(codec.name, _TO_GGML, "codec for GGUF")


def _look_up(key: str, table: Mapping[str, T], kind: str) -> T:
    if key not in table:
        raise FormatError(f"{kind} {key!r:.80} is not supported", expected=", ".join(table))
    return table[key]
