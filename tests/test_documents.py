"""The documents tell the truth: every name and path they give exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from earnest.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]


def test_every_step_of_every_journey_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    steps = re.findall(r"`([a-z_/]+\.py):([A-Za-z_.]+)`", text)
    assert len(steps) > 20
    for file, name in steps:
        path = ROOT / "src" / "earnest" / file
        assert path.is_file(), f"ARCHITECTURE.md names {file}, which does not exist"
        thing = importlib.import_module("earnest." + file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            assert hasattr(thing, part), f"ARCHITECTURE.md names {file}:{name}, not found"
            thing = getattr(thing, part)


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", text, flags=re.MULTILINE))
    package = ROOT / "src" / "earnest"
    present = {
        path.name + ("/" if path.is_dir() else "")
        for path in package.iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert named == present


def test_the_readme_opens_with_exactly_two_set_up_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    assert all(len(block.strip().splitlines()) == 1 for block in blocks)


@pytest.mark.parametrize("verb", VERBS)
def test_the_readme_gives_each_verb_a_tour_of_five_lines(verb: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = re.search(rf"\*\*{verb}\*\*.*?```sh\n(.*?)```", text, flags=re.DOTALL)
    assert tour, f"README.md has no tour of {verb}"
    assert len(tour[1].strip().splitlines()) == 5


def test_no_file_exceeds_600_lines() -> None:
    for folder in ("src", "tests", "bench", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines"
