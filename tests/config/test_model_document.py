"""docs/model.md tells the truth: its examples run, and its table holds the presets' numbers."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from earnest.config import Accounting, preset

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "model.md"


def test_examples_run() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").replace("```", "\n")
    test = doctest.DocTestParser().get_doctest(text, {}, "model.md", str(DOCUMENT), 0)
    assert len(test.examples) >= 10
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize(("column", "name"), [(1, "0.3b"), (2, "21b-a3b"), (3, "300b-a47b")])
def test_the_table_holds_the_numbers_of_the_presets(column: int, name: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if "|" in line]
    table = {row[0].strip("*"): row[column].strip("*") for row in rows if len(row) == 4}
    config, accounting = preset(name), Accounting(preset(name))
    routed = f"{config.moe_num_experts} / {config.moe_k}" if config.is_moe else "-"
    expected = {
        "layers": config.num_hidden_layers,
        "hidden width": config.hidden_size,
        "query heads / key-value heads": (
            f"{config.num_attention_heads} / {config.num_key_value_heads}"
        ),
        "width of a head": config.head_dim,
        "dense feed-forward width": config.intermediate_size,
        "routed experts / chosen per token": routed,
        "width of an expert": config.moe_intermediate_size if config.is_moe else "-",
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "rotary base": int(config.rope_theta),
        "multi-token-prediction blocks": config.num_nextn_predict_layers,
        "embedding is also the head": "yes" if config.tie_word_embeddings else "no",
        "parameters": accounting.total,
        "active per token": accounting.active,
        "active, without embedding and head": accounting.active_without_embedding,
        "parameters of the prediction block": accounting.mtp,
        "key-value cache per token, bf16": f"{accounting.kv_bytes_per_token():,} B",
    }
    found = {key: table[key] for key in expected}
    assert found == {k: f"{v:,}" if isinstance(v, int) else v for k, v in expected.items()}
