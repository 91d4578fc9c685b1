"""Exactness: the same text through `runners.reference` and through transformers, side by side.

Compared are, for every token of the built-in passages: the experts chosen in every layer, the
weights they get, the residual stream after every layer, and the logits.

Two float32 programs never agree to the last bit, for their sums run in different orders. What is
allowed follows from that and was measured, on 84 random models of 1 to 6 layers (dense, and 4 to 64
experts) and on the 30 layers of SmolLM2-135M; the largest values stand beside the budgets below.

A choice between experts whose scores differ by less than rounding (`NEAR_TIE`) is a toss-up: either
outcome is right, but everything after it differs. Such a token is counted as a near tie, and the
reference is made to take the same side, so that what follows remains comparable. Any other
disagreement is a failure and is left as it is.

Shape suffixes: T tokens, E routed experts, A active experts, D hidden size, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from earnest import env
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.errors import MemoryBudgetError, UserError
from earnest.log import Progress, silent
from earnest.runners.base import Float32, Routing
from earnest.runners.reference import Arithmetic
from earnest.verify.reading import Reader, layer_sizes, sequences_of
from earnest.verify.transformers_reference import (
    LayerTrace,
    Trace,
    load_packages,
    open_reference,
)

MAX_TOKENS = 160  # of each passage

# Largest logit difference, relative to the largest logit. Measured: random 1.9e-6, SmolLM2 3.8e-6.
RELATIVE_LOGIT_BUDGET = 1e-4
# Largest Kullback-Leibler divergence of a token's distribution, reference to ours, in nats. It goes
# with the square of the logit difference. Measured: random 4e-12, SmolLM2 2.4e-10.
KL_BUDGET = 1e-7
# Largest difference of an expert's weight (weights are between 0 and 1). Measured: 1.3e-6.
EXPERT_WEIGHT_BUDGET = 1e-4
# Scores (probability plus bias) closer than this are a tie. They differ as the weights do.
NEAR_TIE = 1e-5

# Of the free memory, what the reference may take; the rest is for activations and the system.
_MEMORY_SHARE = 0.85


@dataclass(frozen=True)
class LayerComparison:
    """One layer, all tokens.

    Attributes:
        layer: its index.
        kind: "dense" or "moe".
        hidden_difference: largest difference of the residual stream after the layer, relative to
            its largest value in the reference.
        expert_agreement: share of tokens with the same set of experts (near ties count as the
            same); None in a dense layer.
        near_ties: tokens whose choice was a toss-up and fell differently.
        expert_weight_difference: largest difference of an expert's weight where the experts agree.
    """

    layer: int
    kind: str
    hidden_difference: float
    expert_agreement: float | None
    near_ties: int
    expert_weight_difference: float | None


@dataclass(frozen=True)
class ExactnessReport:
    """The outcome of `compare`.

    Attributes:
        passed: whether everything is within the budgets.
        reference: what was compared with, by name and version.
        layers_compared: layers that were run, from the first.
        layers_total: layers the model has.
        tokens: tokens compared.
        max_logit_difference: largest absolute difference of a logit.
        relative_logit_difference: the same over the largest absolute logit of the reference.
        kl_mean, kl_max: divergence of the next-token distributions, reference to ours, in nats.
        top1_agreement: share of tokens with the same likeliest next token.
        expert_agreement: share of (token, layer) pairs with the same set of experts, near ties
            counted as the same; None for a dense model.
        near_ties: (token, layer) pairs whose choice was a toss-up and fell differently.
        layers: one comparison per layer.
        failures: what exceeds its budget, one sentence each.
        budgets: the budgets, by the name of what they bound.
        notes: what a careful reader should know, one sentence each.
    """

    passed: bool
    reference: str
    layers_compared: int
    layers_total: int
    tokens: int
    max_logit_difference: float
    relative_logit_difference: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    expert_agreement: float | None
    near_ties: int
    layers: tuple[LayerComparison, ...]
    failures: tuple[str, ...]
    budgets: dict[str, float]
    notes: tuple[str, ...]

    COLUMNS: ClassVar[list[str]] = ["layer", "hidden diff.", "experts", "near ties", "weight diff."]

    def rows(self) -> list[list[str]]:
        """One row per layer, then the logits, for a table."""
        rows = [
            [
                f"{row.layer} {row.kind}",
                f"{row.hidden_difference:.1e}",
                "-" if row.expert_agreement is None else f"{row.expert_agreement:.2%}",
                "-" if row.expert_agreement is None else str(row.near_ties),
                "-"
                if row.expert_weight_difference is None
                else f"{row.expert_weight_difference:.1e}",
            ]
            for row in self.layers
        ]
        return [*rows, ["logits", f"{self.relative_logit_difference:.1e}", "-", "-", "-"]]

    def summary(self) -> str:
        """The figures, what failed, and the notes, for people."""
        lines = [
            f"exactness: {self.layers_compared} of {self.layers_total} layers, {self.tokens} "
            f"tokens against {self.reference}",
            f"  largest logit difference {self.max_logit_difference:.2e} "
            f"({self.relative_logit_difference:.1e} of the largest logit), KL {self.kl_mean:.1e} "
            f"mean, {self.kl_max:.1e} most, same likeliest token {self.top1_agreement:.2%}",
        ]
        if self.expert_agreement is not None:
            lines.append(
                f"  same experts {self.expert_agreement:.4%}, {self.near_ties} near ties apart"
            )
        lines += [f"  FAILED: {failure}" for failure in self.failures]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; what is not finite becomes null."""
        return {name: finite(value) for name, value in asdict(self).items()}


