"""Packing into panels is a permutation of bits: nothing is lost, and every weight lies where
`docs/formats/panel.md` says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest import compiled
from earnest.codecs import CODECS
from earnest.codecs.panel import PANEL_ROWS, PANELS, panel
from earnest.errors import FormatError, UserError

needs_kernels = pytest.mark.skipif(
    compiled.module() is None, reason="the compiled kernels are not built"
)


def random_matrix(name: str, rows: int, columns: int, seed: int) -> np.ndarray:
    codec = CODECS[name]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, codec.row_bytes(columns)), np.uint8)
    return raw.view(codec.storage)


@pytest.mark.parametrize("name", PANELS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_unpacking_gives_the_same_bytes(name: str, rows: int, blocks: int, seed: int) -> None:
    columns = blocks * (7 if CODECS[name].is_plain else CODECS[name].block_weights)
    raw = random_matrix(name, rows, columns, seed)
    packed = panel(name).pack(raw, columns)
    assert packed.shape == panel(name).shape(rows, columns)
    again = panel(name).unpack(packed, rows, columns)
    assert again.dtype == raw.dtype
    assert np.array_equal(again.view(np.uint8), raw.view(np.uint8))


@needs_kernels
@pytest.mark.parametrize("name", PANELS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    odd=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_compiled_packer_does_what_numpy_says(
    name: str, rows: int, blocks: int, odd: int, seed: int
) -> None:
    layout, codec = panel(name), CODECS[name]
    columns = blocks * (odd if codec.is_plain else codec.block_weights)
    raw = random_matrix(name, rows, columns, seed)
    packed = layout.pack(raw, columns)
    assert np.array_equal(packed, layout.pack_in_numpy(raw, columns))
    # Panels of any bits, padding that is not zero included.
    noise = np.random.default_rng(seed).integers(0, 256, packed.shape, np.uint8)
    for panels in (packed, noise):
        ours, theirs = (f(panels, rows, columns) for f in (layout.unpack, layout.unpack_in_numpy))
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@needs_kernels
@pytest.mark.parametrize("name", PANELS)
def test_the_compiled_packer_stays_inside_its_arrays(name: str) -> None:
    """Rows and panels anywhere in memory, and not a byte beyond them."""
    layout, codec = panel(name), CODECS[name]
    columns = 2 * codec.block_weights if not codec.is_plain else 45
    rows = 35
    raw = random_matrix(name, rows, columns, 7).view(np.uint8)
    panels, size = layout.shape(rows, columns)
    room = np.full(panels * size + 2, 0xA5, np.uint8)
    out = room[1:-1].reshape(panels, size)
    moved = np.empty(raw.size + 1, np.uint8)[1:].reshape(raw.shape)
    moved[:] = raw
    native = compiled.module()
    assert native is not None
    native.pack(name, moved, out)
    assert np.array_equal(out, layout.pack_in_numpy(raw.view(codec.storage), columns))
    assert room[0] == room[-1] == 0xA5
    room = np.full(raw.size + 2, 0xA5, np.uint8)
    native.unpack(name, out, room[1:-1].reshape(raw.shape))
    assert np.array_equal(room[1:-1], raw.reshape(-1))
    assert room[0] == room[-1] == 0xA5
    for wrong in (out[1:], out[:, 1:].copy()):
        with pytest.raises(ValueError, match="fit"):
            native.pack(name, moved, wrong)
        with pytest.raises(ValueError, match="fit"):
            native.unpack(name, wrong, moved)


@pytest.mark.parametrize("name", ["bf16", "q4_k"])
def test_without_the_compiled_packer_numpy_does_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_matrix(name, 17, 256, 8)
    packed = panel(name).pack(raw, 256)
    monkeypatch.setattr(compiled, "module", lambda: None)
    out = np.empty_like(packed)
    assert panel(name).pack(raw, 256, out=out) is out
    assert np.array_equal(out, packed)
    assert np.array_equal(panel(name).unpack(packed, 17, 256), raw)


@pytest.mark.parametrize("name", PANELS)
def test_packing_what_was_unpacked_gives_the_same_bytes(name: str) -> None:
    """The other way round: no bit of a panel is unused, so a panel has one meaning."""
    layout = panel(name)
    columns = 2 * layout.block_weights
    shape = layout.shape(32, columns)
    packed = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    assert np.array_equal(layout.pack(layout.unpack(packed, 32, columns), columns), packed)


@pytest.mark.parametrize("name", PANELS)
def test_each_source_bit_has_one_place(name: str) -> None:
    """Setting one bit of the source sets exactly one bit of the panel, a different one each."""
    codec, layout = CODECS[name], panel(name)
    columns = layout.block_weights
    row_bytes = codec.row_bytes(columns)
    bits = np.random.default_rng(2).choice(16 * row_bytes * 8, 200, replace=False)
    seen = set()
    for bit in bits:
        raw = np.zeros(16 * row_bytes, np.uint8)
        raw[bit // 8] = 1 << (bit % 8)
        packed = layout.pack(raw.view(codec.storage).reshape(16, -1), columns)
        (place,) = np.flatnonzero(np.unpackbits(packed))
        seen.add(int(place))
    assert len(seen) == len(bits)


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_as_large_as_its_rows(name: str) -> None:
    layout = panel(name)
    columns = 4 * layout.block_weights
    panels, size = layout.shape(160, columns)
    assert panels * size == 160 * CODECS[name].row_bytes(columns)


def nibble(packed: np.ndarray, start: int, k: int, row: int) -> int:
    """A 4-bit weight by the formula of the format, not by the code under test."""
    byte = packed[start + 64 * (k // 8) + 4 * row + k % 4]
    return int(byte >> 4 if k % 8 >= 4 else byte & 15)


def test_places_in_q4_0() -> None:
    raw = random_matrix("q4_0", 16, 32, 3)
    packed = panel("q4_0").pack(raw, 32)[0]
    for row in range(PANEL_ROWS):
        assert packed[2 * row : 2 * row + 2].tobytes() == raw[row, :2].tobytes()
        for k in range(32):
            byte = raw[row, 2 + k % 16]
            assert nibble(packed, 32, k, row) == (byte >> 4 if k >= 16 else byte & 15)


def test_places_in_q8_0_and_bf16() -> None:
    raw = random_matrix("q8_0", 16, 32, 4)
    packed = panel("q8_0").pack(raw, 32)[0]
    plain = random_matrix("bf16", 16, 32, 4)
    words = panel("bf16").pack(plain, 32)[0].view(np.uint16)
    halves = panel("f16").pack(plain.view(np.float16), 32)[0].view(np.uint16)
    for row in range(PANEL_ROWS):
        for k in range(32):
            assert packed[32 + 64 * (k // 4) + 4 * row + k % 4] == raw[row, 2 + k]
            assert words[32 * (k // 2) + 2 * row + k % 2] == plain[row, k]
            assert halves[16 * k + row] == plain[row, k]


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k", "q5_0", "q5_1", "q4_1"])
def test_places_by_what_they_decode_to(name: str) -> None:
    """Weights read from the panel by the format's formulas equal the codec's decoder."""
    codec = CODECS[name]
    columns = codec.block_weights
    raw = random_matrix(name, 16, columns, 5)
    halves = {"q4_1": 2, "q5_0": 1, "q5_1": 2, "q4_k": 2, "q5_k": 2, "q6_k": 0}[name]
    row_heads = raw.view(np.float16).reshape(16, -1)
    row_heads[:, :halves] = np.random.default_rng(6).uniform(-1, 1, (16, halves))
    if name == "q6_k":
        row_heads[:, -1] = 0.5
    expected = codec.decode(raw)
    p = panel(name).pack(raw, columns)[0].astype(np.int64)
    head = panel(name).pack(raw, columns)[0][:64].view(np.float16).astype(np.float32)
    bits = {"4": 4, "5": 5, "6": 6}[name[1]]
    start = {"q4_1": 64, "q5_0": 32, "q5_1": 64, "q4_k": 256, "q5_k": 256, "q6_k": 288}[name]
    for row in range(16):
        for k in range(columns):
            run, i = divmod(k, 32)
            at = start + run * 64 * bits
            q = nibble(p, at + 64 * (bits - 4), i, row)
            place = 4 * row + i % 4
            if bits == 5:
                q |= (p[at + place] >> (i // 4) & 1) << 4
            if bits == 6:
                q |= (p[at + 64 * (i // 16) + place] >> (2 * (i // 4 % 4)) & 3) << 4
            d, m = head[row], head[16 + row]
            if name in ("q4_k", "q5_k"):
                low, high = p[64 + 16 * run + row], p[192 + 16 * (run % 4) + row] >> (run // 4 * 4)
                scale = low & 15 | (high & 3) << 4
                minimum = low >> 4 | (high >> 2 & 3) << 4
                value = d * np.float32(scale) * np.float32(q) - m * np.float32(minimum)
            elif name == "q6_k":
                scale = np.int8(p[32 + 16 * (k // 16) + row].astype(np.uint8).view(np.int8))
                value = d * np.float32(scale) * np.float32(q - 32)
            elif name == "q5_0":
                value = d * np.float32(q - 16)
            else:
                value = d * np.float32(q) + m
            assert value == expected[row, k]


def test_refusals() -> None:
    with pytest.raises(FormatError, match="q2_k"):
        panel("q2_k")
    with pytest.raises(UserError, match="panels"):
        panel("q4_k").shape(16, 128)
    with pytest.raises(UserError, match="bytes in a row"):
        panel("q4_0").pack(np.zeros((16, 20), np.uint8), 32)
    raw = np.zeros((16, 18), np.uint8)
    with pytest.raises(UserError, match="shape of out"):
        panel("q4_0").pack(raw, 32, out=np.empty((1, 289), np.uint8))
    with pytest.raises(UserError, match="shape of out"):
        panel("q4_0").pack(raw, 32, out=np.empty((1, 288), np.int8))
    with pytest.raises(UserError, match="cannot be written"):
        panel("q4_0").pack(raw, 32, out=np.empty((1, 576), np.uint8)[:, ::2])
    with pytest.raises(UserError, match="cannot be stored as panels"):
        panel("q4_0").pack(raw[:0], 32)
    with pytest.raises(UserError, match="shape"):
        panel("q4_0").unpack(np.zeros((1, 287), np.uint8), 16, 32)
