"""Counting: parameters by part, active parameters, floating-point operations, bytes.

The single source of these numbers: planner, engine, `inspect` and reports ask here. Everything is
exact integer arithmetic on the shapes; nothing is opened.

Conventions. A *part* is what a tensor belongs to, as in the checkpoint's name table; the biases of
linear layers (published members have none) count to the part of their weight. The main model and
its multi-token-prediction (MTP) blocks are counted apart, since inference without speculation
never touches the latter. *Active* is what one token multiplies: all but the experts it was not
sent to, and but the correction bias, which only selects. A floating-point operation is one
multiplication or one addition, so a matrix of n weights costs 2 n per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from earnest.config.ernie import ErnieConfig
from earnest.errors import UserError

# Published checkpoints keep these in float32 whatever the rest is stored in.
FP32_PARTS = ("router", "correction_bias")


@dataclass(frozen=True)
class Accounting:
    """What a model of this configuration holds and costs."""

    config: ErnieConfig

    @cached_property
    def parts(self) -> dict[str, int]:
        """Parameters by part, without MTP; parts that the model does not have are 0."""
        c = self.config
        moe_layers = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
        dense_layers = c.num_hidden_layers - moe_layers
        # transformers gives the head of a MoE model a bias where `use_bias`, that of a dense one
        # never; a tied head has no weight of its own but keeps the bias.
        head_bias = c.vocab_size * (c.use_bias and c.is_moe)
        head_weight = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
        expert = 3 * c.hidden_size * c.moe_intermediate_size
        return {
            "embedding": c.vocab_size * c.hidden_size,
            "attention": c.num_hidden_layers * self._attention,
            "dense_ffn": dense_layers * self._swiglu(c.intermediate_size),
            "routed_experts": moe_layers * c.moe_num_experts * expert,
            "shared_experts": moe_layers * self._swiglu(c.shared_intermediate_size)
            if c.moe_num_shared_experts
            else 0,
            "router": moe_layers * c.moe_num_experts * c.hidden_size,
            "correction_bias": moe_layers * c.moe_num_experts,
            "norms": (2 * c.num_hidden_layers + 1) * c.hidden_size,
            "lm_head": head_weight + head_bias,
        }

    @property
    def total(self) -> int:
        """Parameters of the main model, without MTP."""
        return sum(self.parts.values())

    @property
    def mtp(self) -> int:
        """Parameters of the MTP blocks: per depth a dense decoder layer, two norms of its inputs
        and the projection of both, `[H, 2H]`."""
        c = self.config
        block = self._attention + self._swiglu(c.intermediate_size) + 2 * c.hidden_size
        return c.num_nextn_predict_layers * (block + 2 * c.hidden_size + 2 * c.hidden_size**2)

    @property
    def active(self) -> int:
        """Parameters that take part in one token of the main model, the embedding matrix
        included (once where it is also the head, twice where the head is separate)."""
        return self.total - self._idle

    @property
    def active_without_embedding(self) -> int:
        """`active` without the embedding matrix and the head: the number in a model's name."""
        return self.active - self.parts["embedding"] - self.parts["lm_head"]

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations of one token that attends to `context` tokens, itself
        included: 2 per active weight of a matrix (the head too, tied or not; the embedding is a
        look-up), plus 4 per channel of the query heads and attended token for the scores and the
        weighted sum of the values. Norms, rotations, softmax and biases are left out: they are
        below a thousandth.
        """
        c = self.config
        moe_layers = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
        per_layer = 2 * c.hidden_size * (c.q_size + c.kv_size)
        weights = (
            c.num_hidden_layers * per_layer
            + (c.num_hidden_layers - moe_layers) * 3 * c.hidden_size * c.intermediate_size
            + moe_layers
            * c.hidden_size
            * (
                c.moe_num_experts
                + 3 * c.moe_k * c.moe_intermediate_size
                + 3 * c.shared_intermediate_size
            )
            + c.vocab_size * c.hidden_size
        )
        return 2 * weights + 4 * c.num_hidden_layers * c.q_size * context

    def kv_bytes_per_token(self, element_bytes: float = 2) -> int:
        """Bytes of keys and values that one token leaves in the cache, all layers together.

        Args:
            element_bytes: bytes of one stored number; block formats have fractions.
        """
        elements = 2 * self.config.num_hidden_layers * self.config.kv_size
        return ceil(elements * element_bytes)

    def uniform(self, bits: float) -> dict[str, float]:
        """Bits per weight by part (and "mtp") for a model stored in one type: `bits` everywhere,
        32 where published files keep float32. Override parts with `|`."""
        return {part: 32 if part in FP32_PARTS else bits for part in (*self.parts, "mtp")}

    def weight_bytes(self, bits: float | Mapping[str, float], *, mtp: bool = False) -> int:
        """Bytes of the weights.

        Args:
            bits: bits per weight, block scales included: one number as in `uniform`, or one per
                part.
            mtp: whether the MTP blocks are kept.

        Raises:
            UserError: `bits` lacks a part that the model has, or names one that no model has.
        """
        by_part = dict(bits) if isinstance(bits, Mapping) else self.uniform(bits)
        counts = self.parts | {"mtp": self.mtp if mtp else 0}
        unknown = sorted(by_part.keys() - counts.keys())
        missing = sorted(part for part, n in counts.items() if n and part not in by_part)
        if unknown or missing:
            raise UserError(
                "bits per weight do not fit the model's parts",
                got=", ".join([*(f"unknown {p}" for p in unknown), *(f"no {p}" for p in missing)]),
                expected=", ".join(counts),
            )
        return sum(ceil(n * by_part[part] / 8) for part, n in counts.items() if n)

    @property
    def _attention(self) -> int:
        """Parameters of one layer's attention."""
        c = self.config
        weights = 2 * c.hidden_size * (c.q_size + c.kv_size)
        return weights + c.use_bias * (c.q_size + 2 * c.kv_size + c.hidden_size)

    def _swiglu(self, width: int) -> int:
        """Parameters of one gated feed-forward block; routed experts never have biases."""
        c = self.config
        return 3 * c.hidden_size * width + c.use_bias * (2 * width + c.hidden_size)

    @property
    def _idle(self) -> int:
        c = self.config
        if not c.is_moe:
            return 0
        unchosen = self.parts["routed_experts"] // c.moe_num_experts * (c.moe_num_experts - c.moe_k)
        return unchosen + self.parts["correction_bias"]
