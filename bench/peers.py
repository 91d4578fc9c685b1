"""Ours and llama.cpp on the same GGUF files, in one run, taking turns; ratios.

    python bench/peers.py                                  # SmolLM2, the real model
    python bench/peers.py --make 0.3b-q4_0 21b-q4_0 --files /data/shapes
    python bench/peers.py --model model.gguf --peer-python ~/llama/bin/python --json

The peer is the package `llama-cpp-python`, built natively: docs/benchmarks.md says how. It may live
in an environment of its own (--peer-python). Both get the same token ids, as many threads,
and each its best settings: of the peer's, every one worth trying is tried for every line, and the
fastest is kept. Sequences that decode together are fed different tokens: the same token for all
would make them share experts, which flatters whoever reads each expert once. Bandwidth is measured
in the same run. "15" and "8" are bits of activations: 15 is what Earnest does by default,
8 is what llama.cpp does.

Where two copies of a file do not fit into memory, the sides do not run beside each other: each
round starts the one, measures all lines, ends it, and starts the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers_pipe import Pipe, SideError, unpacked

from earnest import env, hub
from earnest.checkpoint import open_checkpoint
from earnest.measure.machine import look, measure_rates

SHAPES = {
    f"{preset}-{codec}": (preset, codec)
    for preset, codecs in {
        "0.3b": ("bf16", "q8_0", "q4_0"),
        "21b-a3b": ("q4_0", "q4_k_m"),
    }.items()
    for codec in codecs
}
# Steps of a decoding line that count, and those before them.
STEPS, WARM = 24, 3


@dataclass(frozen=True)
class Line:
    """One thing to measure."""

    kind: str  # prefill or decode
    depth: int
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """For people, and for --lines."""
        if self.kind == "prefill":
            return f"prefill-{self.tokens}"
        return f"decode-{self.depth}" if self.batch == 1 else f"batch-{self.batch}"


LINES = (
    Line("decode", 0, 1, STEPS),
    Line("decode", 4096, 1, STEPS),
    Line("decode", 16384, 1, STEPS),
    Line("prefill", 0, 1, 512),
    Line("prefill", 0, 1, 4096),
    Line("decode", 0, 8, STEPS),
    Line("decode", 0, 16, STEPS),
)


def ids_of(line: Line, vocabulary: int) -> list[list[int]]:
    """Token ids of a line: different for every sequence and every step."""
    rng = np.random.default_rng(line.batch + line.tokens)
    count = line.tokens + (WARM if line.kind == "decode" else 0)
    return rng.integers(vocabulary, size=(line.batch, count)).tolist()


class Run:
    """One file with one number of threads: all sides, all lines, all rounds."""

    def __init__(self, path: Path, threads: int, options: argparse.Namespace) -> None:
        self._path, self._threads, self._options = path, threads, options
        config = open_checkpoint(path).config
        self._vocabulary = config.vocab_size
        longest = config.max_position_embeddings
        self._lines = [
            line
            for line in LINES
            if line.depth + line.tokens + WARM <= longest
            and (not options.lines or line.name in options.lines)
        ]
        positions = max((n.depth + n.tokens + WARM + 64) * n.batch for n in self._lines)
        self._sides = {f"earnest {bits}": ("earnest", bits, positions) for bits in options.bits}
        self._sides["llama.cpp"] = ("llama", 0, 0)
        room = env.free_memory() - (2 << 30)
        self._together = len(self._sides) * path.stat().st_size * 1.1 < room
        self._pipes: dict[str, Pipe] = {}
        self._flags: dict[tuple[str, Line], dict[str, Any]] = {}
        self._seconds: dict[tuple[str, Line], list[float]] = {}
        self._bytes: dict[Line, float] = {}

    def all(self) -> list[dict[str, Any]]:
        """The rows of the table."""
        rates = measure_rates(self._threads)
        self._check()
        for number in range(self._options.rounds):
            names = list(self._sides)
            for line in self._lines if self._together else [None]:
                # Turn about: no side is always the one that finds a cold or a warm machine.
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    self._tell(f"round {number + 1} of {self._options.rounds}: {name}")
                    for one in [line] if line else self._lines:
                        self._measure(name, one)
                    if not self._together:
                        self._close()
        self._close()
        return [row for line in self._lines for row in self._rows(line, rates)]

    def _tell(self, what: str) -> None:
        print(f"  {self._path.name}, {self._threads} threads: {what}", file=sys.stderr, flush=True)

    def _pipe(self, name: str) -> Pipe:
        if name not in self._pipes:
            kind, bits, positions = self._sides[name]
            if kind == "earnest":
                pipe = Pipe(sys.executable, "peers_earnest.py", str(bits), str(positions))
            else:
                pipe = Pipe(self._options.peer_python, "peers_llama.py")
            pipe.ask("open", path=str(self._path), threads=self._threads)
            self._pipes[name] = pipe
        return self._pipes[name]

    def _close(self) -> None:
        for pipe in self._pipes.values():
            pipe.close()
        self._pipes.clear()

    def _check(self) -> None:
        """Say how far the sides are from each other before comparing their speed."""
        ids = np.random.default_rng(1).integers(self._vocabulary, size=24).tolist()
        logits: dict[str, np.ndarray] = {}
        for name in self._sides:
            logits[name] = unpacked(self._pipe(name).ask("check", ids=ids)["logits"])
            if not self._together:
                self._close()
        peer = logits["llama.cpp"]
        for name, ours in logits.items():
            apart = float(np.abs(ours - peer).max() / np.abs(peer).max())
            self._tell(
                f"largest logit difference of {name} to llama.cpp: {apart:.1e} of the largest"
            )

    def _measure(self, name: str, line: Line) -> None:
        pipe = self._pipe(name)
        tried = self._flags.get((name, line))
        if tried is None:
            flags = pipe.ask(
                "flags", kind=line.kind, depth=line.depth, tokens=line.tokens, batch=line.batch
            )
            speeds = [self._once(pipe, line, each) for each in flags] if len(flags) > 1 else [0.0]
            tried = self._flags[name, line] = flags[int(np.argmin(speeds))]
        self._seconds.setdefault((name, line), []).append(self._once(pipe, line, tried))

    def _once(self, pipe: Pipe, line: Line, flags: dict[str, Any]) -> float:
        """Seconds of a step (the median) or of a prompt."""
        arguments: dict[str, Any] = {"ids": ids_of(line, self._vocabulary), **flags}
        if line.kind == "decode":
            arguments |= {"depth": line.depth, "warm": WARM}
        answer = pipe.ask(line.kind, **arguments)
        if "bytes" in answer:
            self._bytes[line] = answer["bytes"]
        return statistics.median(answer["seconds"])

    def _rows(self, line: Line, rates: Any) -> list[dict[str, Any]]:
        tokens = line.batch * (line.tokens if line.kind == "prefill" else 1)
        medians = {name: statistics.median(self._seconds[name, line]) for name in self._sides}
        return [
            {
                "file": self._path.name,
                "threads": self._threads,
                "line": line.name,
                "side": name,
                "tok_s": tokens / seconds,
                # What a step must read is the same for both: keys and values of 16 bits.
                "bandwidth_share": self._bytes[line] / seconds / rates.read,
                "ratio": medians["llama.cpp"] / seconds,
                "settings": self._flags.get((name, line)),
            }
            for name, seconds in medians.items()
        ]


def made(name: str, folder: Path, layers: int | None) -> Path:
    """The true-shape file of a name, made if it is not there."""
    preset, codec = SHAPES[name]
    path = folder / f"{name}{f'-{layers}-layers' if layers else ''}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--layers", str(layers)] if layers else []
        subprocess.run(
            [
                *(sys.executable, "-m", "earnest", "synth", str(path), "--preset", preset),
                *("--codec", codec, "--seed", "1", *options),
            ],
            check=True,
        )
    return path


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", default=[], help="GGUF files, or smollm2")
    parser.add_argument("--make", nargs="*", default=[], choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--files", type=Path, default=Path("shapes"), help="where --make puts them")
    parser.add_argument("--layers", type=int, help="make fewer layers than the preset has")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--threads", type=int, nargs="*", default=[look().threads])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, nargs="*", default=[15, 8], choices=[8, 15])
    parser.add_argument("--lines", nargs="*", help=", ".join(line.name for line in LINES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = subprocess.run([options.peer_python, "-c", "import llama_cpp"], capture_output=True)
    if found.returncode:
        sys.exit(
            "llama_cpp cannot be imported by --peer-python; to build it for this machine:\n"
            "  CMAKE_ARGS=-DGGML_NATIVE=ON "
            "pip install --no-binary llama-cpp-python llama-cpp-python"
        )
    names = options.model or ([] if options.make else ["smollm2"])
    paths = [Path(hub.locate(name)) for name in names]
    paths += [made(name, options.files, options.layers) for name in options.make]
    rows = []
    for path in paths:
        for threads in options.threads:
            try:
                rows += Run(path, threads, options).all()
            except SideError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps({"machine": look().to_dict(), "rows": rows}, indent=1))
        return
    print("| file | threads | line | side | tokens/s | of the bandwidth | to llama.cpp |")
    print("|---|--:|---|---|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['file']} | {row['threads']} | {row['line']} | {row['side']} | "
            f"{row['tok_s']:.4g} | {row['bandwidth_share']:.0%} | {row['ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
