"""Every kernel in every tier that this machine can run gives the numpy twin's bits, whatever the
number of threads, the batch, and the rows it is given together with."""

from __future__ import annotations

import numpy as np
import pytest

from earnest.codecs import CODECS
from earnest.codecs.panel import PANELS, panel
from earnest.errors import UserError
from earnest.runners.native import isa, ops, twin

if not isa.installed():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

TIERS = isa.available_tiers()
BLOCKS = [name for name in PANELS if not CODECS[name].is_plain]
PLAIN = [name for name in PANELS if CODECS[name].is_plain]


def random_weights(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bits, with half floats that are finite and of one size."""
    rng = np.random.default_rng(seed)
    codec = CODECS[name]
    if name in PLAIN:
        assert codec.encode is not None
        return codec.encode(rng.standard_normal((rows, columns)).astype(np.float32))
    raw = rng.integers(0, 256, (rows, columns // codec.block_weights, codec.block_bytes), np.uint8)
    places = {"q6_k": [208], "q8_0": [0], "q4_0": [0], "q5_0": [0]}.get(name, [0, 2])
    for at in places:
        half = rng.uniform(-0.1, 0.1, raw.shape[:2]).astype("<f2")
        raw[..., at : at + 2] = half[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def activations(tokens: int, columns: int, seed: int = 1) -> np.ndarray:
    """Like a model's: mostly small, some channels a hundred times larger, one row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[:, rng.integers(0, columns, 3)] *= 100
    x[tokens // 2, : columns // 2] = 0
    return x


def plain_twin(raw: np.ndarray, x: np.ndarray, name: str, planes: int, tier: str) -> np.ndarray:
    """bf16 weights meet bf16 activations in the tiles, and with 8 bits in the kernel of pairs."""
    weights = CODECS[name].decode(raw)
    if name == "bf16" and tier == "avx512bf16" and planes == 1:
        return twin.matmul_pairs(weights, x)
    if name == "bf16" and tier == "amx":
        x = twin.rounded_to_bf16(x)
    return twin.matmul_plain(weights, x)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("planes", [1, 2])
def test_quantised_activations_equal_the_twin(tier: str, planes: int) -> None:
    x = activations(9, 352)  # 11 blocks: 8 together, 3 alone
    x[0, 5] = np.nan
    x[1, 40] = np.inf
    x[0, 345] = -np.inf
    x[1, 300], x[1, 301] = np.nan, np.inf
    x[2, :32] = 1e-38
    x[3] *= 1e30
    x[4, :32] = np.arange(32) - 15.5  # ties
    values, blocks = ops.quantize(x, planes, tier=tier)
    v, scale = twin.quantize(x, planes)
    both = values.astype(np.int64)
    integers = both[..., 0, :] if planes == 1 else 128 * both[..., 0, :] + both[..., 1, :]
    assert np.array_equal(integers, v)
    assert np.array_equal(blocks["scale"], scale, equal_nan=True)
    assert np.array_equal(blocks["sum"], v.sum(-1))
    assert np.array_equal(blocks["sum_first"], v[..., :16].sum(-1))
    if planes == 2:
        assert np.abs(both[..., 1, :]).max() <= 64


@pytest.mark.parametrize("planes", [1, 2])
def test_quantised_activations_lose_little(planes: int) -> None:
    x = activations(20, 320)
    v, scale = twin.quantize(x, planes)
    error = np.abs(v * scale[..., None] - x.reshape(20, -1, 32))
    assert (error <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 10, 18, 50])
def test_block_codecs_equal_the_twin(tier: str, name: str, planes: int, tokens: int) -> None:
    rows, columns = 53, 768 if CODECS[name].block_weights == 256 else 288
    raw, x = random_weights(name, rows, columns), activations(tokens, columns)
    packed = panel(name).pack(raw, columns)
    out = ops.matmul(packed, name, rows, x, planes=planes, tier=tier)
    assert np.array_equal(out, twin.matmul_blocks(raw, CODECS[name], x, planes))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("name", "planes"), [*((name, 1) for name in PLAIN), ("bf16", 2)])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 96), (2, 70), (5, 96), (19, 64), (33, 64)])
def test_plain_codecs_equal_the_twin(
    tier: str, name: str, planes: int, tokens: int, columns: int
) -> None:
    rows = 37
    raw, x = random_weights(name, rows, columns), activations(tokens, columns)
    packed = panel(name).pack(raw, columns)
    out = ops.matmul(packed, name, rows, x, planes=planes, tier=tier)
    assert np.array_equal(out, plain_twin(raw, x, name, planes, tier))


