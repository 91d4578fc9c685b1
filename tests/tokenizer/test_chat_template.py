"""Chat templates: the published ones to the letter, the built-in ones equal to them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from earnest.errors import PromptError, TemplateError, UserError
from earnest.tokenizer import ChatTemplate, Tokenizer, builtin_template

BUILTIN = {
    "ernie-4.5-0.3b-base-pt/chat_template.jinja": "ernie",
    "ernie-4.5-21b-a3b-thinking/chat_template.jinja": "ernie-thinking",
}
PUBLISHED = {name: file for file, name in BUILTIN.items()}
USER = [{"role": "user", "content": "hi"}]


def test_all_published_renderings(shared: Path, ernie: Tokenizer) -> None:
    goldens = json.loads((shared / "data/goldens/chat_templates.json").read_text("utf-8"))
    assert len(goldens["cases"]) == 62
    for case in goldens["cases"]:
        source = (shared / "data/tokenizer" / case["template"]).read_text("utf-8")
        templates = [bounded(source)]
        if case["template"] in BUILTIN:
            templates.append(builtin_template(BUILTIN[case["template"]]))
        arguments = {"add_generation_prompt": None} | case["arguments"] | goldens["special_tokens"]
        for template in templates:
            text = template.render(case["messages"], **arguments)
            assert text == case["text"], (template.origin, case["case"])
        if "ids" in case:
            assert ernie.encode(case["text"]) == case["ids"]


def test_the_folders_own_template_is_used(ernie: Tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, *USER]
    text = ernie.apply_chat_template(messages)
    assert text == "<|begin_of_sentence|>S\nUser: hi\nAssistant: "
    assert (
        ernie.apply_chat_template(messages, add_generation_prompt=False)
        == text[: -len("Assistant: ")]
    )
    thinking = ernie.apply_chat_template(USER, chat_template=builtin_template("ernie-thinking"))
    assert thinking.startswith("<|im_start|>system\n") and thinking.endswith("<think>\n")


# --- built-in templates against the published ones ----------------------------------------------


@cache
def plain(source: str) -> jinja2.Template:
    """A template in plain jinja2, set up as chat templates expect."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


@cache
def bounded(source: str) -> ChatTemplate:
    return ChatTemplate(source)


def reference(source: str, messages: list[dict[str, Any]], **variables: Any) -> str | None:
    """What plain jinja2 makes of it; None for an error."""
    try:
        return plain(source).render(messages=messages, **variables)
    except (TypeError, jinja2.TemplateError):
        return None


def ours(template: ChatTemplate, messages: list[dict[str, Any]], **variables: Any) -> str | None:
    try:
        return template.render(messages, **variables)
    except TemplateError:
        return None


MARKS = ["<think>", "</think>", "<tool_output>", "</tool_output>", "\n", "\n\n", "User: ", "中文"]
TEXT = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=6).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": VALUES})
CALLS = st.lists(CALL | st.fixed_dictionaries({"function": CALL}), max_size=3)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXT}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(TEXT, max_size=1)}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": VALUES}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT | st.none()},
        optional={"thoughts": TEXT | st.none(), "tool_calls": CALLS | st.none()},
    ),
)
TOOLS = st.none() | st.lists(st.fixed_dictionaries({"function": VALUES}), max_size=3)


@settings(max_examples=400, deadline=None)
@given(
    messages=st.lists(MESSAGE, max_size=7), tools=TOOLS, system_settings=st.none() | TEXT,
    prompt=st.booleans(),
)  # fmt: skip
def test_builtin_thinking_equals_the_published(
    shared: Path,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    system_settings: str | None,
    prompt: bool,
) -> None:
    source = (shared / "data/tokenizer" / PUBLISHED["ernie-thinking"]).read_text("utf-8")
    variables = {
        "tools": tools, "system_settings": system_settings, "add_generation_prompt": prompt,
    }  # fmt: skip
    expected = reference(source, messages, **variables)
    assert ours(builtin_template("ernie-thinking"), messages, **variables) == expected
    assert ours(bounded(source), messages, **variables) == expected


