"""One answer however the tokens are batched, and clear refusals of batches that make no sense."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from earnest import env
from earnest.config import ErnieConfig
from earnest.errors import MemoryBudgetError, PromptError, TensorsError, UserError
from earnest.runners import Runner
from earnest.runners.reference import Arithmetic, ReferenceRunner, model, runner

CONFIG = ErnieConfig(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    tie_word_embeddings=False,
    moe_num_experts=6,
    moe_k=2,
    moe_intermediate_size=12,
    moe_num_shared_experts=1,
    moe_layer_start_index=1,
)
LENGTHS = (23, 1, 40, 9)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of, weights_of):
    return checkpoint_of(CONFIG, weights_of(CONFIG))


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(60, size=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(checkpoint, sequences, batch_of, runner_for) -> list[np.ndarray]:
    """Each sequence's logits when it runs by itself, in one pass."""
    return [runner_for(checkpoint, 96).step(batch_of((ids, 0, range(12)))) for ids in sequences]


def assert_same(logits: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_it_is_a_runner(checkpoint) -> None:
    made: Runner = ReferenceRunner(checkpoint, num_blocks=3)
    assert (made.config, made.block_size, made.num_blocks) == (CONFIG, 32, 3)


@pytest.mark.parametrize("seed", range(24))
def test_any_schedule_gives_the_same_logits(
    seed: int, checkpoint, sequences, alone, batch_of, runner_for
) -> None:
    """Mixed batches: chunks of any size and single tokens, any block size, shuffled blocks."""
    rng = np.random.default_rng(seed)
    block_size = (1, 3, 8, 32)[seed % 4]
    per_sequence = -(-max(LENGTHS) // block_size)
    made = runner_for(checkpoint, len(LENGTHS) * per_sequence * block_size, block_size=block_size)
    tables = rng.permutation(made.num_blocks).reshape(len(LENGTHS), per_sequence)
    done = np.zeros(len(LENGTHS), int)
    while np.any(done < LENGTHS):
        chunks = np.minimum(rng.choice([0, 1, 1, 5, 40], len(LENGTHS)), LENGTHS - done)
        if not np.any(chunks):
            continue
        order = rng.permutation(len(LENGTHS))
        logits = made.step(
            batch_of(*((sequences[s][done[s] :][: chunks[s]], done[s], tables[s]) for s in order))
        )
        for s in order:
            own, logits = logits[: chunks[s]], logits[chunks[s] :]
            if len(own):
                assert_same(own, alone[s][done[s] : done[s] + chunks[s]])
        done += chunks


def test_only_the_rows_asked_for_in_the_order_asked(
    checkpoint, sequences, alone, batch_of, runner_for
) -> None:
    batch = batch_of((sequences[0], 0, range(12)), rows=[22, 0, 22, 7])
    assert_same(runner_for(checkpoint, 96).step(batch), alone[0][[22, 0, 22, 7]])
    nothing = runner_for(checkpoint, 96).step(batch_of((sequences[0], 0, range(12)), rows=[]))
    assert nothing.shape == (0, 60)
    assert nothing.dtype == np.float32


def test_sequences_may_share_filled_blocks(
    checkpoint, sequences, alone, batch_of, runner_for
) -> None:
    ids = sequences[2]
    made = runner_for(checkpoint, 160)
    made.step(batch_of((ids[:16], 0, [5, 6])))
    logits = made.step(batch_of((ids[16:], 16, [5, 6, 0, 1, 2]), (ids[16:20], 16, [5, 6, 9])))
    assert_same(logits[:24], alone[2][16:])
    assert_same(logits[24:], alone[2][16:20])


def test_a_long_batch_runs_in_pieces(
    checkpoint, sequences, batch_of, runner_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = batch_of(
        *((ids, 0, range(5 * s, 5 * s + 5)) for s, ids in enumerate(sequences)),
        rows=[70, 3, 30, 29, 0],
    )
    whole, whole_routing, routing = runner_for(checkpoint, 160), [], []
    expected = whole.step(wide, whole_routing)
    monkeypatch.setattr(runner, "PIECE_TOKENS", 10)
    monkeypatch.setattr(model, "MAX_SCORES", 64)
    assert_same(runner_for(checkpoint, 160).step(wide, routing), expected)
    assert [part.layer for part in routing] == [1, 2]
    for ours, wanted in zip(routing, whole_routing, strict=True):
        assert ours.experts.dtype == np.int32
        assert ours.weights.dtype == np.float32
        np.testing.assert_array_equal(ours.experts, wanted.experts)
        np.testing.assert_allclose(ours.weights, wanted.weights, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_layers_alone(
    checkpoint_of, weights_of, sequences, batch_of, runner_for, layers: int
) -> None:
    arrays = weights_of(CONFIG)
    shorter = checkpoint_of(
        replace(CONFIG, num_hidden_layers=layers, moe_layer_end_index=2), arrays
    )
    batch = batch_of((sequences[0], 0, range(12)))
    expected = runner_for(shorter, 96).step(batch)
    logits = runner_for(checkpoint_of(CONFIG, arrays), 96, num_layers=layers).step(batch)
    np.testing.assert_array_equal(logits, expected)


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 3_000, 20_000, 10**9])
def test_any_memory_budget_gives_the_same_logits(
    checkpoint_of, weights_of, sequences, batch_of, runner_for, f16, budget: int
) -> None:
    half = checkpoint_of(CONFIG, weights_of(CONFIG), f16)
    batch = batch_of((sequences[0], 0, range(12)))
    expected = runner_for(half, 96, memory_budget=10**9).step(batch)
    made = runner_for(half, 96, memory_budget=budget)
    for _ in range(2):
        assert_same(made.step(batch), expected)
    vectors = 4 * sum(t.size for t in half.tensors.values() if len(t.shape) == 1)
    assert made.model.weights.kept_bytes <= budget + vectors
    if budget == 3_000:
        assert made.model.weights.kept_bytes > vectors


def test_keys_and_values_that_cannot_fit_are_refused(
    checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "free_memory", lambda: 2**20)
    # 3 layers of 2 heads of 8 channels, keys and values, 4 bytes each: 384 bytes per position.
    with pytest.raises(MemoryBudgetError, match="at most 2,728 positions"):
        ReferenceRunner(checkpoint, num_blocks=400, block_size=8)
    ReferenceRunner(checkpoint, num_blocks=340, block_size=8)


def test_an_absurd_number_of_blocks_is_refused(checkpoint) -> None:
    with pytest.raises(MemoryBudgetError):
        ReferenceRunner(checkpoint, num_blocks=2**50)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"num_blocks": 4, "block_size": 0},
        {"num_blocks": 4, "memory_budget": -1},
        {"num_blocks": 4, "num_layers": 0},
        {"num_blocks": 4, "num_layers": 4},
    ],
)
def test_arguments_out_of_range(checkpoint, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="out of range"):
        ReferenceRunner(checkpoint, **options)


