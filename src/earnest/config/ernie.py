"""`ErnieConfig`: the numbers of an ERNIE 4.5 text model, dense or mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from earnest.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ErnieConfig:
    """Everything the arithmetic of a text model depends on, under the field's usual names.

    A dense model has `moe_num_experts == 0`; then every other `moe_*` field is inert. Sizes are in
    elements. `moe_layer_end_index` is inclusive; -1 is resolved to the last layer when the object
    is made. `eos_token_ids` holds all end-of-text ids the configuration names.

    Raises:
        ConfigError: fields contradict each other or are out of range; all problems are listed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    tie_word_embeddings: bool = True
    use_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 0
    dtype: str = "bfloat16"
    initializer_range: float = 0.02
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = -1
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        if self.moe_layer_end_index == -1:
            object.__setattr__(self, "moe_layer_end_index", self.num_hidden_layers - 1)
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        problems = list(self._problems())
        if problems:
            raise ConfigError(
                "the configuration is inconsistent: " + "; ".join(problems),
                remedy="compare it with the config.json the model was published with",
            )

    def _problems(self) -> list[str]:
        # The upper bounds keep products of sizes far inside 64 bits, so that a hostile file cannot
        # ask for absurd allocations; the largest published member is 8 to 80 times smaller.
        bounds = {
            "vocab_size": 2**24,
            "hidden_size": 2**18,
            "intermediate_size": 2**20,
            "num_hidden_layers": 4096,
            "num_attention_heads": 2**14,
            "num_key_value_heads": 2**14,
            "head_dim": 2**14,
            "max_position_embeddings": 2**30,
        }
        if self.is_moe:
            bounds |= {
                "moe_num_experts": 2**14,
                "moe_k": 2**10,
                "moe_intermediate_size": 2**20,
                "moe_layer_interval": 4096,
            }
        found = [
            f"{name} must be between 1 and {limit:,}, got {getattr(self, name)!r}"
            for name, limit in bounds.items()
            if not 1 <= getattr(self, name) <= limit
        ]
        if self.moe_num_experts < 0:
            found.append(f"moe_num_experts must not be negative, got {self.moe_num_experts}")
        if found:
            return found
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            found.append(f"head_dim must be even for rotary pairs, got {self.head_dim}")
        if not 0 < self.rope_theta < float("inf"):
            found.append(f"rope_theta must be positive and finite, got {self.rope_theta}")
        if not 0 <= self.rms_norm_eps < 1:
            found.append(f"rms_norm_eps must be in [0, 1), got {self.rms_norm_eps}")
        if not 0 <= self.num_nextn_predict_layers <= 64:
            found.append(f"num_nextn_predict_layers out of range: {self.num_nextn_predict_layers}")
        if self.is_moe:
            if self.moe_k > self.moe_num_experts:
                found.append(f"moe_k ({self.moe_k}) exceeds moe_num_experts")
            if not 0 <= self.moe_num_shared_experts <= 1024:
                found.append(f"moe_num_shared_experts out of range: {self.moe_num_shared_experts}")
            if self.moe_layer_start_index < 0 or self.moe_layer_end_index < 0:
                found.append("moe_layer_start_index and moe_layer_end_index must not be negative")
            if not 0 <= self.moe_norm_min < 1:
                found.append(f"moe_norm_min must be in [0, 1), got {self.moe_norm_min}")
        return found

    @property
    def is_moe(self) -> bool:
        """Whether the model has routed experts at all."""
        return self.moe_num_experts > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts (else a dense feed-forward block)."""
        return (
            self.is_moe
            and (layer + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        )

    @property
    def q_size(self) -> int:
        """Width of all query heads together; differs from `hidden_size` in the 0.3B model."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are stored fused as one; 0 where there are none."""
        return self.moe_num_shared_experts * self.moe_intermediate_size
