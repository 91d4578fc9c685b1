"""Where two runners chose different experts, and how near a tie each of those choices was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earnest.runners import Routing


@dataclass(frozen=True)
class Swap:
    """A (token, layer) pair whose experts differ.

    Attributes:
        layer, token: where.
        experts: those that only one of the two runners chose.
        gap: how far apart the reference's selection scores of these are.
        scale: how far apart the scores of all experts of this token are (standard deviation).
    """

    layer: int
    token: int
    experts: tuple[int, ...]
    gap: float
    scale: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, token {self.token}: experts {self.experts} are "
            f"{self.gap:.2e} apart, {self.gap / self.scale:.1e} of the spread of the scores"
        )


def swaps(
    ours: Sequence[Routing], theirs: Sequence[Routing], scores: Sequence[np.ndarray]
) -> list[Swap]:
    """All pairs whose sets of experts differ. `scores` are the reference's, `[T, E]` per layer."""
    found = []
    for mine, other, score in zip(ours, theirs, scores, strict=True):
        assert mine.layer == other.layer
        different = np.any(np.sort(mine.experts) != np.sort(other.experts), axis=1)
        for token in np.nonzero(different)[0]:
            only = sorted({*mine.experts[token]} ^ {*other.experts[token]})
            found.append(
                Swap(
                    mine.layer,
                    int(token),
                    tuple(int(expert) for expert in only),
                    float(np.ptp(score[token, only])),
                    float(score[token].std()),
                )
            )
    return found


def causes(found: Sequence[Swap], starts: Sequence[int]) -> list[Swap]:
    """The swaps that no other one explains. Another choice for a token changes, in the layers
    above, what it and the later tokens of its sequence are made of; sequences begin at `starts`.
    """
    sequence = [int(np.searchsorted(starts, swap.token, "right")) for swap in found]
    return [
        swap
        for swap, mine in zip(found, sequence, strict=True)
        if not any(
            mine == theirs and other.layer < swap.layer and other.token <= swap.token
            for other, theirs in zip(found, sequence, strict=True)
        )
    ]


def untouched(found: Sequence[Swap], starts: Sequence[int], tokens: int) -> np.ndarray:
    """Whether each of the tokens comes before all swaps of its sequence, bool `[tokens]`."""
    clean = np.ones(tokens, bool)
    ends = [*starts[1:], tokens]
    for swap in found:
        place = int(np.searchsorted(starts, swap.token, "right")) - 1
        clean[swap.token : ends[place]] = False
    return clean
