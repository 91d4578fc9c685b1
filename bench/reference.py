"""Tokens per second of the numpy reference runner next to transformers, on the same checkpoint.

    python bench/reference.py [MODEL] [--prompt 256] [--new 32] [--rounds 5]

MODEL is a folder that transformers can open too (Hugging Face layout); without one, a random
mixture of experts of 50 million weights is made. Both compute in float32 with all cores. The two
take turns, so that a busy machine slows both; printed are medians and their ratio.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from earnest.checkpoint import open_checkpoint
from earnest.checkpoint.synth import synth
from earnest.config import ErnieConfig
from earnest.runners import Batch
from earnest.runners.reference import ReferenceRunner

BLOCK_SIZE = 32
SMALL = ErnieConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    moe_num_experts=16,
    moe_k=4,
    moe_intermediate_size=192,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
)

# Runs a prompt and some tokens after it; returns the seconds of each phase.
Run = Callable[[list[int], list[int]], tuple[float, float]]


def earnest_run(model: Path, positions: int) -> Run:
    runner = ReferenceRunner(
        open_checkpoint(model), num_blocks=-(-positions // BLOCK_SIZE), block_size=BLOCK_SIZE
    )
    table = np.arange(runner.num_blocks, dtype=np.int32)[None]

    def step(ids: list[int], start: int) -> None:
        tokens = np.array(ids, np.int32)
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        last = np.array([len(ids)], np.int32)
        starts = np.array([0, len(ids)], np.int32)
        runner.step(Batch(tokens, positions, starts, table, last - 1))

    def run(prompt: list[int], new: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        step(prompt, 0)
        middle = time.perf_counter()
        for i, token in enumerate(new):
            step([token], len(prompt) + i)
        return middle - start, time.perf_counter() - middle

    return run


def transformers_run(model: Path) -> Run:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")

    @torch.no_grad()
    def run(prompt: list[int], new: list[int]) -> tuple[float, float]:
        cache = transformers.DynamicCache(config=loaded.config)
        start = time.perf_counter()
        loaded(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
        middle = time.perf_counter()
        for token in new:
            loaded(torch.tensor([[token]]), past_key_values=cache)
        return middle - start, time.perf_counter() - middle

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="reference runner against transformers")
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        model = asked.model
        if model is None:
            model = Path(scratch) / "model"
            synth(model, SMALL, seed=0)
        config = open_checkpoint(model).config
        ids = np.random.default_rng(0).integers(config.vocab_size, size=asked.prompt + asked.new)
        prompt, new = ids[: asked.prompt].tolist(), ids[asked.prompt :].tolist()
        runs = {
            "earnest": earnest_run(model, len(ids)),
            "transformers": transformers_run(model),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for turn in range(asked.rounds + 1):
            for name, run in runs.items():
                took = run(prompt, new)
                if turn:  # the first decodes weights and warms caches
                    seconds[name].append(took)
    print(f"{os.cpu_count()} cores, {asked.prompt} prompt and {asked.new} new tokens, float32")
    for phase, (what, tokens) in enumerate((("prefill", asked.prompt), ("decode", asked.new))):
        speed = {
            name: tokens / statistics.median(pair[phase] for pair in took)
            for name, took in seconds.items()
        }
        ratio = speed["earnest"] / speed["transformers"]
        print(
            f"{what:8} earnest {speed['earnest']:9.1f} tokens/s   "
            f"transformers {speed['transformers']:9.1f} tokens/s   ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
