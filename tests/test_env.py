"""Environment variables are read in one place, documented there, and never misread in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import earnest
from earnest import env
from earnest.errors import UserError


def test_every_variable_the_source_reads_is_declared() -> None:
    source = Path(earnest.__file__).parent
    used = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r"\bEARNEST_[A-Z_]+\b", path.read_text(encoding="utf-8"))
    }
    assert used == {variable.name for variable in env.VARIABLES}


def test_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARNEST_MEMORY_GIB", "1.5")
    assert env.memory_budget() == 3 * 2**29
    monkeypatch.delenv("EARNEST_MEMORY_GIB")
    assert 0 < env.memory_budget() <= env.free_memory()


@pytest.mark.parametrize("value", ["", "lots", "-1", "nan", "inf", "1e99"])
def test_a_memory_budget_that_is_no_amount_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARNEST_MEMORY_GIB", value)
    with pytest.raises(UserError, match="EARNEST_MEMORY_GIB"):
        env.memory_budget()


def test_offline_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", True), ("", False)):
        monkeypatch.setenv("EARNEST_OFFLINE", value)
        assert env.offline() is expected
    monkeypatch.setenv("EARNEST_OFFLINE", "yes")
    with pytest.raises(UserError):
        env.offline()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EARNEST_CACHE", str(tmp_path))
    assert env.cache_dir() == tmp_path
    monkeypatch.delenv("EARNEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "earnest"
