"""`earnest quantize` next to llama.cpp's quantiser: seconds, and squared error of what comes out.

    python bench/quantizing.py --peer-python ~/llama/bin/python [--codecs q4_k_m q8_0] [--layers 2]

Layers of the 21B model in bf16 with random weights, as one GGUF file; both sides write GGUF, each
as a whole process with as many threads, taking turns. Errors are compared over the tensors that
both sides gave the same block type (importance matrices are used by neither).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from earnest.checkpoint import open_checkpoint

# Numbers of llama.h's llama_ftype.
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
PEER = """
import sys, llama_cpp
source, target, file_type, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(file_type), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""
ROWS = 256  # of a tensor whose error is counted


def earnest(*words: str) -> list[str]:
    return [sys.executable, "-c", "from earnest.cli.main import main; main()", *words]


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - begun


def errors(source: Path, ours: Path, theirs: Path) -> dict[str, tuple[float, float]]:
    """Squared error of ours and theirs by block type, over tensors of the same type."""
    original, first, second = (open_checkpoint(path).tensors for path in (source, ours, theirs))
    found: dict[str, tuple[float, float]] = {}
    for name, tensor in first.items():
        other = second[name]
        if tensor.codec.name != other.codec.name or tensor.codec.is_plain:
            continue
        some = slice(min(ROWS, tensor.shape[0]))
        exact, a, b = (t.read_rows(some) for t in (original[name], tensor, other))
        had = found.get(tensor.codec.name, (0.0, 0.0))
        found[tensor.codec.name] = (
            had[0] + float(np.square(a - exact, dtype=np.float64).sum()),
            had[1] + float(np.square(b - exact, dtype=np.float64).sum()),
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--codecs", nargs="+", default=["q4_k_m", "q8_0", "q4_0"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made, source = Path(folder, "made"), Path(folder, "source.gguf")
        seconds(earnest("synth", str(made), "--preset", "21b-a3b", "--layers", str(args.layers)))
        seconds(earnest("convert", str(made), str(source), "--to", "gguf"))
        for name in args.codecs:
            ours, theirs = Path(folder, f"{name}-ours.gguf"), Path(folder, f"{name}-theirs.gguf")
            commands = {
                "ours": earnest("quantize", str(source), str(ours), "--codec", name, "--force"),
                "theirs": [
                    *(args.peer_python, "-c", PEER, str(source), str(theirs)),
                    *(str(FILE_TYPES[name]), str(args.threads)),
                ],
            }
            times: dict[str, list[float]] = {side: [] for side in commands}
            for _ in range(args.rounds):
                for side, command in commands.items():
                    times[side].append(seconds(command))
            median = {side: statistics.median(t) for side, t in times.items()}
            rows.append(
                {
                    "codec": name,
                    "seconds": median,
                    "speed_ratio": median["theirs"] / median["ours"],
                    "bytes": {"ours": ours.stat().st_size, "theirs": theirs.stat().st_size},
                    "error_ratio": {
                        kind: a / b for kind, (a, b) in errors(source, ours, theirs).items()
                    },
                }
            )
            ours.unlink()
            theirs.unlink()
            if not args.json:
                print(json.dumps(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
