"""Every block format against the `gguf` package's own decoder, bit for bit.

Bit for bit, not within a tolerance: both follow ggml's order of operations, each operation is one
IEEE rounding, and none of them is a sum whose order could differ. Only a NaN's payload is free.
"""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest import codecs
from earnest.codecs import Codec

# fmt: off
NAMES = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
]
# fmt: on

# Where a block keeps its half floats; none: mxfp4 and nvfp4 have byte scales, iq1_m scatters one.
HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "tq1_0": [52],
    "tq2_0": [64],
    "mxfp4": [],
    "nvfp4": [],
    "iq1_m": [],
}


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> GGMLQuantizationType:
    found = getattr(GGMLQuantizationType, request.param, None)
    if found is None:
        pytest.skip(f"this version of the gguf package has no {request.param}")
    return found


def reference(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, kind)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    numbers = ~np.isnan(ours)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


def random_bytes(codec: Codec, *lead: int, blocks: int, seed: int = 0) -> np.ndarray:
    shape = (*lead, blocks * codec.block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_layout_and_name(kind: GGMLQuantizationType) -> None:
    codec = codecs.from_ggml(kind)
    assert codec.name == kind.name.lower()
    assert (codec.block_weights, codec.block_bytes) == GGML_QUANT_SIZES[kind]
    assert not codec.is_plain
    assert codec.stored_shape((3, 512)) == (3, 512 // codec.block_weights * codec.block_bytes)


def test_random_bytes(kind: GGMLQuantizationType) -> None:
    """Random bytes: wild scales, infinities and NaNs included. 2 x 3 x 8,192 weights."""
    codec = codecs.from_ggml(kind)
    raw = random_bytes(codec, 2, 3, blocks=8192 // codec.block_weights)
    ours = codec.decode(raw)
    assert ours.shape == (2, 3, 8192)
    assert_same_bits(ours, reference(raw, kind))


def test_realistic_scales(kind: GGMLQuantizationType) -> None:
    """Scales as trained weights have them: every result is finite, so every bit is compared."""
    codec = codecs.from_ggml(kind)
    blocks = random_bytes(codec, 4096, blocks=1, seed=1)
    rng = np.random.default_rng(2)
    for at in HALVES.get(codec.name, [0]):
        scale = rng.normal(0, 0.02, (len(blocks), 1)).astype("<f2")
        blocks[:, at : at + 2] = scale.view(np.uint8)
    if codec.name == "mxfp4":
        blocks[:, 0] = rng.integers(110, 130, len(blocks))
    if codec.name == "iq1_m":
        blocks[:, 55] &= 0xBF  # keeps the exponent of the scattered half float below infinity
    ours = codec.decode(blocks)
    assert np.isfinite(ours).all()
    assert np.unique(ours).size > 50
    assert_same_bits(ours, reference(blocks, kind))


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF, 0x55])
def test_constant_bytes(kind: GGMLQuantizationType, byte: int) -> None:
    codec = codecs.from_ggml(kind)
    raw = np.full((1, codec.block_bytes), byte, np.uint8)
    assert_same_bits(codec.decode(raw), reference(raw, kind))


def test_each_byte_of_a_block_matters(kind: GGMLQuantizationType) -> None:
    """One byte at a time takes all 256 values: no bit is ignored or read from elsewhere."""
    codec = codecs.from_ggml(kind)
    base = random_bytes(codec, blocks=1, seed=3)
    raw = np.broadcast_to(base, (codec.block_bytes, 256, codec.block_bytes)).copy()
    for at in range(codec.block_bytes):
        raw[at, :, at] = np.arange(256)
    assert_same_bits(codec.decode(raw), reference(raw, kind))


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_block(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in NAMES if hasattr(GGMLQuantizationType, n)]))
    kind = GGMLQuantizationType[name]
    codec = codecs.from_ggml(kind)
    block = data.draw(st.binary(min_size=codec.block_bytes, max_size=codec.block_bytes))
    raw = np.frombuffer(block, np.uint8).reshape(1, -1)
    assert_same_bits(codec.decode(raw), reference(raw, kind))


def test_rows_decode_alone_as_in_the_whole(kind: GGMLQuantizationType) -> None:
    """Slices, index arrays, strides, odd addresses, read-only memory: the same weights.

    400 rows of 1,024 weights span several of the chunks that a decoder works in.
    """
    codec = codecs.from_ggml(kind)
    raw = random_bytes(codec, 400, blocks=1024 // codec.block_weights, seed=4)
    whole = codec.decode(raw)
    assert_same_bits(whole, reference(raw, kind))
    for rows in (slice(7, 91), slice(0, 0), slice(None, None, -3), np.array([399, 0, 5, 5])):
        assert_same_bits(codec.decode(raw[rows]), whole[rows])
    assert_same_bits(codec.decode(raw[11]), whole[11])
    odd = np.frombuffer(b"x" + raw.tobytes(), np.uint8)[1:].reshape(raw.shape)
    assert not odd.flags.writeable
    assert_same_bits(codec.decode(odd), whole)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_quantised_weights_come_back(name: str) -> None:
    """What another program quantised decodes to about what it was given."""
    kind = GGMLQuantizationType[name]
    weights = np.random.default_rng(5).normal(0, 0.02, (16, 1024)).astype(np.float32)
    if name.startswith("TQ"):
        weights = np.sign(weights) * np.float32(0.5)
    ours = codecs.from_ggml(kind).decode(quants.quantize(weights, kind))
    steps = {"Q4": 7, "Q5": 15, "Q8": 127}.get(name[:2])
    bound = 1e-6 if steps is None else np.abs(weights).max() / steps * 1.1
    assert np.abs(ours - weights).max() <= bound


def test_a_block_by_hand() -> None:
    """q4_0: scale 0.5, low nibbles 0..15 for weights 0-15, high nibbles all 8 (zero) after them."""
    block = np.array([0x00, 0x38, *(0x80 | i for i in range(16))], np.uint8)
    weights = codecs.codec("q4_0").decode(block[None])[0]
    assert weights.tolist() == [(i - 8) / 2 for i in range(16)] + [0.0] * 16
