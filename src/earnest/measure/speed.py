"""How fast a model runs: prefill and decoding at chosen depths and batch sizes.

What is timed is `Runner.step`, from token ids to logits; sampling and text are not. Three things
keep the numbers honest:

  - Every sequence is fed other tokens at every step. One token fed to all sequences would make
    them share experts, which no real batch does.
  - The bytes of a step are counted, not guessed: the matrices that every token reads, the experts
    that the routers did choose in that step, and the keys and values up to each position.
  - A depth is declared, not computed: the KV blocks are filled with random numbers, and the step is
    told that they are those of `depth` tokens. It reads the same bytes as after a real prompt.
    Zeros would not do: memory never written is one page of zeros, which stays in the cache.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from earnest import env
from earnest.checkpoint import Checkpoint
from earnest.config import Accounting, ErnieConfig
from earnest.engine.batch import Slice, blocks_for, make_batch
from earnest.errors import MemoryBudgetError, UserError
from earnest.log import Progress, silent
from earnest.measure.machine import Rates, huge_page_share, peak_memory
from earnest.runners.base import Routing
from earnest.runners.choice import RunnerChoice, RunnerName
from earnest.runners.native import runner as native
from earnest.runners.native.packing import plan_packing
from earnest.runners.reference import ReferenceRunner
from earnest.runners.reference import runner as reference

BLOCK_SIZE = 32
# A prefill is repeated so often, unless it has taken so many seconds already.
_REPEATS, _ENOUGH_SECONDS = 3, 20.0
_WARM_STEPS = 2
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")

Kind = Literal["prefill", "decode"]
BenchRunner = native.NativeRunner | ReferenceRunner


@dataclass(frozen=True)
class Plan:
    """What will be measured; made by `plan`.

    Attributes:
        depths: tokens that each sequence has behind it.
        batches: how many sequences run together.
        prefill: tokens of a prompt chunk, for each sequence; 0 for no prefill rows.
        tokens: tokens decoded by each sequence; 0 for no decode rows.
    """

    depths: tuple[int, ...]
    batches: tuple[int, ...]
    prefill: int
    tokens: int

    @property
    def positions(self) -> int:
        """Positions of the longest sequence."""
        return max(self.depths) + max(self.prefill, self.tokens)

    @property
    def num_blocks(self) -> int:
        """KV blocks that the largest batch takes."""
        return max(self.batches) * blocks_for(self.positions, BLOCK_SIZE)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: "prefill" or "decode".
        depth: tokens that each sequence had behind it.
        batch: sequences that ran together.
        tokens: tokens of each sequence that were timed.
        seconds: median of a step: of all the tokens in prefill, of one of each sequence in decode.
        tokens_per_second: of all sequences together.
        bytes_per_second: weights, keys and values that the step had to read, over its time.
        operations_per_second: floating-point operations of the model, by accounting.
    """

    kind: Kind
    depth: int
    batch: int
    tokens: int
    seconds: float
    tokens_per_second: float
    bytes_per_second: float
    operations_per_second: float

    def to_dict(self, rates: Rates | None) -> dict[str, Any]:
        """JSON-able: `kind`, `depth`, `batch`, `tokens`, `step_ms`, `tok_s`, `gb_s`, and the shares
        of `rates`: `bandwidth_share` and `int8_share` (None without)."""
        return {
            "kind": self.kind,
            "depth": self.depth,
            "batch": self.batch,
            "tokens": self.tokens,
            "step_ms": 1e3 * self.seconds,
            "tok_s": self.tokens_per_second,
            "gb_s": self.bytes_per_second / 1e9,
            "bandwidth_share": None if rates is None else self.bytes_per_second / rates.read,
            "int8_share": None if rates is None else self.operations_per_second / rates.integer,
        }


@dataclass(frozen=True)
class Speed:
    """What `measure_speed` found.

    Attributes:
        runner: "native" or "reference".
        threads: threads of the native runner; None for the reference, where numpy decides.
        rows: the measurements.
        load_seconds: from an opened checkpoint to a runner that can step (packing included).
        first_token_seconds: length of a prompt to seconds until its logits, nothing warm: of one
            token, and of `Plan.prefill`.
        peak_memory: most bytes that this process has held so far; None if unknown.
        huge_page_share: see `machine.huge_page_share`; the rest of the file is read more slowly.
        weight_bytes: bytes of all matrices as the runner reads them.
        kv_bytes_per_token: bytes of keys and values of a token.
    """

    runner: str
    threads: int | None
    rows: list[Row]
    load_seconds: float
    first_token_seconds: dict[int, float]
    peak_memory: int | None
    huge_page_share: float | None
    weight_bytes: int
    kv_bytes_per_token: int


