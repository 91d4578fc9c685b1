"""GGUF's "k" formats, whose blocks of 256 weights hold small scales of their own; the ternary ones.

Each spec maps `uint8 [N, block bytes]` to float32 `[N, ...]` (see `bits.block_codec`); the comment
over it gives the layout in bytes. `d` and `m` are half floats.
"""

from __future__ import annotations

import numpy as np

from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes, block_codec, half, per_run, planes


# s[16] q[64] d[2] m[2]; 16 runs of 16 weights; s holds a 4-bit scale and, above it, a 4-bit
# minimum; 2-bit weights lie in four planes over each 32 bytes of q. w = d s q - m min
def _q2_k(b: Bytes) -> Float32:
    scale, minimum = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    q = planes(b[:, 16:80].reshape(-1, 2, 32), 4, 2).reshape(-1, 16, 16).astype(np.float32)
    scale, minimum = half(b[:, 80:82]) * scale, half(b[:, 82:84]) * minimum
    return per_run(scale) * q - per_run(minimum)


# h[32] q[64] s[12] d[2]; 16 runs of 16 weights; two bits of a weight in q as in q2_k, the third in
# the eight planes over h. Scales have 6 bits: four in the two planes over s[0:8], two in the four
# planes over s[8:12]. w = d (s - 32)(q - 4)
def _q3_k(b: Bytes) -> Float32:
    low = planes(b[:, 32:96].reshape(-1, 2, 32), 4, 2).reshape(-1, 16, 16)
    high = planes(b[:, :32], 8, 1).reshape(-1, 16, 16)
    q = (low | high << 2).astype(np.float32) - 4
    s_low = planes(b[:, 96:104], 2, 4).reshape(-1, 16)
    s_high = planes(b[:, 104:108], 4, 2).reshape(-1, 16)
    scale = half(b[:, 108:110]) * ((s_low | s_high << 4).astype(np.float32) - 32)
    return per_run(scale) * q


# d[2] m[2] a[4] b[4] c[4]: eight 6-bit scales and minima. Scales 0-3 are the lower six bits of a,
# minima 0-3 those of b. Scales 4-7 are the low nibbles of c under the two upper bits of a, minima
# 4-7 its high nibbles under those of b. Returns d * scale and m * minimum, both [N, 8, 1].
def _scales_and_minima(head: Bytes) -> tuple[Float32, Float32]:
    a, b, c = head[:, 4:8], head[:, 8:12], head[:, 12:16]
    scale = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1).astype(np.float32)
    minimum = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1).astype(np.float32)
    d, m = half(head[:, :2]), half(head[:, 2:4])
    return per_run(d * scale), per_run(m * minimum)


# head[16] q[128]; 8 runs of 32 weights, the two planes over each 32 bytes of q. w = d s q - m min
def _q4_k(b: Bytes) -> Float32:
    scale, minimum = _scales_and_minima(b[:, :16])
    q = planes(b[:, 16:].reshape(-1, 4, 32), 2, 4).reshape(-1, 8, 32).astype(np.float32)
    return scale * q - minimum


# head[16] h[32] q[128]; as q4_k, with the fifth bit of the weights in the eight planes over h.
def _q5_k(b: Bytes) -> Float32:
    scale, minimum = _scales_and_minima(b[:, :16])
    low = planes(b[:, 48:].reshape(-1, 4, 32), 2, 4).reshape(-1, 8, 32)
    q = (low | planes(b[:, 16:48], 8, 1) << 4).astype(np.float32)
    return scale * q - minimum


# q[128] h[64] s[16] d[2]; 16 runs of 16 weights; four bits of a weight in the two planes over each
# 64 bytes of q, two in the four planes over each 32 bytes of h; s are signed. w = d s (q - 32)
def _q6_k(b: Bytes) -> Float32:
    low = planes(b[:, :128].reshape(-1, 2, 64), 2, 4).reshape(-1, 16, 16)
    high = planes(b[:, 128:192].reshape(-1, 2, 32), 4, 2).reshape(-1, 16, 16)
    q = (low | high << 4).astype(np.float32) - 32
    scale = half(b[:, 208:210]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return per_run(scale) * q


# Ternary digits of bytes, `[N, n]` to `[N, count * n]`: the byte is a fraction in units of 1/256
# whose base-3 digits are the weights, most significant first, one plane of digits after another.
def _trits(b: Bytes, count: int) -> Bytes:
    powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
    rest = b[:, None, :] * powers  # modulo 256: what is left below the digits already taken
    return (rest.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(b), -1)


# q[32] q'[16] h[4] d[2]; five trits per byte of q and q', four per byte of h. w = d (trit - 1)
def _tq1_0(b: Bytes) -> Float32:
    parts = [_trits(b[:, :32], 5), _trits(b[:, 32:48], 5), _trits(b[:, 48:52], 4)]
    return half(b[:, 52:54]) * (np.concatenate(parts, axis=1).astype(np.float32) - 1)


# q[64] d[2]; 2-bit weights as in q2_k. w = d (q - 1)
def _tq2_0(b: Bytes) -> Float32:
    q = planes(b[:, :64].reshape(-1, 2, 32), 4, 2).reshape(-1, 256)
    return half(b[:, 64:66]) * (q.astype(np.float32) - 1)


KQUANTS = (
    block_codec("q2_k", 256, 84, _q2_k),
    block_codec("q3_k", 256, 110, _q3_k),
    block_codec("q4_k", 256, 144, _q4_k),
    block_codec("q5_k", 256, 176, _q5_k),
    block_codec("q6_k", 256, 210, _q6_k),
    block_codec("tq1_0", 256, 54, _tq1_0),
    block_codec("tq2_0", 256, 66, _tq2_0),
)
