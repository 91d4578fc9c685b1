"""The thread pool: nothing lost at a barrier, turns between callers, life after a fork."""

from __future__ import annotations

import os
import threading
import time

import pytest

from earnest.runners.native import isa, ops

if not isa.installed():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_barriers_lose_nothing(workers: int) -> None:
    pool = ops.thread_pool(workers)
    for _ in range(20):
        assert isa.native().stress_pool(pool, 100 if workers > 2 else 1000) == 0


def test_many_short_runs() -> None:
    pool = ops.thread_pool(3)
    assert sum(isa.native().stress_pool(pool, 1) for _ in range(2000)) == 0


def test_callers_take_turns() -> None:
    pool = ops.thread_pool(2)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(isa.native().stress_pool(pool, 50) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 200


def test_pools_come_and_go() -> None:
    for _ in range(50):
        pools = [ops.thread_pool(2) for _ in range(3)]
        assert all(isa.native().stress_pool(pool, 3) == 0 for pool in pools)


def test_nothing_runs_while_idle() -> None:
    pool = ops.thread_pool(4)
    isa.native().stress_pool(pool, 10)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_gets_threads_of_its_own() -> None:
    pool = ops.thread_pool(3)
    assert isa.native().stress_pool(pool, 10) == 0
    child = os.fork()
    if child == 0:
        os._exit(0 if isa.native().stress_pool(pool, 100) == 0 else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert isa.native().stress_pool(pool, 10) == 0


def test_usable_threads_follow_the_affinity_mask() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity masks on this system")
    mask = os.sched_getaffinity(0)
    assert 1 <= ops.usable_threads() <= len(mask)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert ops.usable_threads() == 1
    finally:
        os.sched_setaffinity(0, mask)
