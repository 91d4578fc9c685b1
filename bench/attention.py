"""Attention alone: its share of the read bandwidth in decoding and of the arithmetic in prefill.

    python bench/attention.py [--threads 1 2] [--kv f16 bf16] [--shape 21b] [--depth 4096 16384]

A model that is nothing but attention: the heads of the 21B model (20 queries, 4 keys and values of
128 channels) or of SmolLM2 (9 and 3 of 64), a hidden size of 32 and so many layers that keys and
values do not fit into a cache. Decode: GB/s of keys and values. Prefill: 10^9 float operations a
second (a product and its sum are two) of scores and sums of values together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from earnest.checkpoint import Checkpoint
from earnest.checkpoint.lazy import LazyTensor
from earnest.codecs.registry import codec
from earnest.config import ErnieConfig
from earnest.engine.batch import Slice, make_batch
from earnest.measure.speed import fill
from earnest.runners.native import isa, ops
from earnest.runners.native.runner import NativeRunner

SHAPES = {"21b": (20, 4, 128), "smollm2": (9, 3, 64), "mha": (8, 8, 64)}
BLOCK = 32


def model(shape: str, layers: int, context: int) -> Checkpoint:
    heads, kv_heads, channels = SHAPES[shape]
    config = ErnieConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=channels,
        max_position_embeddings=context,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32),
        "model.norm.weight": (32,),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (32,),
            f"{at}.post_attention_layernorm.weight": (32,),
            f"{at}.self_attn.q_proj.weight": (config.q_size, 32),
            f"{at}.self_attn.k_proj.weight": (config.kv_size, 32),
            f"{at}.self_attn.v_proj.weight": (config.kv_size, 32),
            f"{at}.self_attn.o_proj.weight": (32, config.q_size),
            f"{at}.mlp.gate_proj.weight": (32, 32),
            f"{at}.mlp.up_proj.weight": (32, 32),
            f"{at}.mlp.down_proj.weight": (32, 32),
        }
    tensors = {}
    for name, size in shapes.items():
        array = (rng.standard_normal(size) * 0.1).astype(np.float32)
        tensors[name] = LazyTensor(name, codec("f32"), size, lambda a=array: a, "memory")
    return Checkpoint(Path("memory"), config, "safetensors", "hf", tensors)


class Case:
    """A runner at a depth, ready to be timed."""

    def __init__(self, shape: str, kv: str, threads: int, depth: int, tier: str, most: int):
        heads, kv_heads, channels = SHAPES[shape]
        width = {"f32": 4, "int8": 1}.get(kv, 2)
        layers = max(2, min(28, most // (2 * depth * kv_heads * channels * width)))
        context = depth + 1024
        self.runner = NativeRunner(
            model(shape, layers, context), num_blocks=context // BLOCK, block_size=BLOCK,
            threads=threads, kv=kv, tier=tier,
        )  # fmt: skip
        fill(self.runner)
        self.depth = depth
        self.token_bytes = self.runner.kv_bytes / context
        self.token_flops = 4 * heads * channels * layers

    def seconds(self, tokens: int) -> float:
        ids = np.random.default_rng(tokens).integers(0, 64, tokens).tolist()
        table = range(self.runner.num_blocks)
        batch = make_batch([Slice(ids, self.depth, table, 1)], BLOCK)
        start = time.perf_counter()
        self.runner.step(batch)
        return time.perf_counter() - start

    def decode(self) -> float:
        """GB/s."""
        return self.token_bytes * (self.depth + 1) / self.seconds(1) / 1e9

    def prefill(self, tokens: int) -> float:
        """10^9 float operations a second."""
        flops = self.token_flops * tokens * (self.depth + (tokens + 1) / 2)
        return flops / self.seconds(tokens) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, ops.usable_threads()])
    parser.add_argument("--kv", nargs="+", default=["f32", "int16", "f16", "int8"])
    parser.add_argument("--shape", nargs="+", default=["21b", "smollm2"], choices=list(SHAPES))
    parser.add_argument("--depth", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--prefill", type=int, default=256, help="0 for decode only")
    parser.add_argument("--mib", type=int, default=192, help="keys and values of a case")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tier", default=isa.tier())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    data = np.ones(256 * 2**20, np.uint8)
    rows = []
    for threads in sorted(set(args.threads)):
        pool = ops.thread_pool(threads)
        for shape in args.shape:
            for depth in args.depth:
                cases = {
                    kv: Case(shape, kv, threads, depth, args.tier, args.mib * 2**20)
                    for kv in args.kv
                }
                decode: dict[str, list[float]] = {kv: [] for kv in cases}
                prefill: dict[str, list[float]] = {kv: [] for kv in cases}
                read, integer = [], []
                for _ in range(args.repeats):  # all take turns
                    read.append(ops.read_rate(pool, data, 4, tier=args.tier) / 1e9)
                    integer.append(ops.integer_rate(pool, 10**5, tier=args.tier) / 1e9)
                    for kv, case in cases.items():
                        decode[kv].append(case.decode())
                        if args.prefill:
                            prefill[kv].append(case.prefill(args.prefill))
                for kv in cases:
                    row = {
                        "tier": args.tier, "threads": threads, "shape": shape, "depth": depth,
                        "kv": kv, "gb_s": statistics.median(decode[kv]),
                        "read_gb_s": statistics.median(read),
                        "int8_gop_s": statistics.median(integer),
                        "gflop_s": statistics.median(prefill[kv]) if args.prefill else None,
                    }  # fmt: skip
                    rows.append(row)
                    text = f"{shape:8}{threads} threads, depth {depth:6}, {kv:5}"
                    text += f" decode {row['gb_s']:6.1f} GB/s"
                    text += f" {100 * row['gb_s'] / row['read_gb_s']:4.0f}% of read"
                    if args.prefill:
                        share = row["gflop_s"] / row["int8_gop_s"]
                        text += (
                            f"; prefill {row['gflop_s']:6.1f} GFLOP/s {100 * share:3.0f}% of int8"
                        )
                    print(text, flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
