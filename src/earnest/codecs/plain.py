"""Plain codecs: each weight is one number, so arrays can be transposed, sliced and joined freely.

Formats that numpy lacks are held as bit patterns: bf16 as `uint16`, the two fp8 kinds as `uint8`.
All are little-endian on disk, as safetensors and GGUF store them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from earnest.codecs.base import Codec, Float32, Raw
from earnest.errors import FormatError


def _to_float32(raw: Raw) -> Float32:
    # A float64 beyond the range of float32 becomes infinite, which `verify` then reports.
    with np.errstate(over="ignore", invalid="ignore"):
        return raw.astype(np.float32, copy=False)


def _float_encoder(storage: str) -> Callable[[Float32], Raw]:
    """Round to nearest, ties to even, as numpy's conversions do; too large becomes infinite."""

    def encode(x: Float32) -> Raw:
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(storage)

    return encode


def _decode_bf16(raw: Raw) -> Float32:
    """bf16 is the upper half of a float32."""
    bits = raw.astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


def _encode_bf16(x: Float32) -> Raw:
    """Round to nearest, ties to even; infinities and too large values become infinite.

    A NaN keeps its sign and the upper bits of its payload, so that encoding what was decoded gives
    back all 65,536 patterns; a payload that would vanish (leaving an infinity) gets the quiet bit.
    """
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(x.shape)
    upper = bits >> 16
    # Adding just under half a unit, or exactly half where the kept part is odd, carries as wanted.
    rounded = (bits + (0x7FFF + (upper & 1))) >> 16
    quiet = upper | np.where(upper & 0x7F, 0, 0x40).astype(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.asarray(np.where(is_nan, quiet, rounded), dtype="<u2")


def _e4m3_values() -> Float32:
    """The 256 values of fp8 E4M3 "FN": 1 sign, 4 exponent bits (bias 7), 3 mantissa bits.

    No infinities; all ones is NaN; exponent 0 is subnormal. Source: OCP 8-bit floating point
    specification 1.0, section 5.
    """
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    significand = np.where(exponent > 0, 8 + mantissa, mantissa)
    magnitude: Float32 = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - 7 - 3)
    magnitude[(byte & 0x7F) == 0x7F] = np.nan
    return np.copysign(magnitude, np.where(byte < 128, 1, -1), dtype=np.float32)


_E4M3 = _e4m3_values()


def _decode_e4m3(raw: Raw) -> Float32:
    return np.asarray(_E4M3[raw.astype(np.intp)])


def _decode_e5m2(raw: Raw) -> Float32:
    """fp8 E5M2 is the upper half of an IEEE half float."""
    bits = raw.astype(np.uint16)
    np.left_shift(bits, 8, out=bits)
    return _to_float32(bits.view(np.float16))


def _decode_bool(raw: Raw) -> Float32:
    return raw.astype(np.bool_).astype(np.float32)


def _refuse_u16(raw: Raw) -> Float32:
    raise FormatError(
        "a tensor stored as U16 does not say what its bits mean",
        got="U16 weights",
        expected="BF16, F16, F32 or another weight type",
        remedy="Paddle stores bf16 this way, and a checkpoint in Paddle's naming is read as such",
    )


def _plain(
    name: str,
    storage: str,
    decode: Callable[[Raw], Float32] = _to_float32,
    encode: Callable[[Float32], Raw] | None = None,
) -> Codec:
    dtype = np.dtype(storage)
    return Codec(name, dtype, 1, dtype.itemsize, decode, encode)


PLAIN = (
    _plain("f64", "<f8", encode=_float_encoder("<f8")),
    _plain("f32", "<f4", encode=_float_encoder("<f4")),
    _plain("f16", "<f2", encode=_float_encoder("<f2")),
    _plain("bf16", "<u2", _decode_bf16, _encode_bf16),
    _plain("f8_e4m3", "|u1", _decode_e4m3),
    _plain("f8_e5m2", "|u1", _decode_e5m2),
    _plain("i8", "|i1"),
    _plain("i16", "<i2"),
    _plain("i32", "<i4"),
    _plain("i64", "<i8"),
    _plain("u8", "|u1"),
    _plain("u16", "<u2", _refuse_u16),
    _plain("u32", "<u4"),
    _plain("u64", "<u8"),
    # As bytes: a numpy bool other than 0 and 1 would behave in odd ways.
    _plain("bool", "|u1", _decode_bool),
)
