"""Single kernels from Python, for tests and measurements; a whole step is one call elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from earnest.codecs.base import Float32
from earnest.codecs.bits import Bytes
from earnest.codecs.panel import PANEL_COLUMNS, PANEL_ROWS, panel
from earnest.errors import MachineError, UserError
from earnest.runners.native import isa

ThreadPool = Any


def usable_threads() -> int:
    """Threads this process may use at once: affinity mask and control-group quota respected."""
    return int(isa.native().usable_threads())


def thread_pool(workers: int | None = None) -> ThreadPool:
    """A pool of `workers` threads, the caller included.

    By default one for every processor that this process may use; a step of such a pool leaves some
    out while other processes hold their processors. A number that was asked for is kept.

    Raises:
        UserError: not a number of threads from 1 to 1024.
        MachineError: the system gives fewer threads.
    """
    count = usable_threads() if workers is None else workers
    if not 1 <= count <= 1024:
        raise UserError("not a number of threads", got=count, expected="from 1 to 1024")
    try:
        return isa.native().ThreadPool(count, workers is None)
    except RuntimeError as error:
        raise MachineError(
            "the threads of the native runner cannot be started",
            got=str(error),
            expected=f"{count} threads",
            remedy="ask for fewer, or raise the limits on processes and memory (ulimit -u, -v)",
        ) from error


@cache
def _codec_numbers() -> dict[str, int]:
    return {name: i for i, (name, _, _) in enumerate(isa.native().panel_shapes())}


def codec_number(codec: str) -> int:
    """What the kernels call a codec that has a panel layout."""
    return _codec_numbers()[codec]


def _check(array: npt.NDArray[Any], name: str, dtype: str, dimensions: int) -> None:
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != np.dtype(dtype)
        or array.ndim != dimensions
        or not array.flags.c_contiguous
    ):
        kind = f"{getattr(array, 'dtype', type(array))} of shape {getattr(array, 'shape', '?')}"
        raise UserError(
            f"{name} is not an array that the kernels can read",
            got=kind,
            expected=f"{dtype}, {dimensions} dimensions, C-contiguous",
            remedy="numpy.ascontiguousarray(array, dtype)",
        )


def quantize(
    x_TK: Float32, planes: int, *, tier: str | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.void]]:
    """Activations to integers that share a scale per 32.

    Args:
        x_TK: float32 `[T, K]`, K a multiple of 32.
        planes: 1 (|v| <= 127) or 2 (|v| <= 16256, as 128 * high + low).
        tier: a tier of `isa.available_tiers()`; the one in use by default.

    Returns:
        int8 `[T, K / 32, planes, 32]`, and records `[T, K / 32]` of `scale`, `scaled_sum`
        (float32), `sum`, `sum_first` (int32; of all 32 integers and of the first 16).
    """
    _check(x_TK, "x", "float32", 2)
    rows, columns = x_TK.shape
    if columns % 32 or columns == 0 or planes not in (1, 2):
        raise UserError(
            "activations cannot be quantised",
            got=f"{columns} columns, {planes} planes",
            expected="a multiple of 32 columns, 1 or 2 planes",
        )
    values = np.empty((rows, columns * planes), np.int8)
    blocks = np.empty((rows, columns // 32, 4), np.float32)
    isa.native().quantize(tier or isa.tier(), x_TK, planes, values, blocks)
    record = np.dtype([("scale", "f4"), ("scaled_sum", "f4"), ("sum", "i4"), ("sum_first", "i4")])
    return values.reshape(rows, -1, planes, 32), blocks.view(record)[..., 0]


def matmul(
    panels: Bytes,
    codec: str,
    rows: int,
    x_TK: Float32,
    *,
    planes: int = 1,
    select: npt.NDArray[np.int32] | None = None,
    pool: ThreadPool | None = None,
    tier: str | None = None,
) -> Float32:
    """`x W^T` from panels.

    Args:
        panels: `uint8 [panels, bytes]`, as `earnest.codecs.panel` packs them.
        codec: the weights' codec.
        rows: N, output rows of W.
        x_TK: float32 `[T, K]`.
        planes: 1 for 8-bit, 2 for 15-bit activations (see `quantize`). f32 and f16 weights ignore
            it; with 1 those that meet bf16 weights are bf16 in the avx512bf16 tier.
        select: int32 `[T']`, the rows of x to use; all by default.
        pool: threads to use; a pool of one by default.
        tier: a tier of `isa.available_tiers()`; the one in use by default.

    Returns:
        float32 `[T or T', N]`.

    Raises:
        UserError: shapes or types do not fit each other.
    """
    _check(panels, "panels", "uint8", 2)
    _check(x_TK, "x", "float32", 2)
    layout = panel(codec)
    columns = x_TK.shape[1]
    expected = layout.shape(rows, columns)
    if panels.shape != expected:
        raise UserError(
            f"panels do not fit {rows} rows of {columns} columns in {codec}",
            got=panels.shape,
            expected=expected,
        )
    if planes not in (1, 2):
        raise UserError("planes of activations", got=planes, expected="1 or 2")
    if select is not None:
        _check(select, "select", "int32", 1)
        if select.size and not (select.min() >= 0 and select.max() < len(x_TK)):
            raise UserError(
                "selected rows do not exist",
                got=f"from {select.min()} to {select.max()}",
                expected=f"from 0 to {len(x_TK) - 1}",
            )
    if layout.codec.is_plain and columns % PANEL_COLUMNS:
        x_TK = np.pad(x_TK, ((0, 0), (0, -columns % PANEL_COLUMNS)))
    out = np.empty((len(x_TK) if select is None else len(select), rows), np.float32)
    isa.native().matmul(
        pool if pool is not None else thread_pool(1),
        tier or isa.tier(),
        codec_number(codec),
        panels,
        x_TK,
        planes,
        select,
        out,
    )
    return out


def read_rate(pool: ThreadPool, data: Bytes, streams: int, *, tier: str | None = None) -> float:
    """Bytes per second that all threads read together from `data`, each in `streams` places."""
    _check(data, "data", "uint8", 1)
    return float(isa.native().read_rate(pool, tier or isa.tier(), data, streams))


def integer_rate(pool: ThreadPool, rounds: int, *, tier: str | None = None) -> float:
    """8-bit integer operations per second of all threads (a product and its sum are two)."""
    return float(isa.native().integer_rate(pool, tier or isa.tier(), rounds))


__all__ = [
    "PANEL_ROWS",
    "ThreadPool",
    "integer_rate",
    "matmul",
    "quantize",
    "read_rate",
    "thread_pool",
    "usable_threads",
]