# --- batches that make no sense -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tokens": [1, 60, 2, 3]}, PromptError, "token id outside the vocabulary"),
        ({"tokens": [1, -1, 2, 3]}, PromptError, "token id outside the vocabulary"),
        ({"positions": [94, 95, 96, 0]}, PromptError, "position outside the context"),
        ({"positions": [-1, 0, 1, 0]}, PromptError, "position outside the context"),
        ({"positions": [0, 2, 3, 0]}, UserError, "not consecutive"),
        ({"positions": [2, 1, 0, 0]}, UserError, "not consecutive"),
        ({"positions": [0, 1, 2]}, UserError, "one entry per token"),
        ({"sequence_starts": [0, 4]}, UserError, "one row per sequence"),
        ({"sequence_starts": [0, 3, 5]}, UserError, "does not divide"),
        ({"sequence_starts": [1, 3, 4]}, UserError, "does not divide"),
        ({"sequence_starts": [0, 5, 4]}, UserError, "does not divide"),
        ({"sequence_starts": []}, UserError, "does not divide"),
        ({"block_tables": [[0, 1], [-1, -1]]}, UserError, "does not cover"),
        ({"block_tables": [[0, 1], [12, -1]]}, UserError, "does not cover"),
        ({"positions": [14, 15, 16, 0]}, UserError, "does not cover"),
        ({"positions": [8, 9, 10, 0], "block_tables": [[3, 3], [1, 0]]}, UserError, "twice"),
        ({"block_tables": [[0, 1], [0, 1]]}, UserError, "write to the same"),
        ({"block_tables": [0, 1]}, UserError, "2 dimensions"),
        ({"logits_rows": [4]}, UserError, "logits_rows outside rows"),
        ({"logits_rows": [-1]}, UserError, "logits_rows outside rows"),
        ({"tokens": [1.0, 2.0, 3.0, 4.0]}, UserError, "wrong kind of array"),
    ],
)
def test_a_batch_that_makes_no_sense(
    checkpoint, batch_of, runner_for, change: dict, error: type[UserError], says: str
) -> None:
    good = batch_of(([1, 2, 3], 0, [0, 1]), ([4], 0, [2]))
    made = runner_for(checkpoint, 96)
    made.step(good)
    before = made.cache.keys.copy()
    arrays = {
        name: np.array(
            value, None if name == "tokens" and isinstance(value[0], float) else np.int32
        )
        for name, value in change.items()
    }
    with pytest.raises(error, match=says):
        made.step(replace(good, **arrays))
    np.testing.assert_array_equal(made.cache.keys, before)


