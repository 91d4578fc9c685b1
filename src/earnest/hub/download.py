"""`pull`: download a checkpoint from the Hugging Face hub, resumable and checked.

huggingface_hub finds the endpoint, the token and the redirects; which files, where they go and
what a broken download leaves is decided here (its own cache throws partial files away, and a shard
has gigabytes). Files are collected in a partial folder that gets its name when all are whole: a
file being fetched is `NAME.incomplete`, the next pull of the same revision asks only for what is
missing, and every file is checked against the hash that the hub lists: sha256 for large ones, git's
for the others.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from earnest import env
from earnest.errors import (
    AccessError,
    EarnestError,
    FormatError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from earnest.files import StagedFolder, machine_errors, read_json, require_space, write_json
from earnest.hub.lock import exclusive
from earnest.log import Progress, logger, silent

# What Earnest reads, and what tells a person whose work it is. Weights beside these are listed
# below, so that a repository with the same weights in three formats is fetched once.
WANTED = (
    "config.json", "generation_config.json", "configuration.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "tokenizer*", "vocab.json", "merges.txt",
    "*.model", "*.jinja", "*.safetensors.index.json", "README*", "LICENSE*", "NOTICE*",
)  # fmt: skip
# Formats that run code when they are opened, or that nothing here reads.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".pdparams", ".msgpack", ".h5")

_NOTE = ".earnest-pull.json"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MARGIN = 50 * 10**6


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: path inside the repository.
        size: bytes.
        sha256: of the content, for files in large-file storage.
        git_sha1: git's name of the blob, for the others.
    """

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None


