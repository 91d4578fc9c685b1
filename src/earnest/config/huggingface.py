"""config.json in all its spellings: the hub's, transformers 5's, Paddle's, the VL models'.

Reading is strict: a number that implementations fill in differently when it is absent must be
there, a key that would change the arithmetic is refused by name, and so is a key that is not known
(`keys` has the tables). Writing gives what both transformers 5 and the model's older code read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earnest.config.ernie import ErnieConfig
from earnest.config.keys import HF_HARMLESS, HF_NEUTRAL, refuse
from earnest.config.values import Values, as_integer, as_number, brief
from earnest.errors import ConfigError

ORIGIN = "config.json"

_DENSE = "ernie4_5"
_MOE = "ernie4_5_moe"
_VISION = ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_moe_vl")
# What Baidu's pre-training code calls both kinds. (An unrelated older model has the same name;
# its configurations lack required keys and have unknown ones.)
_PRETRAINING = "ernie"
_ARCHITECTURES = {
    "Ernie4_5ForCausalLM": _DENSE,
    "Ernie4_5_ForCausalLM": _DENSE,
    "Ernie4_5_MoeForCausalLM": _MOE,
    "Ernie4_5_MoEForCausalLM": _MOE,
    "Ernie4_5_VLMoeForConditionalGeneration": "ernie4_5_vl_moe",
    "Ernie4_5_VL_MoeForConditionalGeneration": "ernie4_5_vl_moe",
    "ErnieForCausalLM": _PRETRAINING,
    "ErnieMoEForCausalLM": _PRETRAINING,
}
_REFUSED_FAMILIES = {
    "paddleocr_vl": "it rotates other pairs of channels than ERNIE 4.5 does "
    "(rope_is_neox_style) and is a model for pictures of text",
    "llama": "Llama models open as GGUF files only: in config.json folders their rotary "
    "channels lie in another order",
}

# fmt: off
_READ = frozenset((
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "tie_word_embeddings",
    "use_bias", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "initializer_range", "use_moe", "moe_num_experts", "moe_k", "moe_intermediate_size",
    "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_end_index",
    "moe_layer_interval", "moe_norm_min", "num_nextn_predict_layers", "remove_tail_layer",
    "layer_types", "mlp_layer_types", "use_3d_rope", "rope_3d", "moe_use_hard_gate",
))
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
)
# fmt: on
_DTYPES = ("bfloat16", "float16", "float32")


def from_hf(raw: Mapping[str, Any]) -> ErnieConfig:
    """Read a config.json.

    Args:
        raw: the JSON object. Both spellings of each key are understood (`rope_theta` or
            `rope_parameters`, `torch_dtype` or `dtype`); of the lists `[text, vision]` of a
            vision-language model the text entry is taken, and so is a nested `text_config`.

    Returns:
        The configuration of the text model. `num_hidden_layers` is what is left after
        `remove_tail_layer`. Token ids below zero mean none. Configurations of the pre-training
        code (model_type "ernie") number their special tokens 0, 1, -1, against the tokenizer
        beside them and all releases: for that triple the releases' 1, 2, 0 are taken.

    Raises:
        ConfigError: another family of models; a value of the wrong type, missing or out of range;
            a key that changes the arithmetic and is not supported; a key that is not known.
            Lists everything it found.
    """
    family = _family(raw)
    raw = _text_part(raw)
    values = Values(raw, ORIGIN)
    vision = family in _VISION
    refuse(_without_inert_keys(values), _READ, HF_NEUTRAL, HF_HARMLESS)
    _refuse_partial_attention(values)
    _refuse_three_axes(values, vision)

    values.required(_REQUIRED)
    if "num_key_value_heads" not in raw:  # null says: as many as query heads
        values.complain("num_key_value_heads is missing (implementations disagree about it)")
    if family != _PRETRAINING:
        values.required(["tie_word_embeddings"], "implementations disagree about its default")
    heads = values.integer("num_attention_heads", 1)
    hidden = values.integer("hidden_size", 1)
    layers = _layers(values)
    config: dict[str, Any] = {
        "vocab_size": values.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": values.integer("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": values.integer("num_key_value_heads", heads),
        "head_dim": _head_dim(values, family, hidden, heads),
        "max_position_embeddings": values.integer("max_position_embeddings"),
        "rms_norm_eps": values.number("rms_norm_eps"),
        "rope_theta": _rope_theta(values, vision),
        # The pre-training code ties nothing unless told to.
        "tie_word_embeddings": values.flag("tie_word_embeddings", False),
        "use_bias": values.flag("use_bias"),
        "dtype": _dtype(values),
        "initializer_range": values.number("initializer_range", 0.02),
        "num_nextn_predict_layers": values.integer("num_nextn_predict_layers", 0),
        **_experts(values, family, layers),
        **_token_ids(values, family),
    }
    values.check()
    return ErnieConfig(**config)


def to_hf(config: ErnieConfig) -> dict[str, Any]:
    """A config.json that transformers 5 reads to the same numbers, and the older code too.

    Both spellings of what was renamed are written. Everything that `from_hf` reads back is in it:
    `from_hf(to_hf(config)) == config`, but for the inert `moe_*` fields of a dense model.
    """
    ids = list(config.eos_token_ids)
    found: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM" if config.is_moe else "Ernie4_5ForCausalLM"],
        "model_type": _MOE if config.is_moe else _DENSE,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ids if len(ids) > 1 else ids[0] if ids else None,
        "pad_token_id": config.pad_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_bias": config.use_bias,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }
    if config.is_moe:
        found |= {
            "moe_num_experts": config.moe_num_experts,
            "moe_k": config.moe_k,
            "moe_intermediate_size": config.moe_intermediate_size,
            "moe_num_shared_experts": config.moe_num_shared_experts,
            "moe_layer_start_index": config.moe_layer_start_index,
            "moe_layer_end_index": config.moe_layer_end_index,
            "moe_layer_interval": config.moe_layer_interval,
            "moe_norm_min": config.moe_norm_min,
            "moe_gate": "topk",
            "moe_use_aux_free": True,
        }
    if config.is_moe or config.num_nextn_predict_layers:
        found["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return found


def _family(raw: Mapping[str, Any]) -> str:
    """The model type, taken from the architecture's name where it is not written."""
    named = raw.get("model_type")
    if named is None:
        architectures = raw.get("architectures")
        if isinstance(architectures, list) and architectures:
            named = _ARCHITECTURES.get(str(architectures[0]))
    known = (_DENSE, _MOE, *_VISION, _PRETRAINING)
    if isinstance(named, str) and named in known:
        return named
    why = _REFUSED_FAMILIES.get(named) if isinstance(named, str) else None
    raise ConfigError(
        f"{ORIGIN} describes a model that Earnest does not open" + (f": {why}" if why else ""),
        got=f"model_type {brief(named)}",
        expected=f"model_type {', '.join(known)}",
    )


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flat configuration of the text model: transformers 5 nests it in VL configurations."""
    nested = raw.get("text_config")
    if nested is None:
        return {key: value for key, value in raw.items() if key != "text_config"}
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{ORIGIN}: text_config must be an object, got {brief(nested)}")
    outer = {key: value for key, value in raw.items() if key != "text_config"}
    # The head belongs to the outer model, so its word on tying counts; for the rest the inner
    # object is the more specific one, where it says anything.
    inner = {key: value for key, value in nested.items() if value is not None or key not in outer}
    merged = outer | inner
    if outer.get("tie_word_embeddings") is not None:
        merged["tie_word_embeddings"] = outer["tie_word_embeddings"]
    return merged


def _without_inert_keys(values: Values) -> Values:
    """A dense model has no routing, whatever its configuration says of it."""
    if as_integer(values.raw.get("moe_num_experts", 0)) != 0:
        return values
    kept = {k: v for k, v in values.raw.items() if not str(k).startswith("moe_") or k in _READ}
    return Values(kept, ORIGIN, values.problems)


def _refuse_partial_attention(values: Values) -> None:
    layer_types = values.raw.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        values.complain(
            f"layer_types = {brief(layer_types)} asks for other than full attention, "
            "which is not supported"
        )


def _refuse_three_axes(values: Values, vision: bool) -> None:
    """Rotary positions on three axes are those on one axis for a text, whose tokens have the same
    position on all three; a text model has no business with them, though."""
    for key in ("use_3d_rope", "rope_3d"):
        if values.flag(key) and not vision:
            values.complain(f"{key} = true asks for rotary positions on three axes")
    # Router groups of their own for text and vision: what the VL models do.
    if not values.flag("moe_use_hard_gate", True) and vision:
        values.complain("moe_use_hard_gate = false asks for one router over text and vision")


def _head_dim(values: Values, family: str, hidden: int, heads: int) -> int:
    """Published MoE configurations do not write it; transformers has another default for dense
    ones (128) than the published code, so there it must be written unless they agree."""
    derived = hidden // heads if heads > 0 else 0
    if values.has("head_dim"):
        return values.integer("head_dim")
    if family == _DENSE and "head_dim" not in values.raw and derived != 128:
        values.complain("head_dim is missing (implementations disagree about its default)")
    if heads > 0 and hidden % heads:
        values.complain(f"head_dim is missing and {heads} heads do not divide {hidden}")
    return derived


def _layers(values: Values) -> int:
    """Pre-training counts empty layers at the end, which take the place of embedding and head
    when a pipeline is cut into equal stages; `remove_tail_layer` says how many (true: one)."""
    layers = values.integer("num_hidden_layers")
    removed = values.raw.get("remove_tail_layer")
    if removed is None or isinstance(removed, bool):
        return layers - bool(removed)
    count = values.integer("remove_tail_layer")
    if count < 0:
        values.complain(f"remove_tail_layer must not be negative, got {count}")
        return layers
    return layers - count


def _experts(values: Values, family: str, layers: int) -> dict[str, Any]:
    """The `moe_*` fields; empty for a dense model."""
    text = _text_entries(values)
    if family not in (_DENSE, _PRETRAINING):
        text.required(["moe_num_experts"])
    count = text.integer("moe_num_experts")
    routed = values.flag("use_moe", count > 0)
    if count and family == _DENSE:
        values.complain(f"moe_num_experts = {count} contradicts model_type {_DENSE}")
    if routed != (count > 0):
        values.complain(f"use_moe = {str(routed).lower()} contradicts moe_num_experts = {count}")
    found: dict[str, Any] = {}
    if count:
        text.required(["moe_k", "moe_intermediate_size"])
        if not values.has("mlp_layer_types"):
            text.required(
                ["moe_layer_start_index", "moe_layer_interval"],
                "implementations disagree about its default",
            )
        found = {
            "moe_num_experts": count,
            "moe_k": text.integer("moe_k"),
            "moe_intermediate_size": text.integer("moe_intermediate_size"),
            # Absent means none: so the published code reads it. Where a checkpoint has shared
            # experts all the same, opening it will report them as tensors too many.
            "moe_num_shared_experts": text.integer("moe_num_shared_experts", 0),
            "moe_layer_start_index": text.integer("moe_layer_start_index", 0),
            "moe_layer_end_index": text.integer("moe_layer_end_index", -1),
            "moe_layer_interval": text.integer("moe_layer_interval", 1),
            "moe_norm_min": text.number("moe_norm_min", 1e-12),
        }
        if values.has("mlp_layer_types"):
            found |= _layer_pattern(values, layers)
    return found


def _text_entries(values: Values) -> Values:
    """The same values with the text entry in place of each list `[text, vision]`."""
    found = dict(values.raw)
    for key in (
        "moe_num_experts",
        "moe_intermediate_size",
        "moe_layer_start_index",
        "moe_layer_end_index",
    ):
        value = found.get(key)
        if not isinstance(value, (list, tuple)):
            continue
        if len(value) not in (1, 2) or any(as_integer(entry) is None for entry in value):
            values.complain(f"{key} must be an integer or a list [text, vision]: {brief(value)}")
            found[key] = 1
            continue
        if key == "moe_layer_start_index" and len(set(value)) > 1:
            # Between the two, text and vision tokens would run through different kinds of block.
            values.complain(f"{key} = {brief(value)} differs between text and vision")
        found[key] = value[0]
    return Values(found, ORIGIN, values.problems)


def _layer_pattern(values: Values, layers: int) -> dict[str, int]:
    """Start, end and interval that give the kinds of block that transformers 5 lists for VL."""
    kinds = values.raw["mlp_layer_types"]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        values.complain(
            f"mlp_layer_types must list dense or sparse for each of {layers} layers: {brief(kinds)}"
        )
        return {}
    sparse = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    if not sparse:
        values.complain("mlp_layer_types has no sparse layer, but there are experts")
        return {}
    interval = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    expected = [i for i in range(sparse[0], sparse[-1] + 1) if (i + 1) % interval == 0]
    if sparse != expected:
        values.complain(f"mlp_layer_types is no regular pattern: {brief(kinds)}")
        return {}
    return {
        "moe_layer_start_index": sparse[0],
        "moe_layer_end_index": sparse[-1],
        "moe_layer_interval": interval,
    }


def _rope_theta(values: Values, vision: bool) -> float:
    """The rotary base, from either spelling; anything but plain rotary positions is refused."""
    found: list[float] = []
    if values.has("rope_theta"):
        found.append(values.number("rope_theta"))
    for key in ("rope_parameters", "rope_scaling"):
        value = values.raw.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            values.complain(f"{key} must be an object, got {brief(value)}")
            continue
        inner = Values(value, key)
        _refuse_rope_keys(inner, vision, values)
        if inner.has("rope_theta"):
            found.append(inner.number("rope_theta"))
        values.problems.extend(f"{key}: {problem}" for problem in inner.problems)
    if not found:
        values.complain("rope_theta is missing (implementations disagree about its default)")
        return 1.0
    if len(set(found)) > 1:
        values.complain(f"rope_theta is given twice and differs: {found}")
    return found[0]


def _refuse_rope_keys(rope: Values, vision: bool, outer: Values) -> None:
    for key, value in rope.raw.items():
        match key:
            case "rope_theta":
                continue
            case "rope_type" | "type":
                good = value in (None, "default")
            case "factor" | "partial_rotary_factor" | "attention_factor":
                good = value is None or as_number(value) == 1.0
            case "original_max_position_embeddings":
                good = True  # only read by the scaled types
            case "mrope_section":
                good = vision and _equal_axes(value, outer)
            case _:
                good = False
        if not good:
            rope.complain(
                f"{str(key)[:80]} = {brief(value)} asks for rotary positions that are not supported"
            )


def _equal_axes(section: object, outer: Values) -> bool:
    """Whether frequencies are dealt to the axes so that a text, with equal positions on all of
    them, is rotated as by the plain kind: height and width take turns, time takes the rest."""
    if not isinstance(section, list) or len(section) != 3:
        return False
    sizes = [as_integer(size) for size in section]
    if any(size is None or size < 0 for size in sizes) or sizes[0] != sizes[1]:
        return False
    heads = outer.integer("num_attention_heads", 1)
    derived = outer.integer("hidden_size") // heads if heads > 0 else 0
    return 2 * sum(size or 0 for size in sizes) == outer.integer("head_dim", derived)


def _token_ids(values: Values, family: str) -> dict[str, Any]:
    written = [values.raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")]
    if family == _PRETRAINING and written == [0, 1, -1]:
        return {}

    def single(key: str, default: int) -> int | None:
        if key in values.raw and values.raw[key] is None:
            return None
        found = values.integer(key, default)
        return None if found < 0 else found

    ends = values.raw.get("eos_token_id", 2)
    listed = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    ids = [as_integer(entry) for entry in listed]
    if len(listed) > 64 or any(entry is None for entry in ids):
        values.complain(f"eos_token_id must be an integer or a list of them: {brief(ends)}")
    return {
        "bos_token_id": single("bos_token_id", 1),
        "eos_token_ids": tuple(entry for entry in ids if entry is not None and entry >= 0),
        "pad_token_id": single("pad_token_id", 0),
    }


def _dtype(values: Values) -> str:
    """The published type of the weights; a file's own types always win over it."""
    found = {
        values.text(key).removeprefix("torch.")
        for key in ("dtype", "torch_dtype")
        if values.has(key)
    }
    if len(found) > 1 or not found <= set(_DTYPES):
        values.complain(f"dtype must be one of {', '.join(_DTYPES)}, got {brief(sorted(found))}")
    return min(found, default="bfloat16")
