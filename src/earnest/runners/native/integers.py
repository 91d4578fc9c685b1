"""A block codec's weights as the kernels see them: exact integers, float32 scales and minima.

`w = scale * q + minimum`, each float32 number made by one rounding, in the order of
`native/kernels/panel_codecs.inl`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Codec, Float32, Raw
from earnest.codecs.panel import panel_parts

Int64 = npt.NDArray[np.int64]
_OFFSETS = {"q4_0": 8, "q5_0": 16, "q6_k": 32}


def scaled_integers(raw: Raw, codec: Codec) -> tuple[Int64, Float32, Float32 | None]:
    """Take a matrix apart.

    Args:
        raw: `uint8 [N, row bytes]`.
        codec: a block codec with a panel layout.

    Returns:
        `q [N, B, 32]` with the offset taken off, scales float32 `[N, B, parts]` (parts is 2 for
        q6_k, else 1), minima float32 `[N, B]` or None, for B blocks of 32 columns.
    """
    rows = len(raw)
    heads, q = panel_parts(codec.name, raw.view(np.uint8).reshape(-1, codec.block_bytes))
    halves = [h[..., 0, :].copy().view("<f2").astype(np.float32) for h in heads if h.shape[-1] == 2]
    if codec.name == "q8_0":
        integers = q.view(np.int8).astype(np.int64)
    else:
        integers = q.astype(np.int64) - _OFFSETS.get(codec.name, 0)
    minima: Float32 | None = None
    if codec.name == "q6_k":
        scales = halves[0] * heads[1][..., 0].view(np.int8).astype(np.float32)
    elif codec.name in ("q4_k", "q5_k"):
        low, high = heads[2][..., 0], np.concatenate([heads[3][..., 0], heads[3][..., 0] >> 4], -1)
        scales = halves[0] * (low & 15 | (high & 3) << 4).astype(np.float32)
        minima = -halves[1] * (low >> 4 | (high >> 2 & 3) << 4).astype(np.float32)
    else:
        scales = halves[0]
        minima = halves[1] if len(halves) == 2 else None
    return (
        integers.reshape(rows, -1, 32),
        scales.reshape(rows, integers.size // rows // 32, -1),
        None if minima is None else minima.reshape(rows, -1),
    )