def pull(
    repo: str,
    *,
    revision: str | None = None,
    destination: Path | None = None,
    files: Sequence[str] = (),
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Download a repository's checkpoint; what an earlier, broken pull got is not asked for again.

    Args:
        repo: `owner/name`.
        revision: branch, tag or commit; by default the main branch.
        destination: the folder to make; by default one in the cache, where `locate(repo)` finds
            it. A folder that an earlier pull of the same commit made is completed.
        files: shell patterns; by default what Earnest reads, with all safetensors files or, where
            there are none, the only GGUF model.
        endpoint: another hub; by default what the `HF_ENDPOINT` variable says.
        token: by default what huggingface_hub finds (`HF_TOKEN`, or the stored one).
        progress: told about bytes of all files together.

    Returns:
        The folder.

    Raises:
        UserError: a malformed name, patterns that match nothing or pickled weights, a choice of
            several GGUF models, a destination that holds something else.
        ModelNotFoundError: no such repository or revision.
        AccessError: gated or private, or the folder cannot be written.
        NetworkError: the hub cannot be reached, or `EARNEST_OFFLINE` forbids it.
        FormatError: what came is not what the hub listed.
        DiskFullError, MachineError: it cannot be stored.
    """
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UserError(f"{repo!r} is no repository", expected="owner/name")
    if env.offline():
        raise NetworkError(
            f"{repo} cannot be pulled: EARNEST_OFFLINE=1", remedy="unset EARNEST_OFFLINE"
        )
    hub = _Hub(repo, revision, endpoint, token)
    commit, listed = hub.listing()
    wanted = choose(repo, listed, files)
    folder = _cache_folder(repo) / commit if destination is None else destination
    lock = folder.with_name(f".{folder.name}.lock")
    with exclusive(lock, lambda: logger.warning("another process is pulling %s; waiting", repo)):
        if _holds(folder, repo, commit):
            _fetch_all(hub, commit, wanted, folder, progress)
        else:
            staged = StagedFolder(folder, {"repo": repo, "commit": commit})
            _fetch_all(hub, commit, wanted, staged.path, progress)
            staged.commit()
    return folder


def pulled(repo: str) -> Path | None:
    """The folder in the cache with the revision of `repo` pulled last; None if none was."""
    notes = _cache_folder(repo).glob(f"[!.]*/{_NOTE}")
    with contextlib.suppress(OSError):
        if found := [(note.stat().st_mtime, note.parent) for note in notes]:
            return max(found)[1]
    return None


def choose(repo: str, listed: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    """The files to fetch.

    Raises:
        UserError: nothing matches, nothing can be opened, or there is a choice to make.
    """
    if patterns:
        found = [f for f in listed if any(fnmatch.fnmatchcase(f.name, p) for p in patterns)]
        if not found:
            raise UserError(
                f"no file of {repo} matches {', '.join(patterns)}", expected=_names(listed)
            )
        if pickled := [f for f in found if f.name.endswith(_PICKLED)]:
            raise UserError(
                "pickled weights can run any program when opened and are never fetched",
                got=_names(pickled),
                remedy="choose safetensors or GGUF files",
            )
        return found
    top = [file for file in listed if "/" not in file.name]
    texts = [f for f in top if any(fnmatch.fnmatchcase(f.name, p) for p in WANTED)]
    weights = [f for f in top if f.name.endswith(".safetensors")]
    if not weights:
        weights = _only_gguf(repo, listed)
    chosen = {file.name: file for file in [*texts, *weights]}
    return [file for name, file in chosen.items() if not name.endswith(_PICKLED)]


def _only_gguf(repo: str, listed: Sequence[RemoteFile]) -> list[RemoteFile]:
    found = [file for file in listed if file.name.endswith(".gguf")]
    models: dict[str, list[RemoteFile]] = {}
    for file in found:
        whole = re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", file.name)
        models.setdefault(whole, []).append(file)
    if not models:
        raise UserError(
            f"{repo} has no weights that Earnest opens",
            got=_names(listed),
            expected="safetensors or GGUF files",
        )
    if len(models) > 1:
        raise UserError(
            f"{repo} has {len(models)} GGUF models; one must be chosen",
            got=_names(found),
            remedy=f'pass --file, for example --file "{min(models)}"',
        )
    return found


def _names(files: Sequence[RemoteFile]) -> str:
    shown = ", ".join(f"{file.name} ({file.size / 1e6:,.1f} MB)" for file in files[:12])
    return shown + (f" and {len(files) - 12} more" if len(files) > 12 else "")


def _cache_folder(repo: str) -> Path:
    return env.cache_dir() / "hub" / repo.replace("/", "--")


def _holds(folder: Path, repo: str, commit: str) -> bool:
    """Whether an earlier pull of this commit made the folder.

    Raises:
        UserError: it holds another commit, or something else.
    """
    note = folder / _NOTE
    with machine_errors(folder, "reading"):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        if not note.is_file():
            raise UserError(
                f"{folder} exists already, and not from a pull",
                remedy="choose another destination",
            )
    found = read_json(note, 2**20)
    if (found.get("repo"), found.get("commit")) != (repo, commit):
        raise UserError(
            f"{folder} holds another download",
            got=f"{found.get('repo')} at {found.get('commit')}",
            expected=f"{repo} at {commit}",
            remedy="choose another destination, or remove the folder",
        )
    return True


def _fetch_all(
    hub: _Hub, commit: str, wanted: Sequence[RemoteFile], folder: Path, progress: Progress
) -> None:
    """Complete `folder`: every wanted file, whole and checked, and the note that says so."""
    total = sum(file.size for file in wanted)
    present = {file.name: _present(folder, file) for file in wanted}
    done = sum(present.values())
    require_space(folder, total - done + _MARGIN if done < total else 0)
    progress(done, total, hub.repo)
    for file in wanted:
        if present[file.name] == file.size and (folder / file.name).exists():
            continue
        done -= present[file.name]
        _fetch(hub, commit, file, folder, _Counter(progress, done, total, file.name))
        done += file.size
    # Of files that an earlier, broken pull wanted and this one does not.
    for leftover in set(folder.rglob("*.incomplete")) - {folder / file.name for file in wanted}:
        leftover.unlink(missing_ok=True)
    write_json(folder / _NOTE, {"repo": hub.repo, "commit": commit})
    progress(total, total, hub.repo)


def _present(folder: Path, file: RemoteFile) -> int:
    """Bytes of `file` that are there, whole or incomplete; what cannot be right is removed."""
    for path in (folder / file.name, _incomplete(folder, file)):
        with machine_errors(path, "reading"):
            if not path.is_file():
                continue
            size = path.stat().st_size
            if size == file.size or (path.name.endswith(".incomplete") and size < file.size):
                return size
            path.unlink()
    return 0


def _incomplete(folder: Path, file: RemoteFile) -> Path:
    return folder / f"{file.name}.incomplete"


@dataclass
class _Counter:
    """Turns bytes of one file into progress over all of them."""

    progress: Progress
    before: int
    total: int
    name: str

    def at(self, position: int) -> None:
        self.progress(min(self.before + position, self.total), self.total, self.name)


def _fetch(hub: _Hub, commit: str, file: RemoteFile, folder: Path, counter: _Counter) -> None:
    """Fetch one file, from where an earlier attempt stopped."""
    target, partial = folder / file.name, _incomplete(folder, file)
    with machine_errors(partial, "writing"):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as output:
            begun = output.tell()
            if begun < file.size:
                hub.download(commit, file, _Watched(output, partial, counter), begun)
            output.flush()
        found = partial.stat().st_size
        if found < file.size:
            raise NetworkError(
                f"{file.name} ended early",
                got=f"{found:,} bytes",
                expected=f"{file.size:,}",
                remedy="run the same command again; it goes on where it stopped",
            )
        if not _is_right(partial, file):
            partial.unlink()
            raise FormatError(
                f"{file.name} does not have the hash that the hub lists; it was thrown away",
                got=f"{found:,} bytes",
                expected=f"{file.size:,} bytes, {file.sha256 or file.git_sha1}",
                remedy="run the same command again; if it happens again, the repository or a "
                "proxy is at fault",
            )
        partial.replace(target)


def _is_right(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        with path.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest() == file.sha256
    if file.git_sha1:
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as data:
            while block := data.read(2**20):
                digest.update(block)
        return digest.hexdigest() == file.git_sha1
    return True


class _Watched:
    """A binary file that reports its length; disk errors become typed ones at once, so that they
    are not taken for errors of the network."""

    def __init__(self, file: IO[bytes], path: Path, counter: _Counter):
        self._file, self._path, self._counter = file, path, counter

    def write(self, data: bytes) -> int:
        with machine_errors(self._path, "writing"):
            count = self._file.write(data)
        self._counter.at(self._file.tell())
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Hub:
    """The few things asked of the hub, with its errors turned into typed ones."""

    def __init__(self, repo: str, revision: str | None, endpoint: str | None, token: str | None):
        self.repo, self.revision, self.endpoint, self.token = repo, revision, endpoint, token

    def listing(self) -> tuple[str, list[RemoteFile]]:
        """The commit that the revision names, and its files."""
        from huggingface_hub import HfApi

        with self._typed_errors():
            api = HfApi(endpoint=self.endpoint, token=self.token, library_name="earnest")
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True)
        commit = info.sha or ""
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise FormatError(f"the hub names no commit of {self.repo}", got=repr(commit)[:80])
        return commit, [_remote_file(sibling) for sibling in info.siblings or []]

    def download(self, commit: str, file: RemoteFile, output: _Watched, begun: int) -> None:
        """Append the bytes of `file` from `begun` on to `output`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repo, file.name, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token, library_name="earnest")
        # Compressed transfer would make lengths and ranges those of the compressed stream.
        headers["Accept-Encoding"] = "identity"
        with self._typed_errors(), _no_bars():
            http_get(
                url,
                output,  # type: ignore[arg-type]  # what it uses of a file is there
                resume_size=begun,
                headers=headers,
                expected_size=file.size,
            )

    @contextlib.contextmanager
    def _typed_errors(self) -> Iterator[None]:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        # The HTTP library below differs between versions; this is the root of its errors.
        transport: Any = HfHubHTTPError.__mro__[1]
        page = f"https://huggingface.co/{self.repo}"
        try:
            yield
        except EarnestError:
            raise
        except GatedRepoError as error:
            raise AccessError(
                f"{self.repo} is gated: its owner wants conditions accepted first",
                remedy=f"accept them on {page}, then set HF_TOKEN to a token of that account",
            ) from error
        except RevisionNotFoundError as error:
            raise ModelNotFoundError(
                f"{self.repo} has no revision {self.revision}", remedy=f"see {page}/tree/main"
            ) from error
        except RepositoryNotFoundError as error:
            raise ModelNotFoundError(
                f"the hub has no repository {self.repo}, or does not show it to you",
                remedy="check the spelling; for a private one set HF_TOKEN",
            ) from error
        except OfflineModeIsEnabled as error:
            raise NetworkError(
                f"{self.repo} cannot be pulled: HF_HUB_OFFLINE is set", remedy="unset it"
            ) from error
        except HfHubHTTPError as error:
            raise self._http_error(error) from error
        except (transport, OSError, ValueError) as error:
            raise NetworkError(
                f"the hub could not be reached or broke off for {self.repo}",
                got=str(error).strip().partition("\n")[0][:200] or type(error).__name__,
                remedy="check the network (and HF_ENDPOINT), then run the same command again; "
                "it goes on where it stopped",
            ) from error

    def _http_error(self, error: Any) -> EarnestError:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return AccessError(
                f"the hub denies access to {self.repo}",
                got=f"HTTP status {status}",
                remedy="set HF_TOKEN to a token that may read it",
            )
        return NetworkError(
            f"the hub did not answer for {self.repo} as it should",
            got=f"HTTP status {status}",
            remedy="wait a moment, then run the same command again; it goes on where it stopped",
        )


def _remote_file(sibling: Any) -> RemoteFile:
    """One entry of the hub's listing. The hub is not trusted with paths on this machine."""
    name, size = sibling.rfilename, sibling.size
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if (
        not parts
        or name != "/".join(parts)
        or any(part in ("..", ".") or set(part) & set("\\:\0") for part in parts)
        or isinstance(size, bool)
        or not isinstance(size, int)
        or size < 0
    ):
        raise FormatError("the hub lists a file that cannot be", got=f"{name!r}"[:120])
    lfs = sibling.lfs
    return RemoteFile(
        name,
        lfs.size if lfs is not None else size,
        lfs.sha256 if lfs is not None else None,
        sibling.blob_id if lfs is None else None,
    )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing its own progress bars."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
