"""The engine's thread: events to any thread and to asyncio, cancellation, deadlines, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_runner import EOS, FakeRunner, FakeTokenizer, hashed_logits, tiny_config

from earnest.engine.engine import Engine
from earnest.engine.request import Request, SamplingParams, TokenEvent
from earnest.engine.service import Service
from earnest.errors import (
    BusyError,
    DeadlineError,
    EarnestError,
    MachineError,
    PromptError,
    ShuttingDownError,
)

LONG = SamplingParams(max_tokens=None, ignore_eos=True, seed=1)


class Gate(FakeRunner):
    """A runner whose steps can be held up, and made to fail."""

    def __init__(self, **options: Any) -> None:
        super().__init__(config=tiny_config(context=4096), num_blocks=2048, **options)
        self.go = threading.Event()
        self.go.set()
        self.problem: BaseException | None = None

    def step(self, batch: Any, routing: Any = None) -> Any:
        assert self.go.wait(20)
        if self.problem is not None:
            raise self.problem
        return super().step(batch, routing)


def engine_on(runner: FakeRunner) -> Engine:
    return Engine(runner, FakeTokenizer(), eos_ids=[EOS])  # type: ignore[arg-type]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def service(gate: Gate) -> Iterator[Service]:
    made = Service(engine_on(gate), max_waiting=8)
    yield made
    gate.go.set()
    gate.problem = None
    made.close(timeout=0)
    assert not made._thread.is_alive()
    made._engine.blocks.check_idle()


def wanted(prompt: tuple[int, ...], count: int = 5, seed: int = 0) -> Request:
    return Request(prompt, SamplingParams(max_tokens=count, ignore_eos=True, seed=seed))


def expected(request: Request) -> list[int]:
    machine = engine_on(FakeRunner())
    machine.add(request)
    found = []
    while machine.has_work:
        found += [event.token_id for _, event in machine.step() if isinstance(event, TokenEvent)]
    return found


async def read(service: Service, *requests: Request, **options: Any) -> list[list[int | None]]:
    found: list[list[int | None]] = [[] for _ in requests]
    async for which, event in service.stream(requests, **options):
        found[which].append(event.token_id)
    return found


def test_many_at_once_from_asyncio(service: Service) -> None:
    requests = [wanted((2 + n % 5, 3), 6, n) for n in range(8)]

    async def everybody() -> list[list[list[int | None]]]:
        return await asyncio.gather(*(read(service, request) for request in requests))

    found = asyncio.run(everybody())
    assert [answers[0] for answers in found] == [expected(request) for request in requests]


def test_several_answers_to_one_prompt(service: Service) -> None:
    requests = [wanted((2, 3, 4) * 5, 4, n) for n in range(3)]
    assert asyncio.run(read(service, *requests)) == [expected(request) for request in requests]


def test_events_come_on_any_thread(service: Service) -> None:
    done, events = threading.Event(), list[Any]()

    def deliver(which: int, event: Any) -> None:
        events.append(event)
        if event.finish_reason is not None:
            done.set()

    request = wanted((2, 3))
    service.submit([request], deliver)
    assert done.wait(10)
    assert [event.token_id for event in events] == expected(request)


def test_leaving_the_loop_frees_everything(service: Service) -> None:
    async def leave() -> None:
        stream = service.stream([Request((2,), LONG)])
        async for _, event in stream:
            assert event.token_id is not None
            break
        await stream.aclose()

    asyncio.run(leave())
    until = time.monotonic() + 10
    while service._open and time.monotonic() < until:
        time.sleep(0.005)
    assert service._open == 0 and not service._tickets


def test_a_task_that_is_cancelled(service: Service) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(read(service, Request((2,), LONG)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert service.close(timeout=10)


def test_what_takes_too_long_is_given_up(service: Service) -> None:
    with pytest.raises(DeadlineError):
        asyncio.run(read(service, Request((2,), LONG), timeout=0.05))


def test_the_queue_is_bounded(service: Service, gate: Gate) -> None:
    gate.go.clear()
    for _ in range(8):
        service.submit([wanted((2,))], lambda which, event: None)
    with pytest.raises(BusyError, match="waiting"):
        service.submit([wanted((2,))], lambda which, event: None)


def test_bad_requests_are_refused_at_once(service: Service) -> None:
    with pytest.raises(PromptError):
        service.submit([wanted(())], lambda which, event: None)
    assert service._open == 0


def test_a_failing_step_fails_its_requests_only(service: Service, gate: Gate) -> None:
    gate.problem = RuntimeError("out of luck")
    with pytest.raises(MachineError, match="out of luck"):
        asyncio.run(read(service, wanted((2,))))
    gate.problem = None
    request = wanted((2, 3))
    assert asyncio.run(read(service, request)) == [expected(request)]


def test_a_request_that_cannot_be_queued_fails_alone(service: Service) -> None:
    def broken() -> Any:
        raise RuntimeError("no grammar")

    with pytest.raises(MachineError, match="no grammar"):
        asyncio.run(read(service, Request((2,), LONG, constraint=broken)))
    request = wanted((2, 3))
    assert asyncio.run(read(service, request)) == [expected(request)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_died(service: Service, gate: Gate) -> None:
    gate.problem = SystemExit()  # nothing that a step should catch
    with pytest.raises(ShuttingDownError):
        asyncio.run(read(service, Request((2,), LONG)))
    assert not service.accepting
    service._engine.cancel(1)


def test_a_receiver_that_fails_is_dropped(service: Service) -> None:
    def deliver(which: int, event: Any) -> None:
        raise ValueError("nobody home")

    service.submit([Request((2,), LONG)], deliver)
    request = wanted((2, 3))
    assert asyncio.run(read(service, request)) == [expected(request)]
    assert service.close(timeout=10)


def test_draining_lets_the_rest_finish(service: Service, gate: Gate) -> None:
    gate.go.clear()
    events = list[Any]()
    service.submit([wanted((2,), 3)], lambda which, event: events.append(event))
    service.drain()
    with pytest.raises(ShuttingDownError):
        service.submit([wanted((2,))], lambda which, event: None)
    gate.go.set()
    assert service.close(timeout=10)
    assert [event.finish_reason for event in events] == [None, None, "length"]


def test_closing_gives_up_what_does_not_end(service: Service) -> None:
    events = list[Any]()
    started = threading.Event()

    def deliver(which: int, event: Any) -> None:
        events.append(event)
        started.set()

    service.submit([Request((2,), LONG)], deliver)
    assert started.wait(10)
    assert not service.close(timeout=0)
    assert isinstance(events[-1], ShuttingDownError)


def test_nothing_spins_while_idle(service: Service) -> None:
    asyncio.run(read(service, wanted((2,))))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_errors_of_one_are_not_those_of_another() -> None:
    def logits(history: Any, vocab_size: int) -> Any:
        row = hashed_logits(history, vocab_size)
        if history[0] == 5:
            row[:] = float("nan")
        return row

    service = Service(engine_on(FakeRunner(logits=logits)))

    async def both() -> list[Any]:
        return await asyncio.gather(
            read(service, wanted((5,))), read(service, wanted((3,))), return_exceptions=True
        )

    bad, good = asyncio.run(both())
    assert isinstance(bad, EarnestError) and good == [expected(wanted((3,)))]
    assert service.close(timeout=5)


def test_a_loop_that_is_closed_in_the_middle(service: Service) -> None:
    loop = asyncio.new_event_loop()
    stream = service.stream([Request((1,), LONG)])
    loop.run_until_complete(anext(stream))
    loop.close()  # and nobody is left who could leave the stream
    until = time.monotonic() + 20
    while service._open and time.monotonic() < until:
        time.sleep(0.01)
    assert service._open == 0
