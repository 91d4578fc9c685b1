"""The thread pool: nothing lost at a barrier, turns between callers, life after a fork."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from earnest import env
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


@pytest.mark.parametrize("adaptive", [False, True])
def test_nothing_runs_while_idle(adaptive: bool) -> None:
    pool = isa.native().ThreadPool(4, adaptive)
    isa.native().stress_pool(pool, 10, True)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_run_does_not_wait_for_it() -> None:
    pool = ops.thread_pool(2)
    going = True

    def work() -> None:
        while going:
            assert isa.native().stress_pool(pool, 2000) == 0

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            time.sleep(0.003)
            child = os.fork()
            if child == 0:
                os._exit(0 if isa.native().stress_pool(pool, 100) == 0 else 1)
            deadline = time.monotonic() + 20
            while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            if not done[0]:
                os.kill(child, 9)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            assert os.waitstatus_to_exitcode(done[1]) == 0
    finally:
        going = False
        thread.join()


# --- how many workers a run is given --------------------------------------------------------------

MS = 1_000_000


def test_a_crew_shrinks_when_more_than_a_worker_is_lost_and_tries_again_later() -> None:
    crew = isa.native().Crew(2)
    now = 0

    def run(wall: int, lost: int) -> int:
        """One run; how many workers it had."""
        nonlocal now
        size = crew.size(now)
        now += wall
        if size > 1:
            crew.ran(now, wall, lost)
        return size

    # A third of the time lost is less than a second worker gains; so is one hiccup.
    assert [run(6 * MS, 2 * MS) for _ in range(50)] == [2] * 50
    assert run(6 * MS, 6 * MS) == 2
    assert [run(6 * MS, 0) for _ in range(50)] == [2] * 50
    trials = [now for _ in range(2000) if run(6 * MS, 5 * MS) == 2]
    # Ever rarer, up to every 1.6 seconds.
    gaps = [(b - a) // MS for a, b in pairwise(trials) if b - a > 50 * MS]
    assert gaps == sorted(gaps)
    assert gaps[0] < 150
    assert 1600 <= gaps[-1] < 1650
    assert len(trials) * 6 * MS < 0.03 * now
    # On a busy machine a trial takes longer: then it is even rarer.
    for _ in range(3000):
        run(100 * MS, 90 * MS)
    trials = [now for _ in range(300) if run(100 * MS, 90 * MS) == 2]
    assert len(trials) <= 10
    # When the other process ends, all come back and stay.
    assert [run(4 * MS, 0) for _ in range(3000)][-500:] == [2] * 500


def test_a_crew_of_many_loses_as_many_as_are_held_up() -> None:
    crew = isa.native().Crew(8)
    crew.ran(100 * MS, 100 * MS, 9 * MS)  # an eighth is what one worker is worth
    assert crew.size(100 * MS) == 8
    crew.ran(200 * MS, 100 * MS, 20 * MS)
    assert crew.size(200 * MS) == 7
    crew = isa.native().Crew(8)
    crew.ran(100 * MS, 100 * MS, 100 * MS)
    assert crew.size(100 * MS) == 7
    crew = isa.native().Crew(2)
    crew.ran(100 * MS, 100 * MS, 1000 * MS)
    assert crew.size(100 * MS) == 1


def pin_all_threads(processors: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # one that has ended meanwhile
            os.sched_setaffinity(int(task.name), processors)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what was lost")
def test_workers_that_share_one_processor_are_reduced_to_one_unless_asked_for() -> None:
    mask = os.sched_getaffinity(0)
    adaptive, fixed = isa.native().ThreadPool(2, True), isa.native().ThreadPool(2, False)
    assert adaptive.active == 1
    try:
        pin_all_threads({min(mask)})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert isa.native().busy_crew(adaptive, 20) == 0
            if adaptive.active == 1:
                break
        assert adaptive.active == 1
        for _ in range(10):
            assert isa.native().busy_crew(fixed, 20) == 0
            assert fixed.active == 2
    finally:
        pin_all_threads(mask)
    # And with its processors back, the pool still counts right whatever it decides.
    assert sum(isa.native().stress_pool(adaptive, 20, True) for _ in range(200)) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space")
def test_threads_that_the_system_refuses_are_an_error_with_a_remedy() -> None:
    script = """
        import resource
        from earnest.errors import MachineError
        from earnest.runners.native import isa, ops
        isa.native()
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
        for _ in range(2):
            try:
                ops.thread_pool(1000)
            except MachineError as error:
                print(error)
        assert isa.native().stress_pool(ops.thread_pool(2), 100) == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("ask for fewer") == 2, done.stderr


def test_usable_threads_follow_the_affinity_mask() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity masks on this system")
    mask = os.sched_getaffinity(0)
    assert 1 <= ops.usable_threads() == env.usable_cores() <= len(mask)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert ops.usable_threads() == env.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, mask)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no control groups")
def test_usable_threads_follow_the_quota() -> None:
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").exists()
    group = (root if second else root / "cpu") / f"earnest-test-{os.getpid()}"
    quota = {"cpu.max": "50000 100000"} if second else {"cpu.cfs_quota_us": "50000"}
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    for name, value in quota.items():
        if not (group / name).exists():
            group.rmdir()
            pytest.skip("this control group has no quota")
        (group / name).write_text(value)
    script = f"""
        from pathlib import Path
        from earnest import env
        from earnest.runners.native import ops
        Path("{group}/cgroup.procs").write_text("0")
        print(ops.usable_threads(), env.usable_cores())
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        group.rmdir()
    assert done.stdout.split() == ["1", "1"]
