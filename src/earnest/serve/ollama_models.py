"""What Ollama's interface says of models: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from earnest.checkpoint.describe import describe
from earnest.serve.bodies import Strict
from earnest.serve.http import ApiError
from earnest.serve.ollama import check_name
from earnest.serve.state import Served

# Whose interface this is, as far as it goes: clients refuse versions that they take for too old.
_INTERFACE = "0.12.11"


class ShowBody(Strict):
    """Which model."""

    model: str | None = None
    name: str | None = None  # older clients say it so
    verbose: bool | None = None


def router(served: Served) -> APIRouter:
    """The endpoints."""
    api = APIRouter()

    @cache
    def facts() -> dict[str, Any]:
        return describe(served.model.checkpoint)

    @api.get("/api/version", tags=["Ollama"])
    async def show_version() -> dict[str, str]:
        """Ollama's version that this is like, and Earnest's."""
        return {"version": _INTERFACE, "earnest": version("earnest")}

    @api.get("/api/tags", tags=["Ollama"])
    async def tags() -> dict[str, Any]:
        """The one model there is."""
        found = await run_in_threadpool(facts)
        return {"models": [_tag(served, found)]}

    @api.get("/api/ps", tags=["Ollama"])
    async def running() -> dict[str, Any]:
        """The same model, which is always loaded."""
        card = _tag(served, await run_in_threadpool(facts))
        del card["modified_at"]
        always = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
        return {"models": [card | always | {"context_length": served.model.max_context}]}

    @api.post("/api/show", tags=["Ollama"])
    async def show(body: ShowBody) -> dict[str, Any]:
        """All about it."""
        name = body.model or body.name
        if name is None:
            raise ApiError(400, "model is missing", param="model")
        check_name(served, name)
        return _shown(served, await run_in_threadpool(facts))

    return api


def _architecture(facts: dict[str, Any]) -> str:
    stated = str(facts["architecture"])
    if "For" not in stated:  # a GGUF file's own word
        return stated
    return "ernie4_5-moe" if facts["config"]["moe_num_experts"] else "ernie4_5"


def _details(facts: dict[str, Any]) -> dict[str, Any]:
    family = _architecture(facts)
    types = facts["stored"]["types"]
    return {
        "parent_model": "",
        "format": facts["container"],
        "family": family,
        "families": [family],
        "parameter_size": _counted(facts["parameters"]["total"]),
        "quantization_level": next(iter(types), "none").upper(),
    }


def _counted(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _modified(served: Served) -> str:
    path = served.model.checkpoint.path
    seconds = path.stat().st_mtime if path.exists() else served.created
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _tag(served: Served, facts: dict[str, Any]) -> dict[str, Any]:
    # Of what is known without reading every weight: a name for this model, not a proof.
    known = {key: value for key, value in facts.items() if key != "path"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "name": served.name,
        "model": served.name,
        "modified_at": _modified(served),
        "size": facts["stored"]["bytes"],
        "digest": digest,
        "details": _details(facts),
    }


def _shown(served: Served, facts: dict[str, Any]) -> dict[str, Any]:
    template = None if served.tokenizer is None else served.tokenizer.chat_template
    source = "" if template is None else template.source
    family, config, defaults = _architecture(facts), facts["config"], served.defaults
    parameters = {
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "repeat_penalty": defaults.repetition_penalty,
    }
    capabilities = ["completion"]
    if template is not None:
        capabilities += ["tools", "thinking"] if "<think>" in source else ["tools"]
    return {
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in parameters.items()),
        "template": source,
        "details": _details(facts),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": facts["parameters"]["total"],
            f"{family}.context_length": served.model.max_context,
            f"{family}.block_count": config["num_hidden_layers"],
            f"{family}.embedding_length": config["hidden_size"],
            f"{family}.attention.head_count": config["num_attention_heads"],
            f"{family}.attention.head_count_kv": config["num_key_value_heads"],
            f"{family}.vocab_size": config["vocab_size"],
        },
        "capabilities": capabilities,
        "modified_at": _modified(served),
    }
