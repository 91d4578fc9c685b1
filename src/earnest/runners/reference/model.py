"""The forward pass of ERNIE 4.5 in numpy: the specification that every faster runner answers to.

Read it top to bottom: the parts (norm, rotation, attention, router) are plain functions, `Model`
puts them together. Activations are float32 throughout and every sum accumulates in float32; weights
are used as stored, widened exactly (`weights.py`). That is what `transformers` computes when the
same checkpoint is loaded in float32. Where torch and numpy could differ by more than the order of
a sum, the comment says what was chosen and why.

The multi-token-prediction block is not run: it predicts a second token ahead and does not change
the logits of the next one. `transformers` drops it too.

Shape suffixes, one letter a dimension:
    T  tokens of the batch              D  hidden size
    H  query heads                      C  channels of a head (`head_dim`)
    K  key/value heads                  F  rotary frequencies, C / 2
    G  query heads per key/value head   I  inner width of a feed-forward block
    P  positions 0 .. newest of one     E  routed experts
       sequence                         A  active experts per token (`moe_k`)
    Q  queries of one chunk             V  vocabulary
    R  rows of T whose logits are asked N, M  any width in, any width out
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from earnest.config import ErnieConfig
from earnest.runners.base import Batch, Float32, Routing
from earnest.runners.reference.weights import Weights

Slots = npt.NDArray[np.int64]

# Attention scores held at one time, in float32 numbers (256 MiB).
MAX_SCORES = 2**26


@dataclass(frozen=True)
class Arithmetic:
    """The three choices that other implementations of this model get wrong, for diagnosis.

    The defaults are the model's. `verify` makes each mistake on purpose to see whether a
    checkpoint that looks broken was written for it.

    Attributes:
        rope: which channels form a rotary pair: neighbours `(2i, 2i + 1)`, or halves
            `(i, i + C / 2)` as in Llama's Hugging Face layout.
        swap_gate_up: exchange the gate and the up projection of every SwiGLU.
        use_correction_bias: add `e_score_correction_bias` when experts are selected.
    """

    rope: Literal["interleaved", "half-split"] = "interleaved"
    swap_gate_up: bool = False
    use_correction_bias: bool = True


def rms_norm(x_TD: Float32, weight_D: Float32, eps: float) -> Float32:
    """Root-mean-square norm (Zhang and Sennrich 2019): `w * x / sqrt(mean(x^2) + eps)`.

    The order matters below float32: normalise in float32, cast to the activations' dtype, and only
    then multiply with the weight (which is stored in that dtype). Here all of it is float32.
    """
    variance_T1 = np.mean(x_TD * x_TD, axis=-1, keepdims=True)
    normed_TD: Float32 = x_TD * (np.float32(1) / np.sqrt(variance_T1 + np.float32(eps)))
    return weight_D * normed_TD


def inverse_frequencies(head_dim: int, theta: float) -> Float32:
    """Angle per position of each rotary pair, `theta^(-2i / C)`, float32 `[F]`.

    Rounded as torch rounds it, `1 / float32(theta ** float32(2i / C))`: one unit in the last place
    here is up to 0.008 radians at position 131,071. numpy's own float32 power is less accurate than
    torch's, hence the power in float64 and a single rounding of it.
    """
    exponent_F = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power_F = np.power(np.float64(theta), exponent_F.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power_F


def rotations(positions_T: npt.NDArray[np.integer], inverse_F: Float32) -> tuple[Float32, Float32]:
    """Cosine and sine of every position's rotary angles, float32 `[T, F]` each.

    The angle is a float32 product, as in torch; its cosine is correctly rounded (by way of
    float64), since the float32 routines of some platforms lose accuracy at angles this large.
    """
    angle_TF = positions_T.astype(np.float32)[:, None] * inverse_F
    wide_TF = angle_TF.astype(np.float64)
    return np.cos(wide_TF).astype(np.float32), np.sin(wide_TF).astype(np.float32)


def rotate(
    x_THC: Float32,
    cos_TF: Float32,
    sin_TF: Float32,
    pairing: Literal["interleaved", "half-split"] = "interleaved",
) -> Float32:
    """Rotary position embedding (Su et al. 2021): turn each channel pair by its angle.

    ERNIE pairs neighbouring channels, `(x[2i], x[2i + 1])`, in every published layout.
    """
    half = x_THC.shape[-1] // 2
    if pairing == "interleaved":
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, half), slice(half, None)
    a, b = x_THC[..., first], x_THC[..., second]
    cos, sin = cos_TF[:, None, :], sin_TF[:, None, :]
    turned = np.empty_like(x_THC)
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned


def softmax(x: Float32) -> Float32:
    """Softmax along the last axis, in place, shifted by the maximum so that nothing overflows."""
    x -= np.max(x, axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= np.sum(x, axis=-1, keepdims=True)
    return x


def attend(q_THC: Float32, k_KPC: Float32, v_KPC: Float32) -> Float32:
    """Causal grouped-query attention of one sequence, float32 `[T, H, C]`.

    The queries are the last T of the P positions; query head h reads key/value head `h // G`. Long
    sequences go in chunks of queries, so that no more than `MAX_SCORES` scores exist at a time (or
    those of one query), and a chunk only looks at the positions it may see.
    """
    T, H, C = q_THC.shape
    K, P, _ = k_KPC.shape
    G = H // K
    scale = np.float32(C**-0.5)
    out_THC = np.empty_like(q_THC)
    rows = max(1, MAX_SCORES // (H * P))
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        Q, seen = stop - start, P - T + stop
        q_KGQC = q_THC[start:stop].reshape(Q, K, G, C).transpose(1, 2, 0, 3)
        keys_KCP = k_KPC[:, :seen].transpose(0, 2, 1)
        scores_KGQP = (q_KGQC.reshape(K, G * Q, C) @ keys_KCP).reshape(K, G, Q, seen)
        scores_KGQP *= scale
        future_QP = np.arange(seen) > np.arange(seen - Q, seen)[:, None]
        np.copyto(scores_KGQP, -np.inf, where=future_QP)
        mix_KGQP = softmax(scores_KGQP)
        out_KGQC = (mix_KGQP.reshape(K, G * Q, seen) @ v_KPC[:, :seen]).reshape(K, G, Q, C)
        out_THC[start:stop] = out_KGQC.transpose(2, 0, 1, 3).reshape(Q, H, C)
    return out_THC


def route(
    logits_TE: Float32, bias_E: Float32 | None, active: int, norm_min: float
) -> tuple[npt.NDArray[np.int64], Float32]:
    """Choose `active` experts per token: `(experts [T, A], weights [T, A])`, best score first.

    The correction bias is added to the probability (not to the logit) and decides the selection
    only; what an expert's output is multiplied with is its own probability, renormalised over the
    chosen ones. torch leaves the order of equal scores open; here the lower expert id wins.
    """
    probability_TE = softmax(logits_TE)
    score_TE = probability_TE if bias_E is None else probability_TE + bias_E
    experts_TA = np.argsort(-score_TE, axis=-1, kind="stable")[:, :active]
    return experts_TA, expert_weights(probability_TE, experts_TA, norm_min)


def expert_weights(
    probability_TE: Float32, experts_TA: npt.NDArray[np.integer], norm_min: float
) -> Float32:
    """What the outputs of the chosen experts are multiplied with, float32 `[T, A]`."""
    weights_TA = np.take_along_axis(probability_TE, experts_TA, axis=-1)
    weights_TA /= np.maximum(np.sum(weights_TA, axis=-1, keepdims=True), np.float32(norm_min))
    return weights_TA


class KVCache:
    """Keys (after rotation) and values of past tokens, paged.

    Attributes:
        block_size: positions per block.
        keys: float32 `[layers, K, num_blocks * block_size, C]`; position p of a sequence lies in
            slot `block_table[p // block_size] * block_size + p % block_size`.
        values: the same for values.
    """

    def __init__(
        self, config: ErnieConfig, *, num_layers: int, num_blocks: int, block_size: int
    ) -> None:
        self.block_size = block_size
        shape = (num_layers, config.num_key_value_heads, num_blocks * block_size, config.head_dim)
        # Zero pages are only promised by the operating system; memory is taken when written to.
        self.keys: Float32 = np.zeros(shape, np.float32)
        self.values: Float32 = np.zeros(shape, np.float32)

    def slots(self, block_table: npt.NDArray[np.integer], length: int) -> Slots:
        """Slots of positions 0 .. `length` - 1 of a sequence, int64 `[length]`."""
        position_P = np.arange(length)
        block_P = block_table[position_P // self.block_size].astype(np.int64)
        return block_P * self.block_size + position_P % self.block_size

    def store(self, layer: int, slots_T: Slots, k_TKC: Float32, v_TKC: Float32) -> None:
        """Write the keys and values of new tokens."""
        self.keys[layer][:, slots_T] = k_TKC.transpose(1, 0, 2)
        self.values[layer][:, slots_T] = v_TKC.transpose(1, 0, 2)

    def load(self, layer: int, slots_P: Slots) -> tuple[Float32, Float32]:
        """Copy the keys and values of a sequence, float32 `[K, P, C]` each."""
        return (
            np.take(self.keys[layer], slots_P, axis=1),
            np.take(self.values[layer], slots_P, axis=1),
        )


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of a batch.

    Attributes:
        rotations: cosine and sine of the tokens' rotary angles, float32 `[T, F]` each.
        new_slots: the KV slot of each token.
        sequences: per sequence that brings tokens, its rows of T and the slots of its P positions.
    """

    rotations: tuple[Float32, Float32]
    new_slots: Slots
    sequences: list[tuple[slice, Slots]]