@pytest.mark.parametrize("tier", TIERS)
def test_bf16_panels_beyond_the_second_cache(tier: str) -> None:
    """Many tokens and long rows: the kernel of pairs takes a few panels at a time."""
    rows, columns = 112, 4096
    raw, x = random_weights("bf16", rows, columns), activations(14, columns)
    packed = panel("bf16").pack(raw, columns)
    some = x[[0, 9, 13]]
    out = ops.matmul(packed, "bf16", rows, x, tier=tier)
    assert np.array_equal(out[[0, 9, 13]], ops.matmul(packed, "bf16", rows, some, tier=tier))
    assert np.array_equal(out[9:10, :5], plain_twin(raw[:5], x[9:10], "bf16", 1, tier))


pairs = pytest.mark.skipif("avx512bf16" not in TIERS, reason="no AVX512-BF16 here")


@pairs
def test_pairs_of_any_bits_equal_the_twin() -> None:
    """Of all sizes, with denormals, infinities and NaN; and sums that are hardly denormal."""
    rng = np.random.default_rng(4)
    rows, columns, tokens = 48, 64, 13
    raw = rng.integers(0, 2**16, (rows, columns)).astype("<u2")
    bits = rng.integers(0, 2**32, (tokens, columns)).astype(np.uint32)
    for denormal in (False, True):
        if denormal:  # products around 2^-129
            raw = (raw & 0x807F) | (rng.integers(20, 27, raw.shape) << 7).astype("<u2")
            bits = (bits & 0x807FFFFF) | (rng.integers(95, 102, bits.shape) << 23).astype(np.uint32)
            bits[:, ::3] &= 0x80FFFFFF
        x = bits.astype(np.uint32).view(np.float32)
        packed = panel("bf16").pack(raw, columns)
        out = ops.matmul(packed, "bf16", rows, x, planes=1, tier="avx512bf16")
        want = twin.matmul_pairs(CODECS["bf16"].decode(raw), x)
        assert np.array_equal(np.isnan(out), np.isnan(want))
        assert np.array_equal(
            out.view(np.uint32)[~np.isnan(out)], want.view(np.uint32)[~np.isnan(want)]
        )
        if denormal:
            assert np.isfinite(out).all() and 0.05 < (out == 0).mean() < 0.95


@pairs
def test_pairs_whose_sum_is_denormal_before_rounding() -> None:
    """2^-126 less a little: the instruction judges after rounding to 24 bits, of any exponent."""
    less = np.array([1, 1.25, 2, 3], np.float32) * np.float32(2.0**-75)
    codec = CODECS["bf16"]
    assert codec.encode is not None
    weights = np.zeros((4, 32), np.float32)
    weights[:, 1], weights[:, 2] = 2.0**-63, less
    raw = codec.encode(weights)
    x = np.zeros((1, 32), np.float32)
    x[0, 1], x[0, 2] = 2.0**-63, -(2.0**-76)
    packed = panel("bf16").pack(raw, 32)
    out = ops.matmul(packed, "bf16", 4, x, planes=1, tier="avx512bf16")
    assert out.tolist() == [[2.0**-126, 0, 0, 0]] == twin.matmul_pairs(weights, x).tolist()


@pairs
@pytest.mark.parametrize("tokens", [1, 3, 7, 20])
def test_without_8_bits_pairs_are_not_used(tokens: int) -> None:
    raw, x = random_weights("bf16", 37, 96), activations(tokens, 96)
    packed = panel("bf16").pack(raw, 96)
    fine, below = (
        ops.matmul(packed, "bf16", 37, x, planes=2, tier=tier)
        for tier in ("avx512bf16", "avx512vnni")
    )
    assert np.array_equal(fine, below)
    assert not np.array_equal(fine, ops.matmul(packed, "bf16", 37, x, tier="avx512bf16"))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", PANELS)
def test_the_twin_computes_the_product(name: str, planes: int) -> None:
    """Within the error of rounding the activations: the twin is not wrong in the same way."""
    rows, columns = 40, 768
    raw, x = random_weights(name, rows, columns), activations(6, columns)
    exact = x.astype(np.float64) @ CODECS[name].decode(raw).astype(np.float64).T
    if name in PLAIN:
        out, budget = twin.matmul_plain(CODECS[name].decode(raw), x), 2e-6
    else:
        out = twin.matmul_blocks(raw, CODECS[name], x, planes)
        budget = 2e-2 if planes == 1 else 2e-4
    error = np.sqrt(((out - exact) ** 2).mean() / (exact**2).mean())
    assert error < budget


