"""The compiled module `_native`, where this installation has it; others wrap what it can."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def module() -> Any | None:
    """`earnest._native`, or None where it was not built."""
    try:
        return importlib.import_module("earnest._native")
    except ModuleNotFoundError as missing:
        if missing.name != "earnest._native":
            raise
        return None
