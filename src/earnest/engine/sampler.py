"""From logits to one token id, and to log-probabilities; numpy only, one `Sampler` per request.

Everything is computed in float64, where none of the permitted parameters can overflow into NaN. The
vocabulary (103,424 entries) is not sorted as a whole: top-k and top-p look at the few likeliest
entries through a partition.

Randomness is counter-based: the draw of output position n depends on the seed and n alone. So a
request is reproducible whatever runs beside it, and one that is interrupted goes on unchanged.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from earnest.engine.request import SamplingParams, TokenLogprobs
from earnest.errors import CheckpointError, SamplingError

# V: vocabulary.
Float = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

# Sums of a bias and of penalties are held inside this, so that inf - inf cannot arise.
_HUGE = 1e300
# Values of which `largest` first looks at the greatest only.
_RUN = 64
_WORD = 2**64 - 1
_DRAWN_AT_ONCE, _DRAWN_RUN = 4096, 256


def check_sampling(params: SamplingParams, vocab_size: int, stop_ids: Collection[int]) -> None:
    """Refuse parameters that do not fit this model.

    Args:
        params: the parameters.
        vocab_size: V.
        stop_ids: all ids that end the output, the model's own included.

    Raises:
        SamplingError: a bias or stop id is outside the vocabulary, or min_tokens forbids every
            token.
    """
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise SamplingError(
                f"sampling parameter {name} names a token id outside the vocabulary",
                got=outside[0],
                expected=f"0 to {vocab_size - 1}",
            )
    if params.min_tokens and len(set(stop_ids)) >= vocab_size:
        raise SamplingError(
            "min_tokens forbids every token: all of the vocabulary are stop tokens",
            remedy="pass min_tokens=0 or fewer stop_token_ids",
        )


class Sampler:
    """Chooses the tokens of one request, in the order of operations `SamplingParams` states.

    Args:
        params: how to choose; must have passed `check_sampling`.
        vocab_size: V, the length of every logits row.
        prompt_ids: the prompt, which the repetition penalty looks at.
        stop_ids: ids that end the output; masked during the first `min_tokens` tokens.

    Attributes:
        seed: the seed in use, drawn afresh if the parameters have none.
        count: tokens chosen so far.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt_ids: Sequence[int],
        stop_ids: Collection[int] = (),
    ) -> None:
        self._params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.count = 0
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.intp)
        self._bias = np.fromiter(params.logit_bias.values(), np.float64)
        self._stop_ids = np.fromiter(stop_ids, np.intp)
        self._seen_V: npt.NDArray[np.bool_] | None = None
        self._occurrences_V: npt.NDArray[np.int64] | None = None
        if params.repetition_penalty != 1:
            self._seen_V = np.zeros(vocab_size, np.bool_)
            self._seen_V[np.asarray(prompt_ids, np.intp)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._occurrences_V = np.zeros(vocab_size, np.int64)

    def sample(self, logits_V: Float, allowed_V: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token of the request.

        Args:
            logits_V: floating `[V]`; not changed.
            allowed_V: bool `[V]`, the tokens to choose from, at least one; None: all.

        Raises:
            CheckpointError: the logits hold NaN or infinity.
        """
        require_finite(logits_V)
        if self._params.temperature == 0 and allowed_V is None and self._is_plain():
            token = int(np.argmax(logits_V))
        else:
            token = self._choose(self._adjusted(logits_V, allowed_V))
        self.count += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._occurrences_V is not None:
            self._occurrences_V[token] += 1
        return token

    def _is_plain(self) -> bool:
        """Whether nothing but a grammar changes the logits."""
        return (
            self.count >= self._params.min_tokens
            and not len(self._bias_ids)
            and self._seen_V is None
            and self._occurrences_V is None
        )

    def _adjusted(self, logits_V: Float, allowed_V: npt.NDArray[np.bool_] | None) -> Float64:
        """The logits after bias, penalties, minimum-length masking and grammar, in scratch 0."""
        params, x_V = self._params, _scratch(0, len(logits_V))
        x_V[:] = logits_V
        if self._is_plain() and allowed_V is None:
            return x_V
        with np.errstate(over="ignore"):
            if len(self._bias_ids):
                x_V[self._bias_ids] = _held(x_V[self._bias_ids] + self._bias)
            if self._seen_V is not None:
                x, factor = x_V[self._seen_V], params.repetition_penalty
                x_V[self._seen_V] = _held(np.where(x > 0, x / factor, x * factor))
            if self._occurrences_V is not None:
                ids = np.flatnonzero(self._occurrences_V)
                repeats = _held(params.frequency_penalty * self._occurrences_V[ids])
                x_V[ids] = _held(x_V[ids] - _held(params.presence_penalty + repeats))
        if self.count < params.min_tokens:
            x_V[self._stop_ids] = -np.inf
        if allowed_V is not None:
            masked_V = np.where(allowed_V, x_V, -np.inf)
            # A grammar that has come to its end allows nothing but to stop, min_tokens or not.
            x_V = (
                masked_V if np.isfinite(masked_V.max()) else np.where(allowed_V, logits_V, -np.inf)
            )
        return x_V

    def _choose(self, x_V: Float64) -> int:
        params = self._params
        if params.temperature == 0:
            return int(np.argmax(x_V))  # the first of equals: the lowest id
        # Subtracting the maximum before dividing keeps the smallest temperatures from overflowing.
        weights_V = np.subtract(x_V, x_V.max(), out=_scratch(1, len(x_V)))
        if params.temperature < 1:
            with np.errstate(over="ignore"):
                np.divide(weights_V, params.temperature, out=weights_V)
        elif params.temperature > 1:
            np.divide(weights_V, params.temperature, out=weights_V)
        np.exp(weights_V, out=weights_V)
        kept: Ids | None = None  # best first; None: the whole vocabulary
        if 0 < params.top_k < len(weights_V):
            kept = largest(x_V, params.top_k)
        if params.top_p < 1:
            kept = _nucleus(x_V, weights_V, kept, params.top_p)
        weights = weights_V
        if kept is not None:
            # In order of id, so that a seed draws the same token however the set was found.
            kept = np.sort(kept)
            weights = weights_V[kept]
        if params.min_p > 0:
            # The likeliest token has weight 1.
            weights = np.where(weights >= params.min_p, weights, 0.0)
        index = _draw(weights, uniform(self.seed, self.count))
        return index if kept is None else int(kept[index])


def token_logprobs(logits_V: Float, token: int, count: int) -> TokenLogprobs:
    """The log-probability of `token` under softmax(logits) and the `count` likeliest tokens.

    Ties go to the lower id.

    Raises:
        CheckpointError: the logits hold NaN or infinity.
    """
    require_finite(logits_V)
    x_V, weights_V = _scratch(0, len(logits_V)), _scratch(1, len(logits_V))
    x_V[:] = logits_V
    greatest = x_V.max()
    np.exp(np.subtract(x_V, greatest, out=weights_V), out=weights_V)
    log_total = greatest + np.log(weights_V.sum())
    best = largest(x_V, count) if count else ()
    return TokenLogprobs(
        token_id=token,
        logprob=float(x_V[token] - log_total),
        top=tuple((int(i), float(x_V[i] - log_total)) for i in best),
    )


def require_finite(logits_V: Float) -> None:
    """Refuse logits from which nothing can be chosen.

    Raises:
        CheckpointError: they hold NaN or infinity.
    """
    if not np.isfinite(logits_V).all():
        bad = np.count_nonzero(~np.isfinite(logits_V))
        raise CheckpointError(
            "the model produced logits that are not finite numbers",
            got=f"{bad:,} of {logits_V.size:,} are NaN or infinite",
            remedy="run `earnest verify` on the checkpoint; its weights are probably damaged",
        )


def largest(values_V: Float, count: int) -> Ids:
    """Indices of the `count` largest values, best first; of equals the lower index first."""
    if count >= len(values_V):
        return np.argsort(-values_V, kind="stable")
    # Of the greatest of each run the `count`-th is no more than the `count`-th of all, and most
    # values are less than it: few are left to be sorted.
    runs = len(values_V) // _RUN
    if count <= runs:
        greatest = values_V[: runs * _RUN].reshape(_RUN, runs).max(axis=0)
        bound = np.partition(greatest, runs - count)[runs - count]
        candidates: Ids = np.flatnonzero(values_V >= bound)
    else:
        candidates = np.arange(len(values_V))
    best = np.argsort(-values_V[candidates], kind="stable")[:count]
    return candidates[best]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` and `position` only.

    The upper 53 bits of the first word of Philox 4x64-10 (Salmon et al. 2011) with the key
    `(seed, 0)` and the counter `(position + 1, 0, 0, 0)`.
    """
    # Ten rounds of whole numbers: quicker than making a generator of numpy's for one word.
    x0, x1, x2, x3 = position + 1, 0, 0, 0
    key0, key1 = seed, 0
    for _ in range(10):
        high0, high2 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1 = (high2 >> 64) ^ x1 ^ key0, high2 & _WORD
        x2, x3 = (high0 >> 64) ^ x3 ^ key1, high0 & _WORD
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & _WORD, (key1 + 0xBB67AE8584CAA73B) & _WORD
    return (x0 >> 11) * 2.0**-53


def _nucleus(x_V: Float64, weights_V: Float64, kept: Ids | None, top_p: float) -> Ids:
    """The fewest of the likeliest tokens (of `kept`, best first) that hold a share of `top_p`.

    In the order of their logits, as top-k is: weights of nearly equal logits can be equal."""
    total = weights_V.sum() if kept is None else weights_V[kept].sum()
    # Distributions of language models are steep: a few dozen tokens usually suffice.
    size = 64
    while True:
        best = largest(x_V, size) if kept is None else kept
        reached = np.cumsum(weights_V[best])
        if kept is not None or size >= len(weights_V) or reached[-1] >= top_p * total:
            break
        size *= 8
    return best[: int(np.searchsorted(reached, top_p * total)) + 1]


def _draw(weights: Float64, number: float) -> int:
    """The index at which the running sum of `weights` passes `number` (in [0, 1)) of the total.

    Of many, first the run in which that is: sums of runs are quick, running sums are not.
    """
    if len(weights) > _DRAWN_AT_ONCE:
        whole = len(weights) // _DRAWN_RUN * _DRAWN_RUN
        sums = np.empty(whole // _DRAWN_RUN + 1)
        weights[:whole].reshape(-1, _DRAWN_RUN).sum(axis=1, out=sums[:-1])
        sums[-1] = weights[whole:].sum()
        run = _draw(sums, number)
        left = number * sums.sum() - sums[:run].sum()
        first = run * _DRAWN_RUN
        within = min(max(left / sums[run], 0.0), 1 - 2.0**-53)
        return first + _draw(weights[first : first + _DRAWN_RUN], within)
    reached = weights.cumsum()
    total = reached[-1]
    index = int(reached.searchsorted(number * total, side="right"))
    if index < len(reached) and reached[index] < total:
        return index
    # Rounding can take the product up to the total; then the last possible index is meant.
    return min(index, int(reached.searchsorted(total)))


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.rows: dict[int, Float64] = {}


_SCRATCH = _Scratch()


def _scratch(number: int, length: int) -> Float64:
    """Room for one row of the vocabulary, the thread's own and used again for every token: fresh
    memory of that size costs more than what is computed in it."""
    row = _SCRATCH.rows.get(number)
    if row is None or len(row) < length:
        row = _SCRATCH.rows[number] = np.empty(length)
    return row[:length]


def _held(values: npt.ArrayLike) -> Float64:
    return np.clip(np.asarray(values, np.float64), -_HUGE, _HUGE)
