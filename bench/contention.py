"""Decoding while other processes hold processors: one thread, all of them, and all that suit.

    python bench/contention.py [MODEL] [--hogs 0 1 2] [--rounds 9] [--seconds 2]

The three runners take turns in one process; medians of tokens a second, and how many workers the
adaptive pool had at the end of its rounds. A hog is a process in an endless loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from earnest.checkpoint.open import open_checkpoint
from earnest.hub.sources import locate
from earnest.runners import Batch
from earnest.runners.native.ops import usable_threads
from earnest.runners.native.runner import NativeRunner


def decode(runner: NativeRunner, seconds: float) -> float:
    """Tokens a second, one after the other, at the positions 0 to 255."""
    table_SB = np.arange(256 // runner.block_size, dtype=np.int32)[None]
    one = np.array([0], np.int32)
    begun, count = time.perf_counter(), 0
    while (now := time.perf_counter() - begun) < seconds:
        position = np.array([count % 256], np.int32)
        starts = np.array([0, 1], np.int32)
        runner.step(Batch(one + 7, position, starts, table_SB, one))
        count += 1
    return count / now


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--hogs", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    checkpoint = open_checkpoint(locate(args.model))
    ways = {"one": 1, "all": usable_threads(), "adaptive": None}
    runners = {
        name: NativeRunner(checkpoint, num_blocks=8, threads=threads)
        for name, threads in ways.items()
    }
    print(f"{usable_threads()} threads, tier {runners['one'].tier}")
    for hogs in args.hogs:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
        rates: dict[str, list[float]] = {name: [] for name in runners}
        workers = []
        try:
            for _ in range(args.rounds):
                for name, runner in runners.items():
                    rates[name].append(decode(runner, args.seconds))
                workers.append(runners["adaptive"].pool.active)
        finally:
            for other in others:
                other.kill()
                other.wait()
        cells = ", ".join(f"{name} {statistics.median(r):.1f}" for name, r in rates.items())
        print(
            f"{hogs} hogs: {cells} tok/s; adaptive had {statistics.mean(workers):.1f} workers; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
