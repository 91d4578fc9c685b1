"""Attention over paged keys and values: the layout, spelled out in numpy, and long sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from earnest.config import ErnieConfig
from earnest.runners.native import isa
from earnest.runners.reference import ReferenceRunner
from earnest.runners.reference import model as reference_model

pytestmark = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")

if isa.installed():
    from earnest.runners.native.runner import KvType, NativeRunner

KV_TYPES = get_args(KvType) if isa.installed() else []
TIERS = isa.available_tiers() if isa.installed() else []

CONFIG = ErnieConfig(
    vocab_size=120,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
)


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bf16, as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def integers(x: np.ndarray, kv: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers of a type, int8 or int16, and the scale of each row."""
    most = np.float32(np.iinfo(kv).max)
    amax = np.abs(x).max(-1, keepdims=True)
    inverse = most / np.where(amax > 0, amax, 1).astype(np.float32)
    return np.rint(x * inverse).astype(kv), (amax / most).astype(np.float32)


def laid_out_integers(keys: np.ndarray, values: np.ndarray, page: int, kv: str) -> np.ndarray:
    """As `laid_out`: 16 positions begin with their scales. In 8 bits keys follow as
    [C / 4][16][4], values as [4][C][4], where 4 positions are neighbours; in 16 bits both are 2."""
    L, K, P, C = keys.shape
    together = 4 if kv == "int8" else 2
    parts = []
    for x, multiple in ((keys, together), (values, 32)):
        q, scale = integers(x, kv)
        q = np.pad(q, ((0, 0), (0, 0), (0, 0), (0, -C % multiple)))
        if multiple == together:
            q = q.reshape(L, K, P // 16, 16, -1, together).swapaxes(3, 4)
        else:
            q = q.reshape(L, K, P // 16, 16 // together, together, -1).swapaxes(4, 5)
        q = np.ascontiguousarray(q.reshape(L, K, P // 16, -1)).view(np.uint8)
        scale = scale.reshape(L, K, P // 16, 16).view(np.uint8)
        part = np.concatenate([scale, q], axis=-1)
        parts.append(part.reshape(L, K, P // page, -1).swapaxes(1, 2))
    return np.concatenate(parts, axis=-1).reshape(-1)


def laid_out(keys: np.ndarray, values: np.ndarray, page: int, kv: str) -> np.ndarray:
    """`[layers, K, positions, C]` of consecutive blocks as the kernels keep them, in bytes:
    `[layer][block][head][keys | values]`. Keys: 16 positions interleaved, as rows of a panel of the
    plain codec. Values: a row per position, padded to 32 channels; in bf16 rows channels i and
    16 + i of every 32 are neighbours."""
    L, K, P, C = keys.shape
    if kv.startswith("int"):
        return laid_out_integers(keys, values, page, kv)
    together = 1
    if kv == "bf16":
        keys, values, together = bf16(keys), bf16(values), 2
    elif kv == "f16":
        keys, values = keys.astype(np.float16), values.astype(np.float16)
    k = keys.reshape(L, K, P // page, page // 16, 16, C // together, together)
    k = k.transpose(0, 2, 1, 3, 5, 4, 6).reshape(L, P // page, K, -1)
    v = np.zeros((L, K, P, -(-C // 32) * 32), values.dtype)
    v[..., :C] = values
    if kv == "bf16":
        v = v.reshape(L, K, P, -1, 2, 16).swapaxes(-1, -2)
    v = v.reshape(L, K, P // page, -1).swapaxes(1, 2)
    stored = np.concatenate([k, v], axis=-1)
    return np.ascontiguousarray(stored).view(np.uint8).reshape(-1)


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_layout(kv: str, block_size: int, checkpoint_of, weights_of, batch_of) -> None:
    """What a step stores is what the reference keeps, in the documented places."""
    checkpoint = checkpoint_of(CONFIG, weights_of(CONFIG))
    count = 96 // block_size
    batch = batch_of((range(96), 0, range(count)))
    reference = ReferenceRunner(checkpoint, num_blocks=count, block_size=block_size)
    reference.step(batch)
    runner = NativeRunner(checkpoint, num_blocks=count, block_size=block_size, kv=kv)
    runner.step(batch)
    expected = laid_out(reference.cache.keys, reference.cache.values, block_size, kv)
    if kv == "f32":
        ours, theirs = runner.cache.view(np.float32), expected.view(np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    elif kv.startswith("int"):
        panels, channels = block_size // 16, CONFIG.head_dim
        size = np.dtype(kv).itemsize
        shapes = [(panels, 64 + 16 * c * size) for c in (channels, channels + -channels % 32)]
        ends = np.cumsum([0, *(rows * size for rows, size in shapes)])
        heads = [
            a.reshape(-1, ends[-1])[: len(a) // ends[-1] // 2] for a in (runner.cache, expected)
        ]
        for at, shape in zip(ends, shapes, strict=False):  # of the first layer: keys, then values
            ours, theirs = (
                np.ascontiguousarray(h[:, at : at + np.prod(shape)]).reshape(-1, shape[1])
                for h in heads
            )
            scales = [np.ascontiguousarray(a[:, :64]).view(np.float32) for a in (ours, theirs)]
            np.testing.assert_allclose(*scales, rtol=1e-5)
            ours, theirs = (np.ascontiguousarray(a[:, 64:]).view(kv) for a in (ours, theirs))
            off = np.abs(ours - theirs.astype(int))
            # A tie, seldom; in 16 bits also what differs of the floats.
            assert off.max() <= 1 and off.mean() < (1e-3 if kv == "int8" else 0.1)
    else:
        both = runner.cache, expected
        if kv == "f16":
            ours, theirs = (a.view(np.float16).astype(np.float32) for a in both)
        else:
            wide = [a.view(np.uint16).astype(np.uint32) << 16 for a in both]
            ours, theirs = (a.view(np.float32) for a in wide)
        # The second layer has seen the first one's rounded keys and values.
        half = len(ours) // 2
        place = 2**-10 if kv == "f16" else 2**-7
        np.testing.assert_allclose(ours[:half], theirs[:half], rtol=place, atol=1e-5)


def filled(config: ErnieConfig, checkpoint, length: int, block_size: int, **options: object):
    """A reference and a native runner whose caches hold the same random past."""
    rng = np.random.default_rng(length)
    count = -(-length // block_size)
    shape = (
        config.num_hidden_layers,
        config.num_key_value_heads,
        count * block_size,
        config.head_dim,
    )
    keys, values = (
        (bf16(rng.standard_normal(shape, np.float32)).astype(np.uint32) << 16).view(np.float32)
        for _ in range(2)
    )
    reference = ReferenceRunner(checkpoint, num_blocks=count, block_size=block_size)
    reference.cache.keys[:], reference.cache.values[:] = keys, values
    runner = NativeRunner(checkpoint, num_blocks=count, block_size=block_size, **options)
    stored = laid_out(keys, values, block_size, runner.kv)
    runner.cache[:] = stored
    return reference, runner, stored


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (3, 1), (8, 1), (10, 2), (20, 1)])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_heads_and_channels(
    tier: str, heads: tuple[int, int], head_dim: int, checkpoint_of, weights_of, batch_of
) -> None:
    config = replace(
        CONFIG, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim
    )
    checkpoint = checkpoint_of(config, weights_of(config))
    reference, runner, _ = filled(config, checkpoint, 1216, 32, kv="f32", tier=tier, threads=2)
    # Across a segment's end, and within the first block.
    for start in (1000, 1190, 0):
        batch = batch_of((range(26), start, range(38)))
        want = reference.step(batch)
        np.testing.assert_allclose(runner.step(batch), want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_long_past_gives_the_same_bits_however_it_is_divided(
    kv: str, checkpoint_of, weights_of, batch_of
) -> None:
    """Few queries have their past divided among threads, many do not, one thread never does."""
    checkpoint = checkpoint_of(CONFIG, weights_of(CONFIG))
    length = 5 * 1024 + 200
    tokens, start = list(range(40)), length - 40
    results = []
    for threads, chunk in ((1, 40), (1, 1), (2, 1), (2, 3), (2, 4), (3, 17), (2, 40)):
        _, runner, _ = filled(CONFIG, checkpoint, length, 32, kv=kv, threads=threads)
        table = range(runner.num_blocks)
        rows = [
            runner.step(batch_of((tokens[i : i + chunk], start + i, table)))
            for i in range(0, 40, chunk)
        ]
        results.append(np.concatenate(rows))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("kv", KV_TYPES)
def test_the_last_of_131072_positions(kv: str, checkpoint_of, weights_of, batch_of) -> None:
    config = replace(CONFIG, num_attention_heads=4, head_dim=8, max_position_embeddings=131_072)
    checkpoint = checkpoint_of(config, weights_of(config))
    reference, runner, _ = filled(config, checkpoint, 131_072, 32, kv=kv, threads=2)
    batch = batch_of((range(24), 131_072 - 24, range(4096)))
    want = reference.step(batch)
    got = runner.step(batch)
    budget = {"f32": 2e-5, "int16": 5e-4, "f16": 3e-3, "bf16": 2e-2, "int8": 5e-2}[kv]
    np.testing.assert_allclose(got, want, rtol=0, atol=budget * np.abs(want).max())
    one_by_one = [runner.step(batch_of(([i], 131_072 - 24 + i, range(4096)))) for i in range(24)]
    np.testing.assert_array_equal(np.concatenate(one_by_one), got)


def test_what_half_floats_cannot_hold(checkpoint_of, weights_of, batch_of) -> None:
    """Finite numbers stay finite; NaN stays NaN and only where it belongs."""
    arrays = weights_of(CONFIG)
    arrays["model.layers.0.self_attn.v_proj.weight"] *= np.float32(1e7)
    arrays["model.embed_tokens.weight"][7] = np.nan
    runner = NativeRunner(checkpoint_of(CONFIG, arrays), num_blocks=1, kv="f16")
    logits = runner.step(batch_of(([1, 2, 3, 7, 4], 0, [0])))
    stored = np.abs(runner.cache.view(np.float16))
    assert np.nanmax(stored) == 65504
    others = np.arange(CONFIG.vocab_size) != 7  # the head is tied to the embedding
    assert np.isfinite(logits[:3, others]).all()
    assert np.isnan(logits[3:]).all()


def to_shorts(x: np.ndarray) -> np.ndarray:
    """Numbers as the 16-bit integers and the scale that 16 neighbours share say them: the least
    scale for which none is beyond 32767 and their sizes add up to 2^16 at most."""
    wide = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 16)])
    by_16 = wide.reshape(*x.shape[:-1], -1, 16)
    sizes = np.abs(by_16)
    scale = np.maximum(sizes.max(-1) / np.float32(32767), sizes.sum(-1) / np.float32(65528))
    scale = scale[..., None]
    whole = np.rint(by_16 / np.where(scale > 0, scale, 1)).astype(np.int64)
    assert (np.abs(whole).sum(-1) <= 2**16).all() and np.abs(whole).max() <= 32767
    return (whole * scale).reshape(wide.shape)[..., : x.shape[-1]]


def attend_shorts(q_THC: np.ndarray, k_KPC: np.ndarray, v_KPC: np.ndarray) -> np.ndarray:
    """What native/kernels/attention_shorts.inl computes, in place of the reference's `attend`.
    Keys and values are rounded already."""
    (T, H, C), (K, P, _) = q_THC.shape, k_KPC.shape
    q_KGTC = to_shorts(q_THC * np.float32(C**-0.5)).reshape(T, K, -1, C).transpose(1, 2, 0, 3)
    scores_KGTP = q_KGTC @ k_KPC[:, None].swapaxes(-1, -2).astype(np.float64)
    future_TP = np.arange(P) > np.arange(P - T, P)[:, None]
    scores_KGTP[..., future_TP] = -np.inf
    p_KGTP = np.exp(scores_KGTP - scores_KGTP.max(-1, keepdims=True))
    v_KPC, scale_KP1 = integers(v_KPC, "int16")
    weights_KGTP = to_shorts((p_KGTP * scale_KP1[:, None, None, :, 0]).astype(np.float32))
    out_KGTC = weights_KGTP @ v_KPC[:, None].astype(np.float64) / p_KGTP.sum(-1, keepdims=True)
    return out_KGTC.transpose(2, 0, 1, 3).reshape(T, H, C).astype(np.float32)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (10, 2), (7, 7)])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("kv", ["int8", "int16"])
def test_integers_are_as_good_as_their_values(
    kv: str, tier: str, heads: tuple[int, int], head_dim: int, checkpoint_of, weights_of, batch_of,
    monkeypatch,
) -> None:  # fmt: skip
    """Against the reference whose cache rounds keys and values in the same way. Those of 16 bits
    meet queries and weights that are rounded in the same way, too; what is left in 8 bits are the
    15 bits of these."""
    config = replace(
        CONFIG, num_hidden_layers=1,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
    )  # fmt: skip
    checkpoint = checkpoint_of(config, weights_of(config))
    reference, runner, _ = filled(config, checkpoint, 1216, 32, kv=kv, tier=tier)
    cache = reference.cache

    def rounded(x: np.ndarray) -> np.ndarray:
        q, scale = integers(x, kv)
        return q * scale

    cache.keys[:], cache.values[:] = rounded(cache.keys), rounded(cache.values)
    store = type(cache).store
    monkeypatch.setattr(
        type(cache),
        "store",
        lambda self, layer, slots, k, v: store(self, layer, slots, rounded(k), rounded(v)),
    )
    if kv == "int16":
        monkeypatch.setattr(reference_model, "attend", attend_shorts)
    for start in (1000, 1190, 0):
        batch = batch_of((range(26), start, range(38)))
        want = reference.step(batch)
        error = np.abs(runner.step(batch) - want) / np.abs(want).max()
        # Numbers that lie between two integers may become the other one.
        few, worst = (2e-4, 1e-2) if kv == "int8" else (3e-5, 5e-4)
        assert np.quantile(error, 0.95) < few and error.max() < worst
