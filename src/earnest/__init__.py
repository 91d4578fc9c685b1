"""ERNIE 4.5, in earnest.

>>> import earnest
>>> model = earnest.load("stories")
>>> model.generate("Once upon a time", earnest.SamplingParams(temperature=0)).text

The names below are fetched on first use, so that `import earnest` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earnest.checkpoint import open_checkpoint
    from earnest.config import ErnieConfig
    from earnest.engine import Completion, LanguageModel, SamplingParams, TokenEvent, load

    __version__: str

__all__ = [
    "Completion",
    "ErnieConfig",
    "LanguageModel",
    "SamplingParams",
    "TokenEvent",
    "__version__",
    "load",
    "open_checkpoint",
]

_ROOMS = {
    "Completion": "earnest.engine",
    "ErnieConfig": "earnest.config",
    "LanguageModel": "earnest.engine",
    "SamplingParams": "earnest.engine",
    "TokenEvent": "earnest.engine",
    "load": "earnest.engine",
    "open_checkpoint": "earnest.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("earnest")
    elif name in _ROOMS:
        value = getattr(importlib.import_module(_ROOMS[name]), name)
    else:
        raise AttributeError(f"module 'earnest' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
