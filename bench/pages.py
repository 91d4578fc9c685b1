"""Decoding from a packed file in huge pages and from a copy of it in small ones, taking turns.

    python bench/pages.py FOLDER [--threads 1 2] [--rounds 12]

FOLDER is what `earnest synth --codec`, `pack` or `quantize` wrote; both copies must have room in
memory. The second copy is written in pieces of 64 KiB, as most programs do, into a folder
beside it that is removed at the end. Printed: how much of each is mapped in huge pages (where the
system tells), medians of milliseconds a token, and of the ratios of the rounds; and the read
bandwidth measured in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from earnest.checkpoint.open import open_checkpoint
from earnest.measure import measure_rates
from earnest.runners import Batch
from earnest.runners.native.runner import NativeRunner

POSITIONS, PIECE = 256, 2**16


def copied(source: Path, folder: Path) -> Path:
    """A copy whose page cache is made of small pages."""
    for path in source.iterdir():
        with path.open("rb") as whole, (folder / path.name).open("wb", buffering=0) as copy:
            while piece := whole.read(PIECE):
                copy.write(piece)
            os.fsync(copy.fileno())
    return folder


def in_huge_pages(folder: Path) -> int:
    """Bytes of the files in a folder that this process maps in huge pages."""
    count, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) + "/" in line
        elif inside and line.startswith("FilePmdMapped:"):
            count += 1024 * int(line.split()[1])
    return count


def decode(runner: NativeRunner, first: int, count: int) -> list[float]:
    """Seconds of so many tokens, one after the other."""
    table_SB = np.arange(POSITIONS // runner.block_size, dtype=np.int32)[None]
    row, starts, seconds = np.zeros(1, np.int32), np.array([0, 1], np.int32), []
    for n in range(first, first + count):
        token = np.array([7 + 7919 * n % (runner.config.vocab_size - 7)], np.int32)
        position = np.array([n % POSITIONS], np.int32)
        begun = time.perf_counter()
        runner.step(Batch(token, position, starts, table_SB, row))
        seconds.append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    source = args.folder.resolve()
    beside = Path(tempfile.mkdtemp(prefix=f".{source.name}.small-pages-", dir=source.parent))
    try:
        folders = {"huge": source, "small": copied(source, beside)}
        for threads in args.threads:
            compare(folders, threads, args.rounds, args.tokens)
    finally:
        shutil.rmtree(beside)


def compare(folders: dict[str, Path], threads: int, rounds: int, tokens: int) -> None:
    """A few lines about one number of threads."""
    runners = {
        name: NativeRunner(open_checkpoint(str(folder)), num_blocks=8, threads=threads)
        for name, folder in folders.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in runners}
    read = []
    for round_ in range(-1, rounds):
        found = {}
        for name in sorted(runners, reverse=round_ % 2 == 1):
            found[name] = median(decode(runners[name], round_ * tokens + tokens, tokens))
        if round_ >= 0:  # the first finds pages that were never touched
            read.append(measure_rates(threads).read / 1e9)
            for name, seconds in found.items():
                taken[name].append(seconds)
    ratio = median(s / h for s, h in zip(taken["small"], taken["huge"], strict=True))
    times = ", ".join(
        f"{name} pages ({in_huge_pages(folders[name]) / 2**20:,.0f} MB in huge ones) "
        f"{1e3 * median(seconds):.1f} ms"
        for name, seconds in taken.items()
    )
    print(
        f"{threads} threads: {times}; {ratio:.2f} times; read {min(read):.0f}-{max(read):.0f} GB/s"
    )


if __name__ == "__main__":
    main()
