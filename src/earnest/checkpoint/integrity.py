"""`check`: is every stored number of a checkpoint sane, and still the one it was?

Opening a checkpoint has already proved that names and shapes are complete. This reads every byte
once: it counts what is not a number, finds tensors that are zero and routers that lost their
correction bias, and hashes each tensor for a manifest.

What is hashed is the canonical tensor, not the file: the stored weights of one canonical name, in
row-major order of its canonical shape, in their stored type, little-endian; for block types the
blocks of each row as they lie. So a Hugging Face folder, its Paddle twin and any split into files
have the same hashes, and another type or one changed bit gives another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.base import Codec, Raw
from earnest.config import ErnieConfig
from earnest.errors import FormatError
from earnest.files import read_json, write_json
from earnest.log import Progress, silent

_MANIFEST_FORMAT = "earnest-manifest"
_MANIFEST_VERSION = 1
_HASHED = (
    "sha256 of each canonical tensor: stored weights in row-major order, little-endian, block "
    "types as their blocks lie; independent of container, naming, transposition and file split"
)

_BIAS = "mlp.moe_statics.e_score_correction_bias"
_LISTED = 8  # names given in one sentence before "and N more"

# Sign, exponent and mantissa masks of the types whose bits can be judged without decoding.
_BITS: dict[str, tuple[npt.DTypeLike, int, int]] = {
    "bf16": (np.uint16, 0x7F80, 0x007F),
    "f16": (np.uint16, 0x7C00, 0x03FF),
    "f32": (np.uint32, 0x7F80_0000, 0x007F_FFFF),
}


@dataclass(frozen=True)
class TensorCheck:
    """What was found in one tensor.

    Attributes:
        name: canonical name.
        codec: type it is stored in.
        shape: canonical shape.
        nbytes: stored bytes.
        sha256: of the canonical stored bytes, hexadecimal.
        nan, inf: how many weights are not a number, or infinite.
        all_zero: whether every weight is zero.
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str
    nan: int
    inf: int
    all_zero: bool


@dataclass(frozen=True)
class Finding:
    """One line of the report: `state` is "ok", "warning" or "FAIL"."""

    check: str
    state: str
    detail: str


@dataclass(frozen=True)
class IntegrityReport:
    """The outcome of `check`; `passed` is what an exit status should say."""

    path: str
    findings: tuple[Finding, ...]
    tensors: tuple[TensorCheck, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the check fail, one sentence each."""
        return tuple(f.detail for f in self.findings if f.state == "FAIL")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is unusual but may be meant, one sentence each."""
        return tuple(f.detail for f in self.findings if f.state == "warning")

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.problems

    COLUMNS: ClassVar[list[str]] = ["check", "state", "detail"]

    def rows(self) -> list[list[str]]:
        """The findings for a table under `COLUMNS`."""
        return [[f.check, f.state, f.detail] for f in self.findings]

    def summary(self) -> str:
        """One sentence."""
        read = sum(t.nbytes for t in self.tensors) / 1e9
        outcome = f"{len(self.problems)} problems" if self.problems else "no problem"
        return f"{len(self.tensors):,} tensors ({read:,.3f} GB) read: {outcome}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "path": self.path,
            "passed": self.passed,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "findings": [asdict(f) for f in self.findings],
            "tensors": [asdict(t) for t in self.tensors],
        }


def check(
    checkpoint: Checkpoint,
    *,
    manifest: Path | None = None,
    write_manifest: Path | None = None,
    progress: Progress = silent,
) -> IntegrityReport:
    """Read every weight once and report what is wrong with them.

    Args:
        checkpoint: an opened checkpoint.
        manifest: compare each tensor's hash with this file.
        write_manifest: write the hashes to this file (also if the check fails: a manifest says
            what is there, not that it is good).
        progress: told about bytes read.

    Raises:
        FormatError: `manifest` is not a manifest.
        ModelNotFoundError, DiskFullError, AccessError, MachineError: a file cannot be read or
            written.
    """
    expected = None if manifest is None else read_manifest(manifest)
    tensors = [tensor for tensor in checkpoint.tensors.values() if not tensor.is_absent]
    total = sum(tensor.nbytes for tensor in tensors)
    done, checked = 0, []
    streamed = checkpoint.forgetter()
    for tensor in tensors:
        progress(done, total, tensor.name)
        checked.append(_check_tensor(tensor, streamed))
        done += tensor.nbytes
    progress(total, total, "done")
    findings = list(_judge(checkpoint, checked))
    if expected is not None:
        findings += _compare(expected, checked)
    if write_manifest is not None:
        write_json(write_manifest, manifest_of(checked))
        findings.append(
            Finding("manifest", "ok", f"{len(checked):,} hashes written to {write_manifest}")
        )
    return IntegrityReport(str(checkpoint.path), tuple(findings), tuple(checked))


