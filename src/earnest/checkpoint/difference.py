"""`diff`: which tensors of two checkpoints differ, and by how much: a weight-level changelog.

Tensors are matched by canonical name, so layout, container, file split and stored type do not
matter: a GGUF file can be compared with the folder it was made from. Both sides are streamed in
blocks of the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import numpy as np

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Float32, Raw
from earnest.config import ErnieConfig
from earnest.log import Progress, silent

State = Literal["identical", "equal", "differs", "shape", "only in A", "only in B"]

# Above this many rows a table is condensed: one row for a kind of tensor, over layers and experts.
_MAX_ROWS = 100

_BLOCK_WEIGHTS = 2**20  # about 50 MB of working arrays

# These say how weights were stored or drawn; nothing is computed from them.
_INERT = {"dtype", "initializer_range"}


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of A compares with its namesake in B.

    Attributes:
        name: canonical name.
        state: "identical" stored bits; "equal" values in different types; "differs"; other
            "shape"; "only in A" or "only in B".
        codec_a, codec_b: stored types; None on the side that lacks it.
        shape_a, shape_b: shapes; None on the side that lacks it.
        changed: fraction of the weights whose values differ.
        max_abs: largest absolute difference.
        relative_rms: root mean square of B - A over that of A; None where A is zero and B is not.
        cosine: of the angle between A and B as vectors; None where one of them is zero.
        non_finite: weights that are NaN or infinite on either side and differ; they are left out
            of the measures above but for `changed`.
    """

    name: str
    state: State
    codec_a: str | None = None
    codec_b: str | None = None
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    changed: float = 0.0
    max_abs: float = 0.0
    relative_rms: float | None = 0.0
    cosine: float | None = 1.0
    non_finite: int = 0

    @property
    def same(self) -> bool:
        """Whether the values are the same."""
        return self.state in ("identical", "equal")


@dataclass(frozen=True)
class ConfigDifference:
    """A number of the model that differs."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class DiffReport:
    """The outcome of `diff`; `same` is what an exit status should say."""

    a: str
    b: str
    tensors: tuple[TensorDifference, ...]
    config: tuple[ConfigDifference, ...]

    COLUMNS: ClassVar[list[str]] = [
        "tensor", "n", "state", "types", "changed", "max |B-A|", "rel. RMS", "cosine"
    ]  # fmt: skip

    @property
    def same(self) -> bool:
        """Whether both hold the same model: equal values and equal numbers."""
        return not self.config and all(t.same for t in self.tensors)

    def rows(self, *, show_all: bool = False) -> list[list[str]]:
        """Rows for a table under `COLUMNS`: what differs, or everything.

        Where more than a hundred tensors differ, the n of one kind are condensed to one row over
        layers and experts (`*`) with the measures of the most different; `to_dict` has each.
        """
        config = [[c.field, "", "config", f"{c.a} -> {c.b}", "", "", "", ""] for c in self.config]
        shown = [t for t in self.tensors if show_all or not t.same]
        if show_all or len(shown) <= _MAX_ROWS:
            return config + [_row(t) for t in shown]
        return config + [_row(*kind) for kind in _condensed(shown)]

    def summary(self) -> str:
        """One or two sentences."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.state] = counts.get(tensor.state, 0) + 1
        words = {
            "identical": "identical",
            "equal": "equal in value but stored in another type",
            "differs": "different",
            "shape": "of different shape",
            "only in A": "only in A",
            "only in B": "only in B",
        }
        parts = [f"{counts[state]:,} {text}" for state, text in words.items() if state in counts]
        text = f"{len(self.tensors):,} tensors: {', '.join(parts) or 'none'}."
        if self.config:
            text += f" Configurations differ in {', '.join(c.field for c in self.config)}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "summary": self.summary(),
            "config": [asdict(c) for c in self.config],
            "tensors": [asdict(t) for t in self.tensors],
        }


def diff(a: Checkpoint, b: Checkpoint, *, progress: Progress = silent) -> DiffReport:
    """Compare two opened checkpoints tensor by tensor, in the order of the name table.

    Args:
        a, b: opened checkpoints in any layout; of the same path nothing is read.
        progress: told about bytes compared (of A).
    """
    names = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    common = [name for name in names if name in a.tensors and name in b.tensors]
    total = sum(a.tensors[name].nbytes for name in common)
    same_path = a.path.resolve() == b.path.resolve()
    done, found = 0, []
    forget_a, forget_b = a.forgetter(), b.forgetter()

    def streamed(nbytes: int) -> None:
        forget_a(nbytes)
        forget_b(nbytes)

    for name in names:
        progress(done, total, name)
        left, right = a.tensors.get(name), b.tensors.get(name)
        found.append(_compare(name, left, right, streamed, same_path=same_path))
        done += left.nbytes if left and right else 0
    progress(total, total, "done")
    config = tuple(_config_differences(a.config, b.config))
    return DiffReport(str(a.path), str(b.path), tuple(found), config)


def _config_differences(a: ErnieConfig, b: ErnieConfig) -> Iterator[ConfigDifference]:
    left, right = asdict(a), asdict(b)
    for field in left:
        if field not in _INERT and left[field] != right[field]:
            yield ConfigDifference(field, left[field], right[field])


