"""`describe`: the facts of an opened checkpoint, or of a configuration alone, as JSON-able values.

No weight is read for them, so the answer comes at once whatever the size.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from earnest.checkpoint.checkpoint import Checkpoint
from earnest.config import Accounting, ErnieConfig
from earnest.errors import FormatError, TokenizerError

_ELEMENT_BYTES = {"f32": 4, "bf16": 2, "fp8": 1}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds.

    Returns:
        The keys of `describe_config`, and: `path`, `container`, `dialect`; `architecture` as the
        files say it; `has_mtp`; `stored` with `tensors`, `weights`, `bytes`, `bits_per_weight` and
        `types` (type to the same three counts); `tokenizer` with `source`, `vocab_size`,
        `chat_template`, or `error`; `left_out` (each `reason`, `tensors`, `bytes`); `notes`.
    """
    types: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.is_absent:
            continue
        entry = types.setdefault(tensor.codec.name, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += tensor.size
        entry["bytes"] += tensor.nbytes
    whole = {key: sum(t[key] for t in types.values()) for key in ("tensors", "weights", "bytes")}
    return {
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "dialect": checkpoint.dialect,
        **describe_config(checkpoint.config),
        "architecture": _stated_architecture(checkpoint) or _architecture(checkpoint.config),
        "has_mtp": checkpoint.has_mtp,
        "stored": {
            **whole,
            "bits_per_weight": 8 * whole["bytes"] / max(1, whole["weights"]),
            "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        },
        "tokenizer": _describe_tokenizer(checkpoint),
        "left_out": [
            {"reason": left.reason, "tensors": len(left.names), "bytes": left.nbytes}
            for left in checkpoint.left_out
        ],
        "notes": list(checkpoint.notes),
    }


def describe_config(config: ErnieConfig) -> dict[str, Any]:
    """What follows from a configuration alone.

    Returns:
        `architecture`; `config` (all fields of `ErnieConfig`); `parameters` with `parts`, `total`,
        `active`, `active_without_embedding`, `mtp`; `kv_bytes_per_token` and `weight_bytes` by
        type; `flops_per_token` at a context of one token.
    """
    counted = Accounting(config)
    return {
        "architecture": _architecture(config),
        "config": asdict(config) | {"eos_token_ids": list(config.eos_token_ids)},
        "parameters": {
            "parts": {part: count for part, count in counted.parts.items() if count},
            "total": counted.total,
            "active": counted.active,
            "active_without_embedding": counted.active_without_embedding,
            "mtp": counted.mtp,
        },
        "weight_bytes": {t: counted.weight_bytes(8 * n) for t, n in _ELEMENT_BYTES.items()},
        "kv_bytes_per_token": {t: counted.kv_bytes_per_token(n) for t, n in _ELEMENT_BYTES.items()},
        "flops_per_token": counted.flops_per_token(1),
    }


def _architecture(config: ErnieConfig) -> str:
    return "Ernie4_5_MoeForCausalLM" if config.is_moe else "Ernie4_5ForCausalLM"


def _stated_architecture(checkpoint: Checkpoint) -> str | None:
    match checkpoint.metadata:
        case {"general.architecture": str(name)} | {"architectures": [str(name), *_]}:
            return name
    return None


def _describe_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    source = _tokenizer_source(checkpoint)
    try:
        tokenizer = checkpoint.tokenizer
    except (TokenizerError, FormatError) as error:
        return {"source": source, "error": error.problem}
    return {
        "source": source,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template is not None,
    }


def _tokenizer_source(checkpoint: Checkpoint) -> str | None:
    """What the tokenizer is read from: a file beside the weights, or the kind inside a GGUF."""
    if checkpoint.container == "gguf":
        kind = checkpoint.metadata.get("tokenizer.ggml.model")
        return f"GGUF, {kind}" if isinstance(kind, str) else None
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return name
    return None
