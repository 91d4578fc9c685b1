"""`LanguageModel`: an opened model that is simply called, and `load`, which opens one.

All that runs on one model shares one engine: prompts given together, and streams read in turn, run
in the same batches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import numpy.typing as npt

from earnest import env, hub
from earnest.checkpoint import Checkpoint, open_checkpoint
from earnest.config import ErnieConfig
from earnest.engine.batch import Slice, blocks_for, make_batch
from earnest.engine.defaults import end_of_text_ids, sampling_defaults
from earnest.engine.engine import MAX_CONTEXT, Engine, check_token_ids
from earnest.engine.reading import normalized
from earnest.engine.request import (
    Completion,
    Pooling,
    PoolingKind,
    Request,
    SamplingParams,
    TokenEvent,
)
from earnest.engine.speculation import Speculation, SpeculationName, speculation_of
from earnest.errors import (
    ChatUnsupportedError,
    EarnestError,
    MemoryBudgetError,
    PromptError,
    TokenizerError,
    UserError,
)
from earnest.log import Progress, logger, silent
from earnest.runners.base import Float32, Routing, Runner
from earnest.runners.choice import RunnerChoice, RunnerName
from earnest.runners.native.packing import plan_packing
from earnest.runners.native.runner import KvType
from earnest.tokenizer import Tokenizer

Message = Mapping[str, Any]
Notice = Callable[[str], None]

BLOCK_SIZE = 32
# KV blocks for so many sequences of the full context, if memory allows; shorter ones share them.
_POOL_CONTEXTS = 4
_CHUNK_TOKENS = 512
_CHUNK_LOGITS_BYTES = 64 * 2**20


def load(
    model: str | Path,
    *,
    max_context: int | None = None,
    memory_budget: int | None = None,
    runner: RunnerName = "auto",
    threads: int | None = None,
    kv: KvType | None = None,
    activation_bits: Literal[8, 15] | None = None,
    lock: bool = False,
    speculation: SpeculationName | None = "prompt",
    allow_missing_correction_bias: bool = False,
    progress: Progress = silent,
    notice: Notice = logger.warning,
) -> LanguageModel:
    """Open a model for use.

    Args:
        model: a folder or file; or, as a text, also a built-in name ("smollm2", "stories") or a
            repository that was pulled.
        max_context: positions a sequence may have. By default all that the model was made for, or
            as many as there is memory for, if that is fewer.
        memory_budget: bytes that decoded weights may take with the reference runner, in memory
            beside the mapped files; half of it is what keys and values may take with either. By
            default `EARNEST_MEMORY_GIB` or half of what is free.
        runner: "native", the compiled kernels: fast, and near the reference (docs/benchmarks.md
            says how near); "reference", numpy, whose logits are transformers' own in float32, and
            which `earnest verify` proves; "auto", native where it is installed, else the
            reference and a warning.
        threads, kv, activation_bits, lock: of the native runner, by default its own; see
            `NativeRunner`. The reference has no such choices: its keys and values are float32.
        speculation: "prompt" guesses, from where the text repeats itself, several tokens at once,
            while that brings more tokens a second; they are the same tokens as with None. Only
            with the native runner: the reference's sums depend on how many tokens a step has.
        allow_missing_correction_bias: open a mixture of experts without its correction bias.
        progress: told how far fetching a built-in model and packing its weights are.
        notice: told, a sentence at a time, what a careful reader should know.

    Raises:
        ModelNotFoundError, CheckpointError, MachineError: it cannot be found, opened or held.
        MissingPackageError: the native runner was asked for and is not installed.
        UserError: an argument is out of range, there is no such runner, or it has no such option.
    """
    choice = RunnerChoice(
        runner=runner, threads=threads, kv=kv, activation_bits=activation_bits, lock=lock
    )
    guessing = speculation_of(speculation)
    # A `Path` is never a built-in name, whatever it is called.
    name = model if isinstance(model, str) else str(model.absolute())
    path = hub.locate(name, progress=progress, notice=notice)
    checkpoint = open_checkpoint(path, allow_missing_correction_bias=allow_missing_correction_bias)
    for note in checkpoint.notes:
        notice(note)
    config = checkpoint.config
    budget = env.memory_budget() if memory_budget is None else memory_budget
    room = budget // 2
    if choice.native:
        room = min(room, _room_beside_weights(checkpoint))
    per_token = choice.kv_bytes_per_token(config)
    context, num_blocks = _plan_context(config, max_context, room, per_token)
    if max_context is None and context < config.max_position_embeddings:
        notice(
            f"the context is {context:,} of {config.max_position_embeddings:,} tokens, "
            f"which is what there is memory for; {MAX_CONTEXT} sets another"
        )
    opened = choice.open(
        checkpoint,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        memory_budget=budget,
        progress=progress,
    )
    return LanguageModel(
        checkpoint,
        opened,
        max_context=context,
        speculation=guessing if choice.native else None,
        notice=notice,
    )


def _room_beside_weights(checkpoint: Checkpoint) -> int:
    """Bytes for keys and values of the native runner: half of what its weights leave free.

    Where files are mapped in place the system may drop weights and read them again, slowly: a model
    that fills the memory still gets an eighth of what is free.
    """
    packing, free = plan_packing(checkpoint), env.free_memory()
    beside_packed = free - packing.packed_bytes
    return max(beside_packed - packing.mapped_bytes, beside_packed // 4, 0) // 2


def _plan_context(
    config: ErnieConfig, asked: int | None, room: int, per_token: int
) -> tuple[int, int]:
    """How long a sequence may be and how many KV blocks there are, in so many bytes."""
    possible = config.max_position_embeddings
    if asked is not None and not 1 <= asked <= possible:
        raise UserError(
            f"{MAX_CONTEXT} is out of range",
            got=f"{asked:,}",
            expected=f"1 to {possible:,}, which the model was made for",
        )
    fits = max(BLOCK_SIZE, room // per_token)
    context = min(possible, fits) if asked is None else asked
    positions = max(context, min(fits, _POOL_CONTEXTS * context))
    return context, blocks_for(positions, BLOCK_SIZE)


class LanguageModel:
    """An opened model. Made by `load`; safe to use from several threads.

    Args:
        checkpoint: the model's files.
        runner: what runs them; the object owns all its KV blocks.
        max_context: positions a sequence may have; at most what model and blocks allow.
        speculation: guesses several tokens at once; None: nobody does.
        notice: told what a careful reader should know.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: Runner,
        *,
        max_context: int | None = None,
        speculation: Speculation | None = None,
        notice: Notice = logger.warning,
    ) -> None:
        self.checkpoint = checkpoint
        self._runner = runner
        tokenizer: Tokenizer | None = None
        try:
            tokenizer = checkpoint.tokenizer
        except TokenizerError as error:
            notice(f"only token ids can be used, and no text is made: {error.problem}")
        self._engine = Engine(
            runner,
            tokenizer,
            eos_ids=end_of_text_ids(checkpoint, tokenizer),
            max_context=max_context,
            speculation=speculation,
        )
        # Events that arrived while another stream was being read, by request.
        self._arrived: dict[int, deque[tuple[float, TokenEvent | EarnestError]]] = {}
        self._lock = threading.Lock()
        # Requests nobody reads any more, to be cancelled by whoever next holds the lock.
        self._abandoned: deque[int] = deque()

    @property
    def config(self) -> ErnieConfig:
        """The model's numbers."""
        return self.checkpoint.config

    @property
    def engine(self) -> Engine:
        """What runs the requests; whoever drives it (a `Service`) uses nothing else of this
        object that runs the model."""
        return self._engine

    @property
    def runner(self) -> Runner:
        """The model on this machine."""
        return self._runner

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back.

        Raises:
            TokenizerError: the model has none, or it is broken.
        """
        return self.checkpoint.tokenizer

    @property
    def max_context(self) -> int:
        """Positions a sequence (prompt and new tokens) may have."""
        return self._engine.max_context

    @overload
    def generate(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[str | list[int]],
        sampling: SamplingParams | None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | list[list[int]] | list[str | list[int]],
        sampling: SamplingParams | None = None,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once.

        Args:
            prompt: a text (special tokens in it are recognised), or token ids, which are used as
                they are; or a list of either, which are run beside each other.
            sampling: how; by default as the model's authors recommend (`sampling_defaults`).

        Returns:
            A `Completion`, or for a list one for each prompt.

        Raises:
            PromptError, SamplingError: before anything is run, also for the last of a list.
            CheckpointError: the model's logits are not finite.
        """
        params = sampling or sampling_defaults(self.checkpoint)
        if isinstance(prompt, list) and any(map(_is_prompt, prompt)):
            several = cast("list[str | list[int]]", prompt)
            return self._complete([self._request(part, params) for part in several])
        return self._complete([self._request(cast("str | Sequence[int]", prompt), params)])[0]

    def stream(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None = None
    ) -> Generator[TokenEvent, None, None]:
        """Continue a prompt, token by token; see `generate`.

        The prompt is checked now; what it costs is spent when the first event is asked for. Closing
        the generator, or leaving it in the middle, frees what the request holds.
        """
        request = self._request(prompt, sampling or sampling_defaults(self.checkpoint))
        return self._stream(request)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.
            sampling: as in `generate`.
            tools: descriptions of functions, for templates that know them.
            variables: more variables for the template, for example `enable_thinking=False`.

        Raises:
            ChatUnsupportedError: the model has no chat format (a Base model).
            TemplateError: its template refuses the conversation.
            PromptError, SamplingError, CheckpointError: as in `generate`.
        """
        return self.generate(self.chat_ids(messages, tools=tools, **variables), sampling)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> Generator[TokenEvent, None, None]:
        """Answer a conversation, token by token; see `chat` and `stream`."""
        return self.stream(self.chat_ids(messages, tools=tools, **variables), sampling)

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The token ids of a conversation, ready for the answer; errors as in `chat`."""
        if self.tokenizer.chat_template is None:
            raise ChatUnsupportedError(
                "this model has no chat format: it is a Base model, which continues text",
                remedy="use generate() with the beginning of a text, or a post-trained model",
            )
        text = self.tokenizer.apply_chat_template(messages, tools=tools, **variables)
        # As a whole: tokens span the seams of the template ("User: " + "Hello" is `▁Hello`). The
        # template writes the special tokens itself.
        return self.tokenizer.encode(text, add_special_tokens=False, parse_special=True)

    def text_ids(self, text: str) -> list[int]:
        """The token ids of a prompt given as text, as `generate` and `stream` use them: special
        tokens in it are recognised, and the beginning-of-text token is added where the model asks
        for one.

        Raises:
            TokenizerError: the model has no tokenizer.
        """
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text, add_special_tokens=True, parse_special=True)
        if not ids and tokenizer.bos_id is not None:
            return [tokenizer.bos_id]
        return ids

    def logits(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> Float32:
        """What the model expects after each token, before any softmax.

        Args:
            token_ids: T ids, used as they are (no beginning-of-text token is added).

        Returns:
            float32 `[T, vocab_size]`; row t is about the token that follows `token_ids[t]`.

        Raises:
            PromptError: no ids, ids outside the vocabulary, or more than the context.
            MemoryBudgetError: the result would take more than half of the free memory.
        """
        ids = self._checked(token_ids)
        T, V = len(ids), self.config.vocab_size
        needed, limit = 4 * T * V, env.free_memory() // 2
        if needed > limit:
            raise MemoryBudgetError(
                "the logits of so many tokens would take too much memory",
                got=f"{T:,} x {V:,} float32, {needed / 2**30:.2f} GiB",
                expected=f"at most {limit / 2**30:.2f} GiB, half of what is free",
                remedy="pass fewer tokens, or ask generate() for prompt_logprobs instead",
            )
        logits_TV = np.empty((T, V), np.float32)
        with self._lock, self._blocks_for(T) as blocks:
            chunk = max(1, min(_CHUNK_TOKENS, _CHUNK_LOGITS_BYTES // (4 * V)))
            for start in range(0, T, chunk):
                part = ids[start : start + chunk]
                batch = make_batch([Slice(part, start, blocks, len(part))], self._runner.block_size)
                logits_TV[start : start + chunk] = self._runner.step(batch)
        return logits_TV

    def embed(
        self,
        texts: str | Sequence[int] | list[str] | list[list[int]] | list[str | list[int]],
        *,
        pooling: PoolingKind = "mean",
        normalize: bool = True,
    ) -> Float32:
        """Vectors that stand for texts.

        Args:
            texts: a text, or token ids, as in `generate`; or a list of either, which are run beside
                each other.
            pooling: "mean" of all tokens' hidden states after the final norm, or the "last" one's.
            normalize: scale the vectors to length 1.

        Returns:
            float32 `[hidden_size]`, or for a list `[N, hidden_size]`. A text's vector has the same
            bits alone and beside others if the runner's numbers do (the native one's).

        Raises:
            PromptError: before anything is run, also for the last of a list.
            CheckpointError: the model's numbers are not finite.
        """
        several = isinstance(texts, list) and any(map(_is_prompt, texts))
        given = cast("list[str | Sequence[int]]", texts if several else [texts])
        params, reading = SamplingParams(max_tokens=0), Pooling(pooling)
        requests = [self._request(part, params, reading) for part in given]
        with self._running(requests) as ids:
            found = [self._next(request_id)[1].embedding for request_id in ids]
        vectors = [normalized(v) if normalize else v for v in found if v is not None]
        return np.stack(vectors) if several else vectors[0]

    def routing(
        self, token_ids: Sequence[int] | npt.NDArray[np.integer]
    ) -> list[tuple[npt.NDArray[np.int32], Float32]]:
        """Which experts each token is sent to.

        Args:
            token_ids: T ids, as in `logits`.

        Returns:
            One pair per mixture-of-experts layer, from below (none for a dense model): experts
            int32 `[T, k]`, best selection score first, and weights float32 `[T, k]`, what each
            one's output is multiplied with.

        Raises:
            PromptError: as in `logits`.
        """
        ids = self._checked(token_ids)
        chunks: list[list[Routing]] = []
        with self._lock, self._blocks_for(len(ids)) as blocks:
            for start in range(0, len(ids), _CHUNK_TOKENS):
                part = ids[start : start + _CHUNK_TOKENS]
                batch = make_batch([Slice(part, start, blocks)], self._runner.block_size)
                chunks.append([])
                self._runner.step(batch, chunks[-1])
        return [
            (
                np.concatenate([part.experts for part in layer]),
                np.concatenate([part.weights for part in layer]),
            )
            for layer in zip(*chunks, strict=True)
        ]

    def _checked(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        check_token_ids(token_ids, self.config.vocab_size)
        if len(token_ids) > self.max_context:
            raise PromptError(
                "more tokens than the context holds",
                got=f"{len(token_ids):,}",
                expected=f"at most {self.max_context:,}",
                remedy=f"pass fewer, or open the model with a larger {MAX_CONTEXT}",
            )
        return [int(token) for token in token_ids]

    @contextmanager
    def _blocks_for(self, positions: int) -> Iterator[list[int]]:
        """KV blocks for a run outside the engine; the lock must be held."""
        self._sweep()
        with self._engine.borrowed(positions) as blocks:
            yield blocks

    def _request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        reading: Pooling | None = None,
    ) -> Request:
        if not _is_prompt(prompt):
            raise PromptError(
                "a prompt is neither a text nor a list of token ids", got=type(prompt).__name__
            )
        ids = self.text_ids(prompt) if isinstance(prompt, str) else prompt
        request = Request(tuple(ids), params, reading=reading)
        self._engine.check(request)
        return request

    def _stream(self, request: Request) -> Generator[TokenEvent, None, None]:
        with self._running([request]) as (request_id,):
            while True:
                _, event = self._next(request_id)
                yield event
                if event.finish_reason is not None:
                    return

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        begun = time.monotonic()
        with self._running(requests) as ids:
            return [
                self._collect(request, request_id, begun)
                for request, request_id in zip(requests, ids, strict=True)
            ]

    def _collect(self, request: Request, request_id: int, begun: float) -> Completion:
        """Read the events of one request to its end."""
        timed = [self._next(request_id)]
        while timed[-1][1].finish_reason is None:
            timed.append(self._next(request_id))
        (first_time, first), (last_time, last) = timed[0], timed[-1]
        events = [event for _, event in timed]
        sampling, of_prompt = request.sampling, first.prompt_logprobs
        return Completion(
            text="".join(event.text for event in events),
            token_ids=[event.token_id for event in events if event.token_id is not None],
            finish_reason=last.finish_reason or "length",
            prompt_token_ids=list(request.prompt_ids),
            logprobs=None
            if sampling.logprobs is None
            else [event.logprobs for event in events if event.logprobs is not None],
            prompt_logprobs=None if of_prompt is None else list(of_prompt),
            prompt_seconds=first_time - begun,
            decode_seconds=last_time - first_time,
        )

    @contextmanager
    def _running(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Have requests in the engine; whatever happens, they are gone from it afterwards."""
        ids: list[int] = []
        try:
            with self._lock:
                for request in requests:
                    ids.append(self._engine.add(request))
                    self._arrived[ids[-1]] = deque()
            yield ids
        finally:
            # The garbage collector may close a stream in the middle of a step of this very thread:
            # waiting for the lock would then wait for ever.
            self._abandoned.extend(ids)
            if self._lock.acquire(blocking=False):
                try:
                    self._sweep()
                finally:
                    self._lock.release()

    def _sweep(self) -> None:
        while self._abandoned:
            request_id = self._abandoned.popleft()
            self._engine.cancel(request_id)
            self._arrived.pop(request_id, None)

    def _next(self, request_id: int) -> tuple[float, TokenEvent]:
        """The next event of a request and when it arrived, running the engine if need be."""
        while True:
            with self._lock:
                self._sweep()
                if not self._arrived[request_id]:
                    results = self._engine.step()
                    now = time.monotonic()
                    for number, result in results:
                        self._arrived[number].append((now, result))
                    continue
                arrived, result = self._arrived[request_id].popleft()
            if isinstance(result, EarnestError):
                raise result
            return arrived, result


def _is_prompt(value: object) -> bool:
    return isinstance(value, str | Sequence | np.ndarray)
