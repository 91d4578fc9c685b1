"""Encoders of block formats: read back by another decoder, never worse than rounding to nearest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest import codecs
from earnest.codecs import Codec
from earnest.errors import FormatError

Array = npt.NDArray[np.float32]

SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
K = ("q4_k", "q5_k", "q6_k")
ENCODED = (*SIMPLE, *K)
# Root mean square of the error over that of normal weights; a little above what was measured.
BUDGET = {
    "q8_0": 0.00475,
    "q4_0": 0.0818,
    "q4_1": 0.0696,
    "q5_0": 0.0404,
    "q5_1": 0.0337,
    "q4_k": 0.0706,
    "q5_k": 0.0354,
    "q6_k": 0.0167,
}


def encoded(codec: Codec, x: Array) -> npt.NDArray[np.generic]:
    assert codec.encode is not None
    return codec.encode(x)


def coded(name: str, x: Array) -> Array:
    """What is left of `x`, decoded by the `gguf` package."""
    raw = encoded(codecs.codec(name), x)
    return quants.dequantize(raw, GGMLQuantizationType[name.upper()])


def error(x: Array, y: Array) -> float:
    return float(np.sqrt(np.mean((x.astype(np.float64) - y) ** 2)))


def rounded(name: str, x: Array) -> Array:
    """Rounding to nearest with scales from the extremes of each run, nothing searched."""
    if name in SIMPLE:
        kind = GGMLQuantizationType[name.upper()]
        return quants.dequantize(quants.quantize(x, kind), kind)
    rows = x.reshape(-1, 256)
    if name == "q6_k":
        runs = rows.reshape(-1, 16, 16)
        scale = np.abs(runs).max(-1) / 32
        d = (scale.max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
        step = (d * np.rint(scale / np.where(d == 0, 1, d)))[..., None]
        q = np.clip(np.rint(runs / np.where(step == 0, 1, step)), -32, 31)
        return (step * q).reshape(x.shape)
    top = 15 if name == "q4_k" else 31
    runs = rows.reshape(-1, 8, 32)
    low = np.minimum(runs.min(-1), 0)
    scale = (runs.max(-1) - low) / top

    def six_bits(v: Array) -> Array:
        d = (v.max(-1, keepdims=True) / 63).astype(np.float16).astype(np.float32)
        return (d * np.rint(v / np.where(d == 0, 1, d)))[..., None]

    step, below = six_bits(scale), six_bits(-low)
    q = np.clip(np.rint((runs + below) / np.where(step == 0, 1, step)), 0, top)
    return (step * q - below).reshape(x.shape)


def normal(rows: int = 64, columns: int = 1024, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


@pytest.mark.parametrize("name", ENCODED)
def test_error_of_normal_weights(name: str) -> None:
    x = normal(256)
    assert error(x, coded(name, x)) / error(x, np.zeros_like(x)) < BUDGET[name]


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "shifted", "positive", "rows differ"])
def test_no_worse_than_plain_rounding(name: str, kind: str) -> None:
    rng = np.random.default_rng(7)
    x = normal(seed=7)
    x = {
        "normal": x,
        "heavy tails": rng.standard_t(3, x.shape).astype(np.float32),
        "shifted": x + 2,
        "positive": np.abs(x) + 1,
        "rows differ": x * np.exp(3 * normal(64, 1, seed=8)),
    }[kind] * np.float32(0.02)
    assert error(x, coded(name, x)) <= error(x, rounded(name, x))


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0"])
def test_close_to_the_best_scale_there_is(name: str) -> None:
    """Against a thousand scales per block, each with its nearest whole numbers, by the error that
    counts large weights more."""
    low, high = {"q4_0": (-8, 7), "q5_0": (-16, 15), "q8_0": (-127, 127)}[name]
    x = normal(8, 512, seed=3).reshape(-1, 32)
    peak = x[np.arange(len(x)), np.abs(x).argmax(1)][:, None]
    counts = np.abs(x) + np.sqrt((x * x).mean(1, keepdims=True))
    best = np.full(len(x), np.inf)
    for k in (*np.linspace(0.7 * low, 1.4 * low, 500), *np.linspace(0.7 * high, 1.4 * high, 500)):
        d = (peak / np.float32(k)).astype(np.float16).astype(np.float32)
        q = np.clip(np.rint(x / d), low, high)
        best = np.minimum(best, (counts * (x - d * q) ** 2).sum(1))
    ours = (counts * (x - coded(name, x)) ** 2).sum()
    assert ours <= best.sum() * {"q4_0": 1.02, "q5_0": 1.02, "q8_0": 1.05}[name]


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_stay_zeros(name: str, value: float) -> None:
    assert (coded(name, np.full((2, 512), value, np.float32)) == 0).all()


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [1.0, -1.0, 3.7, -0.001, 0.02, 60_000.0, -60_000.0])
def test_constant_blocks(name: str, value: float) -> None:
    x = np.full((2, 512), value, np.float32)
    assert np.abs(coded(name, x) / x - 1).max() < 0.005


@pytest.mark.parametrize("name", ENCODED)
def test_one_weight_among_zeros(name: str) -> None:
    x = np.zeros((4, 256), np.float32)
    x[np.arange(4), [0, 31, 100, 255]] = [5, -5, 1e-3, -2e4]
    y = coded(name, x)
    assert (np.abs(y - x) <= 0.005 * np.abs(x).max(1, keepdims=True)).all()
    if name in ("q4_0", "q5_0", "q6_k", "q8_0"):  # the others have no exact zero beside an offset
        assert np.array_equal(y != 0, x != 0)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-39, 1e-12, 1e-8, 1e-7, 1e-6])
def test_tiny_weights_do_no_harm(name: str, scale: float) -> None:
    """Below what half floats can scale, zero is the nearest; never anything larger."""
    x = (normal() * scale).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        y = coded(name, x)
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= 2 * np.abs(x).max() + 6e-8
    assert error(x, y) <= error(x, np.zeros_like(x)) * 1.01


@pytest.mark.parametrize("name", ENCODED)
def test_weights_up_to_the_limit(name: str) -> None:
    x = normal()
    x *= np.float32(60_000) / np.abs(x).max()
    assert error(x, coded(name, x)) / error(x, np.zeros_like(x)) < BUDGET[name] * 1.05


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_what_has_no_place_is_refused(name: str, value: float) -> None:
    x = normal(2, 512)
    x[1, 300] = value
    with pytest.raises(FormatError, match=name) as caught:
        encoded(codecs.codec(name), x)
    wanted = "beyond the range" if np.isfinite(value) else "not finite"
    assert wanted in str(caught.value)


@pytest.mark.parametrize("name", ENCODED)
def test_rows_can_be_encoded_in_any_portions(name: str) -> None:
    x, codec = normal(96, 1536), codecs.codec(name)
    whole = encoded(codec, x)
    assert whole.dtype == np.uint8 and whole.shape == codec.stored_shape(x.shape)
    portions = [encoded(codec, x[start : start + 7]) for start in range(0, 96, 7)]
    assert np.array_equal(np.concatenate(portions), whole)
    assert np.array_equal(encoded(codec, np.asfortranarray(x)), whole)
    assert np.array_equal(encoded(codec, x.reshape(4, 24, 1536)), whole.reshape(4, 24, -1))
    singly = [encoded(codec, x[5:6, k : k + 256]) for k in range(0, 1536, 256)]
    assert np.array_equal(np.concatenate(singly, axis=1), whole[5:6])
    assert encoded(codec, x[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("name", ENCODED)
def test_encoding_again_changes_little(name: str) -> None:
    codec, x = codecs.codec(name), normal()
    once = codec.decode(encoded(codec, x))
    twice = codec.decode(encoded(codec, once))
    assert error(once, twice) <= 0.25 * error(x, once)


@pytest.mark.parametrize("name", SIMPLE)
def test_what_uses_the_whole_range_is_kept_exactly(name: str) -> None:
    low, high, offset = {
        "q4_0": (-8, 7, 0),
        "q4_1": (0, 15, -3),
        "q5_0": (-16, 15, 0),
        "q5_1": (0, 31, 5),
        "q8_0": (-127, 127, 0),
    }[name]
    q = np.random.default_rng(1).integers(low, high + 1, (64, 32)).astype(np.float32)
    q[:, 3], q[:, 17] = low, high
    x = q * np.float32(0.375) + np.float32(offset)
    assert np.array_equal(coded(name, x), x)


blocks = st.builds(
    lambda seed, exponents, power: (
        np.random.default_rng(seed)
        .standard_normal((len(exponents), 256))
        .__mul__(2.0 ** np.array(exponents)[:, None])
        .__pow__(power)
        .astype(np.float32)
    ),
    st.integers(0, 2**32),
    st.lists(st.integers(-4, 3), min_size=1, max_size=4),
    st.sampled_from([1, 3]),
)


@pytest.mark.parametrize("name", ENCODED)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=blocks)
def test_any_blocks(name: str, x: Array) -> None:
    y = coded(name, x)
    for block, back in zip(x, y, strict=True):
        # Plain rounding may win in a single block by luck, but not by much.
        plain = error(block, rounded(name, block[None])[0])
        assert error(block, back) <= plain * 1.1 + 1e-7 * np.abs(block).max()
    large = np.abs(x).max(1) > 4  # so that no half float is subnormal: a power of two is exact
    if large.any():
        assert np.array_equal(coded(name, x[large] / 4), y[large] / 4)


def test_types_without_an_encoder_say_so() -> None:
    writable = {n for n, c in codecs.CODECS.items() if c.encode and not c.is_plain}
    assert writable == set(ENCODED)
