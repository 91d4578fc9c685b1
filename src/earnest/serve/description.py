"""`/openapi.json`: what endpoints answer, beside what the framework knows of what they take.

Bodies are made where they are cheapest to make, token by token; here stands what they are. The
tests hold every answer against it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_ANY: Schema = {}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _only(*values: str) -> Schema:
    return {"enum": list(values)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _map(of: Schema) -> Schema:
    return {"type": "object", "additionalProperties": of}


def _object(optional: Schema | None = None, /, **required: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


_USAGE = _object(
    prompt_tokens=_WHOLE,
    completion_tokens=_WHOLE,
    total_tokens=_WHOLE,
    prompt_tokens_details=_object(cached_tokens=_WHOLE),
    completion_tokens_details=_object(reasoning_tokens=_WHOLE),
)
_TOP = _object(token=_TEXT, logprob=_NUMBER, bytes=_list(_WHOLE))
_LOGPROBS = _list(
    _object(token=_TEXT, logprob=_NUMBER, bytes=_list(_WHOLE), top_logprobs=_list(_TOP))
)
_FINISH = _only("stop", "length", "tool_calls")

_CHAT = _object(
    {"prompt_token_ids": _list(_WHOLE)},
    id=_TEXT,
    object=_only("chat.completion"),
    created=_WHOLE,
    model=_TEXT,
    system_fingerprint={"type": "null"},
    choices=_list(
        _object(
            {"token_ids": _list(_or_null(_WHOLE))},
            index=_WHOLE,
            message=_object(
                {
                    "reasoning_content": _TEXT,
                    "tool_calls": _list(
                        _object(
                            id=_TEXT,
                            type=_only("function"),
                            function=_object(name=_TEXT, arguments=_TEXT),
                        )
                    ),
                },
                role=_only("assistant"),
                content=_or_null(_TEXT),
                refusal={"type": "null"},
            ),
            logprobs=_or_null(_object(content=_LOGPROBS, refusal={"type": "null"})),
            finish_reason=_FINISH,
        )
    ),
    usage=_USAGE,
)
_COMPLETION = _object(
    id=_TEXT,
    object=_only("text_completion"),
    created=_WHOLE,
    model=_TEXT,
    choices=_list(
        _object(
            {"prompt_token_ids": _list(_WHOLE), "token_ids": _list(_WHOLE)},
            index=_WHOLE,
            text=_TEXT,
            logprobs=_or_null(
                _object(
                    tokens=_list(_TEXT),
                    token_logprobs=_list(_or_null(_NUMBER)),
                    top_logprobs=_list(_or_null(_map(_NUMBER))),
                    text_offset=_list(_WHOLE),
                )
            ),
            finish_reason=_FINISH,
        )
    ),
    usage=_USAGE,
)
_RESPONSE: Schema = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "object": _only("response"),
        "created_at": _WHOLE,
        "status": _only("completed", "incomplete"),
        "model": _TEXT,
        "output": _list(
            {
                "type": "object",
                "properties": {
                    "id": _TEXT,
                    "type": _only("message", "reasoning", "function_call"),
                    "status": _only("completed", "incomplete", "in_progress"),
                },
                "required": ["id", "type"],
            }
        ),
        "usage": _object(
            input_tokens=_WHOLE,
            input_tokens_details=_object(cached_tokens=_WHOLE, cache_write_tokens=_WHOLE),
            output_tokens=_WHOLE,
            output_tokens_details=_object(reasoning_tokens=_WHOLE),
            total_tokens=_WHOLE,
        ),
    },
    "required": ["id", "object", "created_at", "status", "model", "output", "usage"],
}
_MESSAGE = _object(
    id=_TEXT,
    type=_only("message"),
    role=_only("assistant"),
    model=_TEXT,
    content=_list(
        {
            "oneOf": [
                _object(type=_only("text"), text=_TEXT),
                _object(type=_only("thinking"), thinking=_TEXT, signature=_TEXT),
                _object(type=_only("tool_use"), id=_TEXT, name=_TEXT, input=_map(_ANY)),
            ]
        }
    ),
    stop_reason=_only(
        *("end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded")
    ),
    stop_sequence=_or_null(_TEXT),
    usage=_object(
        input_tokens=_WHOLE,
        cache_creation_input_tokens=_WHOLE,
        cache_read_input_tokens=_WHOLE,
        output_tokens=_WHOLE,
        output_tokens_details=_object(thinking_tokens=_WHOLE),
    ),
)
_OLLAMA: Schema = {
    "model": _TEXT,
    "created_at": {"type": "string", "format": "date-time"},
    "done": {"const": True},
    "done_reason": _only("stop", "length", "load"),
}
_OLLAMA_TIMES: Schema = {
    **dict.fromkeys(("total_duration", "load_duration", "prompt_eval_duration"), _WHOLE),
    **dict.fromkeys(("prompt_eval_count", "eval_count", "eval_duration"), _WHOLE),
    "logprobs": _LOGPROBS,
}
_OLLAMA_CALL = _object(id=_TEXT, function=_object(index=_WHOLE, name=_TEXT, arguments=_map(_ANY)))
_DETAILS = _object(
    parent_model=_TEXT,
    format=_TEXT,
    family=_TEXT,
    families=_list(_TEXT),
    parameter_size=_TEXT,
    quantization_level=_TEXT,
)
_LISTED: Schema = {
    "name": _TEXT, "model": _TEXT, "size": _WHOLE, "digest": _TEXT, "details": _DETAILS,
}  # fmt: skip
_CARD = _object(
    id=_TEXT, object=_only("model"), created=_WHOLE, owned_by=_TEXT, max_model_len=_WHOLE
)
_VECTOR = _list(_NUMBER)

# What an answer with status 200 is, by path.
_ANSWERS: dict[str, Schema] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
    "/v1/responses": _RESPONSE,
    "/v1/messages": _MESSAGE,
    "/v1/messages/count_tokens": _object(input_tokens=_WHOLE),
    "/v1/models": _object(object=_only("list"), data=_list(_CARD)),
    "/v1/models/{name}": _CARD,
    "/v1/embeddings": _object(
        object=_only("list"),
        data=_list(
            _object(object=_only("embedding"), index=_WHOLE, embedding={"anyOf": [_VECTOR, _TEXT]})
        ),
        model=_TEXT,
        pooling=_only("mean", "last"),
        normalized=_FLAG,
        usage={
            "type": "object",
            "properties": {"prompt_tokens": _WHOLE, "total_tokens": _WHOLE},
            "required": ["prompt_tokens", "total_tokens"],
        },
    ),
    "/api/chat": _object(
        _OLLAMA_TIMES,
        **_OLLAMA,
        message=_object(
            {"thinking": _TEXT, "tool_calls": _list(_OLLAMA_CALL)},
            role=_only("assistant"),
            content=_TEXT,
        ),
    ),
    "/api/generate": _object({**_OLLAMA_TIMES, "thinking": _TEXT}, **_OLLAMA, response=_TEXT),
    "/api/tags": _object(models=_list(_object(**_LISTED, modified_at=_TEXT))),
    "/api/ps": _object(
        models=_list(_object(**_LISTED, expires_at=_TEXT, size_vram=_WHOLE, context_length=_WHOLE))
    ),
    "/api/show": _object(
        modelfile=_TEXT,
        parameters=_TEXT,
        template=_TEXT,
        details=_DETAILS,
        model_info=_map(_ANY),
        capabilities=_list(_TEXT),
        modified_at=_TEXT,
    ),
    "/api/version": _object(version=_TEXT, earnest=_TEXT),
    "/api/embed": {
        "type": "object",
        "properties": {"model": _TEXT, "embeddings": _list(_VECTOR)},
        "required": ["model", "embeddings"],
    },
    "/api/embeddings": _object(embedding=_VECTOR),
    "/tokenize": _object(
        {"token_strs": _list(_TEXT)}, count=_WHOLE, max_model_len=_WHOLE, tokens=_list(_WHOLE)
    ),
    "/detokenize": _object(prompt=_TEXT),
    "/version": _object(version=_TEXT, python=_TEXT),
    "/tokenizer_info": _map(_ANY),
}
_HELLO = [{"role": "user", "content": "Hello!"}]
_STORY = "Once upon a time"
# A body for each endpoint that takes one, beside the model's name; `/docs` shows them.
_EXAMPLES: dict[str, Schema] = {
    "/v1/chat/completions": {"messages": _HELLO, "max_tokens": 64},
    "/v1/completions": {"prompt": _STORY, "max_tokens": 64},
    "/v1/responses": {"input": "Hello!", "max_output_tokens": 64},
    "/v1/embeddings": {"input": [_STORY]},
    "/v1/messages": {"messages": _HELLO, "max_tokens": 64},
    "/v1/messages/count_tokens": {"messages": _HELLO},
    "/api/chat": {"messages": _HELLO, "stream": False, "options": {"num_predict": 64}},
    "/api/generate": {"prompt": _STORY, "stream": False, "options": {"num_predict": 64}},
    "/api/show": {},
    "/api/embed": {"input": [_STORY]},
    "/api/embeddings": {"prompt": _STORY},
    "/tokenize": {"prompt": _STORY},
    "/detokenize": {"tokens": [1, 2, 3]},
}
_STREAMS = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/completions"), "text/event-stream"),
    **dict.fromkeys(("/v1/responses", "/v1/messages"), "text/event-stream"),
    **dict.fromkeys(("/api/chat", "/api/generate"), "application/x-ndjson"),
}
_PLAIN = ("/health", "/ready", "/metrics")

_ERRORS: dict[str, Schema] = {
    "OpenAIError": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))
    ),
    "AnthropicError": _object(
        type=_only("error"), error=_object(type=_TEXT, message=_TEXT), request_id=_TEXT
    ),
    "OllamaError": _object(error=_TEXT),
}
_REASONS = {
    "400": "something in the request is wrong",
    "401": "the API key is missing or wrong",
    "403": "this web page may not call",
    "404": "there is no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "415": "the body is compressed",
    "422": "the JSON is not what was asked for",
    "429": "too many answers wait",
    "503": "the server ends, or there is no memory",
    "504": "the answer took too long",
}


def describe(app: FastAPI, model: str) -> None:
    """Let the application's description say what is answered, too, and give examples.

    Args:
        app: what is described.
        model: the name that examples ask for.
    """
    of_the_framework = app.openapi

    def openapi() -> Schema:
        document = of_the_framework()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "OpenAIError" not in schemas:
            schemas.update(_ERRORS)
            for path, item in document["paths"].items():
                for operation in item.values():
                    operation["responses"] = _responses(path, operation)
                    _exemplify(path, operation, model)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _exemplify(path: str, operation: Schema, model: str) -> None:
    for parameter in operation.get("parameters", ()):
        parameter["example"] = model  # the only parameter there is
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]
        content["example"] = {"model": model} | _EXAMPLES[path]


def _responses(path: str, operation: Schema) -> Schema:
    if path in _PLAIN:
        content: Schema = {"text/plain": {"schema": _TEXT}}
    else:
        content = {"application/json": {"schema": _ANSWERS.get(path, _ANY)}}
    if path in _STREAMS:
        content[_STREAMS[path]] = {}  # OpenAPI 3.1 has no words for events and lines
    found = {"200": {"description": "the answer", "content": content}}
    if path in _PLAIN:
        if path != "/metrics":
            found["503"] = {"description": "no", "content": content}
        return found
    error = {"schema": {"$ref": f"#/components/schemas/{_error(path)}"}}
    takes_body = "requestBody" in operation
    for status, reason in _REASONS.items():
        own = not path.startswith(("/v1/", "/api/"))
        if status in ("401", "403") or (status == "404" and "{" in path):
            pass
        elif not takes_body or (status == "422" and not own):
            continue
        found[status] = {"description": reason, "content": {"application/json": error}}
    return found


def _error(path: str) -> str:
    if path.startswith("/v1/messages"):
        return "AnthropicError"
    return "OllamaError" if path.startswith("/api/") else "OpenAIError"
