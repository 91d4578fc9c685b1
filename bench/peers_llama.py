"""The llama.cpp side of peers.py: a process that runs one GGUF file through `llama_decode`.

It needs nothing of Earnest, so it may run in an environment of its own (peers.py --peer-python).
Requests and answers are lines of JSON on standard input and output; peers_pipe.py has the loop.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import time
from typing import Any

import llama_cpp as C  # noqa: N812 - every name of it begins with llama_ already
import numpy as np
import peers_pipe

# What is tried for each line; the fastest is kept. "auto" would choose flash attention, which is
# often the slower of the two on processors.
FLASH = {
    "on": C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
# Real tokens whose keys and values are repeated until a depth is reached.
PASSAGE = 256


@C.llama_log_callback
def _silence(_level: int, text: bytes, _data: Any) -> None:
    _last_words.append(text.decode("utf-8", "replace").strip())
    del _last_words[:-8]


_last_words: list[str] = []


class Model:
    """A loaded file and one context at a time.

    Args:
        path: a GGUF file.
        threads: threads for everything.
        mmap: map the file instead of reading it. llama.cpp copies what it repacks, and then the
            mapped file and the copies are both resident: reading is the better choice for files
            of more than half of the memory.
        kv_f32: keys and values in float32 instead of float16; for comparing logits.
    """

    def __init__(self, path: str, threads: int, *, mmap: bool = False, kv_f32: bool = False):
        C.llama_log_set(_silence, None)
        C.llama_backend_init()
        params = C.llama_model_default_params()
        params.n_gpu_layers = 0
        if hasattr(params, "load_mode"):
            params.load_mode = C.LLAMA_LOAD_MODE_MMAP if mmap else C.LLAMA_LOAD_MODE_NONE
        else:  # before September 2026
            params.use_mmap = mmap
        self.model = C.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}: {'; '.join(_last_words)}")
        self.vocabulary = C.llama_model_get_vocab(self.model)
        self.size: int = C.llama_vocab_n_tokens(self.vocabulary)
        self.threads = threads
        self._kv = C.GGML_TYPE_F32 if kv_f32 else C.GGML_TYPE_F16
        self._context: Any = None
        self._batch: Any = None
        self._made: tuple[Any, ...] = ()
        self._passages: dict[str, ctypes.Array[ctypes.c_uint8]] = {}

    def context(
        self, positions: int, sequences: int, *, flash: str, ubatch: int, shared: bool = False
    ) -> None:
        """Make (or keep) a context with room for `positions` of each of `sequences`.

        Args:
            shared: one pool of keys and values for all sequences, so that a sequence can take over
                those of another.
        """
        made = (positions, sequences, flash, ubatch, shared, self.threads)
        if made == self._made:
            return
        self.close_context()
        params = C.llama_context_default_params()
        # Without sharing, each sequence gets n_ctx / n_seq_max positions, whole runs of 256.
        each = -(-positions // 256) * 256
        params.n_ctx = each if shared else each * sequences
        params.n_batch = max(ubatch, min(positions, 4096), sequences)
        params.n_ubatch = ubatch
        params.n_seq_max = max(2, sequences) if shared else sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH[flash]
        params.type_k = params.type_v = self._kv
        params.kv_unified = shared
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self._context = C.llama_init_from_model(self.model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context: {'; '.join(_last_words)}")
        self._n_batch = int(params.n_batch)
        self._batch = C.llama_batch_init(self._n_batch, 0, 1)
        self._made = made

    def close_context(self) -> None:
        """Free keys, values and scratch."""
        if self._context:
            C.llama_batch_free(self._batch)
            C.llama_free(self._context)
        self._context, self._made = None, ()

    def forget(self, sequence: int = -1, start: int = -1) -> None:
        """Drop the tokens of a sequence (-1: all) from position `start` on."""
        memory = C.llama_get_memory(self._context)
        if sequence < 0:
            C.llama_memory_clear(memory, False)
        else:
            C.llama_memory_seq_rm(memory, sequence, start, -1)

    def step(
        self, ids: list[list[int]], start: int, *, logits: str = "last", first: int = 0
    ) -> tuple[float, np.ndarray]:
        """Run new tokens of all sequences, each from position `start` on, in one or (beyond
        n_batch) several calls of `llama_decode`.

        Args:
            ids: new tokens of each sequence.
            logits: "last" of each sequence, "all", or "none".
            first: number of the first sequence.

        Returns:
            Seconds, and logits `[rows, vocabulary]`.
        """
        rows = [
            (token, start + i, first + s, logits == "all" or (logits == "last" and i + 1 == len(r)))
            for s, r in enumerate(ids)
            for i, token in enumerate(r)
        ]
        found = []
        begun = time.perf_counter()
        for at in range(0, len(rows), self._n_batch):
            part, batch = rows[at : at + self._n_batch], self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = wanted
            # Filling the batch from Python is not llama.cpp's work.
            if not at:
                begun = time.perf_counter()
            status = C.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode failed ({status}): {'; '.join(_last_words)}")
            C.llama_synchronize(self._context)
            count = sum(wanted for *_, wanted in part)
            if count:
                found.append((C.llama_get_logits(self._context), count))
                if logits == "all":
                    found[-1] = (self._copy(*found[-1]), count)
        seconds = time.perf_counter() - begun
        parts = [p if isinstance(p, np.ndarray) else self._copy(p, n) for p, n in found]
        return seconds, np.concatenate(parts) if parts else np.empty((0, self.size), np.float32)

    def _copy(self, pointer: Any, count: int) -> np.ndarray:
        return np.ctypeslib.as_array(pointer, (count, self.size)).copy()

    def fill(self, depth: int, flash: str) -> None:
        """Give sequence 0 `depth` positions of context.

        A real prompt of 256 tokens is run once; its keys and values are then repeated: read back
        as another sequence, moved to later positions (llama.cpp turns the keys), handed over to
        sequence 0. What a step reads and computes is the same as after a real prompt; a real one
        of 16,384 tokens would take ten minutes with a 21B model.
        """
        memory = C.llama_get_memory(self._context)
        if flash not in self._passages:
            self.forget()
            ids = np.random.default_rng(2).integers(self.size, size=PASSAGE).tolist()
            self.step([ids], 0, logits="none")
            nbytes = C.llama_state_seq_get_size(self._context, 0)
            state = (ctypes.c_uint8 * nbytes)()
            if C.llama_state_seq_get_data(self._context, state, nbytes, 0) != nbytes:
                raise RuntimeError("llama.cpp does not give out its keys and values")
            self._passages[flash] = state
        state = self._passages[flash]
        self.forget()
        for start in range(0, depth, PASSAGE):
            if not C.llama_state_seq_set_data(self._context, state, len(state), 1):
                raise RuntimeError("llama.cpp does not take its keys and values back")
            if start:
                C.llama_memory_seq_add(memory, 1, 0, PASSAGE, start)
            C.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            C.llama_memory_seq_rm(memory, 1, -1, -1)
        self.forget(0, depth)
        if C.llama_memory_seq_pos_max(memory, 0) != depth - 1:
            raise RuntimeError("llama.cpp did not keep the repeated keys and values")


class Side:
    """What peers.py asks of a side."""

    def __init__(self) -> None:
        self._model: Model | None = None

    def about(self) -> dict[str, Any]:
        """Versions, and what llama.cpp says it was compiled for."""
        said = C.llama_print_system_info().decode()
        features = [
            part.split("=")[0].strip().split(":")[-1].strip()
            for part in said.split("|")
            if part.strip().endswith("= 1")
        ]
        return {
            "name": "llama.cpp",
            "version": f"llama-cpp-python {C.__version__}",
            "python": platform.python_version(),
            "features": features,
        }

    def open(self, path: str, threads: int, mmap: bool = False) -> dict[str, Any]:
        """Load the file; a loaded one only gets other threads."""
        begun = time.perf_counter()
        if self._model is None:
            self._model = Model(path, threads, mmap=mmap)
        self._model.threads = threads
        return {"load_s": time.perf_counter() - begun}

    def flags(self, kind: str, depth: int, tokens: int, batch: int) -> list[dict[str, Any]]:
        """Settings worth trying for a line."""
        sizes = sorted({min(tokens, n) for n in (512, 2048)}) if kind == "prefill" else [512]
        return [{"flash": f, "ubatch": n} for f in FLASH for n in sizes]

    def check(self, ids: list[int]) -> dict[str, Any]:
        """Logits after a prompt."""
        assert self._model is not None
        self._model.context(len(ids), 1, flash="off", ubatch=512)
        self._model.forget()
        _, logits = self._model.step([ids], 0)
        return {"logits": peers_pipe.packed(logits[0])}

    def prefill(self, ids: list[list[int]], flash: str, ubatch: int) -> dict[str, Any]:
        """Seconds of a prompt."""
        assert self._model is not None
        self._model.context(max(map(len, ids)), len(ids), flash=flash, ubatch=ubatch)
        self._model.forget()
        seconds, _ = self._model.step(ids, 0)
        return {"seconds": [seconds]}

    def decode(
        self, ids: list[list[int]], depth: int, warm: int, flash: str, ubatch: int
    ) -> dict[str, Any]:
        """Seconds of each step that takes one token of every sequence, the first `warm` left out.
        With more than one sequence `depth` is 0."""
        assert self._model is not None
        positions = depth + len(ids[0])
        self._model.context(positions, len(ids), flash=flash, ubatch=ubatch, shared=depth > 0)
        if depth:
            self._model.fill(depth, flash)
        else:
            self._model.forget()
        steps = list(zip(*ids, strict=True))
        seconds = [self._model.step([[t] for t in s], depth + i)[0] for i, s in enumerate(steps)]
        return {"seconds": seconds[warm:]}

    def memory(self) -> dict[str, Any]:
        """Most bytes this process has held."""
        return {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    peers_pipe.serve(Side())