def test_a_batch_without_tokens(checkpoint, batch_of, runner_for) -> None:
    with pytest.raises(PromptError, match="no tokens"):
        runner_for(checkpoint, 96).step(batch_of(([], 0, [0]), rows=[]))


def test_a_missing_tensor_is_named(checkpoint_of, weights_of, batch_of, runner_for) -> None:
    arrays = weights_of(CONFIG)
    del arrays["model.layers.2.mlp.gate.weight"]
    made = runner_for(checkpoint_of(CONFIG, arrays), 96)
    with pytest.raises(TensorsError, match=r"model\.layers\.2\.mlp\.gate\.weight"):
        made.step(batch_of(([1], 0, [0])))


# --- deliberate mistakes --------------------------------------------------------------------------


def permuted_for_halves(array: np.ndarray, head_dim: int) -> np.ndarray:
    heads = array.reshape(-1, head_dim, array.shape[-1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(array.shape)


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic(rope="half-split"),
        Arithmetic(swap_gate_up=True),
        Arithmetic(use_correction_bias=False),
    ],
)
def test_each_mistake_is_right_for_weights_made_for_it_and_wrong_for_others(
    checkpoint_of, weights_of, sequences, alone, batch_of, runner_for, arithmetic: Arithmetic
) -> None:
    arrays = weights_of(CONFIG)
    changed = {}
    for name, array in arrays.items():
        if arithmetic.rope == "half-split" and ("q_proj" in name or "k_proj" in name):
            changed[name] = permuted_for_halves(array, CONFIG.head_dim)
        elif arithmetic.swap_gate_up and "_proj" in name and "mlp" in name:
            swap = {"gate_proj": "up_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
            kind = name.split(".")[-2]
            changed[name] = arrays[name.replace(kind, swap[kind])]
        elif "e_score" in name and not arithmetic.use_correction_bias:
            changed[name] = array + np.linspace(-1, 1, len(array), dtype=np.float32)
        else:
            changed[name] = array
    if not arithmetic.use_correction_bias:
        for name in [name for name in arrays if "e_score" in name]:
            arrays[name] = np.zeros_like(arrays[name])
    batch = batch_of((sequences[2], 0, range(12)))
    right = runner_for(checkpoint_of(CONFIG, arrays), 96).step(batch)
    made_for_it = runner_for(checkpoint_of(CONFIG, changed), 96, arithmetic=arithmetic).step(batch)
    assert_same(made_for_it, right)
    wrong = runner_for(checkpoint_of(CONFIG, changed), 96).step(batch)
    assert np.abs(wrong - right).max() > 0.1 * np.abs(right).max()
