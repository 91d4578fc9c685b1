"""GGUF's block formats of 32 weights with one scale, and the two 4-bit float formats.

Each spec maps `uint8 [N, block bytes]` to float32 `[N, ...]` (see `bits.block_codec`); the comment
over it gives the layout in bytes. `d` and `m` are half floats.
"""

from __future__ import annotations

import numpy as np

from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes, block_codec, fields, half, per_run, planes

# The 16 values of fp4 E2M1, doubled so that they are integers; the scales are halved for it.
# Source: OCP Microscaling Formats specification 1.0, section 5.3.3.
_E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_E8M0_HALVED = np.ldexp(np.ones(256, np.float32), np.arange(256) - 127 - 1)


# d[2] q[16]; weight i is nibble i of q: low nibbles are weights 0-15, high ones 16-31. w = d(q - 8)
def _q4_0(b: Bytes) -> Float32:
    q = planes(b[:, 2:], 2, 4).reshape(-1, 32).astype(np.float32)
    return half(b[:, :2]) * (q - 8)


# d[2] m[2] q[16]; nibbles as in q4_0. w = d q + m
def _q4_1(b: Bytes) -> Float32:
    q = planes(b[:, 4:], 2, 4).reshape(-1, 32).astype(np.float32)
    return half(b[:, :2]) * q + half(b[:, 2:4])


# h[4] q[16]; nibbles as in q4_0; bit i of h is the fifth bit of weight i.
def _five_bits(b: Bytes) -> Float32:
    high = fields(b[:, :4], 8, 1).reshape(-1, 32)
    return (planes(b[:, 4:], 2, 4).reshape(-1, 32) | high << 4).astype(np.float32)


# d[2] h[4] q[16]. w = d(q - 16)
def _q5_0(b: Bytes) -> Float32:
    return half(b[:, :2]) * (_five_bits(b[:, 2:]) - 16)


# d[2] m[2] h[4] q[16]. w = d q + m
def _q5_1(b: Bytes) -> Float32:
    return half(b[:, :2]) * _five_bits(b[:, 4:]) + half(b[:, 2:4])


# d[2] q[32] as signed bytes. w = d q
def _q8_0(b: Bytes) -> Float32:
    return half(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


# e[1] q[16]; nibbles as in q4_0, each an E2M1 float; e is E8M0. w = 2^(e - 127) E2M1(q)
# e = 255 is NaN in the OCP specification, but 2^128 in ggml, which is followed.
def _mxfp4(b: Bytes) -> Float32:
    return _E8M0_HALVED[b[:, :1]] * _E2M1_TWICE[planes(b[:, 1:], 2, 4).reshape(-1, 32)]


# s[4] q[4][8]: four runs of 16 weights; within a run nibbles as in q4_0, each an E2M1 float; s is
# an unsigned E4M3 float (the sign bit is not looked at, and 0x7F counts as 0). w = s E2M1(q)
def _nvfp4(b: Bytes) -> Float32:
    s = b[:, :4].astype(np.int32)
    exponent, mantissa = (s >> 3) & 15, s & 7
    significand = np.where(s == 0x7F, 0, mantissa + np.where(exponent > 0, 8, 0))
    scale = np.ldexp(significand.astype(np.float32), np.maximum(exponent, 1) - 7 - 3 - 1)
    q = planes(b[:, 4:].reshape(-1, 4, 8), 2, 4).reshape(-1, 4, 16)
    return per_run(scale) * _E2M1_TWICE[q]


BLOCKS = (
    block_codec("q4_0", 32, 18, _q4_0),
    block_codec("q4_1", 32, 20, _q4_1),
    block_codec("q5_0", 32, 22, _q5_0),
    block_codec("q5_1", 32, 24, _q5_1),
    block_codec("q8_0", 32, 34, _q8_0),
    block_codec("mxfp4", 32, 17, _mxfp4),
    block_codec("nvfp4", 64, 36, _nvfp4),
)
