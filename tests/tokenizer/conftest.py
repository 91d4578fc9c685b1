"""The real ERNIE tokenizer in its forms."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor

from earnest.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT / "src" / "earnest" / "hub" / "stories"


@pytest.fixture(scope="session")
def ernie_folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ERNIE-4.5-0.3B-Base-PT has it, without weights."""
    folder = tmp_path_factory.mktemp("ernie")
    for file in (shared / "data/tokenizer/ernie-4.5-0.3b-base-pt").iterdir():
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(shared / "data/tokenizer/tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def ernie(ernie_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(ernie_folder)


@pytest.fixture(scope="session")
def fast_json(shared: Path) -> bytes:
    """The `tokenizer.json` form of the ERNIE tokenizer."""
    path = shared / "data/tokenizer/tokenizer.reconstructed.json.xz"
    return lzma.decompress(path.read_bytes())


@pytest.fixture(scope="session")
def fast_library(fast_json: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(fast_json.decode())


@pytest.fixture(scope="session")
def raw_library(shared: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(shared / "data/tokenizer/tokenizer.model"))


@pytest.fixture(scope="session")
def goldens(shared: Path) -> list[dict[str, Any]]:
    lines = (shared / "data/goldens/tokenizer_ernie45.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.split("\n")[1:] if line]


@pytest.fixture(scope="session")
def stories() -> Tokenizer:
    return Tokenizer.from_folder(STORIES)
