"""Encoders of GGUF's "k" formats; the layouts are those that `kquants` decodes.

Each maps weights float32 `[256, N]` (blocks side by side) to bytes `[block bytes, N]`. A run's
scale is itself a small whole number times a half float of the block, so the search of a run's best
scale is followed by fits under that constraint: run by run with the block's numbers held, then the
block's numbers with the runs' held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes
from earnest.codecs.encode_blocks import half_bytes, join_planes
from earnest.codecs.encode_search import (
    LINES_OF_FIVE_BITS,
    LINES_OF_FOUR_BITS,
    SCALES_OF_SIX_BITS,
    dot,
    fit_line,
    fit_scale,
    half,
    half_up,
    importance,
    levels,
    over_weights,
    ratio,
)

_HALF_MAX = 65504.0
_ROUNDS = 2


def _whole(x_SN: Float32, low: int, high: int) -> Float32:
    return np.clip(np.rint(x_SN), low, high)


def _lined_runs(
    x_SWN: Float32, high: int, most: int, candidates: Sequence[tuple[float, float]]
) -> tuple[Float32, Float32, Float32, Float32, Float32]:
    """Fit `x ~ d s q - m t` with whole `0 <= q <= high` and `0 <= s, t <= most`.

    Returns:
        d, m `[N]`; s, t `[S, N]`; q `[S, W, N]`.
    """
    scale_SN, offset_SN = fit_line(x_SWN, high, candidates, 1, below_zero=True)
    below_SN = -offset_SN
    d_N = half_up(scale_SN.max(axis=0) / np.float32(most))
    m_N = half_up(below_SN.max(axis=0) / np.float32(most))
    t_SN = _whole(ratio(below_SN, np.broadcast_to(m_N, below_SN.shape)), 0, most)
    w_SWN = importance(x_SWN)
    wx_SN, w_SN = dot(w_SWN, x_SWN), w_SWN.sum(axis=1)
    q_SWN, wq_SWN = np.empty_like(x_SWN), np.empty_like(x_SWN)
    for _ in range(_ROUNDS):
        lifted_SWN = x_SWN + over_weights(m_N * t_SN)
        levels(lifted_SWN, scale_SN, 0, high, out=q_SWN)
        np.multiply(w_SWN, q_SWN, out=wq_SWN)
        scale_SN = ratio(dot(lifted_SWN, wq_SWN), dot(q_SWN, wq_SWN))
        s_SN = _whole(ratio(scale_SN, np.broadcast_to(d_N, scale_SN.shape)), 0, most)
        levels(lifted_SWN, d_N * s_SN, 0, high, out=q_SWN)
        np.multiply(w_SWN, q_SWN, out=wq_SWN)
        wq_SN = wq_SWN.sum(axis=1)
        d_new, m_new = _two_scales(
            dot(q_SWN, wq_SWN), wq_SN, w_SN, dot(x_SWN, wq_SWN), wx_SN, s_SN, t_SN
        )
        # With q and s held, the offset of a run is a mean.
        below_SN = ratio((d_new * s_SN) * wq_SN - wx_SN, w_SN)
        fits_N = _in_range(scale_SN, d_new, 0, most) & _in_range(below_SN, m_new, -most, most)
        d_N, m_N = np.where(fits_N, d_new, d_N), np.where(fits_N, m_new, m_N)
        t_SN = _whole(ratio(below_SN, np.broadcast_to(m_N, below_SN.shape)), 0, most)
        scale_SN = d_N * s_SN
    levels(x_SWN + over_weights(m_N * t_SN), d_N * s_SN, 0, high, out=q_SWN)
    return d_N, m_N, s_SN, t_SN, q_SWN


def _two_scales(
    qq_SN: Float32,
    q_SN: Float32,
    w_SN: Float32,
    xq_SN: Float32,
    x_SN: Float32,
    s_SN: Float32,
    t_SN: Float32,
) -> tuple[Float32, Float32]:
    """The best d and m of a block for given whole numbers: two linear equations.

    Args:
        qq_SN, q_SN, w_SN, xq_SN, x_SN: sums over a run of w q^2, w q, w, w x q and w x.
        s_SN, t_SN: the runs' scales and minima.
    """
    aa_N = (s_SN * s_SN * qq_SN).sum(axis=0)
    ab_N = (s_SN * t_SN * q_SN).sum(axis=0)
    bb_N = (t_SN * t_SN * w_SN).sum(axis=0)
    ax_N, bx_N = (s_SN * xq_SN).sum(axis=0), (t_SN * x_SN).sum(axis=0)
    det_N = aa_N * bb_N - ab_N * ab_N
    det_N[det_N < np.float32(1e-4) * aa_N * bb_N] = 0  # too close to parallel
    d_N, m_N = ratio(ax_N * bb_N - ab_N * bx_N, det_N), ratio(ab_N * ax_N - aa_N * bx_N, det_N)
    return half(d_N), half(m_N)


def _in_range(x_SN: Float32, d_N: Float32, least: int, most: int) -> npt.NDArray[np.bool_]:
    """Whether a block's `d` is usable: not 0, and no run needs a whole number beyond the range by
    more than rounding."""
    needed_SN = ratio(x_SN, np.broadcast_to(d_N, x_SN.shape))
    inside_SN = (needed_SN > least - 0.5) & (needed_SN < most + 0.5)
    return np.asarray((d_N != 0) & inside_SN.all(axis=0))


def _scaled_runs(
    x_SWN: Float32, low: int, high: int, least: int, most: int, candidates: Sequence[float]
) -> tuple[Float32, Float32, Float32]:
    """Fit `x ~ d s q` with whole `low <= q <= high` and `least <= s <= most`.

    Returns:
        d `[N]`, s `[S, N]`, q `[S, W, N]`.
    """
    scale_SN = fit_scale(x_SWN, low, high, candidates, 1)
    highest_N, lowest_N = scale_SN.max(axis=0), scale_SN.min(axis=0)
    # The scale of the largest magnitude takes the longer side of the range.
    peak_N = np.where(highest_N > -lowest_N, highest_N, lowest_N)
    d_N = half_up(peak_N / np.float32(least))
    w_SWN = importance(x_SWN)
    q_SWN, wq_SWN = np.empty_like(x_SWN), np.empty_like(x_SWN)
    for _ in range(_ROUNDS):
        s_SN = _whole(ratio(scale_SN, np.broadcast_to(d_N, scale_SN.shape)), least, most)
        levels(x_SWN, d_N * s_SN, low, high, out=q_SWN)
        np.multiply(w_SWN, q_SWN, out=wq_SWN)
        xq_SN, qq_SN = dot(x_SWN, wq_SWN), dot(q_SWN, wq_SWN)
        d_new = half(ratio((s_SN * xq_SN).sum(axis=0), (s_SN * s_SN * qq_SN).sum(axis=0)))
        scale_SN = ratio(xq_SN, qq_SN)
        d_N = np.where(_in_range(scale_SN, d_new, least, most), d_new, d_N)
    s_SN = _whole(ratio(scale_SN, np.broadcast_to(d_N, scale_SN.shape)), least, most)
    return d_N, s_SN, levels(x_SWN, d_N * s_SN, low, high, out=q_SWN)


def _head(d_N: Float32, m_N: Float32, s_SN: Float32, t_SN: Float32) -> Bytes:
    """d[2] m[2] and the eight 6-bit scales and minima, `[16, N]`."""
    s, t = s_SN.astype(np.uint8), t_SN.astype(np.uint8)
    a = s[:4] | s[4:] >> np.uint8(4) << np.uint8(6)
    b = t[:4] | t[4:] >> np.uint8(4) << np.uint8(6)
    c = s[4:] & np.uint8(15) | t[4:] << np.uint8(4)
    return np.concatenate([half_bytes(d_N), half_bytes(m_N), a, b, c])


def _q4_k(x_WN: Float32) -> Bytes:
    d_N, m_N, s_SN, t_SN, q_SWN = _lined_runs(_runs(x_WN, 8), 15, 63, LINES_OF_FOUR_BITS)
    q = join_planes(q_SWN.astype(np.uint8).reshape(4, 2, 32, -1), 4)
    return np.concatenate([_head(d_N, m_N, s_SN, t_SN), q.reshape(128, -1)])


def _q5_k(x_WN: Float32) -> Bytes:
    d_N, m_N, s_SN, t_SN, q_SWN = _lined_runs(_runs(x_WN, 8), 31, 63, LINES_OF_FIVE_BITS)
    q = q_SWN.astype(np.uint8)
    low = join_planes((q & np.uint8(15)).reshape(4, 2, 32, -1), 4)
    high = join_planes(q >> np.uint8(4), 1)
    return np.concatenate([_head(d_N, m_N, s_SN, t_SN), high, low.reshape(128, -1)])


def _q6_k(x_WN: Float32) -> Bytes:
    d_N, s_SN, q_SWN = _scaled_runs(_runs(x_WN, 16), -32, 31, -128, 127, SCALES_OF_SIX_BITS)
    q = (q_SWN + 32).astype(np.uint8)
    low = join_planes((q & np.uint8(15)).reshape(2, 2, 64, -1), 4)
    high = join_planes((q >> np.uint8(4)).reshape(2, 4, 32, -1), 2)
    s = s_SN.astype(np.int8).view(np.uint8)
    return np.concatenate([low.reshape(128, -1), high.reshape(64, -1), s, half_bytes(d_N)])


def _runs(x_WN: Float32, count: int) -> Float32:
    return x_WN.reshape(count, -1, x_WN.shape[1])


# Name to the fit and the largest weight whose scales can be held.
KQUANT_FITS = {
    "q4_k": (_q4_k, 63 * _HALF_MAX),
    "q5_k": (_q5_k, 63 * _HALF_MAX),
    "q6_k": (_q6_k, 127 * 31 * _HALF_MAX),
}
