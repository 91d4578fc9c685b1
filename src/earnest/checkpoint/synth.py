"""`synth`: a Hugging Face folder of true shapes with random weights, for tests and benchmarks.

The weights are a pure function of (seed, canonical tensor name, position): they depend neither on
how files are split nor on the machine, and the first layers of a deep model are the weights of the
same model cut short. Each weight is one of 65,536 quantiles of the normal distribution, chosen by
16 bits of a Philox stream keyed by the name: numpy guarantees that raw stream for ever, which it
does not for its normal deviates, and one table look-up a weight is ten times faster besides.

Scales keep a signal of unit root mean square through the depth of the model: see `_scale`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import prod, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np

from earnest import codecs
from earnest.checkpoint.containers.base import PlannedTensor
from earnest.checkpoint.names import TensorSpec, stored, tensor_specs
from earnest.checkpoint.writer import WriteReport, write_checkpoint
from earnest.codecs.base import Codec, Float32, Raw
from earnest.config import ErnieConfig
from earnest.errors import UserError
from earnest.log import Progress, silent

DTYPES = ("bf16", "f16", "f32")

# Counts up when the same seed gives other weights than before; part of the resume fingerprint.
_GENERATION = 1

_BLOCK_WEIGHTS = 2**20  # a multiple of 4: each raw word of 64 bits gives four weights

# What one attention or feed-forward block adds to the residual stream, relative to its unit-RMS
# input. Not divided by the depth, so that a tensor does not depend on the number of layers: 28
# layers of two blocks add 56 * 0.2**2 = 2.2 to the mean square, 54 layers add 4.3. Neither hurts.
_RESIDUAL = 0.2

_NO_TOKENIZER = "no tokenizer was written: random weights have no vocabulary; run them on token ids"


def truncated(config: ErnieConfig, layers: int) -> ErnieConfig:
    """The same model cut to its first `layers` layers.

    Raises:
        UserError: `layers` is not between 1 and the number of layers.
    """
    if not 1 <= layers <= config.num_hidden_layers:
        raise UserError(
            f"cannot cut the model to {layers} layers",
            expected=f"between 1 and {config.num_hidden_layers}",
        )
    end = min(config.moe_layer_end_index, layers - 1)
    return replace(config, num_hidden_layers=layers, moe_layer_end_index=end)


def synth(
    destination: Path,
    config: ErnieConfig,
    *,
    seed: int,
    mtp: bool = False,
    dtype: str = "bf16",
    shard_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Progress = silent,
) -> WriteReport:
    """Write a folder in the layout of the published `-PT` checkpoints with random weights.

    Args:
        destination: the folder to make; it appears when it is complete, and an interrupted run is
            taken up again by the same call.
        config: the model's numbers.
        seed: the same seed gives the same bytes, on every machine.
        mtp: also write the multi-token-prediction block the configuration speaks of.
        dtype: "bf16", "f16" or "f32"; router weights and correction biases are always float32.
        shard_bytes: the largest file, unless a single tensor is larger.
        force: replace a destination that exists.
        progress: told about bytes written.

    Raises:
        UserError: the destination exists, an unknown dtype, `mtp` for a model that has none.
        DiskFullError, AccessError, MachineError: it cannot be written; nothing is at the
            destination.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    if mtp:
        require_mtp(config)
    config = replace(
        config,
        dtype={"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype],
        num_nextn_predict_layers=config.num_nextn_predict_layers if mtp else 0,
    )
    specs = {spec.name: spec for spec in tensor_specs(config, mtp)}
    plan = []
    for target in stored(config, "hf", mtp):
        ((name, _),) = target.parts
        spec = specs[name]
        codec = codecs.codec("f32" if spec.fp32 else dtype)
        plan.append(PlannedTensor(target.name, codec, target.shape, _stream(spec, codec, seed)))
    return write_checkpoint(
        destination,
        plan,
        config,
        layout="hf",
        fingerprint={"synth": _GENERATION, "seed": seed},
        shard_bytes=shard_bytes,
        force=force,
        progress=progress,
        notes=(_NO_TOKENIZER,),
    )


def require_mtp(config: ErnieConfig) -> None:
    """Refuse a configuration without a multi-token-prediction block.

    Raises:
        UserError: it has none.
    """
    if not config.num_nextn_predict_layers:
        raise UserError(
            "this configuration has no multi-token-prediction block",
            expected="num_nextn_predict_layers of at least 1",
            remedy="leave mtp out, or take a preset that has one, such as 21b-a3b",
        )


def _stream(spec: TensorSpec, codec: Codec, seed: int) -> Callable[[], Iterator[Raw]]:
    def blocks() -> Iterator[Raw]:
        return random_blocks(spec.name, spec.shape, codec, seed)

    return blocks


def random_blocks(name: str, shape: tuple[int, ...], codec: Codec, seed: int) -> Iterator[Raw]:
    """The stored weights of tensor `name` in row-major order, in flat blocks.

    `codec` must be plain and writable. The same arguments give the same bytes on every machine.
    """
    assert codec.encode is not None and codec.is_plain
    centre, spread = _scale(name, shape)
    table = codec.encode(np.float32(centre) + np.float32(spread) * _quantiles())
    digest = hashlib.sha256(f"earnest synth {seed} {name}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    for start in range(0, prod(shape), _BLOCK_WEIGHTS):
        weights = min(_BLOCK_WEIGHTS, prod(shape) - start)
        words = bits.random_raw(-(-weights // 4)).astype("<u8", copy=False)
        yield table.take(words.view("<u2")[:weights], mode="wrap")


@cache
def _quantiles() -> Float32:
    """The 65,536 equally likely values of a standard normal variable, ascending; ±4.32 at most.

    Rounded to multiples of 2**-16, so that the last bit of a machine's logarithm cannot matter.
    """
    normal, levels = NormalDist(), 2**16
    upper = [round(normal.inv_cdf((i + 0.5) / levels) * 2**16) for i in range(levels // 2, levels)]
    upper_array = np.array(upper, np.float32) / np.float32(2**16)
    values = np.concatenate([-upper_array[::-1], upper_array])
    values.flags.writeable = False
    return values


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the weights of a tensor, by what it does.

    - Norm weights: around 1, spread, so that leaving them out or swapping two shows.
    - Matrices with a unit-RMS input of n columns: 1/sqrt(n), so queries, keys, gates and router
      logits have unit variance: attention scores and expert probabilities are neither flat nor
      one-hot.
    - Matrices that write into the residual stream: that times `_RESIDUAL`.
    - Embedding and head: 2/sqrt(hidden), for logits with a standard deviation of about 2.
    - Correction bias: half the size of a mean probability 1/E. With unit-variance logits the
      probabilities of a token spread by about 1.3/E, so the bias changes some selections, not all.
    - Other biases: small.
    """
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.5 / shape[-1]
    if name.endswith(".bias"):
        return 0.0, 0.02
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.0, 2 / sqrt(shape[-1])
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        return 0.0, _RESIDUAL / sqrt(shape[-1])
    return 0.0, 1 / sqrt(shape[-1])
