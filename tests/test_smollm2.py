"""The default model, a real one that others trained, against transformers on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import earnest
from earnest import hub
from earnest.errors import NetworkError
from earnest.runners.native import isa

PROMPTS = (
    "Why is the sky blue?",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "从前有一座山，山里有一座庙，",
    "Once upon a time, in a small village by the sea, there lived an old man who",
)
GREEDY = earnest.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


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
    return earnest.load(gguf, max_context=1024, runner="reference")


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

    completions = model.generate(list(PROMPTS), GREEDY)
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


@pytest.fixture(scope="module")
def exact_answers(model: earnest.LanguageModel) -> list[tuple[list[int], list[int], np.ndarray]]:
    """Prompt, greedy answer and log-probabilities of both, by the reference."""
    found = model.generate(list(PROMPTS), GREEDY)
    return [
        (
            c.prompt_token_ids,
            c.token_ids,
            log_softmax(model.logits(c.prompt_token_ids + c.token_ids)),
        )
        for c in found
    ]


@pytest.mark.slow
@pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")
@pytest.mark.parametrize(("kv", "nats"), [("f32", 2e-6), ("f16", 1e-5), ("bf16", 1e-4)])
def test_the_native_greedy_text_and_where_it_parts(
    exact_answers: list[tuple[list[int], list[int], np.ndarray]], gguf: Path, kv: Any, nats: float
) -> None:
    """The same five answers by the native runner. With float32 and f16 keys and values they are
    the same texts. With bf16 ones a text may part where the reference hardly prefers its own token:
    by how much is bounded here, and how often is printed (seen: 1 of 5, by 0.007 nats)."""
    native = earnest.load(gguf, max_context=1024, kv=kv)
    near = native.generate(list(PROMPTS), GREEDY)
    parted = 0
    for (prompt, exact, want), completion in zip(exact_answers, near, strict=True):
        got, ours = log_softmax(native.logits(prompt + exact)), completion.token_ids
        assert (np.exp(want) * (want - got)).sum(-1).mean() < nats
        if ours == exact:
            continue
        parted += 1
        at = int(np.argmax(np.array(ours) != np.array(exact)))
        row = want[len(prompt) - 1 + at]
        margin = row[exact[at]] - row[ours[at]]
        print(f"kv {kv}: parted at token {at}, which was preferred by {margin:.4f} nats")
        assert 0 <= margin < 0.05
    assert parted <= (2 if kv == "bf16" else 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
