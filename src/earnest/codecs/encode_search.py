"""Scales that lose least: the search behind the encoders of block formats.

Rounding to nearest is optimal once a scale is given; what makes one encoder better than another is
the scale. Taking it from the largest weight is fast, and 10 to 30% worse in mean squared error than
need be. Here a few scales near that one are tried; each gives integers, and for given integers the
best scale is a least-squares fit in closed form. Which few: out of several hundred, those that
together come closest to trying all, chosen greedily on normal, Laplace and Student weights (1%
above all). A last round or two of fit and rounding (Lloyd's iteration) goes down to the nearest
optimum.

What is minimised is the squared error where each weight's counts in proportion to its magnitude
plus the root mean square of its run. Clipping a large weight saves plain squared error and costs
the model more than it saves: with these counts SmolLM2's next-token distributions at q4_0 lie 10%
closer to those of the original (Kullback-Leibler), for 2% more plain squared error.

Shapes: S runs that share one scale, W weights of a run, N blocks. Blocks are the last axis so that
every step is one long vector operation; sums run over W. Runs are scaled to a peak (or range) of
one first, so that neither very large nor very small weights leave the range of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from earnest.codecs.base import Float32

_HALF_MAX = np.float32(65504)


def half(x: Float32) -> Float32:
    """`x` rounded to half floats, the largest ones instead of infinity, as float32."""
    return np.clip(x, -_HALF_MAX, _HALF_MAX).astype(np.float16).astype(np.float32)


def half_up(x: Float32) -> Float32:
    """As `half`, but never towards zero: what is divided by it does not grow. That matters where
    half floats are subnormal and their steps are large."""
    rounded = np.clip(x, -_HALF_MAX, _HALF_MAX).astype(np.float16)
    short = np.abs(rounded.astype(np.float32)) < np.minimum(np.abs(x), _HALF_MAX)
    away = np.nextafter(rounded, np.copysign(np.float16(np.inf), x).astype(np.float16))
    return np.where(short, away, rounded).astype(np.float32)


def over_weights(x_SN: Float32) -> Float32:
    """`[S, N]` to `[S, 1, N]`: one number for all weights of a run."""
    return np.expand_dims(x_SN, 1)


def dot(a_SWN: Float32, b_SWN: Float32) -> Float32:
    """Sums over the weights of each run, `[S, N]`."""
    return np.asarray(np.einsum("swn,swn->sn", a_SWN, b_SWN), np.float32)


def importance(x_SWN: Float32) -> Float32:
    """How much the error of each weight counts; see the module."""
    size_SWN = np.abs(x_SWN)
    size_SWN += over_weights(np.sqrt(dot(x_SWN, x_SWN) / np.float32(x_SWN.shape[1])))
    return size_SWN


def ratio(a: Float32, b: Float32) -> Float32:
    """`a / b`, and 0 where `b` is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def levels(
    x_SWN: Float32, scale_SN: Float32, low: int, high: int, out: Float32 | None = None
) -> Float32:
    """The whole numbers from `low` to `high` whose multiples of the scale are nearest to `x`."""
    out = np.empty_like(x_SWN) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        # A subnormal scale has an infinite inverse; such weights are divided instead.
        inverse_SN = ratio(np.ones_like(scale_SN), scale_SN)
        if np.isinf(inverse_SN).any():
            np.divide(x_SWN, over_weights(np.where(scale_SN == 0, np.inf, scale_SN)), out=out)
        else:
            np.multiply(x_SWN, over_weights(inverse_SN), out=out)
    np.rint(out, out=out)
    return np.clip(out, low, high, out=out)


def fit_scale(
    x_SWN: Float32, low: int, high: int, candidates: Sequence[float], rounds: int
) -> Float32:
    """Scales `d` for `x ~ d q` with whole `low <= q <= high`.

    Args:
        x_SWN: weights.
        low, high: the range of the whole numbers.
        candidates: what the weight of the largest magnitude may become, with its sign: -8 tries
            the scale that makes it exactly -8, -8.5 one that makes it -8 after clipping.
        rounds: of fit and rounding after the search.

    Returns:
        Scales `[S, N]`, 0 for runs of zeros.
    """
    largest_SN, smallest_SN = x_SWN.max(axis=1), x_SWN.min(axis=1)
    peak_SN = np.where(largest_SN >= -smallest_SN, largest_SN, smallest_SN)
    unit_SWN = x_SWN / over_weights(np.where(peak_SN == 0, 1, peak_SN))
    w_SWN = importance(unit_SWN)
    wx_SWN, wq_SWN = w_SWN * unit_SWN, np.empty_like(x_SWN)
    best_SN, scale_SN = np.zeros_like(peak_SN), np.zeros_like(peak_SN)
    q_SWN = np.empty_like(x_SWN)

    def fitted() -> tuple[Float32, Float32]:
        xq_SN = dot(wx_SWN, q_SWN)
        best_SN = ratio(xq_SN, dot(np.multiply(w_SWN, q_SWN, out=wq_SWN), q_SWN))
        # The error is the sum of w x^2 less the second.
        return best_SN, xq_SN * best_SN

    for candidate in candidates:
        np.multiply(unit_SWN, np.float32(candidate), out=q_SWN)
        np.rint(q_SWN, out=q_SWN)
        np.clip(q_SWN, low, high, out=q_SWN)
        fitted_SN, gain_SN = fitted()
        better_SN = gain_SN > best_SN
        np.copyto(best_SN, gain_SN, where=better_SN)
        np.copyto(scale_SN, fitted_SN, where=better_SN)
    for _ in range(rounds):
        levels(unit_SWN, scale_SN, low, high, out=q_SWN)
        scale_SN, _ = fitted()
    return np.asarray(scale_SN * peak_SN, np.float32)


