"""The tier in use, and how it can be lowered."""

from __future__ import annotations

import pytest

from earnest import compiled
from earnest.errors import MissingPackageError, UserError
from earnest.runners.choice import RunnerChoice
from earnest.runners.native import isa, ops

needs_kernels = pytest.mark.skipif(
    not isa.installed(), reason="the compiled kernels are not installed"
)


@needs_kernels
def test_the_variable_only_lowers(monkeypatch: pytest.MonkeyPatch) -> None:
    available = isa.available_tiers()
    monkeypatch.delenv("EARNEST_ISA", raising=False)
    assert isa.tier() == available[-1]
    monkeypatch.setenv("EARNEST_ISA", "generic")
    assert isa.tier() == "generic"
    for name in [*set(isa.compiled_tiers()) - set(available), "sse9"]:
        monkeypatch.setenv("EARNEST_ISA", name)
        with pytest.raises(UserError, match="EARNEST_ISA"):
            isa.tier()


@needs_kernels
def test_tiers_are_a_ladder_from_generic() -> None:
    assert isa.available_tiers()[0] == "generic"
    assert set(isa.available_tiers()) <= set(isa.compiled_tiers())


def test_without_kernels_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    isa.warn_without_kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="without its compiled kernels") as said:
        # Through a dataclass, whose generated code is no place to point at.
        assert not RunnerChoice().native
    assert [warning.filename for warning in said] == [__file__]
    assert isa.warn_without_kernels()
    isa.warn_without_kernels.cache_clear()
    with pytest.raises(MissingPackageError, match="C\\+\\+ compiler") as caught:
        ops.usable_threads()
    for reason in ("no compiler for C++20", "compiling failed", "EARNEST_NO_NATIVE"):
        assert reason in str(caught.value)
    assert "because" not in str(caught.value), "nobody knows which"
