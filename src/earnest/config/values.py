"""Reading numbers out of untrusted metadata: each value is checked, all problems are collected.

JSON and GGUF both hand over whatever a stranger wrote: strings where integers belong, booleans
(which Python counts as integers), NaN, lists, numbers of a thousand digits. `Values` takes them
one by one under a name and remembers every complaint, so that one error can list them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from earnest.errors import ConfigError

# Far above every bound of `ErnieConfig`; keeps error messages and comparisons small.
_LARGEST = 2**62


class Values:
    """A mapping of untrusted values.

    Args:
        raw: names to values.
        origin: what to call the mapping in messages.
        problems: a list to add to, where several mappings share one.

    Attributes:
        problems: complaints so far, one sentence each.
    """

    def __init__(
        self, raw: Mapping[str, Any], origin: str, problems: list[str] | None = None
    ) -> None:
        self.raw, self.origin = raw, origin
        self.problems: list[str] = [] if problems is None else problems

    def complain(self, problem: str) -> None:
        """Remember a problem; `check` raises them together."""
        self.problems.append(problem)

    def check(self) -> None:
        """Raise what was found so far.

        Raises:
            ConfigError: there was a problem.
        """
        if self.problems:
            raise ConfigError(
                f"{self.origin} cannot be used: " + "; ".join(dict.fromkeys(self.problems)),
                remedy="compare it with the one the model was published with",
            )

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.raw.get(key) is not None

    def required(self, keys: Iterable[str], why: str = "") -> None:
        """Complain about each of `keys` that is absent or null."""
        for key in keys:
            if not self.has(key):
                self.complain(f"{key} is missing" + (f" ({why})" if why else ""))

    def integer(self, key: str, default: int = 0) -> int:
        """An integer, or `default` where the key is absent, null or wrong (then with a
        complaint). A float with an integral value is no integer: nobody writes one by intent."""
        value = self.raw.get(key)
        if value is None:
            return default
        found = as_integer(value)
        if found is None:
            self.complain(f"{key} must be an integer, got {brief(value)}")
            return default
        return found

    def number(self, key: str, default: float = 0.0) -> float:
        """A finite number, or `default` where the key is absent, null or wrong."""
        value = self.raw.get(key)
        if value is None:
            return default
        found = as_number(value)
        if found is None:
            self.complain(f"{key} must be a finite number, got {brief(value)}")
            return default
        return found

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false, or `default` where the key is absent, null or wrong."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.complain(f"{key} must be true or false, got {brief(value)}")
            return default
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string, or `default` where the key is absent, null or wrong."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.complain(f"{key} must be a string, got {brief(value)}")
            return default
        return value


def as_integer(value: object) -> int | None:
    """The integer that `value` is, or None; booleans and absurdly large integers are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    found = int(value)
    return found if abs(found) <= _LARGEST else None


def as_number(value: object) -> float | None:
    """The finite number that `value` is, or None; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def brief(value: object) -> str:
    """A value for an error message, cut to a length that a stranger cannot inflate."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        return "an absurdly large integer"
    if isinstance(value, (list, tuple, dict, set)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} entries"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