def _compare(
    name: str,
    a: LazyTensor | None,
    b: LazyTensor | None,
    streamed: Callable[[int], None],
    *,
    same_path: bool,
) -> TensorDifference:
    if a is None:
        assert b is not None
        return TensorDifference(name, "only in B", codec_b=b.codec.name, shape_b=b.shape)
    if b is None:
        return TensorDifference(name, "only in A", codec_a=a.codec.name, shape_a=a.shape)
    sides = (a.codec.name, b.codec.name, a.shape, b.shape)
    if a.shape != b.shape:
        return TensorDifference(name, "shape", *sides)
    if same_path:
        return TensorDifference(name, "identical", *sides)
    measure = _Measure()
    same_codec = a.codec == b.codec
    same_rows = []
    for rows, block_a in a.row_blocks(_BLOCK_WEIGHTS):
        block_b = b.raw_rows(rows)
        if same_codec and _same_bits(block_a, block_b):
            same_rows.append(rows)
        else:
            measure.add(a.codec.decode(block_a), b.codec.decode(block_b))
        streamed(block_a.nbytes)
    if measure.touched:  # only then do the equal rows count, in the denominators
        for rows in same_rows:
            measure.add_same(a.read_rows(rows))
    if not measure.touched and same_codec:
        return TensorDifference(name, "identical", *sides)
    if not measure.changed:
        # Same values in other bits: another type, or +0 against -0, or other NaN payloads.
        return TensorDifference(name, "equal", *sides)
    return TensorDifference(
        name,
        "differs",
        *sides,
        changed=measure.changed / max(1, a.size),
        max_abs=measure.max_abs,
        relative_rms=measure.relative_rms,
        cosine=measure.cosine,
        non_finite=measure.non_finite,
    )


def _same_bits(a: Raw, b: Raw) -> bool:
    """Whether two stored blocks of one type have the same bits; NaN equals itself here."""
    if a.dtype.kind == "f":
        bits = np.dtype(f"<u{a.dtype.itemsize}")
        a, b = np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits)
    return np.array_equal(a, b)


class _Measure:
    """Sums over blocks, in float64."""

    def __init__(self) -> None:
        self.touched = False
        self.changed = self.non_finite = 0
        self.max_abs = 0.0
        self._aa = self._bb = self._ab = self._dd = 0.0

    def add_same(self, values: Float32) -> None:
        finite = np.where(np.isfinite(values), values, np.float32(0)).astype(np.float64)
        square = float(np.vdot(finite, finite))
        self._aa += square
        self._bb += square
        self._ab += square

    def add(self, a: Float32, b: Float32) -> None:
        self.touched = True
        differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
        self.changed += int(np.count_nonzero(differs))
        finite = np.isfinite(a) & np.isfinite(b)
        self.non_finite += int(np.count_nonzero(differs & ~finite))
        x = np.where(finite, a, np.float32(0)).astype(np.float64)
        y = np.where(finite, b, np.float32(0)).astype(np.float64)
        d = y - x
        self.max_abs = max(self.max_abs, float(np.abs(d).max(initial=0.0)))
        self._aa += float(np.vdot(x, x))
        self._bb += float(np.vdot(y, y))
        self._ab += float(np.vdot(x, y))
        self._dd += float(np.vdot(d, d))

    @property
    def relative_rms(self) -> float | None:
        """RMS(b - a) / RMS(a)."""
        if self._aa == 0:
            return None if self._dd else 0.0
        return sqrt(self._dd / self._aa)

    @property
    def cosine(self) -> float | None:
        """a·b / (|a| |b|)."""
        if self._aa == 0 or self._bb == 0:
            return None
        return max(-1.0, min(1.0, self._ab / (sqrt(self._aa) * sqrt(self._bb))))


# --- for people -------------------------------------------------------------------------------


def _row(t: TensorDifference, name: str | None = None, count: int = 1) -> list[str]:
    if t.state == "shape":
        types = f"{list(t.shape_a or ())} -> {list(t.shape_b or ())}"
    elif t.codec_a == t.codec_b or not (t.codec_a and t.codec_b):
        types = t.codec_a or t.codec_b or ""
    else:
        types = f"{t.codec_a} -> {t.codec_b}"
    head = [name or t.name, f"{count:,}", t.state, types]
    if t.state != "differs":
        return [*head, "", "", "", ""]
    return [
        *head,
        f"{100 * t.changed:.3g}%",
        f"{t.max_abs:.3g}" + (f" and {t.non_finite:,} not finite" if t.non_finite else ""),
        "-" if t.relative_rms is None else f"{t.relative_rms:.3g}",
        "-" if t.cosine is None else f"{t.cosine:.6f}",
    ]


def _condensed(tensors: list[TensorDifference]) -> Iterator[tuple[TensorDifference, str, int]]:
    """For each kind of tensor and state, in order: the worst case, the name, how many."""
    kinds: dict[tuple[str, str], list[TensorDifference]] = {}
    for tensor in tensors:
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", tensor.name), tensor.state), []).append(tensor)
    for (kind, _), members in kinds.items():
        worst = max(members, key=lambda t: (t.relative_rms is None, t.relative_rms or 0.0))
        yield worst, kind if len(members) > 1 else worst.name, len(members)
