"""What all tests share: where the published data lies, if it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# In CI the drawn examples are the same every time, so that a change is judged by itself; everywhere
# else they are fresh, and what they find becomes an @example.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Tests run beside each other (pytest -n): one thread each for the matrix products of numpy and
# torch, or they wait for one another. Must be set before either is imported.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published goldens, tokenizers and tiny models beside the checkout."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("the folder ../shared with published goldens is not beside this checkout")
    return _SHARED
