"""GGUF's "iq" formats: groups of 4 or 8 weights are rows of a fixed grid, signs stored apart.

Each spec maps `uint8 [N, block bytes]` to float32 `[N, ...]` (see `bits.block_codec`); the comment
over it gives the layout in bytes. `d` is a half float.

The grids are data, found by their authors by search; they are read from the `gguf` package on
first use, which keeps `import earnest` quick and two thousand lines of numbers out of here.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes, Integers, block_codec, fields, half, per_run, planes

# Sixteen levels, denser around zero as trained weights are; the one table of both 4-bit formats.
_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


@cache
def _grid(kind: str) -> Float32:
    """The grid of a format as float32 `[entries, 4 or 8]`."""
    from gguf import quants

    owner = getattr(quants, kind)
    owner.init_grid()
    return np.asarray(owner.grid, np.float32).reshape(owner.grid_shape)


def _rows(kind: str, index: Integers) -> Float32:
    """Rows of a grid: `[..., n]` to float32 `[..., n, 4 or 8]`."""
    return np.take(_grid(kind), index, axis=0)


def _signs(bits: Integers) -> Float32:
    """`uint8 [..., n]` to -1 where a bit is set and 1 where not, `[..., n, 8]`, lowest first."""
    return 1 - 2 * fields(bits, 8, 1).astype(np.float32)


def _even(seven: Integers) -> Integers:
    """Seven sign bits as a byte whose eighth bit makes the number of set bits even."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return (seven | (parity & 1) << 7).astype(np.uint8)


# w[4], a little-endian word: four 7-bit sign patterns, then a 4-bit scale. For eight words per
# block: the signs [N, 8, 4, 8] and the scales as float32 [N, 8].
def _signs_and_scales(words: Integers) -> tuple[Float32, Float32]:
    return _signs(_even(fields(words, 4, 7))), (words >> 28).astype(np.float32)


# s[n]: a byte holds the 4-bit scales of two runs, [N, 2n].
def _nibble_scales(b: Bytes) -> Float32:
    return fields(b, 2, 4).reshape(len(b), -1).astype(np.float32)


# d[2], then 8 times: i[4] w[4]; i are rows of the grid of 8. w = d (1/2 + s)/4 * sign * grid
def _iq2_xxs(b: Bytes) -> Float32:
    words = b[:, 2:].view("<u4").reshape(-1, 8, 2)
    signs, scale = _signs_and_scales(words[:, :, 1])
    grid = _rows("IQ2_XXS", fields(words[:, :, 0], 4, 8))
    db = half(b[:, :2]) * (scale + np.float32(0.5)) * np.float32(0.25)
    return per_run(per_run(db)) * grid * signs


# d[2] i[32][2] s[8]; i is a word of 9 bits for a row of the grid of 8 and 7 sign bits; 16 runs of
# 16 weights. w = d (1/2 + s)/4 * sign * grid
def _iq2_xs(b: Bytes) -> Float32:
    words: Integers = b[:, 2:66].view("<u2").reshape(-1, 16, 2)
    db = half(b[:, :2]) * (_nibble_scales(b[:, 66:]) + np.float32(0.5)) * np.float32(0.25)
    grid = _rows("IQ2_XS", words & np.uint16(511))
    return per_run(per_run(db)) * grid * _signs(_even(words >> 9))


# d[2] i[32] signs[32] h[8] s[8]; a row of the grid of 8 has 8 bits in i and 2 above them in h; 16
# runs of 16 weights. w = d (1/2 + s)/4 * sign * grid
def _iq2_s(b: Bytes) -> Float32:
    high = fields(b[:, 66:74], 4, 2).reshape(-1, 32).astype(np.uint16)
    grid = _rows("IQ2_S", b[:, 2:34] | high << 8).reshape(-1, 16, 16)
    signs = _signs(b[:, 34:66]).reshape(-1, 16, 16)
    db = half(b[:, :2]) * (_nibble_scales(b[:, 74:]) + np.float32(0.5)) * np.float32(0.25)
    return per_run(db) * grid * signs


# d[2] i[64] w[8][4]; i are rows of the grid of 4, w as in iq2_xxs. w = d (1/2 + s)/2 * sign * grid
def _iq3_xxs(b: Bytes) -> Float32:
    signs, scale = _signs_and_scales(b[:, 66:].view("<u4"))
    grid = _rows("IQ3_XXS", b[:, 2:66]).reshape(-1, 8, 32)
    db = half(b[:, :2]) * (scale + np.float32(0.5)) * np.float32(0.5)
    return per_run(db) * grid * signs.reshape(-1, 8, 32)


