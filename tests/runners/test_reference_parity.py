"""The reference runner against `transformers`, over seeded random configurations.

Every configuration is saved by `save_pretrained`, opened by `open_checkpoint`, and run by both in
float32 on the same tokens. A third of the files are bfloat16 (widened to float32 by both). A fifth
of the sequences are continued from a long random KV cache, so that the last position is 131,071.
Each is then converted to the Paddle layout and to GGUF, and must give the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from random_configs import CONTEXT, SEEDS, draw

from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.checkpoint.convert import convert
from earnest.checkpoint.export import export
from earnest.errors import ConfigError
from earnest.runners import Routing

torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
transformers = pytest.importorskip("transformers", reason="there is nothing to compare with")

TOKENS = 24
# Selection scores closer than this may come out in either order.
TIE = 1e-6


@dataclass
class Case:
    """A transformers model, the folder it was saved to, and what it says of some tokens."""

    model: torch.nn.Module
    folder: Path
    tokens: list[int]
    start: int
    past: list[tuple[np.ndarray, np.ndarray]]
    logits: np.ndarray = field(default_factory=lambda: np.empty(0))
    routers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights of a plausible scale: every tensor matters, none dominates."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "e_score" in name:
            # Probabilities are about 1 / E; a bias of that size changes the selection.
            parameter.copy_(noise / parameter.numel())
        elif "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


@torch.no_grad()
def make_case(seed: int, folder: Path) -> Case:
    kwargs = draw(seed)
    moe = "moe_k" in kwargs
    kind = "Ernie4_5_Moe" if moe else "Ernie4_5"
    cls = getattr(transformers, f"{kind}ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**kwargs)
    model = cls(config).eval()
    randomise(model, seed)
    if seed % 3 == 0:
        for name, parameter in model.named_parameters():
            # Published files keep the router in float32; half of these do.
            if "e_score" not in name and not ("mlp.gate.weight" in name and seed % 2):
                parameter.data = parameter.data.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    if seed % 3 == 0:
        model = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=kwargs["attn_implementation"],
        ).eval()
    rng = np.random.default_rng(seed)
    start = CONTEXT - TOKENS if seed % 5 == 4 else int(rng.choice([0, 0, 3, 700]))
    shape = (config.num_key_value_heads, start, kwargs["head_dim"])
    past = [
        (rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32))
        for _ in range(config.num_hidden_layers)
    ]
    tokens = rng.integers(config.vocab_size, size=TOKENS).tolist()
    case = Case(model, folder, tokens, start, past)
    run_reference(case)
    return case


@torch.no_grad()
def run_reference(case: Case) -> None:
    """Fill in logits and, per MoE layer, (selection scores, chosen experts, their weights)."""
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda *call: seen(case, *call))
        for layer in case.model.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    cache = transformers.DynamicCache(config=case.model.config)
    if case.start:
        for layer, (keys, values) in enumerate(case.past):
            cache.update(torch.from_numpy(keys)[None], torch.from_numpy(values)[None], layer)
    case.logits = (
        case.model(
            torch.tensor([case.tokens]),
            position_ids=torch.arange(case.start, case.start + len(case.tokens))[None],
            past_key_values=cache,
        )
        .logits[0]
        .numpy()
    )
    for hook in hooks:
        hook.remove()


def seen(case: Case, gate: torch.nn.Module, _arguments: object, output: tuple) -> None:
    logits, weights, experts = output
    probability = torch.softmax(logits, -1)
    score = gate.moe_statics(probability)
    plain = probability.topk(gate.top_k).indices.sort().values
    if not torch.equal(plain, experts.sort().values):
        case.model.bias_mattered = True
    case.routers.append((score.numpy(), experts.numpy(), weights.numpy()))


def compare_routing(case: Case, routing: list[Routing]) -> int:
    """Assert equal experts and weights but for ties; return the number of tokens that tied."""
    assert len(routing) == len(case.routers)
    ties = 0
    for ours, (score, experts, weights) in zip(routing, case.routers, strict=True):
        for t in range(len(experts)):
            if ours.experts[t].tolist() == experts[t].tolist():
                np.testing.assert_allclose(ours.weights[t], weights[t], rtol=0, atol=1e-4)
                continue
            ties += 1
            theirs_by_rank = score[t, experts[t]]
            ours_by_rank = score[t, ours.experts[t]]
            assert np.abs(theirs_by_rank - ours_by_rank).max() < TIE, (
                f"layer {ours.layer}, token {t}: {ours.experts[t]} instead of {experts[t]}"
            )
    return ties


def fill_cache(runner, case: Case, table: np.ndarray) -> None:
    slots = runner.cache.slots(table, case.start)
    for layer, (keys, values) in enumerate(case.past):
        runner.cache.keys[layer][:, slots] = keys
        runner.cache.values[layer][:, slots] = values


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    scale = np.abs(theirs).max()
    assert scale > 0.5, "logits too small to tell anything"
    assert np.abs(ours - theirs).max() < 1e-4 * scale


def converted(checkpoint: Checkpoint, folder: Path) -> Iterator[Checkpoint]:
    """The checkpoint through our own conversions to Paddle and to GGUF."""
    convert(checkpoint, folder / "paddle", "paddle")
    yield open_checkpoint(folder / "paddle")
    config = checkpoint.config
    if config.is_moe and config.moe_layer_end_index < config.num_hidden_layers - 1:
        with pytest.raises(ConfigError, match="moe_layer_end_index"):  # GGUF cannot say it
            export(checkpoint, folder / "model.gguf")
    else:
        export(checkpoint, folder / "model.gguf")
        yield open_checkpoint(folder / "model.gguf")


@pytest.mark.parametrize("seed", SEEDS)
def test_random_configuration(seed: int, tmp_path: Path, batch_of, runner_for) -> None:
    folder = tmp_path / "hf"
    case = make_case(seed, folder)
    checkpoint = open_checkpoint(folder)
    budget = 0 if seed % 7 == 3 else None
    length = case.start + TOKENS
    runner = runner_for(checkpoint, length + 64, memory_budget=budget)
    table = np.random.default_rng(seed).permutation(runner.num_blocks).astype(np.int32)

    fill_cache(runner, case, table)
    routing: list[Routing] = []
    logits = runner.step(batch_of((case.tokens, case.start, table)), routing)
    assert compare_routing(case, routing) <= 1, "ties must be rare"
    assert_close(logits, case.logits)
    if checkpoint.config.is_moe:
        assert case.routers
        assert case.model.bias_mattered, "the correction bias must change the selection"

    # Token by token after an odd chunk; the KV blocks hold the first pass and are overwritten.
    incremental = [runner.step(batch_of((case.tokens[:7], case.start, table)))]
    incremental += [
        runner.step(batch_of(([token], case.start + i, table)))
        for i, token in enumerate(case.tokens[7:], 7)
    ]
    assert_close(np.concatenate(incremental), case.logits)

    # The same weights in the other layouts.
    for other in converted(checkpoint, tmp_path):
        again = runner_for(other, length + 64, memory_budget=budget)
        fill_cache(again, case, table)
        routing = []
        logits = again.step(batch_of((case.tokens, case.start, table)), routing)
        assert compare_routing(case, routing) <= 1, f"ties must be rare ({other.dialect})"
        assert_close(logits, case.logits)
