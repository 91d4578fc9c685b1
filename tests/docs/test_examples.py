"""Every block of the pages about serving runs as it stands, against a real server."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import stories_server

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("serve", "clients", "python")
# What the pages say, and what stands in its place.
_HOST, _MODEL = "127.0.0.1:8000", "smollm2"
# Curl as the pages have it is silent about errors: here they must not pass.
_SHELL = 'curl() { command curl --silent --show-error --fail-with-body "$@" && echo; }\n'


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        where: page and line.
        language: its first word.
        why_not: the reason that the page gives for not running it; "": it runs.
    """

    where: str
    language: str
    why_not: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        _, marked, reason = match[2].partition("not run:")
        assert not marked or reason.strip(), f"docs/{page}.md:{line} gives no reason"
        found.append(Block(f"docs/{page}.md:{line}", match[1], reason.strip(), match[3]))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stories_server.Process]:
    folder = stories_server.with_template(tmp_path_factory.mktemp("model") / _MODEL)
    process = stories_server.Process(folder)
    yield process
    assert process.end() == 0


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, server: stories_server.Process, tmp_path: Path) -> None:
    for needed in ("bash", "curl", "openssl"):
        if shutil.which(needed) is None:
            pytest.skip(f"the examples need {needed}")
    here = _workplace(tmp_path, server.model)
    ran = 0
    for block in blocks(page):
        if block.why_not or block.language not in ("sh", "python"):
            continue
        code = block.code.replace(_HOST, server.url.removeprefix("http://"))
        if block.language == "python":
            code = code.replace(f'load("{_MODEL}")', f"load({str(server.model)!r})")
            done = _run([sys.executable, "-c", code], here)
        else:
            commands, serving = _parted(code)
            done = _run(["bash", "-euo", "pipefail", "-c", _SHELL + commands], here)
            if serving:
                _serve(serving, server.model, here, block.where)
        assert done.returncode == 0, f"{block.where}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert done.stdout.strip() or block.language == "sh", f"{block.where} says nothing"
        ran += 1
    assert ran


def test_what_runs_nowhere_has_a_reason() -> None:
    assert all(block.why_not for block in blocks("ray") if block.language in ("sh", "python"))


def _workplace(folder: Path, model: Path) -> Path:
    """A folder where `earnest` is this source, and where examples may leave their files."""
    tools = folder / "bin"
    tools.mkdir()
    tool = tools / "earnest"
    tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m earnest "$@"\n')
    tool.chmod(0o755)
    return folder


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def _parted(code: str) -> tuple[str, list[str]]:
    """The commands that come to an end, and the arguments of the one that serves, if there is."""
    lines = code.replace("\\\n", " ").splitlines()
    serving = [line for line in lines if line.startswith("earnest serve ")]
    assert len(serving) <= 1 and (not serving or lines[-1] == serving[0])
    return "\n".join(line for line in lines if line not in serving), [
        argument for line in serving for argument in shlex.split(line)[2:]
    ]


def _serve(arguments: list[str], model: Path, folder: Path, where: str) -> None:
    assert arguments[0] == _MODEL
    process = stories_server.Process(model, *arguments[1:], folder=folder)
    assert process.url, where
    assert process.end() == 0, where


@pytest.mark.parametrize("block", blocks("editors"), ids=lambda block: block.where)
def test_settings_are_what_they_say(block: Block, server: stories_server.Process) -> None:
    line = int(block.where.rsplit(":", 1)[1]) - 1
    info = (DOCS / "editors.md").read_text(encoding="utf-8").splitlines()[line]
    asks = re.search(r"asks=(\S+)", info)
    assert asks, f"{block.where} does not say what it asks for"
    values = list(stories_server.texts(stories_server.parsed(block.language, block.code)))
    bases = [value for value in values if value.startswith("http")]
    assert bases and all(base.startswith(f"http://{_HOST}") for base in bases)
    assert block.language == "ini" or any(v.split("/")[-1] == _MODEL for v in values)
    routes = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    paths = [base.removeprefix(f"http://{_HOST}") for base in bases]
    for asked in asks[1].split(","):
        assert any(path + asked in routes for path in paths), (block.where, asked)
    for path in paths:
        assert any(path + asked in routes for asked in asks[1].split(",")), (block.where, path)
