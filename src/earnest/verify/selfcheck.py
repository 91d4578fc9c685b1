"""The self-check: does a checkpoint read plain text as a trained model does? Needs no reference.

A model whose rotary pairs, gate and up halves or correction bias are not where the arithmetic looks
for them still runs and still gives numbers; but it finds plain prose unlikely. So the built-in
passages are read, each twice in a row, and two things are measured:

- *bits per byte* of the first reading: the cross-entropy of the text, in a unit that does not
  depend on the tokenizer;
- the *second reading ratio*: nats per token of the second reading over the first. A trained model
  that meets the same text again finds it easier (or, if it is tiny, as easy). One that attends to
  the wrong positions finds it harder the longer it reads.

If the best of the passages is clearly plausible, the check is passed. If not, each known mistake is
made on purpose on our side, so that it cancels the one the checkpoint may have, and the passages
are read again. The mistake whose making helps most is what the checkpoint looks like. A correction
bias that is missing cannot be made up; its absence is seen in the tensors.

What the thresholds stand on, measured: bits per byte of the best passage, and the second reading
ratio in brackets.

| model                                  | stories260K  | SmolLM2-135M Q4_1 |
|----------------------------------------|--------------|-------------------|
| as published                           | 0.56 (0.99)  | 0.61 (0.09)       |
| q and k rows in half-split order       | 3.02 (1.06)  | 1.13 (1.20)       |
| the opposite permutation               | 2.30 (1.26)  | 1.23 (1.08)       |
| gate and up exchanged                  | 3.02 (1.03)  | 7.48 (1.06)       |
| half-split order and exchanged         | 3.32 (1.02)  | 7.85 (1.10)       |
| any of these, read with the same again | 0.56 (0.99)  | 0.61 (0.09)       |
| random weights                         | 3.48 (1.00)  | 4.1 (uniform)     |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import log
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.errors import TokenizerError
from earnest.log import Progress, silent
from earnest.runners.base import Float32
from earnest.runners.reference import Arithmetic
from earnest.verify.passages import PASSAGES
from earnest.verify.reading import Reader, Reading, encode

# Tokens of a passage that are read; 256 hold each passage whole under any large vocabulary.
MAX_TOKENS = 256
MIN_TOKENS = 32

# Best passage below this many bits per byte, and no harder when read again: a trained model, read
# rightly. Half-way (geometrically) between the worst intact and the best mangled model measured.
CLEAR_BITS_PER_BYTE = 0.8
MAX_SECOND_READING = 1.05

# Neither clear nor hopeless is a weak model, or one in another language. It passes if no repair
# helps, if it is below this (a random model is above 3), and if reading again does not hurt.
WEAK_BITS_PER_BYTE = 2.0

# A repair counts if it takes away at least a quarter of the bits. Measured: the right one takes 46%
# (SmolLM2, half-split) to 92%; on an intact or a random model, each mistake adds bits.
REPAIR_FACTOR = 0.75

# Random logits put the right token 0 standard deviations above their mean, give or take 0.1 over a
# passage. Whatever has learnt at least which words are frequent, puts it above 1.
UNTRAINED_ADVANTAGE = 0.5

_ROWS = 128  # logits held at a time: 53 MB with ERNIE's vocabulary


@dataclass(frozen=True)
class Mistake:
    """How to make a mistake on our side.

    Attributes:
        arithmetic: what the runner does differently.
        permute_rows: bring the rows of q and k into half-split order before they are used.
    """

    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    permute_rows: bool = False


NONE = Mistake()
MISTAKES: Mapping[str, Mistake] = {
    "half-split RoPE": Mistake(Arithmetic(rope="half-split")),
    "swapped gate and up": Mistake(Arithmetic(swap_gate_up=True)),
    "half-split RoPE and swapped gate and up": Mistake(
        Arithmetic(rope="half-split", swap_gate_up=True)
    ),
    "needlessly permuted RoPE": Mistake(permute_rows=True),
    "wrong correction bias": Mistake(Arithmetic(use_correction_bias=False)),
}
MISSING_BIAS = "missing correction bias"
UNTRAINED = "untrained weights"
OTHER_DAMAGE = "other damage"

_REMEDIES = {
    "half-split RoPE": "the rows of q_proj and k_proj are ordered for half-split (Llama, NeoX) "
    "rotary pairs; ERNIE's are interleaved. Convert again from the published files without "
    "permuting them",
    "swapped gate and up": "gate_proj and up_proj (or the halves of up_gate_proj: gate is first) "
    "are exchanged. Convert again from the published files",
    "half-split RoPE and swapped gate and up": "q_proj and k_proj are ordered for half-split "
    "rotary pairs, and gate_proj and up_proj are exchanged. Convert again from the published files",
    "needlessly permuted RoPE": "the rows of q_proj and k_proj were permuted from half-split to "
    "interleaved order, as converters do for Llama, though ERNIE's are interleaved already. "
    "Convert again from the published files without permuting them",
    "wrong correction bias": "without its e_score_correction_bias the model reads well, so these "
    "biases belong elsewhere: another layer, another model, or another order of experts",
    MISSING_BIAS: "e_score_correction_bias is absent or constant, so the wrong experts are chosen. "
    "Take it from the published files (model.layers.N.mlp.moe_statics)",
    UNTRAINED: "the weights look random or barely trained; nothing is known to be misplaced",
    OTHER_DAMAGE: "the model does not read plain text, and none of the known mistakes explains it: "
    "compare with another copy (earnest diff) or with the reference (--against transformers)",
}


@dataclass(frozen=True)
class PassageScore:
    """How likely a model finds one passage.

    Attributes:
        passage: its name.
        tokens: tokens scored in one reading.
        nats_per_token: mean cross-entropy of the first reading.
        bits_per_byte: the same per UTF-8 byte of text, in bits.
        second_reading_ratio: nats per token of the second reading over the first; None where the
            context is too short to read twice.
        advantage: by how many standard deviations of the logits the right token's logit lies above
            their mean, averaged over the first reading.
    """

    passage: str
    tokens: int
    nats_per_token: float
    bits_per_byte: float
    second_reading_ratio: float | None
    advantage: float


@dataclass(frozen=True)
class Trial:
    """The passages read with one arithmetic.

    Attributes:
        name: "as stored", or the mistake that was made on purpose.
        scores: one per passage.
    """

    name: str
    scores: tuple[PassageScore, ...]

    @property
    def best(self) -> PassageScore:
        """The passage that suits the model best: a small model may know one language only."""
        return min(self.scores, key=lambda score: score.bits_per_byte)


@dataclass(frozen=True)
class SelfCheckReport:
    """The outcome of `selfcheck`.

    Attributes:
        passed: whether the checkpoint reads like a trained model.
        suspected: the mistake it looks like; None if it passed, or could not be checked.
        verdict: the outcome in one sentence.
        trials: the readings, first as stored, then with each mistake that was tried.
        notes: what a careful reader should know, one sentence each.
    """

    passed: bool
    suspected: str | None
    verdict: str
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()

    COLUMNS: ClassVar[list[str]] = ["reading", "passage", "nats/token", "bits/byte", "read again"]

    def rows(self) -> list[list[str]]:
        """One row per trial and passage, for a table."""
        return [
            [
                trial.name,
                score.passage,
                f"{score.nats_per_token:.3f}",
                f"{score.bits_per_byte:.3f}",
                "-"
                if score.second_reading_ratio is None
                else f"x {score.second_reading_ratio:.2f}",
            ]
            for trial in self.trials
            for score in trial.scores
        ]

    def summary(self) -> str:
        """The verdict and the notes, for people."""
        return "\n".join([f"self-check: {self.verdict}", *(f"  note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def selfcheck(checkpoint: Checkpoint, *, progress: Progress = silent) -> SelfCheckReport:
    """Read the built-in passages and judge whether a trained model reads like that.

    Costs one pass over the weights for a checkpoint that is in order, up to five for one that is
    not. `progress` is told bytes of weights, and starts again with each pass.

    Raises:
        MachineError, CheckpointError: the checkpoint cannot be read. A checkpoint without a
            tokenizer is reported, not raised.
    """
    try:
        readings = encode(checkpoint, PASSAGES, MAX_TOKENS)
    except TokenizerError as error:
        return SelfCheckReport(
            passed=False,
            suspected=None,
            verdict=f"not done, since the text cannot be encoded: {error.problem}",
        )
    readings = [reading for reading in readings if len(reading.body) >= MIN_TOKENS]
    if not readings:
        return SelfCheckReport(False, None, "not done: the context is too short for any text")
    bias_problem = correction_bias_problem(checkpoint)
    notes = () if bias_problem is None else (bias_problem,)
    examiner = _Examiner(checkpoint, readings)
    trials = [examiner.read("as stored", NONE, progress)]
    if _is_clear(trials[0].best):
        return SelfCheckReport(True, None, _plausible(trials[0].best), tuple(trials), notes)
    for name, mistake in MISTAKES.items():
        needs_bias = not mistake.arithmetic.use_correction_bias
        if needs_bias and (bias_problem or not checkpoint.config.is_moe):
            continue
        trials.append(examiner.read(name, mistake, progress))
        if _is_clear(trials[-1].best):
            break
    return _judge(trials, bias_problem)


def correction_bias_problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the correction biases as such; None if nothing is.

    Training moves each expert's bias by its own load, so a bias that is absent or the same for all
    experts of a layer is one that got lost, or was never trained.
    """
    config = checkpoint.config
    absent, constant = [], []
    for layer in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        name = f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            absent.append(layer)
        elif tensor.size > 1 and float(np.ptp(tensor.read())) == 0:
            constant.append(layer)
    parts = [
        f"e_score_correction_bias is {what} in layer{'s' * (len(layers) > 1)} "
        + ", ".join(map(str, layers[:8]))
        + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
        for what, layers in (("absent", absent), ("the same for all experts", constant))
        if layers
    ]
    return "; ".join(parts) or None