# d[2] i[64] h[8] signs[32] s[4]; a row of the grid of 4 has 8 bits in i and a ninth in h; 8 runs
# of 32 weights. w = d (1 + 2s) * sign * grid
def _iq3_s(b: Bytes) -> Float32:
    high = fields(b[:, 66:74], 8, 1).reshape(-1, 64).astype(np.uint16)
    grid = _rows("IQ3_S", b[:, 2:66] | high << 8).reshape(-1, 8, 32)
    db = half(b[:, :2]) * (1 + 2 * _nibble_scales(b[:, 106:]))
    signs = _signs(b[:, 74:106]).reshape(-1, 8, 32)
    return per_run(db) * grid * signs


# d[2] i[32] h[8][2]; h is a word: four times 3 upper bits of a row of the grid of 8, a 3-bit scale
# and the sign of the shift. w = d (2s + 1)(grid +- 1/8)
def _iq1_s(b: Bytes) -> Float32:
    word = b[:, 34:].view("<u2")
    row = b[:, 2:34] | fields(word, 4, 3).reshape(-1, 32) << 8
    scale = half(b[:, :2]) * (2 * (word >> 12 & 7) + 1).astype(np.float32)
    shift = np.where(word >> 15, np.float32(-0.125), np.float32(0.125))
    grid = _rows("IQ1_S", row).reshape(-1, 8, 32)
    return per_run(scale) * (grid + per_run(shift))


# i[32] h[16] s[4][2]; a nibble of h: 3 upper bits of a row of the grid of 8 and the sign of the
# shift; a word of s: four 3-bit scales under one nibble of d, the lowest first. 16 runs of 16
# weights. w = d (2s + 1)(grid +- 1/8)
def _iq1_m(b: Bytes) -> Float32:
    word = b[:, 48:].view("<u2")
    nibbles = word >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    d = np.bitwise_or.reduce(nibbles, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scale = d * (2 * fields(word, 4, 3).reshape(-1, 16) + 1).astype(np.float32)
    nibble = fields(b[:, 32:48], 2, 4).reshape(-1, 32)
    grid = _rows("IQ1_M", b[:, :32] | (nibble & 7).astype(np.uint16) << 8).reshape(-1, 16, 2, 8)
    shift = np.where(nibble >> 3, np.float32(-0.125), np.float32(0.125)).reshape(-1, 16, 2, 1)
    return per_run(per_run(scale)) * (grid + shift)


# d[2] q[16]; low nibbles are weights 0-15, high ones 16-31. w = d level(q)
def _iq4_nl(b: Bytes) -> Float32:
    return half(b[:, :2]) * _LEVELS[planes(b[:, 2:], 2, 4).reshape(-1, 32)]


# d[2] h[2] s[4] q[128]; 8 runs of 32 weights, nibbles as in iq4_nl; a 6-bit scale has four bits in
# a nibble of s and two in h. w = d (s - 32) level(q)
def _iq4_xs(b: Bytes) -> Float32:
    high = fields(b[:, 2:4].view("<u2"), 8, 2).reshape(-1, 8)
    s = (fields(b[:, 4:8], 2, 4).reshape(-1, 8) | high << 4).astype(np.float32) - 32
    scale = half(b[:, :2]) * s
    q = planes(b[:, 8:].reshape(-1, 8, 16), 2, 4).reshape(-1, 8, 32)
    return per_run(scale) * _LEVELS[q]


IQUANTS = (
    block_codec("iq1_s", 256, 50, _iq1_s),
    block_codec("iq1_m", 256, 56, _iq1_m),
    block_codec("iq2_xxs", 256, 66, _iq2_xxs),
    block_codec("iq2_xs", 256, 74, _iq2_xs),
    block_codec("iq2_s", 256, 82, _iq2_s),
    block_codec("iq3_xxs", 256, 98, _iq3_xxs),
    block_codec("iq3_s", 256, 110, _iq3_s),
    block_codec("iq4_nl", 32, 18, _iq4_nl),
    block_codec("iq4_xs", 256, 136, _iq4_xs),
)