@settings(max_examples=300, deadline=None)
@given(
    messages=st.lists(MESSAGE, max_size=7),
    variables=st.fixed_dictionaries(
        {}, optional={"add_generation_prompt": st.booleans(), "cls_token": TEXT, "sep_token": TEXT}
    ),
)
def test_builtin_ernie_equals_the_published(
    shared: Path, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    source = (shared / "data/tokenizer" / PUBLISHED["ernie"]).read_text("utf-8")
    expected = reference(source, messages, **variables)
    variables = {"add_generation_prompt": None} | variables
    assert ours(builtin_template("ernie"), messages, **variables) == expected
    assert ours(bounded(source), messages, **variables) == expected


def test_the_builtin_templates_are_no_copies(shared: Path) -> None:
    for name, file in PUBLISHED.items():
        theirs = (shared / "data/tokenizer" / file).read_text("utf-8")
        own = builtin_template(name).source
        assert not {line for line in theirs.split("\n") if len(line.strip()) > 40} & set(
            own.split("\n")
        )


def test_an_unknown_builtin_template_is_refused() -> None:
    with pytest.raises(UserError, match="ernie or ernie-thinking"):
        builtin_template("llama")


# --- what templates may use -----------------------------------------------------------------------


FEATURES = {
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}": "013",
    "{{ {'b': 'é<&>', 'a': [1, none, true]} | tojson }}": '{"b": "é<&>", "a": [1, null, true]}',
    "{{ {'a': 1} | tojson(indent=2) }}": '{\n  "a": 1\n}',
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}": '{"a":2,"b":1}',
    "{% generation %}x{% endgeneration %}y": "xy",
    "{{ strftime_now('%%') }}": "%",
    "{{ messages[0]['content'] ~ messages[0].content.upper() }}": "hiHI",
    "  {% if true %}\n  a\n  {% endif %}\n": "  a\n",
    "{{ messages | map(attribute='content') | join(', ') }}": "hi",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{{ 'a,b'.split(',')[::-1] | join }}": "ba",
    "{{ '{}-{x:>3}'.format('a', x=1) }}": "a-  1",
    "{{ '%s|%03d' | format('b', 7) }}{{ '**%s**' % 'c' }}": "b|007**c**",
    "{{ 'a\nb' | indent(2) }}": "a\n  b",
    "{{ ' x ' | trim }}{{ 'aXa' | replace('X', '-') }}": "xa-a",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}": "1",
    "{% macro f(x, y=2) %}{{ x * y }}{% endmacro %}{{ f(3) }}{{ f('ab', 2) }}": "6abab",
    "{{ none }}{{ undefined_name }}{{ [1, 'a'] }}{{ dict(a=1) }}": "None[1, 'a']{'a': 1}",
    "{{ 7 // 2 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ 1.55 | round(1) }}{{ [1, 2.5] | sum }}": "33231.63.5",
    "{% for x in [3, 1, 2] | sort if x > 1 %}{{ x }}{{ loop.last }}{% endfor %}": "2False3True",
    "{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}": "a1",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}": "a1B",
}


@pytest.mark.parametrize(("source", "text"), FEATURES.items())
def test_what_templates_use(source: str, text: str) -> None:
    assert ChatTemplate(source).render(USER) == text


def test_messages_cannot_be_changed() -> None:
    messages = [{"role": "user", "content": ["x"]}]
    for source in ("{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}",
                   "{{ messages[0].content.pop() }}", "{{ messages.clear() }}"):  # fmt: skip
        with pytest.raises(TemplateError, match="unsafe"):
            ChatTemplate(source).render(messages)
    assert messages == [{"role": "user", "content": ["x"]}]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a\nb\n{% if %}", "cannot be compiled at line 3"),
        ("a\n{{ raise_exception('roles must alternate') }}", "line 2: roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("\n\n\n{{ nothing.at.all }}", "line 4: 'nothing' is undefined"),
        ("{{ nothing | tojson }}", "not JSON serializable"),
        ("{{ 'x' + 1 }}", "TypeError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ 'a' | pprint }}", "No filter named 'pprint'"),
    ],
)
def test_errors_name_the_line(source: str, problem: str) -> None:
    template = ChatTemplate(source, origin="chat_template.jinja")
    with pytest.raises(TemplateError, match=problem) as caught:
        template.render(USER)
    assert str(caught.value).startswith("chat_template.jinja ")


@pytest.mark.parametrize("messages", ["hi", {"role": "user"}, ["hi"], [1], b"hi"])
def test_messages_must_be_messages(messages: Any) -> None:
    with pytest.raises(PromptError, match="list of mappings"):
        ChatTemplate("x").render(messages)
    with pytest.raises(PromptError, match="list of mappings"):
        builtin_template("ernie").render(messages)


def test_text_parts_are_refused_by_the_builtin_template() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with pytest.raises(TemplateError, match="content of a user message is not text"):
        builtin_template("ernie").render(messages)
