"""Write the tables of docs/serve.md and docs/ray.md from the code: options of the command,
parameters of requests, arguments of the application.

python tools/serve_tables.py            # writes them
python tools/serve_tables.py --check    # fails if they are not as the code says
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel

from earnest.cli.serve import command
from earnest.serve import (
    anthropic_messages,
    ollama,
    ollama_embed,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    plain,
)

_DOCS = Path(__file__).resolve().parents[1] / "docs"

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": openai_chat.ChatBody,
    "/v1/completions": openai_completions.CompletionBody,
    "/v1/responses": openai_responses.ResponsesBody,
    "/v1/embeddings": openai_embeddings.EmbeddingsBody,
    "/v1/messages": anthropic_messages.MessagesBody,
    "/api/chat": ollama.ChatBody,
    "/api/generate": ollama.GenerateBody,
    "/api/embed": ollama_embed.EmbedBody,
    "/api/embeddings": ollama_embed.EmbeddingsBody,
    "/tokenize": plain.TokenizeBody,
    "/detokenize": plain.DetokenizeBody,
}

# What the interfaces know and this server refuses, with a value that shows it. Anything else that
# is not in the table is refused in the same way.
REFUSED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "audio": {"voice": "alloy", "format": "wav"},
        "function_call": "auto",
        "functions": [],
        "grammar": 'root ::= "a"',
        "prediction": {"type": "content", "content": "a"},
        "prompt_logprobs": 1,
        "store": True,
        "use_beam_search": True,
        "verbosity": "low",
        "web_search_options": {},
    },
    "/v1/completions": {
        "best_of": 4,
        "grammar": 'root ::= "a"',
        "prompt_logprobs": 1,
        "suffix": "the end",
        "use_beam_search": True,
    },
    "/v1/responses": {
        "background": True,
        "conversation": "conv_1",
        "max_tool_calls": 3,
        "previous_response_id": "resp_1",
        "prompt": {"id": "pmpt_1"},
        "store": True,
        "top_logprobs": 3,
        "truncation": "auto",
    },
    "/v1/embeddings": {
        "dimensions": 7,
        "truncate_prompt_tokens": 8,
    },
    "/v1/messages": {
        "container": "container_1",
        "context_management": {},
        "mcp_servers": [],
    },
    "/api/chat": {
        "options.mirostat": 1,
        "options.num_gpu": 1,
        "options.num_thread": 2,
    },
    "/api/embed": {
        "dimensions": 7,
        "options.num_thread": 2,
    },
    "/api/generate": {
        "context": [1, 2],
        "images": ["aGVsbG8="],
        "suffix": "the end",
        "template": "{{ .Prompt }}",
    },
}


def parameters(path: str) -> tuple[list[str], list[str]]:
    """The parameters of an endpoint: those that do something, and those that are taken without."""
    read = _names_read(BODIES[path])
    honoured, taken = [], []
    for prefix, model in (("", BODIES[path]), ("options.", _options(BODIES[path]))):
        for name, info in model.model_fields.items() if model is not None else ():
            if name in REFUSED.get(path, {}) or name == "options":
                continue
            shown = f"`{prefix}{info.alias or name}`"
            if name in read:
                honoured.append(shown)
            elif values := _only(info.annotation):
                taken.append(f"{shown} ({', '.join(values)})")
            else:
                taken.append(shown)
    return honoured, taken


def _options(body: type[BaseModel]) -> type[BaseModel] | None:
    if body in (ollama_embed.EmbedBody, ollama_embed.EmbeddingsBody):
        return ollama_embed.EmbedOptions
    return ollama.Options if "options" in body.model_fields else None


def _only(annotation: Any) -> list[str]:
    """The values that a field is confined to, but for null; none: it takes any."""
    found = []
    for part in get_args(annotation) or (annotation,):
        if part is NoneType:
            continue
        if get_origin(part) is not Literal:
            return []
        found += [f"`{value!r}`".replace("False", "false") for value in get_args(part)]
    return [value.replace("'", '"') for value in found]


def _names_read(body: type[BaseModel]) -> set[str]:
    """Every name that is read as an attribute, or listed to be read as one, where the body and what
    it is made from are defined."""
    names: set[str] = set()
    modules = {kind.__module__ for kind in body.__mro__ if kind.__module__.startswith("earnest")}
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.GeneratorExp | ast.DictComp) and "getattr" in ast.dump(node):
                names |= {
                    part.value
                    for part in ast.walk(node.generators[0].iter)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                }
    return names


def parameters_table() -> str:
    """What each endpoint takes."""
    lines = []
    for path in BODIES:
        honoured, taken = parameters(path)
        lines.append(f"**`{path}`**")
        lines.append("")
        lines.append(f"- honoured: {', '.join(honoured)}")
        if taken:
            lines.append(f"- taken, and of no consequence: {', '.join(taken)}")
        if path in REFUSED:
            lines.append("- refused by name, among others: " + _listed(REFUSED[path]))
        lines.append("")
    return "\n".join(lines).strip()


def _listed(names: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def options_table() -> str:
    """The options of `earnest serve`."""
    lines = ["| option | default | |", "|---|---|---|"]
    context = click.Context(command)
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        name = option.opts[-1]
        metavar = "" if option.is_flag else " " + option.make_metavar(context)
        metavar = metavar.replace("|", "\\|")  # it stands in a table
        default = "" if option.is_flag or option.multiple else option.default
        shown = "" if default is None or "Sentinel" in type(default).__name__ else default
        lines.append(f"| `{name}{metavar}` | {shown} | {option.help or ''} |")
    return "\n".join(lines)


def arguments_table() -> str:
    """The arguments of `earnest.serve.ray_app:build`."""
    from earnest.serve.ray_app import Options

    told = dict(
        re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(Options) or "", re.MULTILINE)
    )
    lines = ["| argument | default | |", "|---|---|---|"]
    for name, info in Options.model_fields.items():
        default = "" if info.is_required() or info.default is None else info.default
        shown = "" if info.default_factory is not None else default
        lines.append(f"| `{name}` | {shown} | {' '.join(told[name].split())} |")
    return "\n".join(lines)


# The pages that have tables, and what makes each of them.
PAGES = {
    _DOCS / "serve.md": {"options": options_table, "parameters": parameters_table},
    _DOCS / "ray.md": {"arguments": arguments_table},
}


def written(page: Path) -> str:
    """The page with its tables as the code says."""
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}: from the code -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} has no place for {name}")
        text = f"{before}{begin}\n{make()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        if "--check" not in sys.argv:
            page.write_text(written(page), encoding="utf-8")
        elif written(page) != page.read_text(encoding="utf-8"):
            sys.exit(f"{page} is not as the code says")