# --- one tensor -------------------------------------------------------------------------------


def _check_tensor(tensor: LazyTensor, streamed: Callable[[int], None]) -> TensorCheck:
    digest = hashlib.sha256()
    nan = inf = 0
    all_zero = True
    for _, block in tensor.row_blocks():
        raw = np.ascontiguousarray(block)
        digest.update(raw.reshape(-1).view(np.uint8).data)
        block_nan, block_inf, block_zero = _count(raw, tensor.codec)
        nan, inf, all_zero = nan + block_nan, inf + block_inf, all_zero and block_zero
        streamed(raw.nbytes)
    return TensorCheck(
        name=tensor.name,
        codec=tensor.codec.name,
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        sha256=digest.hexdigest(),
        nan=nan,
        inf=inf,
        all_zero=all_zero,
    )


def _count(raw: Raw, codec: Codec) -> tuple[int, int, bool]:
    """How many weights of a contiguous stored array are NaN and infinite; whether all are zero."""
    if codec.name not in _BITS:
        values = codec.decode(raw)
        nan, inf = np.isnan(values), np.isinf(values)
        return int(nan.sum()), int(inf.sum()), not np.count_nonzero(values)
    dtype, exponent, mantissa = _BITS[codec.name]
    magnitude = raw.view(dtype) & np.array(exponent | mantissa, dtype)
    largest = int(magnitude.max(initial=0))
    if largest < exponent:  # nothing special anywhere: the usual case, in one pass
        return 0, 0, largest == 0
    return (
        int(np.count_nonzero(magnitude > exponent)),
        int(np.count_nonzero(magnitude == exponent)),
        False,
    )


# --- the whole --------------------------------------------------------------------------------


def _judge(checkpoint: Checkpoint, checked: list[TensorCheck]) -> Iterator[Finding]:
    yield Finding(
        "names and shapes", "ok", f"{len(checked):,} tensors, none missing, none misshaped"
    )
    types = Counter[str]()
    for tensor in checked:
        types[tensor.codec] += 1
    yield Finding("types", "ok", ", ".join(f"{n:,} {codec}" for codec, n in types.most_common()))
    yield _finding(
        "finite",
        [f"{t.name} ({t.nan:,} NaN, {t.inf:,} infinite)" for t in checked if t.nan or t.inf],
        "tensors hold values that are not finite",
        "every weight is finite",
    )
    yield _finding(
        "not zero",
        [t.name for t in checked if t.all_zero and not t.name.endswith("bias")],
        "tensors are zero throughout",
        "no weight tensor is zero throughout",
    )
    if checkpoint.config.is_moe:
        yield from _judge_router(checkpoint.config, checkpoint.tensors)
    yield _finding(
        "distinct",
        _repeated(checked),
        "matrices have the same content as another (an upcycled or damaged model)",
        "no two matrices are the same",
        state="warning",
    )
    for left in checkpoint.left_out:
        size = f"{left.nbytes / 1e6:,.1f} MB"
        text = f"{len(left.names):,} tensors not checked: {left.reason} ({size})"
        yield Finding("left out", "ok", text)


def _judge_router(config: ErnieConfig, tensors: Mapping[str, LazyTensor]) -> Iterator[Finding]:
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    found = {i: tensors.get(f"model.layers.{i}.{_BIAS}") for i in layers}
    biases = {i: bias if bias and not bias.is_absent else None for i, bias in found.items()}
    yield _finding(
        "correction bias present",
        [f"layer {i}" for i, bias in biases.items() if bias is None],
        "layers lack e_score_correction_bias: the router would select the wrong experts",
        f"all {len(layers)} mixture-of-experts layers have one",
    )
    yield _finding(
        "correction bias not constant",
        [f"layer {i}" for i, bias in biases.items() if bias and _is_constant(bias)],
        "layers have the same correction bias for every expert, which is the same as none: a "
        "trained one differs, and without it the router selects the wrong experts",
        "it tells experts apart in every layer",
    )
    gates = [gate for i in layers if (gate := tensors.get(f"model.layers.{i}.mlp.gate.weight"))]
    yield _finding(
        "router type",
        [f"{gate.name} ({gate.codec.name})" for gate in gates if gate.codec.name != "f32"],
        "router weights are not float32, as published ones are: near ties may be decided otherwise",
        "router weights are float32",
        state="warning",
    )