def fit_line(
    x_SWN: Float32,
    high: int,
    candidates: Sequence[tuple[float, float]],
    rounds: int,
    *,
    below_zero: bool,
) -> tuple[Float32, Float32]:
    """Scales `d >= 0` and offsets `m` for `x ~ d q + m` with whole `0 <= q <= high`.

    Args:
        x_SWN: weights.
        high: the largest whole number.
        candidates: how many steps wide the range of a run may be taken to be, and which step its
            lowest weight may be below or above 0; what falls outside is clipped.
        rounds: of fit and rounding after the search.
        below_zero: whether offsets above zero cannot be stored.

    Returns:
        Scales and offsets, each `[S, N]`.
    """
    start_SN, end_SN = x_SWN.min(axis=1), x_SWN.max(axis=1)
    if below_zero:
        np.minimum(start_SN, 0, out=start_SN)
    range_SN = end_SN - start_SN
    unit_SWN = x_SWN - over_weights(start_SN)
    unit_SWN /= over_weights(np.where(range_SN == 0, 1, range_SN))
    w_SWN = importance(x_SWN)
    w_SWN /= over_weights(np.where(range_SN == 0, 1, range_SN))
    wx_SWN, wq_SWN = w_SWN * unit_SWN, np.empty_like(x_SWN)
    count_SN, sum_SN = w_SWN.sum(axis=1), wx_SWN.sum(axis=1)
    best_SN, scale_SN = np.full_like(range_SN, -1), np.zeros_like(range_SN)
    offset_SN = np.zeros_like(range_SN)
    q_SWN = np.empty_like(x_SWN)

    def fitted() -> tuple[Float32, Float32, Float32]:
        q_SN, xq_SN = dot(w_SWN, q_SWN), dot(wx_SWN, q_SWN)
        qq_SN = dot(np.multiply(w_SWN, q_SWN, out=wq_SWN), q_SWN)
        covariance_SN = count_SN * xq_SN - sum_SN * q_SN
        slope_SN = ratio(covariance_SN, count_SN * qq_SN - q_SN * q_SN)
        return slope_SN, ratio(sum_SN - slope_SN * q_SN, count_SN), covariance_SN * slope_SN

    for steps, first in candidates:
        np.multiply(unit_SWN, np.float32(steps), out=q_SWN)
        q_SWN += np.float32(first)
        np.rint(q_SWN, out=q_SWN)
        np.clip(q_SWN, 0, high, out=q_SWN)
        slope_SN, intercept_SN, gain_SN = fitted()
        better_SN = gain_SN > best_SN
        np.copyto(best_SN, gain_SN, where=better_SN)
        np.copyto(scale_SN, slope_SN, where=better_SN)
        np.copyto(offset_SN, intercept_SN, where=better_SN)
    for _ in range(rounds):
        levels(unit_SWN - over_weights(offset_SN), scale_SN, 0, high, out=q_SWN)
        scale_SN, offset_SN, _ = fitted()
    if below_zero:
        # Where the best line starts above zero, the best one from zero takes its place.
        zero_SN = ratio(-start_SN, range_SN)
        above_SN = (offset_SN > zero_SN) & (range_SN > 0)
        np.copyto(offset_SN, zero_SN, where=above_SN)
        np.copyto(scale_SN, (1 - zero_SN) / np.float32(high), where=above_SN)
        shifted_SWN = unit_SWN - over_weights(offset_SN)
        for _ in range(max(1, rounds)):
            levels(shifted_SWN, scale_SN, 0, high, out=q_SWN)
            np.multiply(w_SWN, q_SWN, out=wq_SWN)
            through_SN = ratio(dot(shifted_SWN, wq_SWN), dot(q_SWN, wq_SWN))
            np.copyto(scale_SN, through_SN, where=above_SN)
    return scale_SN * range_SN, offset_SN * range_SN + start_SN


# Of the whole numbers that the weight of the largest magnitude, or the range, may become. The
# ranges of the symmetric formats are one longer below zero, so it goes there.
SCALES_OF_FOUR_BITS = (-9.0, -8.7, -8.4, -8.2, -8.0, -7.8, -7.2, -6.9)
SCALES_OF_FIVE_BITS = (
    *(-16.8, -16.5, -16.3, -16.1, -16.0, -15.8, -15.3),
    *(-15.1, -14.8, -14.3, -14.1, -13.8, -13.1),
)
SCALES_OF_SIX_BITS = (
    *(-32.4, -32.0, -31.8, -31.4, -31.0, -30.6, -30.2, -30.0),
    *(-29.6, -29.0, -28.8, -28.0, -27.0, -26.0, 25.0),
)
SCALES_OF_EIGHT_BITS = (127.4, 127.0, 126.6, *map(float, range(126, 114, -1)))
LINES_OF_FOUR_BITS = (
    *((14.0, 0.75), (14.0, 0.25), (14.25, -0.12), (14.75, 0.12), (14.75, -0.12), (15.25, 0.12)),
    *((15.25, -0.12), (15.25, -0.38), (15.5, 0.25), (15.75, -0.12), (15.75, -0.38), (15.75, -0.62)),
)
LINES_OF_FIVE_BITS = (
    *((27.0, 0.0), (28.0, 3.0), (29.0, 2.0), (29.5, 0.25), (29.5, -0.25), (30.0, 1.0)),
    *((30.5, 0.25), (30.5, -0.25), (31.0, 0.0), (31.5, 0.25), (31.5, -0.25), (31.5, -0.75)),
)
