"""From MODEL to a path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from earnest import hub
from earnest.errors import AccessError, ModelNotFoundError, NetworkError
from earnest.hub import sources
from earnest.hub.carried import SMOLLM2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EARNEST_CACHE", str(folder))
    return folder


def test_built_in_names() -> None:
    assert set(hub.BUILTIN) == {"smollm2", "stories"}


def test_smollm2_is_fetched_into_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fetched(carried, folder, *, progress, notice) -> Path:
        seen.append((carried, folder))
        return folder / "model.gguf"

    monkeypatch.setattr(sources, "fetched", fetched)
    assert hub.locate("smollm2") == cache / "smollm2" / "model.gguf"
    assert seen == [(SMOLLM2, cache / "smollm2")]


def test_smollm2_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARNEST_OFFLINE", "1")
    with pytest.raises(NetworkError, match="EARNEST_OFFLINE"):
        hub.locate("smollm2")
    assert not cache.exists()


def test_stories_come_with_the_package() -> None:
    folder = hub.locate("stories")
    assert {"config.json", "model.safetensors", "LICENSE"} <= {p.name for p in folder.iterdir()}


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "smollm2").mkdir()
    assert hub.locate(str(tmp_path)) == tmp_path
    assert hub.locate("model.gguf") == Path("model.gguf")
    assert hub.locate("owner/name") == Path("owner/name")
    assert hub.locate("./smollm2") == Path("smollm2")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.locate("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize("model", ["", "nowhere", "a\0b", "x" * 5000, "~nobody-here/x", "a/b/c"])
def test_what_is_not_there(cache: Path, model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        hub.locate(model)
    assert all(name in str(caught.value) for name in hub.BUILTIN)
    assert "earnest pull" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_close_names_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "ERNIE-4.5-0.3B-PT").mkdir()
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2"):
        hub.locate("smolm2")
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*ERNIE-4\.5-0\.3B-PT\?"):
        hub.locate(str(tmp_path / "ERNIE-4.5-0.3b-PT"))


def test_a_repository_name_is_recognised(cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"earnest pull baidu/ERNIE-4\.5-0\.3B-PT"):
        hub.locate("baidu/ERNIE-4.5-0.3B-PT")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_path_that_must_not_be_looked_at(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        with pytest.raises(AccessError):
            hub.locate(str(closed / "model"))
    finally:
        closed.chmod(0o700)
