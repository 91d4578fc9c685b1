"""The tokenizer of the story model in the package: published ids, and made by the tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from earnest.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT / "src" / "earnest" / "hub" / "stories"


def test_published_ids_and_text(stories: Tokenizer, shared: Path) -> None:
    goldens = json.loads((shared / "data/goldens/stories260k.json").read_text("utf-8"))
    for case in goldens["cases"]:
        assert stories.encode(case["prompt"], add_special_tokens=True) == case["ids"]
        assert stories.decode(case["ids"]) == case["prompt"]
        assert stories.decode([*case["ids"], *case["greedy_next_32"]]) == case["greedy_text"]
        continued = stories.decode(case["greedy_next_32"], continuation=True)
        assert case["prompt"] + continued == case["greedy_text"]
    case = goldens["perplexity_case"]
    assert stories.encode(case["text"], add_special_tokens=True) == case["ids"]
    assert stories.decode(goldens["greedy_ids_from_bos"]) == goldens["greedy_text"]
    assert goldens["greedy_text"] == goldens["published_greedy_text_200_steps"]


def test_names(stories: Tokenizer) -> None:
    assert stories.vocab_size == 512
    assert (stories.bos_id, stories.unk_id, stories.pad_id) == (1, 0, 0)
    assert stories.eos_ids == (1, 2)  # a story ends where the next would begin
    assert stories.chat_template is None


def test_the_tool_makes_the_files_that_are_shipped(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/models/stories260k-ernie"
    tool = ROOT / "tools" / "make_stories_tokenizer.py"
    subprocess.run(
        [sys.executable, str(tool), str(source / "tok512.json"), str(tmp_path)], check=True
    )
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (STORIES / name).read_bytes()
    for name in ("config.json", "model.safetensors"):
        assert (source / name).read_bytes() == (STORIES / name).read_bytes()


def test_the_licence_comes_along() -> None:
    text = (STORIES / "LICENSE").read_text("utf-8")
    assert "MIT License" in text and "llama2.c" in text and "Karpathy" in text
