"""Which runner runs a model: the compiled one where it is installed, unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from earnest.checkpoint import Checkpoint
from earnest.config import Accounting, ErnieConfig
from earnest.errors import UserError
from earnest.log import Progress, silent
from earnest.runners.native import isa
from earnest.runners.native.runner import (
    DEFAULT_KV,
    KvType,
    NativeRunner,
    kv_bytes_per_token,
)
from earnest.runners.reference import ReferenceRunner

RunnerName = Literal["auto", "native", "reference"]


@dataclass(frozen=True, kw_only=True)
class RunnerChoice:
    """A runner and its options, checked before anything is opened.

    Args:
        runner: "native", the compiled kernels; "reference", numpy, the specification; "auto",
            native where it is installed, else the reference and a warning.
        threads, kv, activation_bits, lock: of the native runner; None and False are its own
            defaults. The reference has no such choices: its keys and values are float32.

    Attributes:
        native: whether it is the native runner.

    Raises:
        UserError: there is no such runner, or it has no such option.
    """

    runner: RunnerName = "auto"
    threads: int | None = None
    kv: KvType | None = None
    activation_bits: Literal[8, 15] | None = None
    lock: bool = False
    native: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.runner not in ("auto", "native", "reference"):
            raise UserError(
                "there is no such runner", got=self.runner, expected="auto, native or reference"
            )
        options = (self.threads, self.kv, self.activation_bits, self.lock or None)
        if self.runner == "reference" and any(option is not None for option in options):
            raise UserError(
                "threads, kv, activation_bits and lock are options of the native runner",
                got="runner reference",
                remedy="leave them out, or use the native runner",
            )
        native = self.runner == "native" or (
            self.runner == "auto" and not isa.warn_without_kernels()
        )
        object.__setattr__(self, "native", native)

    def kv_bytes_per_token(self, config: ErnieConfig) -> int:
        """Bytes of keys and values of a token in all layers.

        Raises:
            UserError: there is no such type of keys and values.
        """
        if self.native:
            return kv_bytes_per_token(config, self.kv or DEFAULT_KV)
        return Accounting(config).kv_bytes_per_token(4)

    def open(
        self,
        checkpoint: Checkpoint,
        *,
        num_blocks: int,
        block_size: int,
        memory_budget: int | None = None,
        progress: Progress = silent,
    ) -> NativeRunner | ReferenceRunner:
        """The runner, its weights ready.

        Args:
            checkpoint: the model.
            num_blocks, block_size: KV blocks, and positions in each.
            memory_budget: bytes that decoded weights may take with the reference runner.
            progress: told how far packing is.

        Raises:
            MissingPackageError, MemoryBudgetError, MachineError, UserError: see `NativeRunner`.
        """
        if not self.native:
            return ReferenceRunner(
                checkpoint,
                num_blocks=num_blocks,
                block_size=block_size,
                memory_budget=memory_budget,
            )
        return NativeRunner(
            checkpoint,
            num_blocks=num_blocks,
            block_size=block_size,
            threads=self.threads,
            kv=DEFAULT_KV if self.kv is None else self.kv,
            activation_bits=15 if self.activation_bits is None else self.activation_bits,
            lock=self.lock,
            progress=progress,
        )
