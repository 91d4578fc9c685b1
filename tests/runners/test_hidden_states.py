"""Hidden states after the final norm: of transformers, the reference and the native runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_configs import draw

from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.config import ErnieConfig
from earnest.errors import UserError
from earnest.runners import Batch
from earnest.runners.native import isa
from earnest.runners.reference import ReferenceRunner

if isa.installed():
    from earnest.runners.native.runner import PIECE_TOKENS, NativeRunner

needs_native = pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")


def hidden_of(runner: Any, batch: Batch, rows: list[int]) -> np.ndarray:
    found = np.full((len(rows), runner.config.hidden_size), np.nan, np.float32)
    asked = replace(batch, hidden_rows=np.array(rows, np.int32))
    logits = runner.step(asked, hidden=found)
    assert logits.shape == (len(batch.logits_rows), runner.config.vocab_size)
    assert np.isfinite(found).all()
    return found


@pytest.fixture(scope="module")
def checkpoint(
    checkpoint_of: Callable[..., Checkpoint], weights_of: Callable[..., dict[str, np.ndarray]]
) -> Checkpoint:
    """A mixture of experts whose width is no multiple of anything."""
    config = ErnieConfig(
        vocab_size=97,
        hidden_size=52,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        moe_num_experts=6,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        tie_word_embeddings=True,
    )
    return checkpoint_of(config, weights_of(config))


@pytest.mark.parametrize("seed", range(6))
def test_they_are_those_of_transformers(
    seed: int, tmp_path: Path, batch_of: Callable[..., Batch]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = draw(seed)
    kind = "Ernie4_5_Moe" if "moe_k" in options else "Ernie4_5"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**options)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 20).tolist()
    with torch.no_grad():
        expected = model.model(torch.tensor([ids])).last_hidden_state[0].float().numpy()
    opened = open_checkpoint(tmp_path)
    batch = batch_of((ids, 0, [0, 1]), rows=[19])
    runners: list[tuple[Any, float]] = [
        (ReferenceRunner(opened, num_blocks=2, block_size=16), 1e-5)
    ]
    if isa.installed():  # float32 weights: no rounding but that of keys and values, to f16
        runners.append((NativeRunner(opened, num_blocks=2, block_size=16, threads=2), 2e-3))
    for runner, by in runners:
        rows = list(range(20))
        found = hidden_of(runner, batch, rows)
        scale = np.abs(expected).max()
        assert np.abs(found - expected).max() <= by * scale
        assert np.array_equal(hidden_of(runner, batch, rows[::-3]), found[::-3])


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_native_bits_do_not_depend_on_batch_chunks_and_threads(
    threads: int, checkpoint: Checkpoint, batch_of: Callable[..., Batch]
) -> None:
    runner = NativeRunner(checkpoint, num_blocks=64, block_size=16, threads=threads)
    alone = NativeRunner(checkpoint, num_blocks=64, block_size=16, threads=2)
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 97, 45).tolist(), rng.integers(0, 97, 30).tolist()
    expected_a = hidden_of(alone, batch_of((a, 0, [0, 1, 2]), rows=[]), list(range(45)))
    expected_b = hidden_of(alone, batch_of((b, 0, [3, 4]), rows=[29]), list(range(30)))
    both = batch_of((a[:17], 0, [5, 6, 7]), (b, 0, [8, 9]), rows=[3])
    first = hidden_of(runner, both, [*range(17, 47), *range(17)])
    assert np.array_equal(first[:30], expected_b)
    assert np.array_equal(first[30:], expected_a[:17])
    for start, stop in ((17, 18), (18, 24), (24, 45)):
        batch = batch_of((a[start:stop], start, [5, 6, 7]), rows=[])
        found = hidden_of(runner, batch, list(range(stop - start)))
        assert np.array_equal(found, expected_a[start:stop])


@needs_native
def test_a_batch_that_is_run_in_pieces_gives_them_all(
    checkpoint: Checkpoint, batch_of: Callable[..., Batch]
) -> None:
    length = PIECE_TOKENS + 40
    ids = np.random.default_rng(2).integers(0, 97, length).tolist()
    blocks = list(range(-(-length // 16)))
    rows = [0, PIECE_TOKENS - 1, PIECE_TOKENS, length - 1, 7]
    batch = batch_of((ids, 0, blocks), rows=[5, length - 1])
    native = NativeRunner(checkpoint, num_blocks=len(blocks), block_size=16, threads=2)
    found = hidden_of(native, batch, rows)
    again = hidden_of(native, batch, [*reversed(rows)])
    assert np.array_equal(found, again[::-1])
    reference = ReferenceRunner(checkpoint, num_blocks=len(blocks), block_size=16)
    expected = hidden_of(reference, batch, rows)
    assert np.abs(found - expected).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["reference", pytest.param("native", marks=needs_native)])
def test_room_that_does_not_fit_is_refused(
    kind: str, checkpoint: Checkpoint, batch_of: Callable[..., Batch]
) -> None:
    make: Any = ReferenceRunner if kind == "reference" else NativeRunner
    runner = make(checkpoint, num_blocks=2, block_size=16)
    batch = replace(batch_of(([1, 2], 0, [0])), hidden_rows=np.array([1], np.int32))
    for wrong in (None, np.empty((2, 52), np.float32), np.empty((1, 52), np.float64)):
        with pytest.raises(UserError, match="hidden"):
            runner.step(batch, hidden=wrong)
    with pytest.raises(UserError, match="hidden_rows"):
        runner.step(
            replace(batch, hidden_rows=np.array([2], np.int32)),
            hidden=np.empty((1, 52), np.float32),
        )