def half_split_rows(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors with the rows of every q_proj and k_proj brought from interleaved into half-split
    order: rows (0, 2, 4, ..., 1, 3, 5, ...) of each head. Rows are stored whole in every codec.
    """
    C = checkpoint.config.head_dim

    def permuted(tensor: LazyTensor) -> LazyTensor:
        order = np.arange(tensor.shape[0]).reshape(-1, C // 2, 2).swapaxes(1, 2).ravel()
        return replace(tensor, view=lambda: tensor.raw()[order], panels=None)

    return {
        name: permuted(tensor) if ".self_attn.q_" in name or ".self_attn.k_" in name else tensor
        for name, tensor in checkpoint.tensors.items()
    }


class _Examiner:
    """Reads each passage twice in a row, with one arithmetic or another."""

    def __init__(self, checkpoint: Checkpoint, readings: list[Reading]) -> None:
        self._checkpoint, self._readings = checkpoint, readings
        context = checkpoint.config.max_position_embeddings
        self._twice = [len(r.prefix) + 2 * len(r.body) <= context for r in readings]
        self._sequences = [
            r.prefix + r.body * (2 if twice else 1)
            for r, twice in zip(readings, self._twice, strict=True)
        ]
        self._permuted, self._reader = False, Reader(checkpoint, self._sequences)

    def read(self, name: str, mistake: Mistake, progress: Progress) -> Trial:
        if mistake.permute_rows != self._permuted:
            tensors = self._checkpoint.tensors
            if mistake.permute_rows:
                tensors = half_split_rows(self._checkpoint)
            del self._reader  # and with it the weights it keeps decoded
            self._reader = Reader(replace(self._checkpoint, tensors=tensors), self._sequences)
            self._permuted = mistake.permute_rows
        # A mangled model may overflow; the scores then say so, and a warning would say it twice.
        with np.errstate(over="ignore", invalid="ignore"):
            for x_TD in self._reader.hidden_states(
                arithmetic=mistake.arithmetic, progress=progress, what=f"reading, {name}"
            ):
                last_TD = x_TD
            scores = [
                self._score(reading, last_TD[rows], twice)
                for reading, rows, twice in zip(
                    self._readings, self._reader.rows, self._twice, strict=True
                )
            ]
        return Trial(name, tuple(scores))

    def _score(self, reading: Reading, x_TD: Float32, twice: bool) -> PassageScore:
        # The first token of a reading has nothing, or something unrelated, before it.
        start, length = len(reading.prefix), len(reading.body)
        targets = np.array(reading.body[1:])
        first, advantage = self._likelihood(x_TD[start : start + length - 1], targets)
        ratio = None
        if twice:
            second, _ = self._likelihood(x_TD[start + length : start + 2 * length - 1], targets)
            ratio = second / first
        return PassageScore(
            passage=reading.passage.name,
            tokens=len(targets),
            nats_per_token=first,
            bits_per_byte=first * length / log(2) / reading.utf8_bytes,
            second_reading_ratio=ratio,
            advantage=advantage,
        )

    def _likelihood(self, x_RD: Float32, targets_R: npt.NDArray[np.integer]) -> tuple[float, float]:
        """Mean cross-entropy in nats, and mean advantage, of the targets."""
        nats, advantages = [], []
        for start in range(0, len(x_RD), _ROWS):
            logits_RV = self._reader.logits(x_RD[start : start + _ROWS])
            targets = targets_R[start : start + _ROWS]
            peak_R = logits_RV.max(axis=-1)
            total_R = np.exp(logits_RV - peak_R[:, None]).sum(axis=-1, dtype=np.float64)
            chosen_R = logits_RV[np.arange(len(targets)), targets]
            nats.append(np.log(total_R) + peak_R - chosen_R)
            spread_R = logits_RV.std(axis=-1) + np.float32(1e-30)
            advantages.append((chosen_R - logits_RV.mean(axis=-1)) / spread_R)
        # What is not finite counts as very unlikely.
        nats_R = np.nan_to_num(np.concatenate(nats), nan=1e4, posinf=1e4, neginf=1e4)
        advantage_R = np.nan_to_num(np.concatenate(advantages), nan=0, posinf=0, neginf=0)
        return float(nats_R.mean()), float(advantage_R.mean())


def _is_clear(score: PassageScore) -> bool:
    ratio = score.second_reading_ratio
    return score.bits_per_byte <= CLEAR_BITS_PER_BYTE and (
        ratio is None or ratio <= MAX_SECOND_READING
    )


def _plausible(score: PassageScore) -> str:
    return (
        f"reads like a trained model ({score.bits_per_byte:.2f} bits per byte of the "
        f"{score.passage} passage)"
    )


def _judge(trials: list[Trial], bias_problem: str | None) -> SelfCheckReport:
    stored, mended = trials[0].best, min(trials[1:], key=lambda trial: trial.best.bits_per_byte)
    notes = [] if bias_problem is None else [bias_problem]
    if mended.best.bits_per_byte <= REPAIR_FACTOR * stored.bits_per_byte:
        suspected = mended.name
        if not _is_clear(mended.best):
            notes.append("even so the text stays less plausible than a trained model finds it")
        return _failed(
            suspected,
            f"{stored.bits_per_byte:.2f} bits per byte as stored, "
            f"{mended.best.bits_per_byte:.2f} when read with {suspected}",
            trials,
            notes,
        )
    ratio = stored.second_reading_ratio
    if stored.bits_per_byte <= WEAK_BITS_PER_BYTE and (
        ratio is None or ratio <= MAX_SECOND_READING
    ):
        notes.append(
            f"more than the {CLEAR_BITS_PER_BYTE} bits per byte of a capable model, but no known "
            "mistake explains it: a small or specialised model"
        )
        return SelfCheckReport(True, None, _plausible(stored), tuple(trials), tuple(notes))
    measured = f"{stored.bits_per_byte:.2f} bits per byte, {stored.nats_per_token:.2f} nats a token"
    chance = max(score.advantage for score in trials[0].scores) < UNTRAINED_ADVANTAGE
    if bias_problem is not None:
        if chance:
            notes.append("no better than chance: the weights may also just be untrained")
        return _failed(MISSING_BIAS, measured, trials, notes)
    return _failed(UNTRAINED if chance else OTHER_DAMAGE, measured, trials, notes)


def _failed(
    suspected: str, measured: str, trials: list[Trial], notes: list[str]
) -> SelfCheckReport:
    return SelfCheckReport(
        passed=False,
        suspected=suspected,
        verdict=f"looks like {suspected} ({measured}): {_REMEDIES[suspected]}",
        trials=tuple(trials),
        notes=tuple(notes),
    )
