"""The kernels' numpy twin: the same integers and the same order of float32 operations.

Every tier must give these very bits (with AMX: after rounding the activations of bf16 weights to
bf16). Slow, short, and read side by side with `native/kernels/matmul.inl`.

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


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """`a * b + c` in float32 with one rounding.

    The product is exact in float64. The sum is rounded there to odd (the last bit set if anything
    was lost), which keeps the second rounding, to float32, from seeing a false tie.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
        total = p + q
        back = total - p
        lost = (p - (total - back)) + (q - back)
        bits = total.view(np.int64)
        away = (lost > 0) == (total > 0)
        odd = np.where(away, bits | 1, np.where(bits & 1, bits, bits - 1))
        fixed = np.where((lost != 0) & np.isfinite(total) & (bits & 1 == 0), odd, bits)
        return fixed.view(np.float64).astype(np.float32)


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
