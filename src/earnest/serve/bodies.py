"""What the bodies of all interfaces share: they are strict, they name the model, and what they say
becomes turns of a conversation as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from earnest.engine import SamplingParams
from earnest.serve.http import ApiError
from earnest.serve.state import Served

# How many tokens of thoughts an effort is; None: as many as it takes.
_EFFORT = {
    **{"none": 0, "minimal": 256, "low": 1024, "medium": 4096},
    **{"high": None, "xhigh": None, "max": None},
}


class Strict(BaseModel):
    """A body that has no other fields, and nothing in them but what they say: no "7" for 7."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        """16.0 is a whole number in JSON, and some clients know no other way to write one."""
        if not isinstance(given, dict):
            return given
        return {
            name: int(value) if type(value) is float and value.is_integer() else value
            for name, value in given.items()
        }


def check_model(served: Served, name: str | None) -> None:
    """Refuse the name of a model that is not here."""
    if name is not None and name != served.name:
        raise ApiError(404, f"there is no model {name!r:.200}; this server has {served.name!r}")


def sampling_with(served: Served, **given: Any) -> SamplingParams:
    """As the model's authors recommend, but for what is given and not None."""
    if len(given.get("stop") or ()) > served.limits.texts:  # each token is looked at for all
        raise ApiError(400, f"too many stop strings: at most {served.limits.texts:,}", param="stop")
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(served.defaults, **chosen)


def thinking_tokens(effort: str | None) -> int | None:
    """Most tokens of thoughts for a reasoning effort; None: as many as it takes."""
    return None if effort is None else _EFFORT[effort]


def thinking_variables(effort: str | None) -> dict[str, Any]:
    """What a reasoning effort tells templates of models that think only when they are told to."""
    return {} if effort is None else {"enable_thinking": effort != "none"}


def turn(
    role: str,
    content: str = "",
    *,
    thoughts: str | None = None,
    calls: Sequence[dict[str, Any]] = (),
    call_id: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """One turn of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: its text.
        thoughts: what the model thought before it; templates know them by two names.
        calls: from `tool_call`.
        call_id: of the call whose result this is.
        name: of who speaks.
    """
    found: dict[str, Any] = {"role": role, "content": content}
    if name is not None:
        found["name"] = name
    if thoughts is not None:
        found["reasoning_content"] = found["thoughts"] = thoughts
    if call_id is not None:
        found["tool_call_id"] = call_id
    if calls:
        found["tool_calls"] = list(calls)
    return found


def tool_call(call_id: str, name: str, arguments: object) -> dict[str, Any]:
    """A call that the model made earlier; its arguments are an object."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The description of a tool, as templates take it."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }


def arguments_of(text: str) -> Any:
    """Arguments of a call, from JSON if they are."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
