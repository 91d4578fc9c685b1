"""`Sequence`: a request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from earnest.engine.blocks import Link
from earnest.engine.constraint import Constraint
from earnest.engine.reading import Reader
from earnest.engine.request import Request
from earnest.engine.sampler import Sampler
from earnest.engine.stop import TextStream


@dataclass(eq=False)
class Sequence:
    """What the engine knows of one request. Positions below `computed` have keys and values stored.

    Attributes:
        id: counts up; the order in which requests came.
        request: what was asked.
        sampler, text, constraint: their state goes on where it was after a preemption.
        stop_ids: ids that end the output.
        limit: new tokens at most.
        tokens: the prompt and what was chosen since.
        beginning: where its chain of blocks starts; None: it neither reads nor leaves prefixes.
        leader: the sequence whose prompt it shares and waits for.
        blocks: KV blocks, in order.
        links: of its first blocks, those that are known by their content.
        computed: positions stored.
        waited: steps it has waited for, in all.
        cached: positions of the prompt that were found instead of computed, when first admitted.
        admitted_at: `time.monotonic()` when that was.
        counted: whether its prompt was counted.
        reader: reads the rows of its prompt; None: nobody wants them.
    """

    id: int
    request: Request
    sampler: Sampler
    text: TextStream
    stop_ids: frozenset[int]
    limit: int
    tokens: list[int]
    beginning: Link | None
    constraint: Constraint | None = None
    leader: Sequence | None = None
    blocks: list[int] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    computed: int = 0
    waited: int = 0
    cached: int | None = None
    admitted_at: float | None = None
    counted: bool = False
    reader: Reader | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.computed

    @property
    def writing(self) -> bool:
        """Whether everything but the token chosen last is computed."""
        return self.computed >= self.prompt_length and self.pending == 1

    @property
    def scored(self) -> bool:
        """Whether all is known that was asked about the prompt."""
        return self.reader is None or self.reader.done

    @property
    def needs_no_step(self) -> bool:
        """No tokens were asked for, and nothing that a step would have to find."""
        return self.limit == 0 and self.scored
