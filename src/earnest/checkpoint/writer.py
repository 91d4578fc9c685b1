"""Writing a checkpoint: a complete folder that appears at once, or not at all.

The folder is built beside its destination under a temporary name. A run that is killed leaves the
files it finished there; the same call again, with the same input, keeps them and goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from earnest.checkpoint.checkpoint import LeftOut
from earnest.checkpoint.containers import panel
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.containers.safetensors import SINGLE, write_shards
from earnest.checkpoint.plan import tensors_digest
from earnest.config import ErnieConfig, to_hf
from earnest.errors import DiskFullError
from earnest.files import StagedFolder, machine_errors, require_space, write_json
from earnest.log import Progress, logger, silent

Layout = Literal["hf", "paddle"]

# What the ecosystems look for in a safetensors header before they open the file.
_METADATA = {"hf": {"format": "pt"}, "paddle": {"format": "np"}}

# Configuration, index and tokenizer files.
_OVERHEAD_BYTES = 32 * 2**20

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class WriteReport:
    """What was written.

    Attributes:
        path: the folder, or the GGUF file.
        layout: "hf", "paddle", "panel" or "gguf".
        tensors: how many stored tensors.
        nbytes: their size.
        files: names of all files in the folder, or that of the file.
        resumed: whether an interrupted run was continued.
        left_out: what the source holds and the result does not.
        notes: what a careful reader should know, one sentence each.
    """

    path: str
    layout: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    resumed: bool
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def _no_side_files(folder: Path) -> tuple[str, ...]:
    return ()


def write_checkpoint(
    destination: Path,
    plan: Sequence[PlannedTensor],
    config: ErnieConfig,
    *,
    layout: Layout | Literal["panel"],
    fingerprint: dict[str, Any],
    shard_bytes: int = 5 * 10**9,
    force: bool,
    progress: Progress = silent,
    side_files: Callable[[Path], Sequence[str]] = _no_side_files,
    left_out: Sequence[LeftOut] = (),
    notes: Sequence[str] = (),
) -> WriteReport:
    """Write weights, index, `config.json` and side files as a folder.

    Args:
        destination: the folder to make.
        plan: the tensors to stream, in order.
        config: the model's numbers; its `dtype` is set to the type most weights are written in.
        layout: "hf", "paddle" or "panel"; decides the spelling of `config.json`, and how the
            tensors are stored: in shards, or in one packed file.
        fingerprint: what the weights depend on besides the plan's names, types and shapes.
        shard_bytes: the largest shard, unless a single tensor is larger.
        force: replace a destination that exists.
        progress: told about bytes written.
        side_files: writes further files into the folder it is given; returns notes.
        left_out, notes: for the report.

    Raises:
        UserError: the destination exists.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    total = sum(tensor.nbytes for tensor in plan)
    config = replace(config, dtype=_main_dtype(plan) or config.dtype)
    identity = {
        **fingerprint,
        "layout": layout,
        "shard_bytes": shard_bytes,
        "config": asdict(config),
        "tensors": tensors_digest(plan),
    }
    with resumable(destination, identity, total + _OVERHEAD_BYTES, force=force) as staged:
        write_json(staged.path / "config.json", config_json(config, layout))
        more_notes = side_files(staged.path)
        if layout == "panel":
            panel.write_file(staged.path / SINGLE, plan, progress)
        else:
            write_shards(staged.path, plan, shard_bytes, _METADATA[layout], progress)
        staged.commit()
    with machine_errors(destination, "reading"):
        files = tuple(sorted(entry.name for entry in destination.iterdir()))
    return WriteReport(
        path=str(destination),
        layout=layout,
        tensors=len(plan),
        nbytes=total,
        files=files,
        resumed=staged.resumed,
        left_out=tuple(left_out),
        notes=(*notes, *more_notes),
    )


@contextlib.contextmanager
def resumable(
    destination: Path, identity: dict[str, Any], nbytes: int, *, force: bool
) -> Iterator[StagedFolder]:
    """A staged folder that is refused at once if it cannot fit, and that a full disk or an
    interrupt leaves to be continued: a note of the `KeyboardInterrupt` says how. That something is
    continued is told as a warning.

    Args:
        destination: what is to appear.
        identity: what the content depends on.
        nbytes: its size.
        force: replace a destination that exists.

    Raises:
        UserError: the destination exists, or another run is writing it.
        DiskFullError: fewer bytes are free than are missing, or the disk filled up.
        AccessError, MachineError: the folder cannot be made.
    """
    require_space(destination, nbytes - _size_of(StagedFolder.partial_path(destination)))
    with StagedFolder(destination, identity, force=force) as staged:
        if staged.resumed:
            logger.warning(
                "an interrupted run left %s: what it finished is not made again; delete that "
                "folder to start over",
                staged.path,
            )
        try:
            yield staged
        except KeyboardInterrupt as interrupt:
            if staged.path.exists():  # else it is complete already
                interrupt.add_note(
                    f"what is finished is kept in {staged.path}: the same command goes on from "
                    "there; delete that folder to start over"
                )
            raise
        except DiskFullError as error:
            raise DiskFullError(
                error.problem,
                remedy="free some space and run the same command again: it goes on from what is "
                f"finished, which is kept in {staged.path}",
            ) from error


def config_json(config: ErnieConfig, layout: str) -> dict[str, Any]:
    """The content of `config.json`: Hugging Face's spelling, or that of layout "paddle".

    Paddle's readers tell their own folders from others by `dtype` in place of `torch_dtype`, and
    apply the correction bias where `moe_use_aux_free` says so.
    """
    raw = to_hf(config)
    if layout == "paddle":
        for key in ("torch_dtype", "transformers_version", "rope_parameters"):
            raw.pop(key, None)
        raw |= {"dtype": config.dtype, "rope_theta": config.rope_theta}
        if config.is_moe:
            raw["moe_use_aux_free"] = True
    return raw


def _main_dtype(plan: Sequence[PlannedTensor]) -> str | None:
    sizes: dict[str, int] = {}
    for tensor in plan:
        sizes[tensor.codec.name] = sizes.get(tensor.codec.name, 0) + tensor.nbytes
    return _DTYPES.get(max(sizes, key=lambda name: sizes[name])) if sizes else None


def _size_of(folder: Path) -> int:
    """Bytes in the files of a folder; 0 if there is none."""
    with machine_errors(folder, "reading"):
        if not folder.is_dir():
            return 0
        return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