def compare(
    checkpoint: Checkpoint,
    *,
    num_layers: int | None = None,
    arithmetic: Arithmetic | None = None,
    progress: Progress = silent,
) -> ExactnessReport:
    """Run the built-in passages here and in transformers, and compare.

    Args:
        checkpoint: the model.
        num_layers: how many layers, from the first; by default as many as memory allows.
        arithmetic: a deliberate mistake on our side, to see that the comparison can fail.
        progress: told bytes of weights.

    Raises:
        MissingPackageError: torch or transformers is not installed.
        MemoryBudgetError: not even one layer (or not `num_layers`) fits into memory.
        UserError: `num_layers` is out of range.
        CheckpointError: transformers cannot load the checkpoint.
    """
    load_packages()
    total = checkpoint.config.num_hidden_layers
    if num_layers is not None and not 1 <= num_layers <= total:
        raise UserError("num_layers is out of range", got=num_layers, expected=f"1 to {total}")
    sequences, notes = sequences_of(checkpoint, MAX_TOKENS)
    layers, advice = _fitting_layers(checkpoint, num_layers, sum(map(len, sequences)))
    ours = _Ours(checkpoint, sequences, layers, arithmetic, progress)
    gc.collect()  # the decoded weights: transformers needs that memory now
    with open_reference(checkpoint, layers, progress) as reference:
        comparison = _Comparison(ours)
        size = sum(layer_sizes(checkpoint, lambda tensor: tensor.nbytes)[:layers])
        for index, ids in enumerate(sequences):
            progress(size * index // len(sequences), size, "the reference reads")
            comparison.add(index, reference.run(ids, comparison.settle_ties(index)))
        progress(size, size, "the reference reads")
        notes = (reference.how, *notes, *advice)
        return comparison.report(reference.version, total, notes)


def _fitting_layers(
    checkpoint: Checkpoint, wanted: int | None, tokens: int
) -> tuple[int, tuple[str, ...]]:
    """How many layers the reference can hold in float32, and a note if that is not all.

    transformers needs 4 bytes a weight. While it stacks the experts of a layer they exist more than
    once; measured with layers of the 21B model, the peak is 1.3 layers above the whole.
    """
    config = checkpoint.config
    sizes = layer_sizes(checkpoint, lambda tensor: tensor.size)
    outside = sum(
        tensor.size
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(("model.layers.", "model.mtp_"))
    )
    # Of each token: logits on both sides and as many again while comparing one passage.
    activations = tokens * (3 * config.vocab_size + 4 * config.hidden_size * len(sizes))
    needed = [
        4 * (outside + sum(sizes[:n]) + int(1.5 * max(sizes[:n], default=0)) + activations)
        for n in range(len(sizes) + 1)
    ]
    available = int(env.free_memory() * _MEMORY_SHARE)
    fitting = max((n for n, bytes_ in enumerate(needed) if bytes_ <= available), default=0)
    if fitting < (wanted or 1):
        count = wanted or 1
        raise MemoryBudgetError(
            f"the reference does not fit into memory with {count} of {len(sizes)} layers",
            got=f"{available / 1e9:.1f} GB that may be used",
            expected=f"{needed[count] / 1e9:.1f} GB in float32",
            remedy=f"compare at most {fitting} layers" if fitting else "use a larger machine",
        )
    if wanted is not None or fitting == len(sizes):
        return wanted or fitting, ()
    return fitting, (
        f"only the first {fitting} of {len(sizes)} layers fit into memory in float32 "
        f"({needed[-1] / 1e9:.0f} GB are needed for all, {available / 1e9:.0f} GB are there); "
        "their output went straight to the final norm and the head",
    )


class _Ours:
    """What `runners.reference` does with the sequences, kept for the comparison."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        layers: int,
        arithmetic: Arithmetic | None,
        progress: Progress,
    ) -> None:
        self.config, self.num_layers = checkpoint.config, layers
        routing: list[Routing] = []
        reader = Reader(checkpoint, sequences, num_layers=layers)
        self.rows = reader.rows
        states = reader.hidden_states(
            arithmetic=arithmetic, routing=routing, progress=progress, what="reading"
        )
        self.hidden: list[Float32] = list(states)[1:]
        self.logits: Float32 = reader.logits(self.hidden[-1])
        self.routing = {layer.layer: layer for layer in routing}


@dataclass
class _LayerTally:
    """Running maxima and counts of one layer."""

    hidden_difference: float = 0.0
    hidden_scale: float = 0.0
    tokens: int = 0
    disagreements: int = 0
    near_ties: int = 0
    weight_difference: float = 0.0


class _Comparison:
    """Takes in one passage after another; the logits of one are held at a time."""

    def __init__(self, ours: _Ours) -> None:
        self._ours = ours
        self._layers = [_LayerTally() for _ in range(ours.num_layers)]
        self._difference = self._scale = 0.0
        self._kl: list[npt.NDArray[np.float64]] = []
        self._same_top = 0

    def settle_ties(self, sequence: int) -> Any:
        """The `Override` that makes the reference take our side where the choice is a toss-up."""
        rows = self._ours.rows[sequence]

        def override(layer: int, theirs: LayerTrace) -> npt.NDArray[np.int64]:
            assert theirs.experts is not None and theirs.scores is not None
            ours_TA = self._ours.routing[layer].experts[rows].astype(np.int64)
            differ_T = _differ(ours_TA, theirs.experts)
            tied_T = differ_T & (score_gaps(theirs.scores, theirs.experts, ours_TA) <= NEAR_TIE)
            return np.where(tied_T[:, None], ours_TA, theirs.experts)

        return override

    def add(self, sequence: int, theirs: Trace) -> None:
        rows = self._ours.rows[sequence]
        for layer, trace in enumerate(theirs.layers):
            tally = self._layers[layer]
            assert trace.hidden is not None
            apart = np.abs(self._ours.hidden[layer][rows] - trace.hidden).max()
            tally.hidden_difference = _most(tally.hidden_difference, apart)
            tally.hidden_scale = _most(tally.hidden_scale, np.abs(trace.hidden).max())
            tally.tokens += rows.stop - rows.start
            if trace.experts is not None:
                self._add_routing(tally, self._ours.routing[layer], rows, trace)
        ours_TV, theirs_TV = self._ours.logits[rows], theirs.logits
        self._difference = _most(self._difference, np.abs(ours_TV - theirs_TV).max())
        self._scale = _most(self._scale, np.abs(theirs_TV).max())
        self._kl.append(kl_divergence(theirs_TV, ours_TV))
        self._same_top += int((ours_TV.argmax(axis=-1) == theirs_TV.argmax(axis=-1)).sum())

    @staticmethod
    def _add_routing(tally: _LayerTally, ours: Routing, rows: slice, theirs: LayerTrace) -> None:
        assert theirs.experts is not None and theirs.scores is not None
        assert theirs.weights is not None
        ours_TA = ours.experts[rows].astype(np.int64)
        differ_T = _differ(ours_TA, theirs.experts)
        tied_T = differ_T & (score_gaps(theirs.scores, theirs.experts, ours_TA) <= NEAR_TIE)
        tally.near_ties += int(tied_T.sum())
        tally.disagreements += int((differ_T & ~tied_T).sum())
        # By expert, since the order within the choice may differ.
        same_T = ~differ_T
        apart = np.abs(
            _by_expert(ours.weights[rows], ours_TA)[same_T]
            - _by_expert(theirs.weights, theirs.experts)[same_T]
        )
        tally.weight_difference = _most(tally.weight_difference, apart.max(initial=0.0))

    def report(self, reference: str, layers_total: int, notes: tuple[str, ...]) -> ExactnessReport:
        config = self._ours.config
        moe = [t for i, t in enumerate(self._layers) if config.is_moe_layer(i)]
        pairs = sum(tally.tokens for tally in moe)
        kl_T = np.concatenate(self._kl)
        measured = {
            "relative_logit_difference": _ratio(self._difference, self._scale),
            "kl_max": _most(0.0, kl_T.max()),
            "expert_weight_difference": max((t.weight_difference for t in moe), default=0.0),
        }
        budgets = {
            "relative_logit_difference": RELATIVE_LOGIT_BUDGET,
            "kl_max": KL_BUDGET,
            "expert_weight_difference": EXPERT_WEIGHT_BUDGET,
        }
        # Not `>`: what is not a number must fail.
        failures = [
            f"{name.replace('_', ' ')} is {measured[name]:.2e}, at most {budget:.0e} is allowed"
            for name, budget in budgets.items()
            if not measured[name] <= budget
        ]
        disagreements = sum(tally.disagreements for tally in moe)
        if disagreements:
            first = next(i for i, tally in enumerate(self._layers) if tally.disagreements)
            failures.append(
                f"other experts were chosen for {disagreements} of {pairs} (token, layer) pairs, "
                f"first in layer {first}, where it was no tie"
            )
        return ExactnessReport(
            passed=not failures,
            reference=reference,
            layers_compared=self._ours.num_layers,
            layers_total=layers_total,
            tokens=len(kl_T),
            max_logit_difference=self._difference,
            relative_logit_difference=measured["relative_logit_difference"],
            kl_mean=float(kl_T.mean()),
            kl_max=measured["kl_max"],
            top1_agreement=self._same_top / len(kl_T),
            expert_agreement=1 - disagreements / pairs if pairs else None,
            near_ties=sum(tally.near_ties for tally in moe),
            layers=tuple(self._layer_row(i, tally) for i, tally in enumerate(self._layers)),
            failures=tuple(failures),
            budgets={**budgets, "near_tie": NEAR_TIE},
            notes=notes,
        )

    def _layer_row(self, layer: int, tally: _LayerTally) -> LayerComparison:
        moe = self._ours.config.is_moe_layer(layer)
        return LayerComparison(
            layer=layer,
            kind="moe" if moe else "dense",
            hidden_difference=_ratio(tally.hidden_difference, tally.hidden_scale),
            expert_agreement=1 - tally.disagreements / tally.tokens if moe else None,
            near_ties=tally.near_ties,
            expert_weight_difference=tally.weight_difference if moe else None,
        )


def score_gaps(
    scores_TE: Float32,
    chosen_TA: npt.NDArray[np.integer],
    other_TA: npt.NDArray[np.integer],
) -> Float32:
    """By how much the sum of the scores of one choice of experts exceeds that of another, in the
    worst pairing: the largest score chosen only here minus the smallest chosen only there, float32
    `[T]`; 0 where both choices are the same set.

    If that is within rounding, every expert that was exchanged is a toss-up.
    """
    chosen_TE = np.zeros(scores_TE.shape, bool)
    other_TE = np.zeros(scores_TE.shape, bool)
    np.put_along_axis(chosen_TE, chosen_TA, True, axis=-1)
    np.put_along_axis(other_TE, other_TA, True, axis=-1)
    best_T = np.where(chosen_TE & ~other_TE, scores_TE, -np.inf).max(axis=-1)
    worst_T = np.where(other_TE & ~chosen_TE, scores_TE, np.inf).min(axis=-1)
    same_T = ~np.any(chosen_TE != other_TE, axis=-1)
    return np.where(same_T, np.float32(0), best_T - worst_T)


def kl_divergence(reference_TV: Float32, ours_TV: Float32) -> npt.NDArray[np.float64]:
    """KL(reference || ours) of each row's softmax, in nats, summed in float64, float64 `[T]`."""
    result = np.empty(len(reference_TV))
    for row, (p_V, q_V) in enumerate(zip(reference_TV, ours_TV, strict=True)):
        log_p_V, log_q_V = _log_softmax(p_V), _log_softmax(q_V)
        result[row] = np.sum(np.exp(log_p_V) * (log_p_V - log_q_V))
    return result


def _log_softmax(x_V: Float32) -> npt.NDArray[np.float64]:
    wide_V = x_V.astype(np.float64)
    wide_V -= wide_V.max()
    shifted: npt.NDArray[np.float64] = wide_V - np.log(np.sum(np.exp(wide_V)))
    return shifted


def _differ(a_TA: npt.NDArray[np.integer], b_TA: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Whether two choices are different sets, bool `[T]`."""
    unequal_TA = np.sort(a_TA, axis=-1) != np.sort(b_TA, axis=-1)
    return np.asarray(unequal_TA.any(axis=-1))


def _by_expert(weights_TA: Float32, experts_TA: npt.NDArray[np.integer]) -> Float32:
    return np.take_along_axis(weights_TA, np.argsort(experts_TA, axis=-1), axis=-1)


def _most(so_far: float, value: Any) -> float:
    """The larger one; what is not a number wins, so that it cannot go unnoticed."""
    return float(np.maximum(so_far, value))


def _ratio(difference: float, scale: float) -> float:
    """`difference / scale`, where a scale of nothing leaves the difference as it is."""
    return difference / scale if scale else difference


def finite(value: Any) -> Any:
    """What JSON can hold: floats that are not finite become None, tuples become lists."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
