"""Earnest's side of peers.py: a process that runs one model with the native runner."""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import numpy as np
import peers_pipe

from earnest import __version__
from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.engine.batch import Slice, blocks_for, make_batch
from earnest.log import silent
from earnest.measure.machine import peak_memory
from earnest.measure.speed import Traffic, fill
from earnest.runners.base import Routing
from earnest.runners.native import isa
from earnest.runners.native.runner import NativeRunner

BLOCK_SIZE = 32


class Side:
    """What peers.py asks of a side.

    Args:
        activation_bits: 15, the default of Earnest, or 8, which is what llama.cpp does.
        positions: KV positions to have room for, of all sequences together.
    """

    def __init__(self, activation_bits: int, positions: int) -> None:
        self._bits, self._positions = activation_bits, positions
        self._checkpoint: Checkpoint | None = None
        self._runner: NativeRunner | None = None
        self._traffic: Traffic | None = None
        self._threads = 0

    def about(self) -> dict[str, Any]:
        """Version and tier."""
        return {"name": "earnest", "version": f"earnest {__version__}", "features": [isa.tier()]}

    def open(self, path: str, threads: int, mmap: bool = True) -> dict[str, Any]:
        """Open, and pack into memory what is not packed."""
        if self._threads == threads:
            return {"load_s": 0.0}
        self._runner = self._traffic = None  # its panels first, or there are two of them
        gc.collect()
        begun = time.perf_counter()
        self._checkpoint = open_checkpoint(path)
        self._runner = NativeRunner(
            self._checkpoint,
            num_blocks=blocks_for(self._positions, BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            threads=threads,
            activation_bits=8 if self._bits == 8 else 15,
            progress=silent,
        )
        self._threads = threads
        seconds = time.perf_counter() - begun
        self._traffic = Traffic(self._checkpoint, self._runner)
        fill(self._runner)
        return {"load_s": seconds}

    def flags(self, kind: str, depth: int, tokens: int, batch: int) -> list[dict[str, Any]]:
        """Nothing to choose."""
        return [{}]

    def check(self, ids: list[int]) -> dict[str, Any]:
        """Logits after a prompt."""
        _, _, logits = self._step([ids], 0)
        return {"logits": peers_pipe.packed(logits[0])}

    def prefill(self, ids: list[list[int]]) -> dict[str, Any]:
        """Seconds of a prompt, and bytes it must read."""
        seconds, nbytes, _ = self._step(ids, 0)
        return {"seconds": [seconds], "bytes": nbytes}

    def decode(self, ids: list[list[int]], depth: int, warm: int) -> dict[str, Any]:
        """Seconds of each step that takes one token of every sequence, the first `warm` left out,
        and the mean bytes it must read. The KV blocks below `depth` hold random numbers, which a
        step reads like any others."""
        steps = list(zip(*ids, strict=True))
        done = [self._step([[token] for token in step], depth + i) for i, step in enumerate(steps)]
        return {
            "seconds": [seconds for seconds, _, _ in done[warm:]],
            "bytes": float(np.mean([nbytes for _, nbytes, _ in done[warm:]])),
        }

    def memory(self) -> dict[str, Any]:
        """Most bytes this process has held."""
        return {"peak": peak_memory()}

    def _step(self, ids: list[list[int]], start: int) -> tuple[float, float, np.ndarray]:
        assert self._runner is not None and self._traffic is not None
        each = blocks_for(start + max(map(len, ids)), BLOCK_SIZE)
        slices = [
            Slice(row, start, range(i * each, (i + 1) * each), 1) for i, row in enumerate(ids)
        ]
        batch = make_batch(slices, BLOCK_SIZE)
        routing: list[Routing] = []
        begun = time.perf_counter()
        logits = self._runner.step(batch, routing)
        seconds = time.perf_counter() - begun
        tokens = sum(map(len, ids))
        stored = tokens + start * len(ids)
        return seconds, self._traffic.step(tokens, stored, routing), logits


if __name__ == "__main__":
    peers_pipe.serve(Side(int(sys.argv[1]), int(sys.argv[2])))
