"""`NativeRunner`: the compiled forward step behind the Runner protocol.

Python checks the batch, computes the rotary angles and owns the memory; everything else is one C++
call a step, outside the interpreter lock. For one instruction-set tier the logits of a sequence are
the same bits whatever the number of threads, the batch it shares a step with and the way its tokens
were divided into steps.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from earnest import env
from earnest.checkpoint.checkpoint import Checkpoint
from earnest.codecs.bits import Bytes
from earnest.config import ErnieConfig
from earnest.errors import MemoryBudgetError, TensorsError, UserError
from earnest.log import Progress, logger, silent
from earnest.runners.base import Batch, Float32, Routing
from earnest.runners.check import check_at_least, check_batch
from earnest.runners.native import isa, memory, ops
from earnest.runners.native.packing import Packing, Plain, plan_packing
from earnest.runners.reference.model import inverse_frequencies, rotations

# Tokens run at once, to bound the scratch; longer batches are run in pieces, with the same result.
PIECE_TOKENS = 1024
# Positions that the kernels read side by side: a KV block must be whole runs of them.
POSITIONS_TOGETHER = 16

# Packing less takes no longer than starting Python, and is not spoken of.
_WORTH_PACKING = 2**28

_KV_TYPES = {"f32": 0, "bf16": 1, "f16": 2, "int8": 3, "int16": 4}

KvType = Literal["int16", "f16", "bf16", "f32", "int8"]
DEFAULT_KV: KvType = "int16"


def kv_bytes_per_token(config: ErnieConfig, kv: KvType = DEFAULT_KV) -> int:
    """Bytes that the keys and values of one token take in all layers; the rows of values are
    filled up to 32 channels (`native/model/kv.h`).

    Raises:
        UserError: there is no such type of keys and values.
    """
    if kv not in _KV_TYPES:
        raise UserError(
            "there is no such type of keys and values", got=kv, expected=" or ".join(_KV_TYPES)
        )
    keys, values = config.head_dim, -(-config.head_dim // 32) * 32
    if kv == "int8":
        keys = -(-keys // 4) * 4
    number = {"f32": 4, "int8": 1}.get(kv, 2)
    scales = 8 if kv.startswith("int") else 0  # two of float32
    head = (keys + values) * number + scales
    return config.num_hidden_layers * config.num_key_value_heads * head


class NativeRunner:
    """Runs a checkpoint with the compiled kernels (a `runners.base.Runner`).

    Args:
        checkpoint: the model; its matrices are packed into memory as panels.
        num_blocks: KV blocks; memory for them is taken when they are first written.
        block_size: positions per KV block, a multiple of 16.
        threads: threads to use; by default all that this process may use, and fewer while other
            processes hold their processors.
        memory_budget: bytes that panels packed into memory may take (mapped ones take none); by
            default what is free beside the KV blocks and the scratch.
        plain: round matrices stored as f32, f16 or bf16 to this codec; None keeps their bits.
        kv: how keys and values are kept. int16 gives every key and value of a head a scale; f16
            keeps 11 bits of each number (and 65504 of what is larger), bf16 8 bits, in the same
            memory; f32 all in twice as much. int8 has a scale like int16 and takes half: faster
            at depth, and not as near.
        activation_bits: how finely activations are rounded where they meet block codecs. 15 keeps
            the logits as good as exact; 8 halves the integer products, which prefill feels. With 8
            those that meet bf16 weights become bf16 if the processor multiplies it (docs/isa.md).
        tier: an instruction-set tier of `isa.available_tiers()`; the one in use by default.
        lock: pin the weights in RAM, whether mapped or packed.
        progress: told how far packing (and locking) is.

    Attributes:
        config, block_size, num_blocks: what the protocol asks for.
        weight_bytes: bytes of all panels; `mapped_bytes` of them are read in the file.
        kv_bytes, scratch_bytes: memory beside them.

    Raises:
        MissingPackageError: this installation has no compiled kernels.
        UserError: an argument is out of range.
        MemoryBudgetError: what must be in memory does not fit into what is free: packed weights,
            KV blocks, scratch, and mapped weights if they are to be locked.
        MachineError: this process may not lock so much memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        num_blocks: int,
        block_size: int = 32,
        threads: int | None = None,
        memory_budget: int | None = None,
        plain: Plain | None = None,
        kv: KvType = DEFAULT_KV,
        activation_bits: Literal[8, 15] = 15,
        tier: str | None = None,
        lock: bool = False,
        progress: Progress = silent,
    ) -> None:
        config = checkpoint.config
        native = isa.native()
        check_at_least("num_blocks", num_blocks, 1)
        check_at_least("block_size", block_size, 1)
        if block_size % POSITIONS_TOGETHER:
            raise UserError(
                "block_size does not suit the native runner",
                got=block_size,
                expected=f"a multiple of {POSITIONS_TOGETHER}",
            )
        if memory_budget is not None:
            check_at_least("memory_budget", memory_budget, 0)
        kv_bytes_per_token(config, kv)  # refuses what there is not
        if activation_bits not in (8, 15):
            raise UserError(
                "the native runner has no such activations", got=activation_bits, expected="8 or 15"
            )
        if num_blocks > 2**31 - 1:
            raise UserError("num_blocks is out of range", got=num_blocks, expected="32 bits")
        self.config, self.block_size, self.num_blocks = config, block_size, num_blocks
        self.kv: KvType = kv
        self._inverse_F = inverse_frequencies(config.head_dim, config.rope_theta)
        self._moe_layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        self.pool = ops.thread_pool(threads)
        self.tier = tier or isa.tier()
        packing = plan_packing(checkpoint, plain=plain)
        self._model: Any = native.Model(
            self.pool, self.tier, _numbers(config, planes=1 if activation_bits == 8 else 2)
        )
        for matrix in packing.matrices:
            self._model.matrix(matrix.name, ops.codec_number(matrix.codec), *matrix.tensor.shape)
        for name, values in packing.vectors.items():
            self._model.vector(name, values)
        positions = min(config.max_position_embeddings, num_blocks * block_size)
        try:
            scratch = self._model.plan(
                _KV_TYPES[kv], num_blocks, block_size, PIECE_TOKENS, positions
            )
        except ValueError as error:
            raise TensorsError(
                f"the checkpoint's tensors do not make its model: {error}",
                remedy="open it with earnest.checkpoint.open_checkpoint, which lists all problems",
            ) from error
        self.weight_bytes, self.mapped_bytes = packing.nbytes, packing.mapped_bytes
        self.kv_bytes: int = self._model.kv_bytes
        self.scratch_bytes: int = scratch
        self._check_memory(packing, memory_budget, lock)
        if packing.packed_bytes > _WORTH_PACKING:
            logger.warning(
                f"packing {packing.packed_bytes / 2**30:.1f} GiB of weights into memory; to open "
                f"this model instantly from now on: earnest pack {checkpoint.path} PACKED"
            )
        for notice in (packing.notice, memory.too_large(self.mapped_bytes, self._memory(packing))):
            if notice:
                logger.warning(notice)
        placed, made = packing.place(self.pool.workers, checkpoint.forgetter(), progress)
        for name, panels in placed.items():
            self._model.place(name, panels)
        mapped = [placed[matrix.name] for matrix in packing.matrices if matrix.is_mapped]
        if lock:
            memory.lock([*mapped, made], progress)
        # Zeros, since attention multiplies the padding of narrow heads.
        self.cache: Bytes = memory.zeros(self.kv_bytes)
        self._model.use(np.empty(scratch + 64, np.uint8), self.cache)

    def step(
        self,
        batch: Batch,
        routing: list[Routing] | None = None,
        hidden: Float32 | None = None,
    ) -> Float32:
        """Run the batch, store its keys and values, return logits float32 `[R, vocab_size]`.

        Ctrl-C ends it between two layers; what the batch has stored by then is incomplete.

        Args:
            batch: the new tokens; every position below a token's own must have been stored by an
                earlier step or by this one.
            routing: a list that receives one `Routing` per MoE layer, in order; None to skip.
            hidden: float32 `[H, hidden_size]`, which receives the last layer's output, after the
                final norm, of the `hidden_rows`; None if there are none.

        Raises:
            PromptError: a token id is outside the vocabulary, or a position outside the context.
            UserError: the batch contradicts itself or the KV blocks; nothing has been stored.
        """
        check_batch(batch, self.config, self.block_size, self.num_blocks, hidden)
        if hidden is None:
            hidden = np.empty((0, self.config.hidden_size), np.float32)
        T, R = len(batch.tokens), len(batch.logits_rows)
        cos_TF, sin_TF = rotations(batch.positions, self._inverse_F)
        logits_RV = np.empty((R, self.config.vocab_size), np.float32)
        experts = weights = None
        if routing is not None and self._moe_layers:
            shape = (len(self._moe_layers), T, self.config.moe_k)
            experts, weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        self._model.step(
            np.ascontiguousarray(batch.tokens, np.int32),
            np.ascontiguousarray(batch.positions, np.int32),
            np.ascontiguousarray(batch.sequence_starts, np.int32),
            np.ascontiguousarray(batch.block_tables, np.int32),
            np.ascontiguousarray(batch.logits_rows, np.int32),
            np.ascontiguousarray(batch.hidden_rows, np.int32),
            cos_TF,
            sin_TF,
            logits_RV,
            hidden,
            experts,
            weights,
        )
        if routing is not None and experts is not None and weights is not None:
            for index, layer in enumerate(self._moe_layers):
                routing.append(Routing(layer, experts[index], weights[index]))
        return logits_RV

    def _memory(self, packing: Packing) -> int:
        """Bytes that are taken beside mapped weights."""
        return packing.packed_bytes + self.kv_bytes + self.scratch_bytes

    def _check_memory(self, packing: Packing, budget: int | None, lock: bool) -> None:
        free = env.free_memory()
        locked = packing.mapped_bytes if lock else 0
        fits = self._memory(packing) + locked <= free
        if fits and (budget is None or packing.packed_bytes <= budget):
            return
        gib = 2**30
        remedies = [
            f"ask for a shorter context (a block of {self.block_size} positions takes "
            f"{self.kv_bytes // self.num_blocks:,} bytes)",
            "quantise the weights",
        ]
        if packing.packed_bytes:
            remedies.append("or earnest pack them: a packed file is mapped and takes no memory")
        if locked:
            remedies.append("or do not lock them")
        raise MemoryBudgetError(
            "the model does not fit into memory",
            got=f"{(packing.packed_bytes + locked) / gib:.2f} GiB of weights, "
            f"{self.kv_bytes / gib:.2f} GiB of keys and values "
            f"({self.num_blocks * self.block_size:,} positions), "
            f"{self.scratch_bytes / gib:.2f} GiB of scratch",
            expected=f"{free / gib:.2f} GiB are free"
            + ("" if budget is None else f", weights may take {budget / gib:.2f} GiB"),
            remedy=", ".join(remedies),
        )


def _numbers(config: ErnieConfig, planes: int) -> dict[str, int | float]:
    fields = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "moe_k",
        "moe_norm_min",
        "rms_norm_eps",
    )
    return {name: getattr(config, name) for name in fields} | {"planes": planes}
