"""How block formats pack small integers, and how a block format becomes a `Codec`.

GGUF's block formats use two arrangements, and a spec is short once they have names. *Fields*: the
bits of one byte (or word) hold neighbouring values. *Planes*: bits `i*width` of a whole run of
bytes hold one run of values, bits `(i+1)*width` the next run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Codec, Float32, Raw

Integers = npt.NDArray[np.integer[Any]]
Bytes = npt.NDArray[np.uint8]

# Weights decoded at a time: the intermediates of a spec then stay in a core's own cache, which
# is several times faster than one pass over a large tensor, and its memory is bounded.
_CHUNK_WEIGHTS = 2**16


def fields(words: Integers, count: int, width: int) -> Integers:
    """`[..., n]` to `[..., n, count]`: the lowest `count` fields of `width` bits of each word."""
    shifts = np.arange(0, count * width, width, dtype=words.dtype)
    return np.asarray((words[..., None] >> shifts) & words.dtype.type(2**width - 1))


def planes(words: Integers, count: int, width: int) -> Integers:
    """`[..., n]` to `[..., count, n]`: field 0 of all words, then field 1 of all words, ..."""
    shifts = np.arange(0, count * width, width, dtype=words.dtype)[:, None]
    return np.asarray((words[..., None, :] >> shifts) & words.dtype.type(2**width - 1))


def half(b: Bytes) -> Float32:
    """`uint8 [..., 2k]` holding `k` little-endian half floats to float32 `[..., k]`."""
    return b.view("<f2").astype(np.float32)


def per_run(scale: Float32) -> Float32:
    """`[N, runs]` to `[N, runs, 1]`: one number for all weights of a run."""
    return np.expand_dims(scale, -1)


def block_codec(
    name: str, block_weights: int, block_bytes: int, spec: Callable[[Bytes], Float32]
) -> Codec:
    """A codec from its spec.

    The spec maps blocks as `uint8 [N, block_bytes]` to their weights in order, float32 `[N, ...]`.
    It keeps the order of floating-point operations of ggml's decoder, so that results agree bit
    for bit with every engine that follows it.
    """
    step = max(1, _CHUNK_WEIGHTS // block_weights)

    def decode(raw: Raw) -> Float32:
        blocks = raw.view(np.uint8).reshape(-1, block_bytes)
        out = np.empty((len(blocks), block_weights), np.float32)
        # A scale of a broken file may be infinite or NaN: the result then says so, silently.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(blocks), step):
                out[start : start + step] = spec(blocks[start : start + step]).reshape(
                    -1, block_weights
                )
        return out.reshape(*raw.shape[:-1], raw.shape[-1] // block_bytes * block_weights)

    return Codec(name, np.dtype(np.uint8), block_weights, block_bytes, decode)
