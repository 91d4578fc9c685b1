"""`earnest serve` as a process, with a model that can chat; and the reading of settings."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from earnest import hub

# Enough to see that conversations arrive, and thoughts where they are asked for.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def with_template(folder: Path) -> Path:
    """A copy of the stories model that can chat."""
    shutil.copytree(hub.locate("stories"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Process:
    """A server of its own, ready when made."""

    def __init__(self, model: Path, *arguments: str, folder: Path | None = None) -> None:
        self.model = model
        where = () if "--unix-socket" in arguments else ("--port", "0")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "earnest", "serve", str(model), *arguments, *where],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.search(r"(https?://\S+|unix:\S+)", line)
        if found is None:
            self._process.kill()
            raise AssertionError((line, *self._process.communicate()))
        self.url = found[1]

    def end(self) -> int:
        """Its exit status after SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=60)
        return self._process.returncode


def parsed(language: str, text: str) -> Any:
    """Settings in the language of their block."""
    if language == "json":
        return json.loads(text)
    if language == "yaml":
        return yaml.safe_load(text)
    if language == "toml":
        return tomllib.loads(text)
    assert language == "ini", language
    parser = configparser.ConfigParser()
    parser.read_string(f"[all]\n{text}")
    return dict(parser["all"])


def texts(value: Any) -> Iterator[str]:
    """Every text in settings."""
    if isinstance(value, dict):
        for part in value.values():
            yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value