@dataclass(frozen=True)
class Model:
    """The decoder.

    Attributes:
        config: its numbers.
        weights: its tensors, by canonical name.
        num_layers: how many of its layers are run, from the first.
        arithmetic: deliberate mistakes, for diagnosis; none by default.
    """

    config: ErnieConfig
    weights: Weights
    num_layers: int
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    def run(
        self, batch: Batch, cache: KVCache, routing: list[Routing] | None = None
    ) -> tuple[Float32, Float32]:
        """Run a valid batch, store its keys and values, return logits float32 `[R, V]` and the
        hidden states that were asked for, float32 `[H, D]`."""
        for x_TD in self.hidden_states(batch, cache, routing):
            last_TD = x_TD
        return self.head(last_TD[batch.logits_rows]), self.normed(last_TD[batch.hidden_rows])

    def hidden_states(
        self, batch: Batch, cache: KVCache, routing: list[Routing] | None = None
    ) -> Iterator[Float32]:
        """Yield the residual stream float32 `[T, D]`: the embeddings, then after each layer."""
        x_TD = self.weights.rows("model.embed_tokens.weight", batch.tokens)
        yield x_TD
        step = self._plan(batch, cache)
        eps = self.config.rms_norm_eps
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            norm_D = self.weights.vector(f"{prefix}.input_layernorm.weight")
            x_TD = x_TD + self.attention(layer, rms_norm(x_TD, norm_D, eps), step, cache)
            norm_D = self.weights.vector(f"{prefix}.post_attention_layernorm.weight")
            normed_TD = rms_norm(x_TD, norm_D, eps)
            if self.config.is_moe_layer(layer):
                x_TD = x_TD + self.mixture(layer, normed_TD, routing)
            else:
                x_TD = x_TD + self.swiglu(f"{prefix}.mlp", normed_TD)
            yield x_TD

    def normed(self, x_RD: Float32) -> Float32:
        """Final norm, float32 `[R, D]`."""
        norm_D = self.weights.vector("model.norm.weight")
        return rms_norm(x_RD, norm_D, self.config.rms_norm_eps)

    def head(self, x_RD: Float32) -> Float32:
        """Final norm and output projection, float32 `[R, V]`; tied models reuse the embeddings."""
        x_RD = self.normed(x_RD)
        tied = self.config.tie_word_embeddings
        logits_RV = self.weights.matmul(
            x_RD, "model.embed_tokens.weight" if tied else "lm_head.weight"
        )
        if "lm_head.bias" in self.weights:  # with `use_bias`, and then of MoE models only
            logits_RV += self.weights.vector("lm_head.bias")
        return logits_RV

    def attention(self, layer: int, x_TD: Float32, step: Step, cache: KVCache) -> Float32:
        """Self-attention of one layer, float32 `[T, D]`. Keys are cached after their rotation."""
        T, C = len(x_TD), self.config.head_dim
        prefix = f"model.layers.{layer}.self_attn"
        q_THC = self.linear(f"{prefix}.q_proj", x_TD).reshape(T, -1, C)
        k_TKC = self.linear(f"{prefix}.k_proj", x_TD).reshape(T, -1, C)
        v_TKC = self.linear(f"{prefix}.v_proj", x_TD).reshape(T, -1, C)
        q_THC = rotate(q_THC, *step.rotations, self.arithmetic.rope)
        k_TKC = rotate(k_TKC, *step.rotations, self.arithmetic.rope)
        cache.store(layer, step.new_slots, k_TKC, v_TKC)
        out_THC = np.empty_like(q_THC)
        for rows, slots_P in step.sequences:
            out_THC[rows] = attend(q_THC[rows], *cache.load(layer, slots_P))
        return self.linear(f"{prefix}.o_proj", out_THC.reshape(T, -1))

    def router(self, layer: int, x_TD: Float32) -> tuple[Float32, Float32 | None]:
        """The router's logits float32 `[T, E]` and its correction bias float32 `[E]`, if any."""
        prefix = f"model.layers.{layer}.mlp"
        bias_E = None
        if self.arithmetic.use_correction_bias:
            bias_E = self.weights.vector(f"{prefix}.moe_statics.e_score_correction_bias")
        return self.weights.matmul(x_TD, f"{prefix}.gate.weight"), bias_E

    def choose(
        self, layer: int, logits_TE: Float32, bias_E: Float32 | None
    ) -> tuple[npt.NDArray[np.int64], Float32]:
        """Which experts of a layer act, and with which weights: see `route`."""
        return route(logits_TE, bias_E, self.config.moe_k, self.config.moe_norm_min)

    def mixture(self, layer: int, x_TD: Float32, routing: list[Routing] | None = None) -> Float32:
        """Routed experts plus the shared ones, float32 `[T, D]`.

        Tokens are grouped by expert, so that each expert in use is read once per step. Shared
        experts are stored fused as one wide SwiGLU that sees every token with weight 1.
        """
        prefix = f"model.layers.{layer}.mlp"
        experts_TA, weights_TA = self.choose(layer, *self.router(layer, x_TD))
        if routing is not None:
            routing.append(Routing(layer, experts_TA.astype(np.int32), weights_TA))
        y_TD = np.zeros_like(x_TD)
        for expert in np.unique(experts_TA):
            rows, place = np.nonzero(experts_TA == expert)
            out = self.swiglu(f"{prefix}.experts.{expert}", x_TD[rows], biased=False)
            y_TD[rows] += weights_TA[rows, place, None] * out
        if self.config.moe_num_shared_experts:
            y_TD += self.swiglu(f"{prefix}.shared_experts", x_TD)
        return y_TD

    def swiglu(self, prefix: str, x_TD: Float32, *, biased: bool = True) -> Float32:
        """Feed-forward block `down(silu(gate(x)) * up(x))` (Shazeer 2020), float32 `[T, D]`."""
        gate, up = "gate_proj", "up_proj"
        if self.arithmetic.swap_gate_up:
            gate, up = up, gate
        gate_TI = self.linear(f"{prefix}.{gate}", x_TD, biased=biased)
        with np.errstate(over="ignore"):  # exp(-x) of a very negative x is inf, and x / inf is 0
            gate_TI /= np.float32(1) + np.exp(-gate_TI)
        gate_TI *= self.linear(f"{prefix}.{up}", x_TD, biased=biased)
        return self.linear(f"{prefix}.down_proj", gate_TI, biased=biased)

    def linear(self, name: str, x_TN: Float32, *, biased: bool = True) -> Float32:
        """`x W^T`, plus the bias if the model has them. Routed experts and the router never do."""
        y_TM = self.weights.matmul(x_TN, f"{name}.weight")
        if biased and self.config.use_bias:
            y_TM += self.weights.vector(f"{name}.bias")
        return y_TM

    def _plan(self, batch: Batch, cache: KVCache) -> Step:
        inverse_F = inverse_frequencies(self.config.head_dim, self.config.rope_theta)
        sequences, new = [], []
        for (start, stop), table in zip(
            pairwise(batch.sequence_starts.tolist()), batch.block_tables, strict=True
        ):
            if start == stop:
                continue
            slots_P = cache.slots(table, int(batch.positions[stop - 1]) + 1)
            sequences.append((slice(start, stop), slots_P))
            new.append(slots_P[start - stop :])
        return Step(rotations(batch.positions, inverse_F), np.concatenate(new), sequences)
