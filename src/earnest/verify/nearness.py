"""Nearness: the same text through the native runner and through the reference, on any file.

The native runner rounds what it multiplies (activations to 15 bits, keys and values to 16), so it
is near the reference and not equal to it. Compared are the logits of every token of the built-in
passages and the experts of every layer.

Another choice of experts changes what all layers above and all later tokens are made of, so the
reference goes on with the native runner's choices and says at each what it would have chosen: every
(token, layer) pair is compared after the same past, and every difference stands for itself. It must
be a near tie, a choice between scores that are no farther apart than roundings move them.

Shape suffixes: T tokens, E routed experts, A active experts, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.log import Progress, silent
from earnest.runners.base import Float32, Routing
from earnest.runners.native.runner import NativeRunner
from earnest.runners.reference import Model, expert_weights, route, softmax
from earnest.verify.exactness import MAX_TOKENS, finite, kl_divergence
from earnest.verify.reading import Reader, sequences_of

# Mean Kullback-Leibler divergence, reference to native, in nats a token. Measured: 4e-7 (SmolLM2 in
# Q8_0), 8e-7 (Q4_1).
KL_BUDGET = 1e-4
# By which share the perplexity of the passages differs. Measured: 2e-4.
PERPLEXITY_BUDGET = 3e-3
# Share of (token, layer) pairs with other experts. Measured on a mixture of random weights in the
# proportions of the 21B model: 5e-4 to 6e-4. Of few pairs two are allowed in any case.
EXPERT_BUDGET, FEW = 1e-3, 2
# How far apart the scores of exchanged experts may be, by the spread (standard deviation) of the
# scores of all experts. Measured: 7e-4.
NEAR_TIE = 2e-3

_SHOWN = 20  # differences in the summary; JSON has them all


@dataclass(frozen=True)
class OtherExperts:
    """A (token, layer) pair for which the runners chose different experts.

    Attributes:
        layer, passage, token: where; tokens are counted from the beginning of the passage.
        native_only, reference_only: the experts that only one of them chose.
        gap: how far apart the reference's selection scores of these are.
        spread: standard deviation of the scores of all experts of this token.
    """

    layer: int
    passage: int
    token: int
    native_only: tuple[int, ...]
    reference_only: tuple[int, ...]
    gap: float
    spread: float

    @property
    def tie(self) -> float:
        """The gap by the spread."""
        return self.gap / self.spread if self.spread else self.gap

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, passage {self.passage}, token {self.token}: "
            f"{_listed(self.native_only)} for {_listed(self.reference_only)}, "
            f"{self.gap:.1e} apart, {self.tie:.1e} of the spread of the scores"
        )


@dataclass(frozen=True)
class NearnessReport:
    """The outcome of `nearness`.

    Attributes:
        passed: whether everything is within the budgets.
        tier, kv, activation_bits: what the native runner computed with.
        tokens: tokens compared.
        relative_logit_difference: largest difference of a logit over the largest logit.
        kl_mean, kl_max: divergence of the next-token distributions, reference to native, in nats.
        top1_agreement: share of tokens with the same likeliest next token.
        perplexity, reference_perplexity: of the passages, as each runner reads them.
        perplexity_apart: by which share they differ.
        pairs: (token, layer) pairs for which experts were chosen.
        expert_agreement: share of these with the same set of experts; None for a dense model.
        other_experts: the pairs with others.
        failures: what exceeds its budget, one sentence each.
        budgets: the budgets, by the name of what they bound.
        notes: what a careful reader should know, one sentence each.
    """

    passed: bool
    tier: str
    kv: str
    activation_bits: int
    tokens: int
    relative_logit_difference: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    perplexity_apart: float
    pairs: int
    expert_agreement: float | None
    other_experts: tuple[OtherExperts, ...]
    failures: tuple[str, ...]
    budgets: dict[str, float]
    notes: tuple[str, ...]

    COLUMNS: ClassVar[list[str]] = ["native beside reference", "measured", "at most"]

    def rows(self) -> list[list[str]]:
        """One row per budget, for a table."""
        rows = [
            ["KL, nats a token", f"{self.kl_mean:.1e}", f"{KL_BUDGET:.0e}"],
            ["perplexity apart", f"{self.perplexity_apart:.1e}", f"{PERPLEXITY_BUDGET:.0e}"],
        ]
        if self.expert_agreement is not None:
            worst = max((other.tie for other in self.other_experts), default=0.0)
            rows += [
                [
                    "other experts",
                    f"{len(self.other_experts):,} of {self.pairs:,}",
                    f"{_allowed(self.pairs):,}",
                ],
                ["farthest from a tie", f"{worst:.1e}", f"{NEAR_TIE:.0e}"],
            ]
        return rows

    def summary(self) -> str:
        """The figures, the differences, what failed, and the notes, for people."""
        lines = [
            f"nearness: {self.tokens} tokens, tier {self.tier}, activations of "
            f"{self.activation_bits} bits, keys and values in {self.kv}",
            f"  largest logit difference {self.relative_logit_difference:.1e} of the largest "
            f"logit, KL {self.kl_mean:.1e} mean, {self.kl_max:.1e} most, same likeliest token "
            f"{self.top1_agreement:.2%}, perplexity {self.perplexity:.4f} beside "
            f"{self.reference_perplexity:.4f}",
        ]
        if self.expert_agreement is not None:
            lines.append(f"  same experts {self.expert_agreement:.4%}")
        lines += [f"  other experts: {other}" for other in self.other_experts[:_SHOWN]]
        if len(self.other_experts) > _SHOWN:
            lines.append(f"  and {len(self.other_experts) - _SHOWN} more (--json has all)")
        lines += [f"  FAILED: {failure}" for failure in self.failures]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; what is not finite becomes null."""
        return {name: finite(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Following(Model):
    """The reference, which goes on with the experts that another runner chose.

    Attributes:
        others: that runner's choices, by layer.
        own: receives what it would have chosen itself and its selection scores, by layer.
    """

    others: dict[int, Routing] = field(default_factory=dict)
    own: dict[int, tuple[npt.NDArray[np.int64], Float32]] = field(default_factory=dict)

    def choose(
        self, layer: int, logits_TE: Float32, bias_E: Float32 | None
    ) -> tuple[npt.NDArray[np.int64], Float32]:
        k, norm_min = self.config.moe_k, self.config.moe_norm_min
        own_TA, _ = route(logits_TE.copy(), bias_E, k, norm_min)
        probability_TE = softmax(logits_TE)
        self.own[layer] = own_TA, probability_TE if bias_E is None else probability_TE + bias_E
        experts_TA = self.others[layer].experts.astype(np.int64)
        return experts_TA, expert_weights(probability_TE, experts_TA, norm_min)


def nearness(
    checkpoint: Checkpoint,
    *,
    sequences: Sequence[Sequence[int]] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> NearnessReport:
    """Run the built-in passages with the native runner and with the reference, and compare.

    Args:
        checkpoint: the model.
        sequences: token ids to read in place of the passages.
        progress: told bytes of weights.
        options: of `NativeRunner`; its own defaults if left out.

    Raises:
        MissingPackageError: the compiled kernels are not installed.
        MemoryBudgetError: the packed model, or the keys and values, do not fit into memory.
    """
    notes: tuple[str, ...] = ()
    if sequences is None:
        sequences, notes = sequences_of(checkpoint, MAX_TOKENS)
    reader = Reader(checkpoint, sequences)
    native = NativeRunner(
        checkpoint,
        num_blocks=reader.num_blocks,
        block_size=reader.block_size,
        progress=progress,
        **options,
    )
    routing: list[Routing] = []
    ours_TV = native.step(reader.batch, routing)
    computed = {
        "tier": native.tier,
        "kv": native.kv,
        "activation_bits": options.get("activation_bits", 15),
    }
    del native  # its packed weights: the reference needs that memory now
    following = _Following(
        checkpoint.config,
        reader.model.weights,
        reader.num_layers,
        others={layer.layer: layer for layer in routing},
    )
    for last_TD in reader.hidden_states(model=following, progress=progress, what="the reference"):
        x_TD = last_TD
    theirs_TV = reader.logits(x_TD)
    others = _other_experts(following, reader.rows)
    return _report(reader, sequences, ours_TV, theirs_TV, others, len(routing), notes, computed)


def _other_experts(following: _Following, rows: Sequence[slice]) -> list[OtherExperts]:
    starts = [passage.start for passage in rows]
    found = []
    for layer, (own_TA, scores_TE) in following.own.items():
        others_TA = following.others[layer].experts
        differ_T = np.any(np.sort(own_TA, axis=-1) != np.sort(others_TA, axis=-1), axis=-1)
        for token in np.flatnonzero(differ_T).tolist():
            native = {int(expert) for expert in others_TA[token]}
            reference = {int(expert) for expert in own_TA[token]}
            passage = int(np.searchsorted(starts, token, "right")) - 1
            exchanged = sorted(native ^ reference)
            found.append(
                OtherExperts(
                    layer=layer,
                    passage=passage,
                    token=token - starts[passage],
                    native_only=tuple(sorted(native - reference)),
                    reference_only=tuple(sorted(reference - native)),
                    gap=float(np.ptp(scores_TE[token, exchanged])),
                    spread=float(scores_TE[token].std()),
                )
            )
    return found


def _report(
    reader: Reader,
    sequences: Sequence[Sequence[int]],
    ours_TV: Float32,
    theirs_TV: Float32,
    others: list[OtherExperts],
    moe_layers: int,
    notes: tuple[str, ...],
    computed: dict[str, Any],
) -> NearnessReport:
    kl_T = kl_divergence(theirs_TV, ours_TV)
    ours, theirs = (_mean_nats(x, sequences, reader.rows) for x in (ours_TV, theirs_TV))
    apart = abs(float(np.expm1(ours - theirs)))
    pairs = moe_layers * len(kl_T)
    failures = []
    if not kl_T.mean() <= KL_BUDGET:  # not `>`: what is not a number must fail
        failures.append(f"KL is {kl_T.mean():.1e} nats a token, at most {KL_BUDGET:.0e} is allowed")
    if not apart <= PERPLEXITY_BUDGET:
        failures.append(
            f"perplexities are {apart:.1e} apart, at most {PERPLEXITY_BUDGET:.0e} is allowed"
        )
    if len(others) > _allowed(pairs):
        failures.append(
            f"other experts were chosen for {len(others)} of {pairs} (token, layer) pairs, at most "
            f"{_allowed(pairs)} are allowed"
        )
    if far := [other for other in others if not other.tie <= NEAR_TIE]:
        failures.append(
            f"{len(far)} choices of experts differ where it was no tie, first: {far[0]}"
        )
    return NearnessReport(
        passed=not failures,
        **computed,
        tokens=len(kl_T),
        relative_logit_difference=float(
            np.abs(ours_TV - theirs_TV).max() / np.abs(theirs_TV).max()
        ),
        kl_mean=float(kl_T.mean()),
        kl_max=float(kl_T.max()),
        top1_agreement=float((ours_TV.argmax(axis=-1) == theirs_TV.argmax(axis=-1)).mean()),
        perplexity=float(np.exp(ours)),
        reference_perplexity=float(np.exp(theirs)),
        perplexity_apart=apart,
        pairs=pairs,
        expert_agreement=1 - len(others) / pairs if pairs else None,
        other_experts=tuple(others),
        failures=tuple(failures),
        budgets={
            "kl_mean": KL_BUDGET,
            "perplexity": PERPLEXITY_BUDGET,
            "other_experts": EXPERT_BUDGET,
            "near_tie": NEAR_TIE,
        },
        notes=notes,
    )


def _allowed(pairs: int) -> int:
    """How many of the pairs may have other experts."""
    return max(FEW, int(EXPERT_BUDGET * pairs))


def _mean_nats(
    logits_TV: Float32, sequences: Sequence[Sequence[int]], rows: Sequence[slice]
) -> float:
    """Cross-entropy of a token, over all that have one before them in their sequence."""
    nats: list[float] = []
    for ids, passage in zip(sequences, rows, strict=True):
        for logits_V, token in zip(logits_TV[passage][:-1], ids[1:], strict=True):
            wide_V = logits_V.astype(np.float64)
            nats.append(float(np.logaddexp.reduce(wide_V) - wide_V[token]))
    return float(np.mean(nats))


def _listed(experts: Sequence[int]) -> str:
    return f"expert{'s'[: len(experts) > 1]} {', '.join(map(str, experts))}"
