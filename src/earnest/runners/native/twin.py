"""The kernels' numpy twin: the same integers and the same order of float32 operations.

Every tier must give these very bits (with AMX: after rounding the activations of bf16 weights to
bf16; with AVX512-BF16 and 8-bit activations bf16 weights have an order of their own). Slow, short,
and read side by side with `native/kernels/matmul.inl` and `bf16_pairs.inl`.

Letters: T tokens, N output rows, K columns, B = K / 32 blocks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Codec, Float32, Raw
from earnest.codecs.panel import PANEL_COLUMNS
from earnest.runners.native.integers import scaled_integers

Int64 = npt.NDArray[np.int64]
_TINY = np.float32(2.0**-100)
_NORMAL = np.float32(2.0**-126)  # the smallest normal float32
_ROUNDED_AWAY = 2.0**-126 - 2.0**-151  # what is below rounds, to 24 bits, to less than that


def quantize(x_TK: Float32, planes: int) -> tuple[Int64, Float32]:
    """Activations to integers, 32 sharing a scale: `x ~ scale * v`.

    Args:
        x_TK: float32 `[T, K]`, K a multiple of 32.
        planes: 1 for |v| <= 127, 2 for |v| <= 16256.

    Returns:
        `v [T, B, 32]` and the scales, float32 `[T, B]`; NaN for a block that is not finite.
    """
    limit = np.float32(127 if planes == 1 else 16256)
    x_TBb = x_TK.reshape(len(x_TK), -1, 32)
    amax = np.abs(x_TBb).max(-1)
    good = np.isfinite(amax) & (amax >= _TINY)
    safe = np.where(good, amax, np.float32(1))
    inverse = limit / safe
    v = np.rint(np.where(good[..., None], x_TBb, 0) * inverse[..., None]).astype(np.int64)
    scale = np.where(good, safe / limit, np.float32(0))
    return v, np.where(np.isfinite(amax), scale, np.float32(np.nan)).astype(np.float32)


def _sum_of_product(a: Float32, b: Float32, c: Float32) -> npt.NDArray[np.float64]:
    """`a * b + c`, rounded to odd in float64: the last bit is set if anything was lost."""
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
        total = p + q
        back = total - p
        lost = (p - (total - back)) + (q - back)
        bits = total.view(np.int64)
        away = (lost > 0) == (total > 0)
        odd = np.where(away, bits | 1, np.where(bits & 1, bits, bits - 1))
        fixed = np.where((lost != 0) & np.isfinite(total) & (bits & 1 == 0), odd, bits)
        return fixed.view(np.float64)


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """`a * b + c` in float32 with one rounding.

    The product is exact in float64, and the sum rounded there to odd, which keeps the second
    rounding, to float32, from seeing a false tie.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    with np.errstate(over="ignore"):
        return _sum_of_product(a, b, c).astype(np.float32)


def fma_without_denormals(a: Float32, b: Float32, c: Float32) -> Float32:
    """As `fma`, as `vdpbf16ps` does it: a result that stays below 2^-126 after rounding to 24 bits,
    with room for any exponent, is zero. None of the operands is denormal."""
    exact = _sum_of_product(a, b, c)
    with np.errstate(over="ignore"):
        return np.where(np.abs(exact) < _ROUNDED_AWAY, np.copysign(0, exact), exact).astype(
            np.float32
        )


def matmul_blocks(raw: Raw, codec: Codec, x_TK: Float32, planes: int) -> Float32:
    """`x W^T` for a block codec: float32 `[T, N]`.

    Args:
        raw: `uint8 [N, row bytes]`, as the codec stores it (not panels).
        codec: q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k or q6_k.
        x_TK: float32 `[T, K]`.
        planes: see `quantize`.
    """
    v_TBb, scale_TB = quantize(x_TK, planes)
    q_NBb, scale_NBp, minimum_NB = scaled_integers(raw, codec)
    parts = scale_NBp.shape[-1]
    acc = np.zeros((len(x_TK), len(raw)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(v_TBb.shape[1]):
            for p in range(parts):
                k = slice(p * 32 // parts, (p + 1) * 32 // parts)
                exact = v_TBb[:, b, k] @ q_NBb[:, b, k].T
                scale = scale_NBp[None, :, b, p] * scale_TB[:, None, b]
                acc = fma(exact.astype(np.float32), scale, acc)
            if minimum_NB is not None:
                total = scale_TB[:, b] * v_TBb[:, b].sum(-1).astype(np.float32)
                acc = fma(minimum_NB[None, :, b], total[:, None], acc)
    return acc


def matmul_plain(weights_NK: Float32, x_TK: Float32) -> Float32:
    """`x W^T` for a plain codec, from decoded weights: in a block of 32 columns even and odd ones
    are summed apart, in order, with fma; then both are added, and their sum to the result.

    Returns:
        float32 `[T, N]`.
    """
    pad = -x_TK.shape[1] % PANEL_COLUMNS
    x_TK, w_NK = (np.pad(a, ((0, 0), (0, pad))) for a in (x_TK, weights_NK))
    acc = np.zeros((len(x_TK), len(w_NK)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, x_TK.shape[1], 32):
            halves = np.zeros((2, *acc.shape), np.float32)
            for k in range(32):
                at = start + k
                halves[k % 2] = fma(w_NK[None, :, at], x_TK[:, None, at], halves[k % 2])
            acc = acc + (halves[0] + halves[1])
    return acc


def rounded_to_bf16(x: Float32) -> Float32:
    """To 8 significant bits, ties to even, still float32; denormals become zero."""
    bits = np.where(np.abs(x) < _NORMAL, np.copysign(0, x), x).astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.astype(np.uint32).view(np.float32))


def matmul_pairs(weights_NK: Float32, x_TK: Float32) -> Float32:
    """`x W^T` for bf16 weights, decoded, and activations rounded to bf16: pairs of columns in
    order, of each the odd one first (`native/kernels/bf16_pairs.inl`).

    Returns:
        float32 `[T, N]`.
    """
    pad = -x_TK.shape[1] % 2
    x_TK, w_NK = (np.pad(a, ((0, 0), (0, pad))) for a in (x_TK, weights_NK))
    x_TK = rounded_to_bf16(x_TK)
    w_NK = np.where(np.abs(w_NK) < _NORMAL, np.copysign(0, w_NK), w_NK)
    acc = np.zeros((len(x_TK), len(w_NK)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for even in range(0, x_TK.shape[1], 2):
            for k in (even + 1, even):
                acc = fma_without_denormals(w_NK[None, :, k], x_TK[:, None, k], acc)
    return acc
