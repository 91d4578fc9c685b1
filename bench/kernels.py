"""What the matrix kernels reach of what this machine gives, measured in the same minutes.

    python bench/kernels.py [--threads 1 2] [--codecs q4_0 bf16] [--gib 1.5] [--tier avx2]

Decode: one token against a matrix far larger than any cache; GB/s and its share of the read
bandwidth. Prefill: 512 tokens; 10^9 operations per second (a product and a sum are two) and, for
integer codecs, the share of the tier's own integer rate.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from earnest.codecs.panel import PANELS, panel
from earnest.runners.native import isa, ops

COLUMNS = 2560  # hidden size of the 21B model


def huge(size: int) -> np.ndarray:
    """Memory in huge pages where the system gives them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix(codec: str, rows: int, out: np.ndarray) -> np.ndarray:
    """Panels of `rows` rows: a random tile repeated."""
    layout = panel(codec)
    count, size = layout.shape(rows, COLUMNS)
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (min(count, 64), layout.block_bytes), np.uint8)
    tile[:, 1::2] &= 0x3F  # numbers of moderate size wherever a half float or bf16 lies
    blocks = out[: count * size].reshape(-1, layout.block_bytes)
    for start in range(0, len(blocks), len(tile)):
        part = blocks[start : start + len(tile)]
        part[:] = tile[: len(part)]
    return blocks.reshape(count, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, ops.usable_threads()])
    parser.add_argument("--codecs", nargs="+", default=list(PANELS), choices=list(PANELS))
    parser.add_argument("--gib", type=float, default=1.5)
    parser.add_argument("--tier", default=isa.tier())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 512])
    parser.add_argument("--planes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    memory = huge(int(args.gib * 2**30))
    memory[:] = 1
    rows_out = []
    for threads in sorted(set(args.threads)):
        pool = ops.thread_pool(threads)
        read = max(
            statistics.median(
                ops.read_rate(pool, memory, streams, tier=args.tier) for _ in range(args.repeats)
            )
            for streams in (1, 2, 4)
        )
        ops.integer_rate(pool, 10**5, tier=args.tier)
        rate = max(ops.integer_rate(pool, 10**6, tier=args.tier) for _ in range(3))
        print(f"{args.tier}, {threads} threads: read {read / 1e9:.1f} GB/s,", end=" ")
        print(f"int8 {rate / 1e12:.3f} TOP/s")
        for codec in args.codecs:
            for tokens in args.tokens:
                # Decode streams the whole memory; prefill reuses a matrix of an expert's size.
                size = len(memory) if tokens < 16 else 48 * 2**20
                rows = int(size // panel(codec).shape(16, COLUMNS)[1]) * 16
                packed = matrix(codec, rows, memory)
                x = np.random.default_rng(1).standard_normal((tokens, COLUMNS), np.float32)
                plain = panel(codec).codec.is_plain
                for planes in args.planes if codec == "bf16" or not plain else [1]:
                    run = partial(
                        ops.matmul, packed, codec, rows, x,
                        planes=planes, pool=pool, tier=args.tier,
                    )  # fmt: skip
                    seconds = median_seconds(run, args.repeats if tokens < 16 else 3)
                    gb_s = packed.nbytes / seconds / 1e9
                    gop_s = 2 * rows * COLUMNS * tokens / seconds / 1e9
                    print(
                        f"  {codec:5} tokens {tokens:4} planes {planes}: {gb_s:6.2f} GB/s"
                        f" {100e9 * gb_s / read:5.1f}% of read, {gop_s:8.1f} GOP/s"
                        f" {100e9 * gop_s / rate:5.1f}% of int8"
                    )
                    rows_out.append(
                        {
                            "tier": args.tier, "threads": threads, "codec": codec,
                            "tokens": tokens, "planes": planes, "gb_s": gb_s, "gop_s": gop_s,
                            "bandwidth_share": 1e9 * gb_s / read, "int8_share": 1e9 * gop_s / rate,
                        }
                    )  # fmt: skip
    if args.json:
        print(json.dumps(rows_out, indent=1))


if __name__ == "__main__":
    main()
