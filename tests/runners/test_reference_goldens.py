"""Numbers that were published or computed elsewhere, reproduced by the reference runner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from earnest.checkpoint import open_checkpoint
from earnest.config import ErnieConfig

IDS = [3, 17, 42, 5, 63, 8]
COMMON = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_MOE = ErnieConfig(
    **COMMON,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    head_dim=4,
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=8,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
)
TINY_DENSE = ErnieConfig(
    **COMMON, hidden_size=12, intermediate_size=20, num_hidden_layers=2, head_dim=8
)


def rule_weights(config: ErnieConfig) -> dict[str, np.ndarray]:
    """The weights of the golden models: a rule over the sorted in-memory names of transformers 5.

    Element i of the tensor of rank s is `off + amp * sin(0.37 i + 0.0113 i^2 + s)`.
    """
    D, M, E = config.hidden_size, config.moe_intermediate_size, config.moe_num_experts
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, D),
        "model.norm.weight": (D,),
    }
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (config.q_size, D),
            f"{layer}.self_attn.k_proj.weight": (config.kv_size, D),
            f"{layer}.self_attn.v_proj.weight": (config.kv_size, D),
            f"{layer}.self_attn.o_proj.weight": (D, config.q_size),
        }
        mlp, width = f"{layer}.mlp", config.intermediate_size
        if config.is_moe_layer(i):
            shapes |= {
                f"{mlp}.experts.down_proj": (E, D, M),
                f"{mlp}.experts.gate_up_proj": (E, 2 * M, D),
                f"{mlp}.gate.moe_statics.e_score_correction_bias": (1, E),
                f"{mlp}.gate.weight": (E, D),
            }
            mlp, width = f"{mlp}.shared_experts", config.shared_intermediate_size
        shapes |= {
            f"{mlp}.down_proj.weight": (D, width),
            f"{mlp}.gate_proj.weight": (width, D),
            f"{mlp}.up_proj.weight": (width, D),
        }
    found: dict[str, np.ndarray] = {}
    for rank, name in enumerate(sorted(shapes)):
        offset, amplitude = (1, 0.1) if "norm" in name else (0, 0.05 if "e_score" in name else 0.3)
        i = np.arange(np.prod(shapes[name]), dtype=np.float64)
        value = offset + amplitude * np.sin(0.37 * i + 0.0113 * i * i + rank)
        found[name] = value.astype(np.float32).reshape(shapes[name])
    return found


def unpacked(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under the canonical names: one per expert."""
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith("experts.down_proj"):
            for e, down in enumerate(array):
                found[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        elif name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(array):
                prefix = f"{name.removesuffix('gate_up_proj')}{e}"
                gate, up = np.split(both, 2)
                found[f"{prefix}.gate_proj.weight"] = gate
                found[f"{prefix}.up_proj.weight"] = up
        elif "e_score" in name:
            found[name.replace("gate.moe_statics", "moe_statics")] = array[0]
        else:
            found[name] = array
    return found


def test_the_tiny_mixture_of_experts(checkpoint_of, batch_of, runner_for) -> None:
    arrays = rule_weights(TINY_MOE)
    assert len(arrays) == 37
    runner = runner_for(checkpoint_of(TINY_MOE, unpacked(arrays)), 8)
    routing = []
    logits = runner.step(batch_of((IDS, 0, [0])), routing)
    np.testing.assert_allclose(logits[0, :4], [-0.642721, 0.811859, 1.494685, -0.079007], atol=2e-6)
    np.testing.assert_allclose(
        logits[5, :8],
        [-0.784447, 0.471018, 0.490057, -0.979629, 0.346935, 0.786158, -0.564191, 0.496805],
        atol=2e-6,
    )
    assert np.abs(logits).sum() == pytest.approx(242.77984, abs=2e-4)
    assert logits.argmax(-1).tolist() == [42, 42, 42, 62, 42, 33]
    first, second = routing
    assert (first.layer, second.layer) == (1, 2)
    assert first.experts.tolist() == [[3, 2], [3, 1], [2, 3], [1, 2], [3, 2], [3, 2]]
    assert second.experts.tolist() == [[3, 2], [3, 1], [1, 3], [3, 1], [3, 1], [3, 2]]
    np.testing.assert_allclose(
        first.weights[:, 0], [0.779294, 0.831386, 0.546111, 0.774753, 0.749518, 0.689531], atol=2e-6
    )
    np.testing.assert_allclose(
        second.weights[:, 0],
        [0.869799, 0.670061, 0.529653, 0.641820, 0.525712, 0.844027],
        atol=2e-6,
    )
    np.testing.assert_allclose(first.weights.sum(-1), 1, rtol=1e-6)


def test_the_tiny_dense_model(checkpoint_of, batch_of, runner_for) -> None:
    arrays = rule_weights(TINY_DENSE)
    assert len(arrays) == 20
    runner = runner_for(checkpoint_of(TINY_DENSE, arrays), 8)
    logits = runner.step(batch_of((IDS, 0, [0])))
    np.testing.assert_allclose(logits[0, :4], [0.410291, 0.916451, 1.353844, 1.078018], atol=2e-6)
    np.testing.assert_allclose(
        logits[5, :8],
        [0.465293, 1.740565, 0.331394, 0.404006, -0.371739, -0.146926, 0.889837, 0.221796],
        atol=2e-6,
    )
    assert np.abs(logits).sum() == pytest.approx(232.29797, abs=2e-4)
    assert logits.argmax(-1).tolist() == [48, 48, 48, 31, 23, 1]


@pytest.fixture(scope="module")
def stories(shared: Path):
    """The 260K-parameter story model and what it is known to say."""
    golden = json.loads((shared / "data/goldens/stories260k.json").read_text(encoding="utf-8"))
    return open_checkpoint(shared / "data/models/stories260k-ernie"), golden


def greedy(runner, batch_of, ids: list[int], steps: int) -> list[int]:
    table = range(runner.num_blocks)
    ids = list(ids)
    done = 0
    for _ in range(steps):
        logits = runner.step(batch_of((ids[done:], done, table), rows=[len(ids) - done - 1]))
        done = len(ids)
        ids.append(int(logits[0].argmax()))
    return ids


def test_stories_greedy_text_from_nothing(stories, batch_of, runner_for) -> None:
    checkpoint, golden = stories
    expected = golden["greedy_ids_from_bos"]
    runner = runner_for(checkpoint, 256)
    assert greedy(runner, batch_of, [1], len(expected) - 1) == expected


@pytest.mark.parametrize("case", range(5))
def test_stories_prompts(stories, batch_of, runner_for, case: int) -> None:
    checkpoint, golden = stories
    wanted = golden["cases"][case]
    ids = wanted["ids"]
    runner = runner_for(checkpoint, 256)
    batch = batch_of((ids, 0, range(32)))
    logits = runner.step(batch)
    np.testing.assert_allclose(logits[-1], wanted["last_logits"], atol=1e-3)
    logprobs = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(
        logprobs[np.arange(len(ids) - 1), ids[1:]],
        wanted["logprob_of_each_next_prompt_token"],
        atol=1e-3,
    )
    norms = [np.linalg.norm(x[-1]) for x in runner.model.hidden_states(batch, runner.cache)]
    np.testing.assert_allclose(norms, wanted["hidden_l2_after_each_layer_last_token"], atol=1e-3)
    assert greedy(runner, batch_of, ids, 32)[len(ids) :] == wanted["greedy_next_32"]


def test_stories_perplexity(stories, batch_of, runner_for) -> None:
    checkpoint, golden = stories
    case = golden["perplexity_case"]
    ids = case["ids"]
    logits = runner_for(checkpoint, len(ids)).step(batch_of((ids, 0, range(len(ids) // 8 + 1))))
    logprobs = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    nll = -logprobs[np.arange(len(ids) - 1), ids[1:]].mean()
    assert nll == pytest.approx(case["mean_nll"], abs=1e-4)
    assert np.exp(nll) == pytest.approx(case["ppl"], abs=1e-3)