def plan(
    config: ErnieConfig,
    *,
    depths: Sequence[int] | None = None,
    batches: Sequence[int] = (1, 4),
    prefill: int | None = None,
    tokens: int = 32,
) -> Plan:
    """What to measure of a model; whatever is None follows from its context.

    Args:
        config: the model.
        depths: by default 0 and 4096, the latter if the context has room for it.
        batches: numbers of sequences.
        prefill: by default 512, or half of a context that is shorter than 1024.
        tokens: tokens to decode.

    Raises:
        UserError: numbers out of range, or a sequence longer than the model's context.
    """
    context = config.max_position_embeddings
    prefill = min(512, context // 2) if prefill is None else prefill
    longest = max(prefill, tokens)
    if depths is None:
        depths = [depth for depth in (0, 4096) if depth + longest <= context] or [0]
    if min(*depths, prefill, tokens, 0) < 0 or not depths or not batches or min(batches) < 1:
        raise UserError(
            "bench was asked for something that cannot be measured",
            got=f"depths {list(depths)}, batches {list(batches)}, {prefill} and {tokens} tokens",
            expected="numbers from 0, batches from 1, at least one of each",
        )
    if longest == 0:
        raise UserError("bench was asked for neither prefill nor decoding", got="0 and 0 tokens")
    if max(depths) + longest > context:
        raise UserError(
            "the sequences to measure are longer than the model's context",
            got=f"{max(depths):,} tokens of depth and {longest:,} more",
            expected=f"{context:,} in all",
            remedy="lower --depth, --prefill or --tokens",
        )
    if max(batches) > config.vocab_size:
        raise UserError("more sequences than tokens to tell them apart", got=max(batches))
    return Plan(tuple(dict.fromkeys(depths)), tuple(dict.fromkeys(batches)), prefill, tokens)


def measure_speed(
    checkpoint: Checkpoint,
    what: Plan,
    *,
    runner: RunnerName = "auto",
    threads: int | None = None,
    kv: native.KvType | None = None,
    activation_bits: Literal[8, 15] | None = None,
    lock: bool = False,
    loading: Progress = silent,
    progress: Progress = silent,
) -> Speed:
    """Load the model and measure.

    Args:
        checkpoint: the model.
        what: the rows to measure.
        runner, threads, kv, activation_bits, lock: see `RunnerChoice`.
        loading: told how far packing is, in bytes.
        progress: told how many measurements are done: the first tokens, then the rows. It is
            called between them only, so what it does is not timed.

    Raises:
        MemoryBudgetError: keys and values, or the weights, have no room.
        MissingPackageError: the native runner was asked for and is not installed.
        MachineError: the weights may not be locked.
        UserError: there is no such runner, or it has no such option.
    """
    choice = RunnerChoice(
        runner=runner, threads=threads, kv=kv, activation_bits=activation_bits, lock=lock
    )
    _check_room(what, choice.kv_bytes_per_token(checkpoint.config))
    begun = time.perf_counter()
    made = choice.open(
        checkpoint, num_blocks=what.num_blocks, block_size=BLOCK_SIZE, progress=loading
    )
    bench = _Bench(checkpoint, made, what)
    load_seconds = time.perf_counter() - begun
    prompts = sorted({1, what.prefill} - {0})
    kinds: list[Kind] = [kind for kind in _KINDS if getattr(what, _KINDS[kind])]
    wanted = [(k, depth, batch) for k in kinds for depth in what.depths for batch in what.batches]
    total = len(prompts) + len(wanted)
    first = {}
    for i, n in enumerate(prompts):
        progress(i, total, f"first token, cold, after a prompt of {n:,}")
        first[n] = bench.step(0, 1, n)[0]
    fill(made)
    rows = []
    for i, (kind, depth, batch) in enumerate(wanted, len(prompts)):
        progress(i, total, f"{kind} at depth {depth:,}, batch {batch}")
        rows.append(
            bench.prefill(depth, batch) if kind == "prefill" else bench.decode(depth, batch)
        )
    progress(total, total, "done")
    return Speed(
        runner="native" if choice.native else "reference",
        threads=made.pool.workers if isinstance(made, native.NativeRunner) else None,
        rows=rows,
        load_seconds=load_seconds,
        first_token_seconds=first,
        peak_memory=peak_memory(),
        huge_page_share=huge_page_share(),
        weight_bytes=bench.traffic.weight_bytes,
        kv_bytes_per_token=bench.traffic.kv_bytes_per_token,
    )


_KINDS: dict[Kind, str] = {"prefill": "prefill", "decode": "tokens"}


class Traffic:
    """Bytes that a step must read.

    Args:
        checkpoint: the model.
        runner: what runs it, and thereby how wide a stored weight and a key are.
    """

    def __init__(self, checkpoint: Checkpoint, runner: BenchRunner) -> None:
        config = checkpoint.config
        if isinstance(runner, native.NativeRunner):
            sizes = {m.name: m.nbytes for m in plan_packing(checkpoint).matrices}
            self._piece = native.PIECE_TOKENS
            self.kv_bytes_per_token = runner.kv_bytes // (runner.num_blocks * runner.block_size)
        else:
            sizes = {  # numpy multiplies float32, whatever the file holds
                name.removesuffix(".weight"): 4 * tensor.size
                for name, tensor in checkpoint.tensors.items()
                if len(tensor.shape) == 2 and not name.startswith("model.mtp_")
            }
            self._piece = reference.PIECE_TOKENS
            self.kv_bytes_per_token = Accounting(config).kv_bytes_per_token(4)
        self.weight_bytes = sum(sizes.values())
        self._experts: dict[tuple[int, int], int] = {}
        # Apart from the head, an embedding is a look-up of one row per token.
        self._always, self._row = 0, 0.0
        for name, nbytes in sizes.items():
            if found := _EXPERT.match(name):
                key = int(found[1]), int(found[2])
                self._experts[key] = self._experts.get(key, 0) + nbytes
            elif name == "model.embed_tokens" and not config.tie_word_embeddings:
                self._row = nbytes / config.vocab_size
            elif name != "lm_head" or not config.tie_word_embeddings:
                self._always += nbytes

    def step(self, tokens: int, stored: int, routing: Sequence[Routing]) -> float:
        """Bytes of a step of `tokens` tokens whose sequences have `stored` positions in all, its
        own included. Weights are read once for each piece that the runner divides it into."""
        total = self._row * tokens + stored * self.kv_bytes_per_token
        for start in range(0, tokens, self._piece):
            total += self._always
            for layer in routing:
                for expert in np.unique(layer.experts[start : start + self._piece]):
                    total += self._experts[layer.layer, int(expert)]
        return total


class _Bench:
    """A runner, its KV blocks dealt out to as many sequences as the largest batch has."""

    def __init__(self, checkpoint: Checkpoint, runner: BenchRunner, what: Plan) -> None:
        self._config, self._runner, self._what = checkpoint.config, runner, what
        self.traffic = Traffic(checkpoint, runner)
        self._operations = Accounting(checkpoint.config)
        each = runner.num_blocks // max(what.batches)
        self._blocks = [range(i * each, (i + 1) * each) for i in range(max(what.batches))]
        self._rng = np.random.default_rng(0)

    def step(self, start: int, batch: int, tokens: int) -> tuple[float, float]:
        """Run `tokens` new tokens of `batch` sequences at position `start`.

        Returns:
            The seconds it took and the bytes it had to read.
        """
        vocab = self._config.vocab_size
        if tokens == 1:
            ids = self._rng.choice(vocab, (batch, 1), replace=False)
        else:
            ids = self._rng.integers(0, vocab, (batch, tokens))
        slices = [
            Slice(row, start, blocks, 1)
            for row, blocks in zip(ids.tolist(), self._blocks[:batch], strict=True)
        ]
        made = make_batch(slices, BLOCK_SIZE)
        routing: list[Routing] = []
        begun = time.perf_counter()
        self._runner.step(made, routing)
        seconds = time.perf_counter() - begun
        return seconds, self.traffic.step(batch * tokens, batch * (start + tokens), routing)

    def prefill(self, depth: int, batch: int) -> Row:
        """Prompt chunks of all sequences in one step."""
        tokens = self._what.prefill
        measured = [self.step(depth, batch, tokens)]
        while len(measured) < _REPEATS and sum(s for s, _ in measured) < _ENOUGH_SECONDS:
            measured.append(self.step(depth, batch, tokens))
        # Attention is linear in the context, so the mean context counts; the head is only asked
        # for the last token of each.
        c = self._config
        operations = batch * (
            tokens * self._operations.flops_per_token(depth + (tokens + 1) // 2)
            - 2 * (tokens - 1) * c.vocab_size * c.hidden_size
        )
        return self._row("prefill", depth, batch, tokens, measured, operations, batch * tokens)

    def decode(self, depth: int, batch: int) -> Row:
        """One token of every sequence a step, from `depth` on."""
        tokens = self._what.tokens
        for _ in range(_WARM_STEPS):
            self.step(depth, batch, 1)
        measured = [self.step(depth + i, batch, 1) for i in range(tokens)]
        operations = batch * self._operations.flops_per_token(depth + (tokens + 1) // 2)
        return self._row("decode", depth, batch, tokens, measured, operations, batch)

    @staticmethod
    def _row(
        kind: Kind,
        depth: int,
        batch: int,
        tokens: int,
        measured: list[tuple[float, float]],
        operations: int,
        tokens_of_a_step: int,
    ) -> Row:
        seconds = statistics.median(s for s, _ in measured)
        return Row(
            kind=kind,
            depth=depth,
            batch=batch,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens_of_a_step / seconds,
            bytes_per_second=statistics.median(nbytes / s for s, nbytes in measured),
            operations_per_second=operations / seconds,
        )


def fill(runner: BenchRunner) -> None:
    """Write random numbers of moderate size (standard deviation 1/4) to all KV blocks."""
    numbers = np.random.default_rng(1).standard_normal(2**20, np.float32) / 4
    if isinstance(runner, native.NativeRunner) and runner.kv.startswith("int"):
        kept = np.dtype(runner.kv)
        most = np.iinfo(kept).max
        steps = most * 1.25  # of 1: 3.2 standard deviations are kept
        _tile(runner.cache.view(kept), np.rint(numbers * steps).clip(-most, most).astype(kept))
        channels = runner.config.head_dim
        # 16 positions of keys, then of values: their scales first.
        panels = runner.block_size // 16
        together = 4 if runner.kv == "int8" else 2
        sizes = [64 + 16 * kept.itemsize * (-(-channels // m) * m) for m in (together, 32)]
        heads = runner.cache.reshape(-1, panels * sum(sizes))
        keys = range(0, panels * sizes[0], sizes[0])
        values = range(keys.stop, panels * sum(sizes), sizes[1])
        for at in (*keys, *values):
            heads[:, at : at + 64] = np.full(16, 1 / steps, np.float32).view(np.uint8)
    elif isinstance(runner, native.NativeRunner):
        stored: np.ndarray[Any, Any] = numbers
        if runner.kv == "f16":
            stored = numbers.astype(np.float16)
        elif runner.kv == "bf16":
            stored = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        _tile(runner.cache.view(stored.dtype), stored)
    else:
        _tile(runner.cache.keys.reshape(-1), numbers)
        _tile(runner.cache.values.reshape(-1), numbers)


def _tile(out: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> None:
    for start in range(0, len(out), len(numbers)):
        part = out[start : start + len(numbers)]
        part[:] = numbers[: len(part)]


def _check_room(what: Plan, per_token: int) -> None:
    """Keys and values must fit; the runner checks them again beside the weights."""
    free, positions = env.free_memory(), what.num_blocks * BLOCK_SIZE
    if positions * per_token <= free:
        return
    raise MemoryBudgetError(
        "the keys and values to measure with do not fit into memory",
        got=f"{max(what.batches):,} sequences of {what.positions:,} positions of {per_token:,} "
        f"bytes, {positions * per_token / 2**30:.2f} GiB",
        expected=f"at most the {free / 2**30:.2f} GiB that are free",
        remedy=f"lower --depth or --batch until they take {free // per_token:,} positions in all",
    )
