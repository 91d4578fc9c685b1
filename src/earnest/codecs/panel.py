"""Panels: the stored layout that the CPU kernels read. `docs/formats/panel.md` is the format.

A panel holds 16 output rows of a weight matrix, interleaved so that a vector lane is a row. The
bits are those of the source codec, permuted: packing loses nothing and unpacking gives the same
bytes back. This module is the specification (numpy, whole blocks at a time); the kernels are tested
against it, and so is the compiled packer (native/core/pack.cpp), which does the work where it is
installed, some thirty times as fast.

Letters: P panels, R = 16 rows of a panel, B blocks along K, N = P * B blocks of a panel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from earnest import compiled
from earnest.codecs.base import Codec, Raw
from earnest.codecs.bits import Bytes
from earnest.codecs.registry import CODECS
from earnest.errors import FormatError, UserError

PANEL_VERSION = 1
PANEL_ROWS = 16
PANEL_COLUMNS = 32  # columns of plain codecs are padded to a multiple of this

# What a block of a row says, taken apart: the parts of its head, each `uint8 [N, 16, items, size]`,
# and its weights as small unsigned integers, `uint8 [N, 16, weights]`.
Parts: TypeAlias = tuple[list[Bytes], Bytes]

# Bytes of panels worked on at a time. The intermediates, 8 bits a weight, then stay in a core's own
# cache and in memory that is not given back to the system in between: three times as fast as 2**22.
_CHUNK_BYTES = 2**18


@dataclass(frozen=True)
class Panel:
    """The panel layout of one codec.

    Attributes:
        codec: whose bits are permuted.
        block_weights: columns of a panel block; the columns of a matrix must be a multiple (for
            plain codecs they are padded with zeros instead).
        block_bytes: bytes of a panel block, which holds `block_weights` columns of 16 rows.
    """

    codec: Codec
    block_weights: int
    block_bytes: int
    _pack: Callable[[Bytes], Bytes]
    _unpack: Callable[[Bytes], Bytes]

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """`(panels, bytes of a panel)` of a matrix `[rows, columns]`.

        Raises:
            UserError: the columns are not a multiple of the codec's block, or a size is not
                positive.
        """
        if rows <= 0 or columns <= 0 or columns % self.codec.block_weights:
            raise UserError(
                f"a matrix in {self.codec.name} cannot be stored as panels",
                got=f"{rows} rows of {columns} columns",
                expected=f"columns in a multiple of {self.codec.block_weights}",
                remedy="store this tensor as bf16",
            )
        blocks = -(-columns // self.block_weights)
        return -(-rows // PANEL_ROWS), blocks * self.block_bytes

    def pack(self, raw: Raw, columns: int, *, out: Bytes | None = None) -> Bytes:
        """Interleave a matrix. Rows beyond a multiple of 16 are followed by rows of zero bytes.

        Other threads run meanwhile, where the compiled packer is installed.

        Args:
            raw: the stored array of the codec: `[rows, columns]` of its dtype for a plain codec,
                `uint8 [rows, row_bytes]` for a block codec.
            columns: weights in a row.
            out: where to write the panels, C-contiguous; a new array by default.

        Returns:
            `uint8 [panels, bytes of a panel]`: `out` if given.

        Raises:
            UserError: an array does not fit the size of the matrix.
        """
        shape = self.shape(raw.shape[0], columns)
        source, out = self._rows(raw, columns), self._room(out, shape)
        if (native := compiled.module()) is not None:
            native.pack(self.codec.name, source, out)
        else:
            self._pack_in_numpy(source, out)
        return out

    def pack_in_numpy(self, raw: Raw, columns: int) -> Bytes:
        """What `pack` does, by its specification."""
        out = np.empty(self.shape(raw.shape[0], columns), np.uint8)
        self._pack_in_numpy(self._rows(raw, columns), out)
        return out

    def unpack(self, packed: Bytes, rows: int, columns: int) -> Raw:
        """Undo `pack`: the stored array of the codec, byte for byte.

        Args:
            packed: `uint8 [panels, bytes of a panel]`.
            rows: rows of the matrix, without the padding.
            columns: weights in a row, without the padding.

        Raises:
            UserError: the panels do not fit the size of the matrix.
        """
        native = compiled.module()
        if native is None:
            return self.unpack_in_numpy(packed, rows, columns)
        _expect(packed.shape, self.shape(rows, columns), "shape", self.codec)
        out = np.empty((rows, self.codec.row_bytes(columns)), np.uint8)
        native.unpack(self.codec.name, np.ascontiguousarray(packed), out)
        return out.view(self.codec.storage)

    def unpack_in_numpy(self, packed: Bytes, rows: int, columns: int) -> Raw:
        """What `unpack` does, by its specification."""
        panels, panel_bytes = self.shape(rows, columns)
        _expect(packed.shape, (panels, panel_bytes), "shape", self.codec)
        blocks, row_block = panel_bytes // self.block_bytes, self.block_bytes // PANEL_ROWS
        row_bytes = self.codec.row_bytes(columns)
        out = np.empty((rows, row_bytes), np.uint8)
        step = max(1, _CHUNK_BYTES // panel_bytes)
        for start in range(0, panels, step):
            chunk = packed[start : start + step].reshape(-1, self.block_bytes)
            found = self._unpack(chunk).reshape(-1, blocks, PANEL_ROWS, row_block)
            plain = found.swapaxes(1, 2).reshape(-1, blocks * row_block)
            part = out[start * PANEL_ROWS : (start + step) * PANEL_ROWS]
            part[:] = plain[: part.shape[0], :row_bytes]
        return out.view(self.codec.storage)

    def _rows(self, raw: Raw, columns: int) -> Bytes:
        """The matrix as `uint8 [rows, row_bytes]`, checked."""
        source = np.ascontiguousarray(raw).view(np.uint8).reshape(raw.shape[0], -1)
        _expect(source.shape[1], self.codec.row_bytes(columns), "bytes in a row", self.codec)
        return source

    def _room(self, out: Bytes | None, shape: tuple[int, int]) -> Bytes:
        if out is None:
            return np.empty(shape, np.uint8)
        _expect((out.shape, out.dtype), (shape, np.dtype(np.uint8)), "shape of out", self.codec)
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise UserError(
                "panels cannot be written here", expected="a writeable, C-contiguous array"
            )
        return out

    def _pack_in_numpy(self, source: Bytes, out: Bytes) -> None:
        panels, panel_bytes = out.shape
        blocks = panel_bytes // self.block_bytes
        row_block = self.block_bytes // PANEL_ROWS
        step = max(1, _CHUNK_BYTES // panel_bytes)
        for start in range(0, panels, step):
            count = min(step, panels - start)
            padded = np.zeros((count * PANEL_ROWS, blocks * row_block), np.uint8)
            part = source[start * PANEL_ROWS : (start + count) * PANEL_ROWS]
            padded[: part.shape[0], : part.shape[1]] = part
            chunk = padded.reshape(count, PANEL_ROWS, blocks, row_block).swapaxes(1, 2)
            packed = self._pack(chunk.reshape(-1, PANEL_ROWS, row_block))
            out[start : start + count] = packed.reshape(count, panel_bytes)


def _bytes(x: npt.NDArray[Any]) -> Bytes:
    """For the type checker, to which a shift of bytes is of any integer type."""
    return np.asarray(x, np.uint8)


def _expect(got: object, expected: object, what: str, codec: Codec) -> None:
    if got != expected:
        raise UserError(
            f"{what} of a {codec.name} matrix does not fit its size", got=got, expected=expected
        )


# --- weights of 32 columns: [k / 4][row][k % 4], 64-byte groups -------------------------------


def _groups(q: Bytes) -> Bytes:
    """`[n, 16, 32]` to `[n, 8, 64]`: byte `4 row + k % 4` of group `k // 4`."""
    return q.reshape(-1, PANEL_ROWS, 8, 4).swapaxes(1, 2).reshape(-1, 8, 64)


def _ungroup(g: Bytes) -> Bytes:
    return g.reshape(-1, 8, PANEL_ROWS, 4).swapaxes(1, 2).reshape(-1, PANEL_ROWS, 32)


def _store(q: Bytes, bits: int) -> Bytes:
    """Weights of `bits` bits, `[n, 16, 32]`, to `[n, 64 * bits]` bytes: the bits above the fourth
    in planes over 64 bytes (bit `width * g` of byte b is that of byte b of group g), then nibbles,
    two groups sharing 64 bytes."""
    g = _groups(q)
    if bits == 8:
        return g.reshape(-1, 512)
    low = g[:, 0::2] & 15 | g[:, 1::2] << 4
    parts = [low.reshape(-1, 256)]
    if bits > 4:
        width = bits - 4
        per_byte = 8 // width
        fields = (g >> 4).reshape(-1, 8 // per_byte, per_byte, 64)
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        high = np.bitwise_or.reduce(fields << shifts, axis=2)
        parts.insert(0, high.reshape(-1, 64 * width))
    return np.concatenate(parts, axis=1)


def _load(stored: Bytes, bits: int) -> Bytes:
    """Undo `_store`: `[n, 64 * bits]` to `[n, 16, 32]`."""
    if bits == 8:
        return _ungroup(stored)
    width = bits - 4
    low = stored[:, 64 * width :].reshape(-1, 4, 64)
    g = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8, 64)
    if width:
        high = stored[:, : 64 * width].reshape(-1, width, 1, 64)
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        g |= (high >> shifts & (2**width - 1)).reshape(-1, 8, 64) << 4
    return _ungroup(g)


# --- blocks taken apart and put together: one pair per codec ----------------------------------


def _split_nibbles(b: Bytes) -> Bytes:
    """`[..., 16]` to `[..., 32]`: low nibbles are weights 0-15, high ones 16-31."""
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _join_nibbles(q: Bytes) -> Bytes:
    return _bytes(q[..., :16] & 15 | q[..., 16:] << 4)


def _split_legacy(halves: int, fifth: bool) -> Callable[[Bytes], Parts]:
    """q4_0, q4_1, q5_0, q5_1: `halves` half floats, then 32 fifth bits if `fifth`, then nibbles."""

    def split(b: Bytes) -> Parts:
        start = 2 * halves
        heads = [b[..., i : i + 2][..., None, :] for i in range(0, start, 2)]
        if not fifth:
            return heads, _split_nibbles(b[..., start:])
        bits = np.unpackbits(b[..., start : start + 4], axis=-1, bitorder="little")
        return heads, _bytes(_split_nibbles(b[..., start + 4 :]) | bits << 4)

    return split


def _join_legacy(fifth: bool) -> Callable[[list[Bytes], Bytes], Bytes]:
    def join(heads: list[Bytes], q: Bytes) -> Bytes:
        parts = [h[..., 0, :] for h in heads]
        if fifth:
            parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
        return np.concatenate([*parts, _join_nibbles(q)], axis=-1)

    return join


def _split_q8_0(b: Bytes) -> Parts:
    return [b[..., None, :2]], b[..., 2:]


def _join_q8_0(heads: list[Bytes], q: Bytes) -> Bytes:
    return np.concatenate([heads[0][..., 0, :], q], axis=-1)


def _planes(b: Bytes, run: int, count: int, width: int) -> Bytes:
    """`[..., n]` to `[..., count * n]`: over each `run` bytes, `count` planes of `width` bits."""
    shifts = np.arange(0, count * width, width, dtype=np.uint8)[:, None]
    taken = b.reshape(*b.shape[:-1], -1, 1, run) >> shifts & (2**width - 1)
    return _bytes(taken.reshape(*b.shape[:-1], -1))


def _join_planes(q: Bytes, run: int, count: int, width: int) -> Bytes:
    """Undo `_planes`."""
    shifts = np.arange(0, count * width, width, dtype=np.uint8)[:, None]
    fields = q.reshape(*q.shape[:-1], -1, count, run) << shifts
    return np.asarray(np.bitwise_or.reduce(fields, axis=-2)).reshape(*q.shape[:-1], -1)


def _split_six_bit(b: Bytes) -> list[Bytes]:
    """The head of q4_k and q5_k (see kquants.py): d, m, then the eight 6-bit scales s and minima n:
    bytes `s % 16 | n % 16 << 4` of runs 0-7, then for j in 0-3 the upper bits of runs j and j + 4:
    `s_j | n_j << 2 | s_(j+4) << 4 | n_(j+4) << 6`."""
    a, m, c = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    low = np.concatenate([a & 15 | m << 4, c], axis=-1)
    high = a >> 4 & 3 | m >> 2 & 12 | a >> 2 & 0x30 | m & 0xC0
    return [b[..., None, :2], b[..., None, 2:4], low[..., None], high[..., None]]


def _join_six_bit(heads: list[Bytes]) -> Bytes:
    low, high = heads[2][..., 0], heads[3][..., 0]
    first = low[..., :4]
    a = first & 15 | (high & 3) << 4 | (high & 0x30) << 2
    m = first >> 4 | (high & 12) << 2 | high & 0xC0
    return np.concatenate([heads[0][..., 0, :], heads[1][..., 0, :], a, m, low[..., 4:]], axis=-1)


def _split_q4_k(b: Bytes) -> Parts:
    return _split_six_bit(b), _planes(b[..., 16:], 32, 2, 4)


def _join_q4_k(heads: list[Bytes], q: Bytes) -> Bytes:
    return np.concatenate([_join_six_bit(heads), _join_planes(q, 32, 2, 4)], axis=-1)


def _split_q5_k(b: Bytes) -> Parts:
    low, high = _planes(b[..., 48:], 32, 2, 4), _planes(b[..., 16:48], 32, 8, 1)
    return _split_six_bit(b), _bytes(low | high << 4)


def _join_q5_k(heads: list[Bytes], q: Bytes) -> Bytes:
    high, low = _join_planes(_bytes(q >> 4), 32, 8, 1), _join_planes(_bytes(q & 15), 32, 2, 4)
    return np.concatenate([_join_six_bit(heads), high, low], axis=-1)


def _split_q6_k(b: Bytes) -> Parts:
    low, high = _planes(b[..., :128], 64, 2, 4), _planes(b[..., 128:192], 32, 4, 2)
    return [b[..., None, 208:210], b[..., 192:208, None]], _bytes(low | high << 4)


def _join_q6_k(heads: list[Bytes], q: Bytes) -> Bytes:
    low, high = _join_planes(_bytes(q & 15), 64, 2, 4), _join_planes(_bytes(q >> 4), 32, 4, 2)
    return np.concatenate([low, high, heads[1][..., 0], heads[0][..., 0, :]], axis=-1)


def _block_panel(
    name: str,
    bits: int,
    head: list[tuple[int, int]],
    join: Callable[[list[Bytes], Bytes], Bytes],
) -> Panel:
    """A panel block: each part of the head as `[item][row][bytes of an item]`, then the weights,
    32 columns at a time. `head` gives (items, bytes of an item) of each part."""
    codec, split = CODECS[name], _SPLIT[name]
    runs = codec.block_weights // 32
    head_bytes = sum(PANEL_ROWS * items * size for items, size in head)

    def pack(b: Bytes) -> Bytes:
        heads, q = split(b)
        parts = [h.swapaxes(1, 2).reshape(len(b), -1) for h in heads]
        q = q.reshape(len(b), PANEL_ROWS, runs, 32).swapaxes(1, 2)
        parts.append(_store(q.reshape(-1, PANEL_ROWS, 32), bits).reshape(len(b), -1))
        return np.concatenate(parts, axis=1)

    def unpack(p: Bytes) -> Bytes:
        heads, at = [], 0
        for items, size in head:
            part = p[:, at : at + PANEL_ROWS * items * size]
            heads.append(part.reshape(-1, items, PANEL_ROWS, size).swapaxes(1, 2))
            at += PANEL_ROWS * items * size
        q = _load(p[:, head_bytes:].reshape(-1, 64 * bits), bits)
        q = q.reshape(-1, runs, PANEL_ROWS, 32).swapaxes(1, 2)
        return join(heads, q.reshape(-1, PANEL_ROWS, runs * 32))

    return Panel(codec, codec.block_weights, PANEL_ROWS * codec.block_bytes, pack, unpack)


def _plain_panel(name: str, together: int) -> Panel:
    """`[k / together][row][k % together]`, each weight as the codec stores it."""
    codec = CODECS[name]
    unit = together * codec.block_bytes
    count = PANEL_COLUMNS // together

    def pack(b: Bytes) -> Bytes:
        return b.reshape(-1, PANEL_ROWS, count, unit).swapaxes(1, 2).reshape(len(b), -1)

    def unpack(p: Bytes) -> Bytes:
        return p.reshape(-1, count, PANEL_ROWS, unit).swapaxes(1, 2).reshape(len(p), PANEL_ROWS, -1)

    return Panel(codec, PANEL_COLUMNS, PANEL_ROWS * count * unit, pack, unpack)


_SPLIT: dict[str, Callable[[Bytes], Parts]] = {
    "q8_0": _split_q8_0,
    "q4_0": _split_legacy(1, False),
    "q4_1": _split_legacy(2, False),
    "q5_0": _split_legacy(1, True),
    "q5_1": _split_legacy(2, True),
    "q4_k": _split_q4_k,
    "q5_k": _split_q5_k,
    "q6_k": _split_q6_k,
}


def panel_parts(name: str, blocks: Bytes) -> Parts:
    """A block codec's blocks, `uint8 [..., block_bytes]`, taken apart as the panel stores them:
    the parts of the head `[..., items, bytes]` in order, and the weights `uint8 [..., weights]`."""
    return _SPLIT[name](blocks)


_SIX_BIT = [(1, 2), (1, 2), (8, 1), (4, 1)]

PANELS: dict[str, Panel] = {
    panel.codec.name: panel
    for panel in (
        _plain_panel("f32", 1),
        _plain_panel("f16", 1),
        _plain_panel("bf16", 2),
        _block_panel("q8_0", 8, [(1, 2)], _join_q8_0),
        _block_panel("q4_0", 4, [(1, 2)], _join_legacy(False)),
        _block_panel("q4_1", 4, [(1, 2)] * 2, _join_legacy(False)),
        _block_panel("q5_0", 5, [(1, 2)], _join_legacy(True)),
        _block_panel("q5_1", 5, [(1, 2)] * 2, _join_legacy(True)),
        _block_panel("q4_k", 4, _SIX_BIT, _join_q4_k),
        _block_panel("q5_k", 5, _SIX_BIT, _join_q5_k),
        _block_panel("q6_k", 6, [(1, 2), (16, 1)], _join_q6_k),
    )
}


def panel(name: str) -> Panel:
    """The panel layout of the codec called `name`.

    Raises:
        FormatError: this codec has none.
    """
    if name not in PANELS:
        raise FormatError(
            f"weights in {name!r:.40} have no panel layout",
            expected=", ".join(PANELS),
            remedy="re-encode them, for example to q8_0",
        )
    return PANELS[name]
