"""Pulling from a hub, against one that runs in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, Repository

from earnest import hub as room
from earnest.errors import (
    AccessError,
    DiskFullError,
    EarnestError,
    FormatError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)

REPO = "baidu/ERNIE-4.5-TEST-PT"
SHARD = bytes(range(256)) * 4000
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": "模型".encode(),
    "LICENSE": b"Apache-2.0",
    "config.json": b'{"model_type": "ernie4_5"}',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": SHARD[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.model": b"\x0a" * 20_000,
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "modeling_ernie4_5.py": b"import os",
    "original/model.safetensors": b"another format",
    "figures/benchmark.png": b"png",
}
WANTED = {
    "README.md",
    "LICENSE",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("EARNEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # What huggingface_hub holds back before it writes, and loses when the line breaks: 10 MB.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    with FakeHub({REPO: Repository(dict(FILES))}) as server:
        yield server


def names(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".earnest-pull.json"
    }


def test_what_is_needed_is_fetched_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = room.pull(
        REPO,
        destination=tmp_path / "out",
        endpoint=hub.url,
        progress=lambda done, total, what: seen.append((done, total, what)),
    )
    assert folder == tmp_path / "out"
    assert names(folder) == WANTED
    for name in WANTED:
        assert (folder / name).read_bytes() == FILES[name]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == ["out"]
    total = sum(len(FILES[name]) for name in WANTED)
    assert seen[-1][:2] == (total, total)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_the_cache_is_the_default_and_locate_finds_it(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        room.locate(REPO)
    folder = room.pull(REPO, endpoint=hub.url)
    assert tmp_path / "cache" in folder.parents
    assert room.locate(REPO) == folder
    asked = len(hub.requests)
    assert room.pull(REPO, endpoint=hub.url) == folder
    assert len(hub.requests) == asked + 1  # the listing

    hub.repositories[REPO].commit = "f" * 40
    hub.repositories[REPO].files["README.md"] = b"newer"
    newer = room.pull(REPO, endpoint=hub.url)
    assert newer != folder
    assert room.locate(REPO) == newer
    assert (folder / "README.md").read_bytes() == FILES["README.md"]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.model"])
def test_a_broken_download_is_resumed(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.cut[name] = 12_345
    with pytest.raises(NetworkError, match="goes on where it stopped"):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert not (tmp_path / "out").exists()

    hub.down = False
    hub.requests.clear()
    seen: list[int] = []
    folder = room.pull(
        REPO,
        destination=tmp_path / "out",
        endpoint=hub.url,
        progress=lambda done, total, what: seen.append(done),
    )
    assert names(folder) == WANTED
    assert (folder / name).read_bytes() == FILES[name]
    assert set(hub.asked(name)) == {"bytes=12000-"}
    assert hub.asked("config.json") == []  # it was whole already
    assert seen[0] >= 12_000


def test_a_line_that_drops_once_is_picked_up_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut["model-00001-of-00002.safetensors"] = 5000

    # The server comes back before the client asks again.
    original = hub._file

    def recover(request, name, data, body):
        original(request, name, data, body)
        hub.down = False

    hub._file = recover  # type: ignore[method-assign]
    folder = room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == SHARD
    assert "bytes=5000-" in hub.asked("model-00001-of-00002.safetensors")


def test_a_server_that_ignores_ranges(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut["model-00001-of-00002.safetensors"] = 5000
    with pytest.raises(NetworkError):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    hub.down, hub.ignore_ranges = False, True
    folder = room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == SHARD


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_wrong_bytes_are_thrown_away(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.flipped.add(name)
    with pytest.raises(FormatError, match=name):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert not (tmp_path / "out").exists()
    hub.flipped.clear()
    folder = room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert (folder / name).read_bytes() == FILES[name]


def test_another_revision_does_not_mix_with_a_broken_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut["model-00001-of-00002.safetensors"] = 5000
    with pytest.raises(NetworkError):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    hub.down = False
    hub.repositories[REPO].commit = "f" * 40
    hub.repositories[REPO].files["model-00001-of-00002.safetensors"] = SHARD[1:] + b"x"
    hub.requests.clear()
    folder = room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == SHARD[1:] + b"x"
    assert set(hub.asked("model-00001-of-00002.safetensors")) == {None}


def test_revisions(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[REPO].revisions = ("main", "v1.0")
    room.pull(REPO, revision="v1.0", destination=tmp_path / "a", endpoint=hub.url)
    room.pull(REPO, revision=COMMIT, destination=tmp_path / "b", endpoint=hub.url)
    with pytest.raises(ModelNotFoundError, match=r"v2\.0"):
        room.pull(REPO, revision="v2.0", destination=tmp_path / "c", endpoint=hub.url)


# --- which files ------------------------------------------------------------------------------

GGUF = "someone/ERNIE-4.5-TEST-GGUF"


def gguf_repository(hub: FakeHub, *files: str) -> None:
    hub.repositories[GGUF] = Repository({name: name.encode() for name in ("README.md", *files)})


def test_the_only_gguf_is_taken(hub: FakeHub, tmp_path: Path) -> None:
    gguf_repository(hub, "model-00001-of-00002.gguf", "model-00002-of-00002.gguf")
    folder = room.pull(GGUF, destination=tmp_path / "out", endpoint=hub.url)
    assert len(names(folder)) == 3


def test_one_of_several_ggufs_must_be_chosen(hub: FakeHub, tmp_path: Path) -> None:
    gguf_repository(hub, "model-Q4_0.gguf", "model-Q8_0.gguf", "BF16/model.gguf")
    with pytest.raises(UserError) as caught:
        room.pull(GGUF, destination=tmp_path / "out", endpoint=hub.url)
    for word in ("model-Q4_0.gguf", "model-Q8_0.gguf", "--file"):
        assert word in str(caught.value)
    folder = room.pull(GGUF, destination=tmp_path / "out", endpoint=hub.url, files=["*Q4_0.gguf"])
    assert names(folder) == {"model-Q4_0.gguf"}
    # The same folder can be completed with another file of the same commit.
    room.pull(GGUF, destination=tmp_path / "out", endpoint=hub.url, files=["BF16/*"])
    assert names(folder) == {"model-Q4_0.gguf", "BF16/model.gguf"}


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "no weights"),
        ({}, "no weights"),
    ],
)
def test_repositories_without_weights(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes], pattern: str
) -> None:
    hub.repositories[REPO].files = files
    with pytest.raises(UserError, match=pattern):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)


def test_patterns(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pickled"):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url, files=["*.bin"])
    with pytest.raises(UserError, match=r"config\.json"):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url, files=["*.gguf"])
    folder = room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url, files=["original/*"])
    assert names(folder) == {"original/model.safetensors"}


@pytest.mark.parametrize(
    "name", ["../evil.gguf", "/etc/evil.gguf", "a/../b.gguf", "a\\b.gguf", "C:b.gguf", "", "a//b"]
)
def test_a_hub_cannot_write_outside_the_folder(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.extra_entries = [{"rfilename": name, "size": 4, "blobId": "0" * 40}]
    with pytest.raises(FormatError, match="cannot be"):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["ernie", "a/b/c", "../x", "a/..", "a b/c", "", "https://x/y"])
def test_malformed_names(hub: FakeHub, repo: str) -> None:
    with pytest.raises(UserError, match="owner/name"):
        room.pull(repo, endpoint=hub.url)
    assert hub.requests == []


def test_an_unknown_repository(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="spelling"):
        room.pull("baidu/ERNIE-5", endpoint=hub.url)


def test_private_and_gated_repositories_and_tokens(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[REPO].private = True
    with pytest.raises(ModelNotFoundError, match="HF_TOKEN"):
        room.pull(REPO, destination=tmp_path / "a", endpoint=hub.url)
    hub.repositories[REPO].private, hub.repositories[REPO].gated = False, True
    with pytest.raises(AccessError, match="accept"):
        room.pull(REPO, destination=tmp_path / "a", endpoint=hub.url)
    room.pull(REPO, destination=tmp_path / "a", endpoint=hub.url, token="hf_secret")
    assert "Bearer hf_secret" in hub.tokens
    assert b"hf_secret" not in (tmp_path / "a" / ".earnest-pull.json").read_bytes()


def test_no_hub_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARNEST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NetworkError, match="HF_ENDPOINT"):
        room.pull(REPO, endpoint="http://127.0.0.1:9")


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARNEST_OFFLINE", "1")
    with pytest.raises(NetworkError, match="EARNEST_OFFLINE"):
        room.pull(REPO, endpoint=hub.url)
    assert hub.requests == []


def test_what_is_there_already_stays(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "dear"
    folder = room.pull(REPO, destination=tmp_path / "new", endpoint=hub.url)
    hub.repositories[REPO].commit = "f" * 40
    with pytest.raises(UserError, match="another download"):
        room.pull(REPO, destination=folder, endpoint=hub.url)


def test_a_full_disk_is_seen_before_anything_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.extra_entries = [
        {
            "rfilename": "model-00003.safetensors",
            "size": 2**60,
            "blobId": "0" * 40,
            "lfs": {"sha256": "0" * 64, "size": 2**60, "pointerSize": 134},
        }
    ]
    with pytest.raises(DiskFullError):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert hub.asked("config.json") == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes as a full disk would")
def test_a_disk_that_fills_meanwhile(hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from earnest import hub\n"
        "from earnest.errors import EarnestError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        f"    hub.pull({REPO!r}, destination=Path(sys.argv[1]), endpoint={hub.url!r})\n"
        "except EarnestError as error:\n"
        "    print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == DiskFullError.__name__, done.stderr
    assert not (tmp_path / "out").exists()
    # With room again the download goes on where the disk was full.
    hub.requests.clear()
    room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").read_bytes() == SHARD
    assert hub.asked("model-00001-of-00002.safetensors")[0] not in (None, "bytes=0-")


def test_the_environment_names_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """huggingface_hub reads HF_ENDPOINT when it is imported, so in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from earnest import hub\n"
        f"print(hub.pull({REPO!r}, destination=Path(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HOME": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars, no warnings
    assert names(tmp_path / "out") == WANTED
    assert "Bearer hf_secret" in hub.tokens


def test_every_failure_is_an_earnest_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.extra_entries = [{"rfilename": "x.safetensors", "size": "big", "blobId": 5}]
    with pytest.raises(EarnestError):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    hub.extra_entries = []
    hub.repositories[REPO].commit = "../../x"
    with pytest.raises(FormatError, match="commit"):
        room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)


def test_the_note_says_what_it_is(hub: FakeHub, tmp_path: Path) -> None:
    folder = room.pull(REPO, destination=tmp_path / "out", endpoint=hub.url)
    note = json.loads((folder / ".earnest-pull.json").read_text(encoding="utf-8"))
    assert note == {"repo": REPO, "commit": COMMIT}
