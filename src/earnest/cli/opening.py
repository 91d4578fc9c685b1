"""How every verb turns the MODEL it was given into an opened checkpoint."""

from __future__ import annotations

from earnest import hub
from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.cli.terminal import notice
from earnest.log import Progress


def opened(model: str, progress: Progress, *, allow_missing_correction_bias: bool) -> Checkpoint:
    """Find MODEL (a path or a built-in name, fetched if need be) and open it."""
    path = hub.locate(model, progress=progress, notice=notice)
    return open_checkpoint(path, allow_missing_correction_bias=allow_missing_correction_bias)