def test_the_twin_of_pairs_computes_the_product() -> None:
    raw, x = random_weights("bf16", 40, 768), activations(6, 768)
    weights = CODECS["bf16"].decode(raw)
    rounded = CODECS["bf16"]
    assert rounded.encode is not None
    near = rounded.decode(rounded.encode(x))
    assert np.array_equal(twin.rounded_to_bf16(x), near)
    exact = near.astype(np.float64) @ weights.astype(np.float64).T
    error = np.sqrt(((twin.matmul_pairs(weights, x) - exact) ** 2).mean() / (exact**2).mean())
    assert error < 5e-6


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("name", "planes"), [*((name, 1) for name in PANELS), ("bf16", 2)])
def test_threads_batch_and_chunks_do_not_matter(tier: str, name: str, planes: int) -> None:
    rows, columns, tokens = 203, 512, 23
    raw, x = random_weights(name, rows, columns), activations(tokens, columns)
    packed = panel(name).pack(raw, columns)
    whole = ops.matmul(packed, name, rows, x, planes=planes, tier=tier)
    for workers in range(2, 9):
        pool = ops.thread_pool(workers)
        assert np.array_equal(
            ops.matmul(packed, name, rows, x, planes=planes, tier=tier, pool=pool), whole
        )
    pool = ops.thread_pool(2)
    for size in range(1, 10):
        for start in range(0, tokens, size):
            part = x[start : start + size]
            out = ops.matmul(packed, name, rows, part, planes=planes, tier=tier, pool=pool)
            assert np.array_equal(out, whole[start : start + size])
    select = np.random.default_rng(3).integers(0, tokens, 31).astype(np.int32)
    for some in (select, select[:4], select[:1]):
        out = ops.matmul(packed, name, rows, x, planes=planes, tier=tier, select=some)
        assert np.array_equal(out, whole[some])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q6_k", "q5_k", "bf16"])
def test_extreme_weights_do_not_overflow(tier: str, name: str) -> None:
    """All bits set or clear, with the largest activations: sums inside a block stay exact."""
    rows, columns = 32, 256
    for fill in (0, 127, 128, 255):
        raw = random_weights(name, rows, columns).view(np.uint8)
        keep = random_weights(name, rows, columns).view(np.uint8).copy()
        if name == "bf16":
            continue
        raw[:] = fill
        blocks, kept = (a.reshape(rows, -1, CODECS[name].block_bytes) for a in (raw, keep))
        halves = {"q6_k": slice(208, 210), "q5_k": slice(0, 4)}.get(name, slice(0, 2))
        blocks[..., halves] = kept[..., halves]
        for sign in (1.0, -1.0):
            x = np.full((9, columns), sign, np.float32)
            x[:, 1::2] *= -1 if fill == 127 else 1
            packed = panel(name).pack(raw, columns)
            for planes in (1, 2):
                out = ops.matmul(packed, name, rows, x, planes=planes, tier=tier)
                assert np.array_equal(out, twin.matmul_blocks(raw, CODECS[name], x, planes))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["q4_0", "q6_k", "f32", "bf16"])
def test_a_nan_is_seen_in_its_row_and_in_no_other(tier: str, name: str) -> None:
    raw, x = random_weights(name, 32, 256), activations(9, 256)
    x[4, 100] = np.nan
    out = ops.matmul(panel(name).pack(raw, 256), name, 32, x, tier=tier)
    assert np.isnan(out[4]).all()
    assert np.isfinite(np.delete(out, 4, axis=0)).all()


def test_refusals() -> None:
    packed = panel("q4_0").pack(random_weights("q4_0", 32, 64), 64)
    x = activations(2, 64)
    with pytest.raises(UserError, match="fit"):
        ops.matmul(packed, "q4_0", 64, x)
    with pytest.raises(UserError, match="x is not an array"):
        ops.matmul(packed, "q4_0", 32, x.astype(np.float64))
    with pytest.raises(UserError, match="x is not an array"):
        ops.matmul(packed, "q4_0", 32, np.asfortranarray(x))
    with pytest.raises(UserError, match="selected rows"):
        ops.matmul(packed, "q4_0", 32, x, select=np.array([2], np.int32))
    with pytest.raises(UserError, match="quantised"):
        ops.quantize(x[:, :40].copy(), 1)
    with pytest.raises(UserError, match="threads"):
        ops.thread_pool(0)
