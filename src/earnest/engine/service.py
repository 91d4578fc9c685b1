"""`Service`: an engine with a thread of its own, for callers on any thread or in asyncio.

The thread runs steps while there is work and sleeps while there is none. Callers only leave
messages: a step, which may take long, is never waited for. Events go to a callback on the engine's
thread, or through `stream` to an asyncio loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from earnest.engine.engine import Counters, Engine
from earnest.engine.request import Request, TokenEvent
from earnest.errors import (
    BusyError,
    DeadlineError,
    EarnestError,
    MachineError,
    ShuttingDownError,
)
from earnest.log import logger

# What a callback is given; the last of a request has a finish_reason or is an error.
Event = TokenEvent | EarnestError
Deliver = Callable[[int, Event], None]


@dataclass(eq=False)
class Ticket:
    """Several answers to one prompt, on their way.

    Attributes:
        requests: one per answer, all with the same prompt.
        deliver: told (which answer, event).
        expires: `time.monotonic()` at which it is given up; None: never.
        ids: the engine's, while it runs; None where an answer has ended.
    """

    requests: Sequence[Request]
    deliver: Deliver
    expires: float | None = None
    ids: list[int | None] = field(default_factory=list)
    ended: bool = False


# What came for a stream: whose it is, where it goes, and (which answer, event).
_Arrival = tuple[Ticket, "asyncio.Queue[tuple[int, Event]]", tuple[int, Event]]


@dataclass(frozen=True)
class Load:
    """How busy a service is.

    Attributes:
        running: answers that hold KV blocks.
        waiting: answers that do not yet.
        blocks_used: share of the KV blocks that are in use, 0 to 1.
        counters: what was done so far.
    """

    running: int
    waiting: int
    blocks_used: float
    counters: Counters


class Service:
    """Runs an engine until it is closed.

    Args:
        engine: nobody else may step it, unless under `lock`.
        max_waiting: answers that may wait; more are refused with `BusyError`.
        lock: held around every use of the engine.

    Raises:
        (by `submit` and `stream`) PromptError, SamplingError: see `Engine.check`.
        BusyError: too many requests are waiting.
        ShuttingDownError: the service is draining or closed.
        MachineError: a step failed in a way that nobody foresaw; the service goes on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 1024,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._lock = lock or nullcontext()
        self._wake = threading.Condition()
        self._new: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._outgoing: dict[asyncio.AbstractEventLoop, list[_Arrival]] = {}
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # by the engine's id: whose, and which
        self._open = 0  # answers that have not ended, queued ones included
        self._draining = self._closing = False
        self._load = Load(0, 0, 0.0, Counters())
        self._thread = threading.Thread(target=self._run, name="earnest-engine", daemon=True)
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------

    @property
    def load(self) -> Load:
        """As of the last step."""
        return self._load

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        """Whether requests are taken."""
        return not (self._draining or self._closing) and self._thread.is_alive()

    def submit(
        self, requests: Sequence[Request], deliver: Deliver, *, timeout: float | None = None
    ) -> Ticket:
        """Have requests answered.

        Args:
            requests: one per answer; if there are several, all with the same prompt, which is
                then computed once.
            deliver: told (which answer, event) on the engine's thread; must return at once.
            timeout: seconds after which what has not ended gets a `DeadlineError`.
        """
        for request in requests[:1]:
            self._engine.check(request)
        expires = None if timeout is None else time.monotonic() + timeout
        ticket = Ticket(tuple(requests), deliver, expires)
        with self._wake:
            if not self.accepting:
                raise ShuttingDownError("the server is shutting down and takes no more requests")
            if self._open - self._load.running + len(requests) > self._max_waiting:
                raise BusyError(
                    "too many requests are waiting",
                    got=f"{self._open:,} under way",
                    expected=f"at most {self._max_waiting:,} waiting",
                    remedy="try again in a moment",
                )
            self._open += len(requests)
            self._new.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the rest of it any more. Events may still be on their way."""
        with self._wake:
            self._cancelled.append(ticket)
            self._wake.notify()

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Drain, wait for what is under way (at most `timeout` seconds), give up the rest, and end
        the thread. True if nothing had to be given up."""
        self.drain()
        until = None if timeout is None else time.monotonic() + timeout
        with self._wake:
            done = self._wake.wait_for(
                lambda: self._open == 0 or not self._thread.is_alive(),
                None if until is None else max(0.0, until - time.monotonic()),
            )
            self._closing = True
            self._wake.notify_all()
        self._thread.join()
        return done

    async def stream(
        self, requests: Sequence[Request], *, timeout: float | None = None
    ) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """The events of all answers, as (which answer, event), as they come.

        Leaving the loop, or being cancelled in it, gives up the rest.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def deliver(which: int, event: Event) -> None:
            self._outgoing.setdefault(loop, []).append((ticket, arrived, (which, event)))

        ticket = self.submit(requests, deliver, timeout=timeout)
        left = len(requests)
        try:
            while left:
                which, event = await arrived.get()
                if isinstance(event, EarnestError):
                    raise event
                left -= event.finish_reason is not None
                yield which, event
        finally:
            if left:
                self.cancel(ticket)

    # --- the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # also if the thread should die of a defect: nobody may wait for ever
            with self._wake:
                self._closing = True
            with self._lock:
                for ticket in [*self._new, *{id(t): t for t, _ in self._tickets.values()}.values()]:
                    self._fail(ticket, ShuttingDownError("the server was shut down"))
            self._hand_over()

    def _turn(self) -> bool:
        """Wait for work and do one step of it; False when the service is closed."""
        with self._wake:
            while not (self._new or self._cancelled or self._closing or self._tickets):
                self._wake.notify_all()  # whoever waits for us to be done
                self._wake.wait()
            if self._closing:
                return False
            new, self._new = self._new, deque()
            cancelled, self._cancelled = self._cancelled, deque()
        with self._lock:
            for ticket in new:
                self._admit(ticket)
            for ticket in cancelled:
                self._give_up(ticket)
            self._expire()
            results = self._step()
            self._load = self._measured()
        for number, event in results:
            self._deliver(number, event)
        self._hand_over()
        return True

    def _hand_over(self) -> None:
        """Give each loop all that a turn has brought its streams, at once: it is woken once."""
        outgoing, self._outgoing = self._outgoing, {}
        for loop, events in outgoing.items():
            try:
                loop.call_soon_threadsafe(_arrive, events)
            except RuntimeError:  # it was closed in the middle: nobody listens
                for ticket, _, _ in events:
                    self.cancel(ticket)

    def _admit(self, ticket: Ticket) -> None:
        if ticket.ended:
            return
        try:
            for which, request in enumerate(ticket.requests):
                number = self._engine.add(request, after=ticket.ids[0] if ticket.ids else None)
                ticket.ids.append(number)
                self._tickets[number] = ticket, which
        except EarnestError as error:
            self._fail(ticket, error)
        except Exception as error:  # noqa: BLE001 - it is this request's; the others go on
            self._fail(ticket, _unforeseen("a request could not be queued", error))

    def _step(self) -> list[tuple[int, Event]]:
        try:
            return self._engine.step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers must hear of it
            problem = _unforeseen("a step of the engine failed", error)
            for number in list(self._tickets):
                self._engine.cancel(number)
            return [(number, problem) for number in self._tickets]

    def _deliver(self, number: int, event: Event) -> None:
        found = self._tickets.get(number)
        if found is None:
            return
        ticket, which = found
        if isinstance(event, EarnestError) or event.finish_reason is not None:
            self._forget(number)
        self._tell(ticket, which, event)

    def _tell(self, ticket: Ticket, which: int, event: Event) -> None:
        try:
            ticket.deliver(which, event)
        except Exception:  # noqa: BLE001 - one receiver's defect must not end the others
            logger.exception("a request's receiver failed; the rest of it is given up")
            self.cancel(ticket)

    def _fail(self, ticket: Ticket, error: EarnestError) -> None:
        """End what is left of a ticket with an error."""
        left = [which for which in range(len(ticket.requests)) if self._is_open(ticket, which)]
        self._give_up(ticket)
        for which in left:
            self._tell(ticket, which, error)

    @staticmethod
    def _is_open(ticket: Ticket, which: int) -> bool:
        return which >= len(ticket.ids) or ticket.ids[which] is not None

    def _give_up(self, ticket: Ticket) -> None:
        if ticket.ended:
            return
        ticket.ended = True
        with self._wake:
            self._open -= len(ticket.requests) - len(ticket.ids)  # those never queued
            self._wake.notify_all()
        for number in [number for number in ticket.ids if number is not None]:
            self._engine.cancel(number)
            self._forget(number)

    def _forget(self, number: int) -> None:
        ticket, which = self._tickets.pop(number)
        ticket.ids[which] = None
        if all(number is None for number in ticket.ids) and len(ticket.ids) == len(ticket.requests):
            ticket.ended = True
        with self._wake:
            self._open -= 1
            self._wake.notify_all()

    def _expire(self) -> None:
        now = time.monotonic()
        late = {
            id(ticket): ticket
            for ticket, _ in self._tickets.values()
            if ticket.expires is not None and ticket.expires <= now
        }
        for ticket in late.values():
            self._fail(ticket, DeadlineError("the time for this request is over"))

    def _measured(self) -> Load:
        engine, pool = self._engine, self._engine.blocks
        used = 1 - pool.num_free / pool.num_blocks
        return Load(engine.num_running, engine.num_waiting, used, engine.counters)


def _arrive(events: Sequence[_Arrival]) -> None:
    for _, arrived, event in events:
        arrived.put_nowait(event)


def _unforeseen(what: str, error: Exception) -> MachineError:
    """For the caller; the log gets the whole of it."""
    logger.error(what, exc_info=error)
    return MachineError(f"{what}: {type(error).__name__}: {error}", remedy="see the server's log")