def _is_constant(bias: LazyTensor) -> bool:
    values = bias.read()
    return values.size > 1 and bool((values == values[0]).all())  # one expert competes with none


def _repeated(checked: list[TensorCheck]) -> list[str]:
    """Matrices whose content an earlier one has; zero ones are reported elsewhere."""
    first: dict[str, str] = {}
    found = []
    for tensor in checked:
        if len(tensor.shape) < 2 or tensor.all_zero:
            continue
        if tensor.sha256 in first:
            found.append(f"{tensor.name} = {first[tensor.sha256]}")
        first.setdefault(tensor.sha256, tensor.name)
    return found


def _finding(
    check_name: str, names: list[str], problem: str, fine: str, state: str = "FAIL"
) -> Finding:
    if not names:
        return Finding(check_name, "ok", fine)
    return Finding(check_name, state, f"{len(names):,} {problem}: {_enumerate(names)}")


def _enumerate(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest:,} more" if rest > 0 else "")


# --- manifests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ManifestEntry:
    """What a manifest says of one tensor."""

    sha256: str
    codec: str
    shape: tuple[int, ...]


def manifest_of(checked: list[TensorCheck]) -> dict[str, Any]:
    """The JSON value of a manifest."""
    return {
        "format": _MANIFEST_FORMAT,
        "version": _MANIFEST_VERSION,
        "hashed": _HASHED,
        "tensors": {
            t.name: {"sha256": t.sha256, "codec": t.codec, "shape": list(t.shape)} for t in checked
        },
    }


def read_manifest(path: Path) -> dict[str, ManifestEntry]:
    """The entries of a manifest file by canonical name.

    Raises:
        FormatError: it is not JSON, not a manifest, of a newer version, or an entry is malformed.
        ModelNotFoundError, AccessError, MachineError: it cannot be read.
    """
    raw = read_json(path)
    remedy = "write it anew with --write-manifest from a checkpoint that is known to be good"
    if raw.get("format") != _MANIFEST_FORMAT or not isinstance(raw.get("tensors"), dict):
        raise FormatError(
            f"{path} is not a manifest",
            got=f"format {raw.get('format')!r:.60}",
            expected=f"format {_MANIFEST_FORMAT!r} and an object of tensors",
            remedy=remedy,
        )
    if raw.get("version") != _MANIFEST_VERSION:
        raise FormatError(
            f"{path} is a manifest of another version",
            got=f"{raw.get('version')!r:.60}",
            expected=_MANIFEST_VERSION,
            remedy=remedy,
        )
    return {name: _entry(path, name, entry) for name, entry in raw["tensors"].items()}


def _entry(path: Path, name: str, entry: object) -> ManifestEntry:
    def is_size(n: object) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and n >= 0

    match entry:
        case {"sha256": str(digest), "codec": str(codec), "shape": list(shape)} if (
            len(digest) == 64
            and set(digest) <= set("0123456789abcdef")
            and all(is_size(n) for n in shape)
        ):
            return ManifestEntry(digest, codec, tuple(shape))
    raise FormatError(
        f"{path}: the entry of {name!r:.120} is malformed",
        got=f"{entry!r:.120}",
        expected='{"sha256": 64 hexadecimal digits, "codec": a type, "shape": sizes}',
    )


def _compare(expected: Mapping[str, ManifestEntry], checked: list[TensorCheck]) -> list[Finding]:
    found = {t.name: t for t in checked}
    common = [(found[name], entry) for name, entry in expected.items() if name in found]

    def names(differs: Callable[[TensorCheck, ManifestEntry], bool]) -> list[str]:
        return [tensor.name for tensor, entry in common if differs(tensor, entry)]

    def other_kind(tensor: TensorCheck, entry: ManifestEntry) -> bool:
        return (tensor.codec, tensor.shape) != (entry.codec, entry.shape)

    kinds = names(other_kind)
    bits = names(lambda t, e: not other_kind(t, e) and t.sha256 != e.sha256)
    absent = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    lists = (
        (bits, "tensors have other bits than the manifest says"),
        (kinds, "tensors have another type or shape than the manifest says, so their bits cannot "
         "be compared (earnest diff compares values)"),
        (absent, "tensors of the manifest are not in the checkpoint"),
        (extra, "tensors are not in the manifest"),
    )  # fmt: skip
    failures = [_finding("manifest", names, problem, "") for names, problem in lists if names]
    return failures or [Finding("manifest", "ok", f"all {len(found):,} tensors agree")]
