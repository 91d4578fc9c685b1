"""The default model, a real one that others trained, against transformers on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import earnest
from earnest import hub
from earnest.errors import NetworkError

PROMPTS = (
    "Why is the sky blue?",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "从前有一座山，山里有一座庙，",
    "Once upon a time, in a small village by the sea, there lived an old man who",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return hub.locate("smollm2")
    except NetworkError as error:
        pytest.skip(f"the default model could not be fetched: {error.problem}")


@pytest.fixture(scope="module")
def reference(gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def reference_tokenizer(gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def model(gguf: Path) -> earnest.LanguageModel:
    return earnest.load(gguf, max_context=1024)


def test_the_same_tokens(model: earnest.LanguageModel, reference_tokenizer: Any) -> None:
    texts = [
        *PROMPTS,
        "<|im_start|>user\nHi  there!<|im_end|>\n",
        " 3.14159 and 1,000,000 ",
        "🦙\x00\t",
    ]
    for text in texts:
        expected = reference_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenizer.encode(text) == expected, text
        assert model.tokenizer.decode(expected, skip_special_tokens=False) == text


def test_the_same_chat_prompt(model: earnest.LanguageModel, reference_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": PROMPTS[0]},
    ]
    expected = reference_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert model.tokenizer.apply_chat_template(messages) == expected


@pytest.mark.slow
def test_the_same_logits_and_the_same_greedy_text(
    model: earnest.LanguageModel, reference: Any
) -> None:
    import torch

    greedy = earnest.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    completions = model.generate(list(PROMPTS), greedy)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = completion.prompt_token_ids + completion.token_ids
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0].numpy()
        # One pass over prompt and answer: at each place the reference's own choice must be ours.
        chosen = logits[len(completion.prompt_token_ids) - 1 : -1].argmax(axis=-1)
        assert completion.token_ids == chosen.tolist(), prompt
        ours = model.logits(completion.prompt_token_ids)
        theirs = logits[: len(ours)]
        assert np.max(np.abs(ours - theirs)) < 1e-4 * np.max(np.abs(theirs))
