"""Encoders of the block formats of 32 weights; the layouts are those that `blocks` decodes.

Each maps weights float32 `[32, N]` (blocks side by side) to bytes `[block bytes, N]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes
from earnest.codecs.encode_search import (
    LINES_OF_FIVE_BITS,
    LINES_OF_FOUR_BITS,
    SCALES_OF_EIGHT_BITS,
    SCALES_OF_FIVE_BITS,
    SCALES_OF_FOUR_BITS,
    fit_line,
    fit_scale,
    half,
    levels,
    over_weights,
)

_HALF_MAX = 65504.0


def join_planes(q: Bytes, width: int) -> Bytes:
    """`[..., count, n, N]` to `[..., n, N]`: the inverse of `bits.planes`, blocks side by side."""
    out = q[..., 0, :, :].copy()
    for index in range(1, q.shape[-3]):
        out |= q[..., index, :, :] << np.uint8(index * width)
    return out


def half_bytes(x_N: Float32) -> Bytes:
    """`[N]` to the two bytes of each half float, `[2, N]`."""
    return x_N.astype("<f2").view(np.uint8).reshape(-1, 2).T


def _nibbles(q: Bytes) -> Bytes:
    return join_planes(q.reshape(2, 16, -1), 4)


def _fifth_bits(q: Bytes) -> Bytes:
    return join_planes((q >> np.uint8(4)).reshape(4, 8, 1, -1), 1).reshape(4, -1)


def _scaled(
    x_WN: Float32, low: int, high: int, candidates: Sequence[float], rounds: int
) -> tuple[Bytes, Float32]:
    """The bytes of the scales, and the whole numbers `[32, N]`."""
    x_SWN = x_WN[None]
    d_SN = half(fit_scale(x_SWN, low, high, candidates, rounds))
    return half_bytes(d_SN[0]), levels(x_SWN, d_SN, low, high)[0]


def _lined(
    x_WN: Float32, high: int, candidates: Sequence[tuple[float, float]]
) -> tuple[Bytes, Bytes]:
    """The bytes of scales and offsets, and the whole numbers `[32, N]`."""
    x_SWN = x_WN[None]
    d_SN, m_SN = fit_line(x_SWN, high, candidates, 2, below_zero=False)
    # The offset makes up for what the rounding of the scale has moved.
    d_SN = half(d_SN)
    q_SWN = levels(x_SWN - over_weights(m_SN), d_SN, 0, high)
    m_SN = half((x_SWN - q_SWN * over_weights(d_SN)).mean(axis=1))
    levels(x_SWN - over_weights(m_SN), d_SN, 0, high, out=q_SWN)
    head = np.concatenate([half_bytes(d_SN[0]), half_bytes(m_SN[0])])
    return head, q_SWN[0].astype(np.uint8)


def _q4_0(x_WN: Float32) -> Bytes:
    d, q_WN = _scaled(x_WN, -8, 7, SCALES_OF_FOUR_BITS, 2)
    return np.concatenate([d, _nibbles((q_WN + 8).astype(np.uint8))])


def _q5_0(x_WN: Float32) -> Bytes:
    d, q_WN = _scaled(x_WN, -16, 15, SCALES_OF_FIVE_BITS, 2)
    q = (q_WN + 16).astype(np.uint8)
    return np.concatenate([d, _fifth_bits(q), _nibbles(q & np.uint8(15))])


def _q4_1(x_WN: Float32) -> Bytes:
    head, q = _lined(x_WN, 15, LINES_OF_FOUR_BITS)
    return np.concatenate([head, _nibbles(q)])


def _q5_1(x_WN: Float32) -> Bytes:
    head, q = _lined(x_WN, 31, LINES_OF_FIVE_BITS)
    return np.concatenate([head, _fifth_bits(q), _nibbles(q & np.uint8(15))])


# -128 is left out by convention: kernels may negate a weight within its byte.
def _q8_0(x_WN: Float32) -> Bytes:
    d, q_WN = _scaled(x_WN, -127, 127, SCALES_OF_EIGHT_BITS, 1)
    return np.concatenate([d, q_WN.astype(np.int8).view(np.uint8)])


# Name to the fit and the largest weight whose scale is a half float.
BLOCK_FITS = {
    "q4_0": (_q4_0, 7 * _HALF_MAX),
    "q4_1": (_q4_1, _HALF_MAX),
    "q5_0": (_q5_0, 15 * _HALF_MAX),
    "q5_1": (_q5_1, _HALF_MAX),
    "q8_0": (_q8_0, 127 * _HALF_MAX),
}
