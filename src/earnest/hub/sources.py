"""From what a person types as MODEL to a file or folder on this machine."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from earnest import env
from earnest.errors import AccessError, EarnestError, ModelNotFoundError
from earnest.files import machine_errors
from earnest.hub.carried import SMOLLM2, fetched
from earnest.hub.download import pulled
from earnest.log import Progress, logger, silent

BUILTIN = {
    "smollm2": "SmolLM2-135M-Instruct (Q4_1, 98 MB), a small chat model; fetched on first use",
    "stories": "260 thousand parameters that tell children's stories; part of the package",
}

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(
    model: str,
    *,
    progress: Progress = silent,
    notice: Callable[[str], None] = logger.warning,
) -> Path:
    """Find a model.

    Args:
        model: a built-in name (`BUILTIN`; to open a file of the same name write ./name), a path,
            or the name of a repository that `pull` has put into the cache.
        progress: told how far fetching is, in bytes.
        notice: told in a sentence what is being fetched and why.

    Raises:
        ModelNotFoundError: it is none of these; says what comes close.
        NetworkError, MissingPackageError, DiskFullError, AccessError, MachineError: a built-in
            model cannot be fetched.
    """
    if model == "smollm2":
        return fetched(SMOLLM2, env.cache_dir() / "smollm2", progress=progress, notice=notice)
    if model == "stories":
        return _packaged("stories")
    path = _path(model)
    if path is not None and _exists(path):
        return path
    if _REPO.fullmatch(model) and (found := pulled(model)):
        return found
    raise _not_found(model, path)


def _packaged(name: str) -> Path:
    folder = Path(str(importlib.resources.files("earnest.hub") / name))
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"the built-in model {name} is not part of this installation",
            remedy="reinstall Earnest from an unpacked wheel",
        )
    return folder


def _path(model: str) -> Path | None:
    """`model` as a path, if it can be one."""
    if not model or "\0" in model:
        return None
    path = Path(model)
    try:
        return path.expanduser()
    except RuntimeError:  # ~name of nobody on this machine
        return path


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except PermissionError as error:
        raise AccessError(
            f"{path} cannot be looked at: permission denied",
            remedy="check the permissions of the folders above it",
        ) from error
    except OSError:  # not there, too long for a name, a loop of links
        return False
    return True


def _not_found(model: str, path: Path | None) -> ModelNotFoundError:
    shown = model if len(model) <= 200 else model[:200] + "..."
    remedies = [f"name a file or folder, or one of {', '.join(BUILTIN)}"]
    if close := _close_names(model, path):
        remedies.append(f"did you mean {' or '.join(close)}?")
    if _REPO.fullmatch(model):
        remedies.append(
            f"if it is a repository on the Hugging Face hub, first run: earnest pull {model}"
        )
    return ModelNotFoundError(f"there is no model {shown!r}", remedy="; ".join(remedies))


def _close_names(model: str, path: Path | None) -> list[str]:
    """Built-in names, and neighbours of a path that is not there, that look like it."""
    found = difflib.get_close_matches(model.lower(), BUILTIN, n=1, cutoff=0.6)
    if path is None or not path.name:
        return found
    try:
        with machine_errors(path.parent, "reading"):
            names = [entry.name for entry in islice(path.parent.iterdir(), 10_000)]
    except EarnestError:
        return found  # only a suggestion; what was asked for is reported by the caller
    near = difflib.get_close_matches(path.name, names, n=2, cutoff=0.7)
    return found + [str(path.with_name(name)) for name in near]
