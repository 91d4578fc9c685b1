"""What all tests share: where the published data lies, if it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published goldens, tokenizers and tiny models beside the checkout."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("the folder ../shared with published goldens is not beside this checkout")
    return _SHARED
