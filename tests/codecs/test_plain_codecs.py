"""The plain codecs against torch, over every bit pattern where there are few enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest import codecs
from earnest.errors import FormatError

torch = pytest.importorskip("torch", reason="the codecs are compared with torch")

SIXTEEN = np.arange(2**16).astype("<u2")
EIGHT = np.arange(2**8).astype(np.uint8)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    numbers = ~np.isnan(ours)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


@pytest.mark.parametrize(
    ("name", "patterns", "kind"),
    [
        ("bf16", SIXTEEN, "bfloat16"),
        ("f16", SIXTEEN.view("<f2"), "float16"),
        ("f8_e4m3", EIGHT, "float8_e4m3fn"),
        ("f8_e5m2", EIGHT, "float8_e5m2"),
    ],
)
def test_every_pattern_decodes_as_in_torch(name: str, patterns: np.ndarray, kind: str) -> None:
    codec = codecs.codec(name)
    assert patterns.dtype == codec.storage
    signed = patterns.view(np.int8 if patterns.itemsize == 1 else np.int16)
    theirs = torch.from_numpy(signed.copy()).view(getattr(torch, kind)).float().numpy()
    assert_same(codec.decode(patterns), theirs)


def interesting_floats() -> np.ndarray:
    """Random patterns, and all that lie on, just above and just below a tie of bf16."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 2**19, dtype=np.uint32)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    ties = np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    return np.concatenate([anything, ties.astype(np.uint32)]).view(np.float32)


def test_bf16_rounds_as_torch_does() -> None:
    x = interesting_floats()
    bf16 = codecs.codec("bf16")
    assert bf16.encode is not None
    ours = bf16.encode(x)
    assert ours.dtype == bf16.storage
    theirs = torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    nan = np.isnan(x)
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(bf16.decode(ours[nan])).all()


def test_bf16_patterns_survive_a_round_trip() -> None:
    """All 65,536, payloads of NaNs included: converting there and back changes none of them."""
    bf16 = codecs.codec("bf16")
    assert bf16.encode is not None
    assert np.array_equal(bf16.encode(bf16.decode(SIXTEEN)), SIXTEEN)


def test_f16_rounds_as_torch_does() -> None:
    f16 = codecs.codec("f16")
    assert f16.encode is not None
    small = np.random.default_rng(1).normal(0, 0.02, 2**16).astype(np.float32)
    x = np.concatenate([interesting_floats(), small])
    ours, theirs = f16.encode(x), torch.from_numpy(x.copy()).half().numpy()
    assert ours.dtype == f16.storage
    assert_same(ours.astype(np.float32), theirs.astype(np.float32))


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_f32_and_f64_are_lossless(values: list[float]) -> None:
    x = np.array(values, np.float32)
    for name in ("f32", "f64"):
        codec = codecs.codec(name)
        assert codec.encode is not None
        stored = codec.encode(x)
        assert stored.dtype == codec.storage
        assert np.array_equal(codec.decode(stored), x, equal_nan=True)


def test_f32_is_not_copied() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(codecs.codec("f32").decode(x), x)


@pytest.mark.parametrize("name", ["i8", "i16", "i32", "i64", "u8", "u32", "u64"])
def test_integers_decode_to_their_values(name: str) -> None:
    codec = codecs.codec(name)
    limits = np.iinfo(codec.storage)
    values = np.array([limits.min, 0, 1, 77, limits.max], codec.storage)
    assert np.array_equal(codec.decode(values), values.astype(np.float32))


def test_bool_decodes_to_zero_and_one() -> None:
    assert codecs.codec("bool").decode(np.array([0, 1, 2, 255], np.uint8)).tolist() == [0, 1, 1, 1]


def test_u16_is_listed_but_not_guessed_at() -> None:
    codec = codecs.codec("u16")
    assert codec.row_bytes(10) == 20
    with pytest.raises(FormatError, match="U16"):
        codec.decode(np.zeros(4, np.uint16))


@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2", "i32", "bool"])
def test_shapes_strides_and_emptiness(name: str) -> None:
    codec = codecs.codec(name)
    bits = np.random.default_rng(2).integers(0, 50, (4, 6, 8 * codec.block_bytes)).astype(np.uint8)
    stored = bits.view(codec.storage)
    whole = codec.decode(stored)
    assert whole.shape == (4, 6, 8)
    assert np.array_equal(codec.decode(stored.transpose(2, 0, 1)), whole.transpose(2, 0, 1))
    assert np.array_equal(codec.decode(stored[::2, 1]), whole[::2, 1])
    assert codec.decode(stored[:0]).shape == (0, 6, 8)
    if codec.encode is not None:
        turned = codec.encode(whole.transpose(2, 0, 1))
        assert np.array_equal(codec.decode(turned), whole.transpose(2, 0, 1))
