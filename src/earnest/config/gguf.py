"""The configuration inside a GGUF file, as llama.cpp writes it.

Three architectures are ERNIE 4.5's arithmetic: `ernie4_5`, `ernie4_5-moe` and `llama` (the dense
model under another name: GGUF stores its query and key rows for interleaved rotary pairs). As with
config.json, keys of the architecture that are not known, or that ask for something else, are
refused by name. Keys outside its prefix (`general.`, `tokenizer.`, ...) describe other things.

What GGUF cannot say: the initialiser's range, the clamp of expert weights, a last MoE layer before
the last one, MTP blocks, whether the head is tied and whether there are biases (the tensors show).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sized
from typing import Any

from earnest.config.ernie import ErnieConfig
from earnest.config.keys import GGUF_HARMLESS, GGUF_NEUTRAL, refuse
from earnest.config.values import Values, as_integer, brief
from earnest.errors import ConfigError

ORIGIN = "the GGUF metadata"

ARCHITECTURES = ("ernie4_5", "ernie4_5-moe", "llama")

# general.file_type: what the bulk of the weights is stored in. Quantised files are given the type
# they were made from, which for this family is bfloat16.
_FILE_TYPES = {0: "float32", 1: "float16", 32: "bfloat16"}

# fmt: off
_READ = frozenset((
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "attention.scale", "vocab_size",
    "expert_count", "expert_used_count", "expert_feed_forward_length",
    "expert_shared_count", "expert_shared_feed_forward_length",
    "leading_dense_block_count", "interleave_moe_layer_step",
))
_REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.layer_norm_rms_epsilon",
)
_REQUIRED_MOE = (
    "expert_count", "expert_used_count", "expert_feed_forward_length",
    "leading_dense_block_count",
)
# fmt: on


def from_gguf(metadata: Mapping[str, Any], *, tied: bool, use_bias: bool = False) -> ErnieConfig:
    """Read the configuration out of a GGUF file's key-value pairs.

    Args:
        metadata: keys to Python (or numpy) values; arrays as anything that has a length.
        tied: whether the file lacks `output.weight`, so that the embedding is the head.
        use_bias: whether it has biases, for example `blk.0.attn_q.bias`.

    Returns:
        The configuration. Sizes of the vocabulary: the token list's length, or `vocab_size` where
        there is no list (llama.cpp requires the former of the embedding). End-of-text ids: eos,
        eot and eom as far as they are named.

    Raises:
        ConfigError: another architecture, a wrong or missing value, a key that is not supported
            or not known; lists everything it found.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError(
            "the GGUF file holds a model that Earnest does not open",
            got=f"general.architecture {brief(architecture)}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ConfigError(
            "the GGUF file holds no whole model",
            got=f"general.type {brief(kind)}",
            expected="model",
        )
    prefix = f"{architecture}."
    own = {k[len(prefix) :]: v for k, v in metadata.items() if str(k).startswith(prefix)}
    values = Values(own, ORIGIN)
    refuse(values, _READ, GGUF_NEUTRAL, GGUF_HARMLESS)
    _refuse_rotary_scaling(values)
    values.required(_REQUIRED)
    layers = values.integer("block_count")
    hidden = values.integer("embedding_length")
    width = _same_in_all_layers(values, "feed_forward_length")
    heads = _same_in_all_layers(values, "attention.head_count", 1)
    kv_heads = _same_in_all_layers(values, "attention.head_count_kv", heads)
    head_dim = _head_dim(values, hidden, heads)
    _refuse_scaled_attention(values, head_dim)
    moe = _experts(values, architecture, width, kv_heads)
    general = Values(metadata, ORIGIN, values.problems)
    config: dict[str, Any] = {
        "vocab_size": _vocab_size(values, metadata),
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": values.integer("context_length"),
        "rms_norm_eps": _shortest(values.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(values.number("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "use_bias": use_bias,
        "bos_token_id": _token_id(general, "bos"),
        "eos_token_ids": _end_ids(general),
        "pad_token_id": _token_id(general, "padding"),
        "dtype": _FILE_TYPES.get(general.integer("general.file_type", -1), "bfloat16"),
    }
    values.check()
    return ErnieConfig(**(config | moe))


def to_gguf(config: ErnieConfig) -> dict[str, object]:
    """The metadata that describes `config`, keys in the order llama.cpp's converter writes them.

    Read back, `from_gguf(to_gguf(c), tied=c.tie_word_embeddings, use_bias=c.use_bias)` equals `c`
    but for `initializer_range`, `num_nextn_predict_layers`, end-of-text ids after the third, a
    `moe_layer_end_index` beyond the last layer and the inert `moe_*` fields of a dense model.

    Raises:
        ConfigError: the arithmetic cannot be said in GGUF: a last MoE layer before the last
            layer, or another clamp of expert weights than 1e-12.
    """
    architecture = "ernie4_5-moe" if config.is_moe else "ernie4_5"
    file_types = {name: number for number, name in _FILE_TYPES.items()}
    found: dict[str, object] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.file_type": file_types[config.dtype],
    }
    own: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.is_moe:
        _refuse_unspeakable(config)
        own |= {
            "expert_count": config.moe_num_experts,
            "expert_used_count": config.moe_k,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "leading_dense_block_count": config.moe_layer_start_index,
            "interleave_moe_layer_step": config.moe_layer_interval,
        }
        if config.moe_num_shared_experts:
            own |= {
                "expert_shared_count": config.moe_num_shared_experts,
                "expert_shared_feed_forward_length": config.shared_intermediate_size,
            }
    found |= {f"{architecture}.{key}": value for key, value in own.items()}
    ids = dict(zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False))
    named = {"bos": config.bos_token_id, **ids, "padding": config.pad_token_id}
    found |= {f"tokenizer.ggml.{k}_token_id": v for k, v in named.items() if v is not None}
    return found


def _refuse_unspeakable(config: ErnieConfig) -> None:
    if config.moe_layer_end_index < config.num_hidden_layers - 1 or config.moe_norm_min != 1e-12:
        raise ConfigError(
            "GGUF has no way to describe this model",
            got=f"moe_layer_end_index {config.moe_layer_end_index}, "
            f"moe_norm_min {config.moe_norm_min}",
            expected=f"{config.num_hidden_layers - 1} (the last layer) and 1e-12",
        )


def _refuse_rotary_scaling(values: Values) -> None:
    scaling = values.raw.get("rope.scaling.type", "none")
    # "linear" without a factor divides positions by one.
    if scaling not in ("none", "linear"):
        values.complain(f"rope.scaling.type = {brief(scaling)} is not supported")


def _same_in_all_layers(values: Values, key: str, default: int = 0) -> int:
    """llama.cpp writes one number, or a list of one per layer where they differ."""
    value = values.raw.get(key)
    if not isinstance(value, (list, tuple)):
        return values.integer(key, default)
    entries = {as_integer(entry) for entry in value}
    (only,) = entries if len(entries) == 1 else (None,)
    if only is None:
        values.complain(f"{key} differs from layer to layer, which is not supported")
        return default
    return only


def _head_dim(values: Values, hidden: int, heads: int) -> int:
    derived = hidden // heads if heads > 0 else 0
    if heads > 0 and hidden % heads and not values.has("attention.key_length"):
        values.complain(f"attention.key_length is missing and {heads} heads do not divide {hidden}")
    head_dim = values.integer("attention.key_length", derived)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = values.integer(key, head_dim)
        if found != head_dim:
            values.complain(f"{key} = {found} differs from the key heads' {head_dim}")
    return head_dim


def _refuse_scaled_attention(values: Values, head_dim: int) -> None:
    scale = values.number("attention.scale", 0.0)
    if scale and not (head_dim > 0 and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
        values.complain(f"attention.scale = {scale} is not 1 / sqrt({head_dim})")


def _experts(values: Values, architecture: str, width: int, kv_heads: int) -> dict[str, Any]:
    count = values.integer("expert_count")
    if architecture == "llama" and count:
        values.complain(
            "expert_count: a Llama mixture of experts routes by other rules than ERNIE 4.5"
        )
    if architecture == "ernie4_5" and count:
        values.complain("expert_count contradicts the dense architecture ernie4_5")
    if architecture != "ernie4_5-moe":
        return {}
    values.required(_REQUIRED_MOE)
    shared = values.integer("expert_shared_count")
    expert_width = values.integer("expert_feed_forward_length")
    # llama.cpp's converter writes intermediate_size // num_key_value_heads here, which is the true
    # width in the 21B model only; the tensors have the true one.
    quirk = width // kv_heads if kv_heads > 0 else 0
    written = values.integer("expert_shared_feed_forward_length", shared * expert_width)
    if written not in (shared * expert_width, quirk):
        values.complain(
            f"expert_shared_feed_forward_length = {written} is not {shared} shared experts "
            f"of width {expert_width}"
        )
    return {
        "moe_num_experts": count,
        "moe_k": values.integer("expert_used_count"),
        "moe_intermediate_size": expert_width,
        "moe_num_shared_experts": shared,
        "moe_layer_start_index": values.integer("leading_dense_block_count"),
        "moe_layer_interval": values.integer("interleave_moe_layer_step", 1),
    }


def _vocab_size(values: Values, metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sized) and not isinstance(tokens, (str, bytes)):
        return len(tokens)
    values.required(["vocab_size"])
    return values.integer("vocab_size")


def _token_id(general: Values, name: str) -> int | None:
    found = general.integer(f"tokenizer.ggml.{name}_token_id", -1)
    # 2**32 - 1 is an unsigned -1.
    return found if 0 <= found < 2**32 - 1 else None


def _end_ids(general: Values) -> tuple[int, ...]:
    found = (_token_id(general, name) for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(entry for entry in found if entry is not None))


def _shortest(value: float) -> float:
    """The short decimal that is the same float32: GGUF holds 1e-5 as 9.99999974737e-06. What needs
    more than six digits was hardly written down as a decimal and stays as it is."""
    if abs(value) > 3e38 or _float32(value) != value:
        return value
    for digits in range(1, 7):
        candidate = float(f"{value:.{digits}g}")
        if _float32(candidate) == value:
            return candidate
    return value


def _float32(value: float) -> float:
    (found,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(found, float)
    return found
