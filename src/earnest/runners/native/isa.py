"""Which instruction-set tier the kernels run in, and what is lost where there are no kernels."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from types import FrameType
from typing import Any

from earnest import compiled, env
from earnest.errors import MissingKernelsWarning, MissingPackageError, UserError

WITHOUT_KERNELS = (
    "earnest was installed without its compiled kernels\n"
    "  costs:    models run in numpy, tens of times slower and with several times the memory\n"
    "  reasons:  there was no compiler for C++20, compiling failed, or EARNEST_NO_NATIVE was set\n"
    "  to do:    install a C++ compiler (Debian: apt install g++; macOS: xcode-select --install),\n"
    "            unset EARNEST_NO_NATIVE and, in Earnest's checkout:\n"
    "              pip install --force-reinstall --no-deps -v .\n"
    "            where -v shows why compiling failed, if it does so again"
)


def installed() -> bool:
    """Whether this installation has the compiled kernels."""
    return compiled.module() is not None


@cache
def warn_without_kernels() -> bool:
    """Say once, if there are no kernels, what that costs and how to mend it; True if so."""
    if installed():
        return False
    warnings.warn(WITHOUT_KERNELS, MissingKernelsWarning, stacklevel=_levels_to_the_caller())
    return True


def _levels_to_the_caller() -> int:
    """How many calls back, seen from who asks, code of somebody else's called Earnest."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith("earnest."):
        frame, level = frame.f_back, level + 1
    return level


def native() -> Any:
    """The compiled module.

    Raises:
        MissingPackageError: this installation has none.
    """
    module = compiled.module()
    if module is None:
        raise MissingPackageError(WITHOUT_KERNELS)
    return module


def compiled_tiers() -> list[str]:
    """Every tier of this build, lowest first."""
    return list(native().compiled_tiers())


def available_tiers() -> list[str]:
    """The tiers that this processor and operating system can run, lowest first."""
    return list(native().available_tiers())


def tier() -> str:
    """The tier in use: the best available, or a lower one named by `EARNEST_ISA`.

    Raises:
        UserError: `EARNEST_ISA` names no tier of this build, or one that this machine cannot run.
        MissingPackageError: there are no compiled kernels.
    """
    available = available_tiers()
    cap = env.isa_cap()
    if cap is None:
        return available[-1]
    if cap not in available:
        raise UserError(
            "EARNEST_ISA names no instruction-set tier that can be used here",
            got=cap,
            expected="one of: " + ", ".join(available),
            remedy="the variable can only lower the tier; unset it to use the best",
        )
    return cap
