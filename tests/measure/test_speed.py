"""What a benchmark of a model feeds it, counts and reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from earnest import compiled
from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.checkpoint.synth import synth
from earnest.config import PRESETS
from earnest.errors import MemoryBudgetError, MissingPackageError, UserError
from earnest.hub import locate
from earnest.measure import measure_speed, plan, speed
from earnest.measure.machine import Rates
from earnest.runners import Batch, Routing
from earnest.runners.native import isa
from earnest.runners.native.runner import NativeRunner
from earnest.runners.reference import ReferenceRunner

RUNNERS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built"),
    ),
]


@pytest.fixture(scope="module")
def small_moe(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("measure") / "small-moe"
    synth(folder, PRESETS["small-moe"], seed=1)
    return open_checkpoint(folder)


def make(kind: str, checkpoint: Checkpoint, num_blocks: int) -> speed.BenchRunner:
    if kind == "native":
        return NativeRunner(checkpoint, num_blocks=num_blocks)
    return ReferenceRunner(checkpoint, num_blocks=num_blocks)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("model", ["small-moe", "stories"])
def test_every_row_is_measured(kind: str, model: str, small_moe: Checkpoint) -> None:
    checkpoint = small_moe if model == "small-moe" else open_checkpoint(locate("stories"))
    what = plan(checkpoint.config, depths=[0, 70], batches=[1, 3], prefill=9, tokens=4)
    told: list[tuple[int, int]] = []
    found = measure_speed(
        checkpoint,
        what,
        runner=kind,  # type: ignore[arg-type]
        threads=1 if kind == "native" else None,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert [(r.kind, r.depth, r.batch, r.tokens) for r in found.rows] == [
        (k, depth, batch, {"prefill": 9, "decode": 4}[k])
        for k in ("prefill", "decode")
        for depth in (0, 70)
        for batch in (1, 3)
    ]
    assert found.runner == kind
    assert found.threads == (1 if kind == "native" else None)
    assert set(found.first_token_seconds) == {1, 9}
    assert told == [(i, 10) for i in range(11)]  # two first tokens, eight rows
    for row in found.rows:
        each = row.tokens if row.kind == "prefill" else 1
        assert row.tokens_per_second == pytest.approx(row.batch * each / row.seconds)
        shares = row.to_dict(Rates("generic", 1, 2e9, 1e12))
        assert shares["bandwidth_share"] == pytest.approx(shares["gb_s"] / 2)
        assert row.to_dict(None)["bandwidth_share"] is None


@pytest.mark.parametrize("kind", RUNNERS)
def test_bytes_of_a_step_are_those_of_the_chosen_experts(kind: str, small_moe: Checkpoint) -> None:
    config = small_moe.config
    traffic = speed.Traffic(small_moe, make(kind, small_moe, 2))
    width = 2 if kind == "native" else 4  # bf16 panels and int16 keys, or float32
    expert = 3 * config.hidden_size * config.moe_intermediate_size * width
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]

    def routed(*chosen: list[int]) -> list[Routing]:
        experts = np.array(chosen, np.int32)
        return [Routing(i, experts, np.zeros(experts.shape, np.float32)) for i in layers]

    def bytes_of(stored: int, *chosen: list[int]) -> float:
        return traffic.step(len(chosen), stored, routed(*chosen))

    one = bytes_of(1, [0, 1])
    per_position = 2 * config.num_hidden_layers * config.kv_size * width
    if kind == "native":  # scales of float32
        per_position += 2 * config.num_hidden_layers * config.num_key_value_heads * 4
    assert traffic.kv_bytes_per_token == per_position
    assert bytes_of(101, [0, 1]) - one == 100 * per_position
    # Shared experts are read once, others for each.
    assert bytes_of(1, [0, 1], [1, 0]) - one == 0
    assert bytes_of(1, [0, 1], [1, 5]) - one == expert * len(layers)
    assert bytes_of(1, [0, 1], [4, 5]) - one == 2 * expert * len(layers)
    # All experts together are all weights: nothing is left out or counted twice.
    every = [list(range(i, i + 2)) for i in range(0, config.moe_num_experts, 2)]
    assert bytes_of(0, *every) == traffic.weight_bytes


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_long_prompt_reads_the_weights_once_for_each_piece(
    kind: str, small_moe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (speed.native, speed.reference):
        monkeypatch.setattr(module, "PIECE_TOKENS", 2)
    traffic = speed.Traffic(small_moe, make(kind, small_moe, 2))
    experts = np.array([[0, 1], [2, 3], [0, 1], [0, 1]], np.int32)
    layer = Routing(1, experts, np.zeros((4, 2), np.float32))
    first = Routing(1, experts[:2], layer.weights[:2])
    second = Routing(1, experts[2:], layer.weights[2:])
    whole = traffic.step(4, 4, [layer])
    assert whole == traffic.step(2, 2, [first]) + traffic.step(2, 2, [second])


def test_an_embedding_that_is_not_the_head_is_a_look_up(tmp_path: Path) -> None:
    config = replace(PRESETS["tiny-dense"], tie_word_embeddings=False)
    synth(tmp_path / "m", config, seed=1)
    checkpoint = open_checkpoint(tmp_path / "m")
    traffic = speed.Traffic(checkpoint, ReferenceRunner(checkpoint, num_blocks=1))
    unread = 4 * config.hidden_size * (config.vocab_size - 1)
    assert traffic.step(1, 0, []) == traffic.weight_bytes - unread


@pytest.mark.parametrize("kind", RUNNERS)
def test_sequences_are_fed_different_tokens(kind: str, small_moe: Checkpoint) -> None:
    what = plan(small_moe.config, depths=[0], batches=[64], prefill=8, tokens=1)
    made = make(kind, small_moe, what.num_blocks)
    seen: list[Batch] = []

    class Watched:
        num_blocks, block_size = made.num_blocks, made.block_size

        def step(self, batch: Batch, routing: list[Routing]) -> np.ndarray:
            seen.append(batch)
            return made.step(batch, routing)

    bench = speed._Bench(small_moe, made, what)
    bench._runner = Watched()  # type: ignore[assignment]
    bench.step(5, 64, 1)
    assert len(set(seen[0].tokens.tolist())) == 64
    assert set(seen[0].positions.tolist()) == {5}
    assert len(set(seen[0].block_tables.reshape(-1).tolist())) == 64
    bench.step(5, 64, 1)
    assert seen[0].tokens.tolist() != seen[1].tokens.tolist()
    bench.step(0, 3, 8)
    assert len({tuple(row) for row in seen[2].tokens.reshape(3, 8).tolist()}) == 3


@pytest.mark.parametrize("kind", RUNNERS)
def test_declared_positions_hold_finite_numbers_everywhere(
    kind: str, small_moe: Checkpoint
) -> None:
    made = make(kind, small_moe, 5)
    speed.fill(made)
    if isinstance(made, NativeRunner):
        # Panels of 16 positions: their scales, then the numbers.
        panels = made.cache.reshape(-1, 16 * (4 + 2 * small_moe.config.head_dim))
        scales = np.ascontiguousarray(panels[:, :64]).view(np.float32)
        assert np.ptp(scales) == 0
        values = np.ascontiguousarray(panels[:, 64:]).view(np.int16) * scales[0, 0]
    else:
        values = np.concatenate([made.cache.keys.ravel(), made.cache.values.ravel()])
    assert np.isfinite(values).all()
    assert np.count_nonzero(values) > 0.99 * values.size
    assert 0.2 < values.std() < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [-1]}, "cannot be measured"),
        ({"batches": [0]}, "cannot be measured"),
        ({"batches": []}, "cannot be measured"),
        ({"depths": []}, "cannot be measured"),
        ({"prefill": 0, "tokens": 0}, "neither prefill nor decoding"),
        ({"depths": [131_000], "prefill": 512}, "longer than the model's context"),
        ({"tokens": 10**9}, "longer than the model's context"),
        ({"batches": [10**9]}, "more sequences than tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(PRESETS["0.3b"], **options)  # type: ignore[arg-type]


def test_a_short_context_shortens_the_defaults() -> None:
    config = open_checkpoint(locate("stories")).config
    what = plan(config)
    assert what.depths == (0,)
    assert what.positions <= config.max_position_embeddings
    assert plan(PRESETS["0.3b"]).depths == (0, 4096)


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_what_does_not_fit_is_refused_before_anything_is_taken(
    kind: str, small_moe: Checkpoint
) -> None:
    what = plan(small_moe.config, depths=[100_000], batches=[1000])
    with pytest.raises(MemoryBudgetError, match="lower --depth or --batch"):
        measure_speed(small_moe, what, runner=kind)  # type: ignore[arg-type]


def test_the_native_runner_must_be_there(
    small_moe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "module", lambda: None)
    with pytest.raises(MissingPackageError):
        measure_speed(small_moe, plan(small_moe.config), runner="native")
