"""Builds of Earnest decoding from the same packed file, taking turns within a second.

    python bench/builds.py FOLDER [--build NAME=SRC ...] [--threads 2] [--depth 0] [--sequences 1]
        [--seconds 60]

SRC is the `src` folder of a checkout whose compiled module lies in it (CONTRIBUTING.md says how);
without --build only the one that runs this is measured. All builds stay open, each in a process of
its own, and share the file's pages. Memory of virtual machines changes its speed within seconds:
the read bandwidth is measured before and after each round, rounds in which it changed are left out,
and slow and fast ones are told apart. Printed: milliseconds a step, the ratio to the first build
and the share of the bandwidth; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SEQUENCE = 64  # tokens, which come again and again: their experts stay in memory


class Build:
    """A process that decodes when told to."""

    def __init__(
        self, source: str | None, folder: Path, threads: int, depth: int, sequences: int
    ) -> None:
        environment = {**os.environ, **({"PYTHONPATH": source} if source else {})}
        self._process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                str(folder),
                "--side",
                f"--threads={threads}",
                f"--depth={depth}",
                f"--sequences={sequences}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, steps: int) -> dict[str, float]:
        """Run so many steps; of 0, measure the read bandwidth."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("a build ended; what it said stands above")
        found: dict[str, float] = json.loads(answer)
        return found

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def side(folder: Path, threads: int, depth: int, sequences: int) -> None:
    """The process of a build: a number on each line comes in, an answer on each goes out."""
    from earnest.checkpoint.open import open_checkpoint
    from earnest.engine.batch import Slice, blocks_for, make_batch
    from earnest.measure.speed import Traffic, fill
    from earnest.runners import Routing
    from earnest.runners.native import memory, ops
    from earnest.runners.native.runner import NativeRunner

    checkpoint = open_checkpoint(str(folder))
    each = blocks_for(depth + SEQUENCE, 32)
    runner = NativeRunner(checkpoint, num_blocks=each * sequences, threads=threads)
    fill(runner)
    traffic = Traffic(checkpoint, runner)
    random = np.random.default_rng(0)
    ids = random.integers(3, checkpoint.config.vocab_size, (SEQUENCE, sequences)).tolist()
    pool, data = ops.thread_pool(threads), memory.zeros(2**28)
    data[:] = 1
    step = 0
    for line in sys.stdin:
        seconds, read = [], []
        for _ in range(int(line)):
            at = step % SEQUENCE
            rows = [
                Slice([token], depth + at, range(i * each, (i + 1) * each), 1)
                for i, token in enumerate(ids[at])
            ]
            batch = make_batch(rows, runner.block_size)
            routing: list[Routing] = []
            begun = time.perf_counter()
            runner.step(batch, routing)
            seconds.append(time.perf_counter() - begun)
            read.append(traffic.step(sequences, depth + at + 1, routing))
            step += 1
        if seconds:
            answer = {"seconds": median(seconds), "bytes": median(read)}
        else:
            rates = [median(ops.read_rate(pool, data, n) for _ in range(3)) for n in (1, 2, 4)]
            answer = {"read": max(rates)}
        print(json.dumps(answer), flush=True)


def measure(builds: dict[str, Build], seconds: float, steps: int) -> list[dict[str, Any]]:
    """Rounds of all builds in turn, each with the bandwidth before and after."""
    for build in builds.values():
        build.ask(2 * SEQUENCE)  # finds pages that were never touched
    first = next(iter(builds.values()))
    rounds: list[dict[str, Any]] = []
    before, end = first.ask(0)["read"], time.monotonic() + seconds
    while time.monotonic() < end:
        names = list(builds)
        names = names[len(rounds) % len(names) :] + names[: len(rounds) % len(names)]
        found = {name: builds[name].ask(steps) for name in names}
        after = first.ask(0)["read"]
        rounds.append({"before": before, "after": after, "found": found})
        before = after
    return rounds


def report(rounds: list[dict[str, Any]], names: list[str]) -> None:
    """A line for every build and speed of the memory."""
    steady = [r for r in rounds if abs(r["before"] - r["after"]) < 0.1 * r["before"]]
    steady.sort(key=lambda r: r["before"])
    groups: list[list[dict[str, Any]]] = []
    for r in steady:
        if groups and r["before"] < 1.2 * groups[-1][-1]["before"]:
            groups[-1].append(r)
        else:
            groups.append([r])
    print(f"{len(rounds)} rounds, in {len(rounds) - len(steady)} of which memory changed its speed")
    for group in groups:
        read = median((r["before"] + r["after"]) / 2 for r in group)
        print(f"read bandwidth {read / 1e9:.1f} GB/s, {len(group)} rounds:")
        for name in names:
            took = [r["found"][name]["seconds"] for r in group]
            ratio = median(
                t / r["found"][names[0]]["seconds"] for t, r in zip(took, group, strict=True)
            )
            share = median(
                2 * r["found"][name]["bytes"] / t / (r["before"] + r["after"])
                for t, r in zip(took, group, strict=True)
            )
            print(f"  {name}: {1e3 * median(took):.2f} ms, {ratio:.3f} of the first, {share:.1%}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--build", action="append", default=[], metavar="NAME=SRC")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=1, help="decoding together")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=16, help="in a turn")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(args.folder, args.threads, args.depth, args.sequences)
        return
    sources = dict(build.split("=", 1) for build in args.build) or {"this": None}
    builds = {
        name: Build(source, args.folder, args.threads, args.depth, args.sequences)
        for name, source in sources.items()
    }
    report(measure(builds, args.seconds, args.steps), list(builds))
    for build in builds.values():
        build.close()


if __name__ == "__main__":
    main()
