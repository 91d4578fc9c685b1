"""Encoders of GGUF's block formats: float32 weights to the bytes that `decode` reads.

Each block's squared error is minimised by the search of `encode_search`. A block depends on nothing
but its own weights, so rows may be encoded in any portions and on any number of threads (numpy lets
go of the interpreter lock) with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Codec, Float32, Raw
from earnest.codecs.encode_blocks import BLOCK_FITS
from earnest.codecs.encode_kquants import KQUANT_FITS
from earnest.errors import FormatError

# Weights encoded at a time: few enough that the arrays of a search stay in the caches, and enough
# that a call of numpy outlasts the hand-over of the interpreter lock to another thread.
_CHUNK_WEIGHTS = 2**18
_LANES = 16  # float32 numbers in the widest vector register

# Counts up when the same weights give other blocks than before: an interrupted run of another
# generation must not be continued.
GENERATION = 1

Columns = npt.NDArray[np.uint8]
Fit = Callable[[Float32], Columns]

_FITS = {**BLOCK_FITS, **KQUANT_FITS}


def with_encoder(codec: Codec) -> Codec:
    """A block codec with its encoder, if Earnest has one for it."""
    found = _FITS.get(codec.name)
    if found is None:
        return codec
    fit, largest = found

    def encode(x: Float32) -> Raw:
        return _encode(x, codec, fit, largest)

    return replace(codec, encode=encode)


def _encode(x: Float32, codec: Codec, fit: Fit, largest: float) -> Raw:
    """Encode float32 `[..., n]`, where n is a multiple of the block length.

    Raises:
        FormatError: a weight is not finite, or too large for the format's half-float scales.
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, codec.block_weights)
    out = np.empty((len(blocks), codec.block_bytes), np.uint8)
    step = max(1, _CHUNK_WEIGHTS // codec.block_weights)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        _check(part, codec.name, largest)
        # numpy may add up in another order, or with other rounding, at the end of a row that fills
        # no vector register, or when a row is a single number.
        columns = np.zeros((codec.block_weights, -(-len(part) // _LANES) * _LANES), np.float32)
        columns[:, : len(part)] = part.T
        out[start : start + step] = fit(columns)[:, : len(part)].T
    return out.reshape(*x.shape[:-1], codec.row_bytes(x.shape[-1]))


def _check(part: Float32, name: str, largest: float) -> None:
    peak = float(max(part.max(), -part.min()))
    if peak <= largest:  # not so for NaN
        return
    finite = bool(np.isfinite(part).all())
    raise FormatError(
        f"weights {'beyond the range of' if finite else 'that are not finite have no place in'} "
        f"{name} blocks",
        got=f"{peak:.6g}" if finite else f"{int((~np.isfinite(part)).sum()):,} NaN or infinite",
        expected=f"at most {largest:.6g}",
        remedy="the checkpoint may be damaged (see earnest verify); if not, store them as bf16",
    )
