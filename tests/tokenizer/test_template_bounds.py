"""Hostile chat templates: none takes all the time or all the memory."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earnest.errors import TemplateError
from earnest.tokenizer import ChatTemplate
from earnest.tokenizer.template import MAX_SOURCE_CHARACTERS

USER = [{"role": "user", "content": "hi"}]
TIME, TEXT, ENTRIES, WIDTH = "takes longer", "makes a text longer", "entries", "wider than"


def repeated(setup: str, step: str, times: int = 200) -> str:
    return f"{setup}{{% for i in range({times}) %}}{step}{{% endfor %}}"


STRING = "{% set ns = namespace(a='aaaaaaaaaa') %}"
LIST = "{% set ns = namespace(a=[1]) %}"

BOMBS = {
    "loops without output": ("{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4, TIME),
    "filtered loop": (
        repeated("", "{% for b in range(99999) if false %}{% endfor %}", 99999), TIME),
    "searching": (
        "{% set b = range(99999) | list %}"
        "{{ range(100000, 199999) | select('in', b) | list }}", TIME),
    "searching in a condition": (
        "{% set b = range(99999) | list %}"
        "{% for x in range(-99999, 0) if x in b %}{% endfor %}", TIME),
    "comparing": (
        "{% set ns = namespace(a=[1], b=[1]) %}"
        + repeated("", "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}", 15)
        + repeated("", "{% set x = ns.a == ns.b %}", 99999), TIME),
    "sorting": (repeated("", "{% set x = range(99999) | sort %}", 99999), TIME),
    "characters": ("{% set a = 'a' * 4000000 %}"
                   "{% for b in a %}{% for c in a %}{% endfor %}{% endfor %}", TIME),
    "output": (repeated("", "{{ 'x' * 1000 }}", 99999), "writes more than"),
    "product": ("{{ 'a' * 10 ** 10 }}", TEXT),
    "product of a list": ("{{ ([1] * 10 ** 9) | length }}", TEXT),
    "product of a number": ("{{ 10 ** 9 * 'ab' }}", TEXT),
    "power": ("{{ 10 ** (10 ** 10) }}", "absurdly large number"),
    "power of a power": ("{{ (10 ** 1000) ** 1000 }}", "absurdly large number"),
    "squaring": (repeated("{% set ns = namespace(a=9) %}", "{% set ns.a = ns.a * ns.a %}"),
                 "absurdly large number"),
    "tilde": (repeated(STRING, "{% set ns.a = ns.a ~ ns.a %}"), TEXT),
    "plus": (repeated(STRING, "{% set ns.a = ns.a + ns.a %}"), TEXT),
    "plus of lists": (repeated(LIST, "{% set ns.a = ns.a + ns.a %}"), ENTRIES),
    "block set": (repeated(STRING, "{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = b %}"),
                  TEXT),
    "macro": ("{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}"
              + repeated(STRING, "{% set ns.a = m(ns.a) %}"), TEXT),
    "filter block": ("{% filter replace('a', 'aaaaaaaaaa') %}" * 18 + "a" + "{% endfilter %}" * 18,
                     TEXT),
    "autoescape": ("{% autoescape true %}" + repeated(STRING, "{% set ns.a = (ns.a | safe) * 10 %}")
                   + "{% endautoescape %}", TEXT),
    "many texts": ("".join(f"{{% set a{i} = 'x' * 4000000 %}}" for i in range(1500)), "in all"),
    "nested lists": (repeated(LIST, "{% set ns.a = [ns.a, ns.a] %}"), ENTRIES),
    "nested tuples": (repeated(LIST, "{% set ns.a = (ns.a, ns.a) %}"), ENTRIES),
    "nested mappings": (repeated(LIST, "{% set ns.a = {'x': ns.a, 'y': ns.a} %}"), ENTRIES),
    "nested dict()": (repeated(LIST, "{% set ns.a = dict(x=ns.a, y=ns.a) %}"), ENTRIES),
    "nested namespaces": (repeated(LIST, "{% set ns.a = namespace(x=ns.a, y=ns.a) %}"), ENTRIES),
    "views": (repeated(LIST, "{% set ns.a = [ns.a, ns.a] %}", 15)
              + "{% set v = {1: ns.a, 2: ns.a, 3: ns.a}.values() %}{{ [v, v, v] }}", ENTRIES),
    "a namespace in itself": ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", ENTRIES),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested more than"),
    "recursive loop": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "nested more"),
    "recursive block": ("{% block a %}{{ self.a() }}{% endblock %}", "nested more than"),
    "center": ("{{ 'a'.center(10 ** 10) }}", TEXT),
    "zfill": ("{{ 'a'.zfill(10 ** 10) }}", TEXT),
    "center filter": ("{{ 'a' | center(10 ** 10) }}", "No filter named"),
    "percent": ("{{ '%1000000000d' % 1 }}", WIDTH),
    "percent star": ("{{ '%*d' % (1000000000, 1) }}", WIDTH),
    "percent precision": ("{{ '%.1000000000f' % 1 }}", WIDTH),
    "percent many": ("{{ ('%(a)s' * 1000) % {'a': 'x' * 100000} }}", TEXT),
    "format filter": ("{{ '%1000000000d' | format(1) }}", WIDTH),
    "format": ("{{ '{:1000000000}'.format(1) }}", WIDTH),
    "format nested": ("{{ '{:{}}'.format(1, 1000000000) }}", WIDTH),
    "format many": ("{{ ('{0}' * 10000).format('x' * 1000000) }}", "in all"),
    "format_map": ("{{ '{a}'.format_map({'a': 1}) }}", "may not"),
    "join": ("{{ ('a' * 1000000).join(range(99999)) }}", TEXT),
    "join filter": ("{{ range(99999) | join('a' * 1000000) }}", TEXT),
    "replace": ("{{ ('a' * 1000000).replace('a', 'b' * 1000) }}", TEXT),
    "replace nothing": ("{{ ('a' * 1000000).replace('', 'b' * 1000) }}", TEXT),
    "replace filter": ("{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}", TEXT),
    "replace in a map": ("{{ range(99999) | map('replace', '1', 'a' * 1000000) | list | length }}",
                         "in all"),
    "indent": ("{{ ('\n' * 1000000) | indent(900) }}", TEXT),
    "indent far": ("{{ 'a' | indent(10 ** 9) }}", "indents by more"),
    "indent JSON": ("{{ {'a': 1} | tojson(indent=10 ** 9) }}", "indents JSON"),
    "escape": ("{{ ('<' * 4000000) | e }}", TEXT),
    "split": ("{{ ('a ' * 2000000).split() }}", ENTRIES),
    "list": ("{{ ('a' * 2000000) | list }}", ENTRIES),
    "sum of lists": ("{{ ([[1]] * 99999) | sum(start=[]) }}", "adds numbers only"),
    "round": ("{{ 1.5 | round(10 ** 9, 'ceil') }}", "absurd number of digits"),
    "bytes": ("{{ (5).to_bytes(10 ** 9, 'big') }}", "may not"),
    "encode": ("{{ 'a'.encode() }}", "may not"),
    "expandtabs": ("{{ '\t'.expandtabs(10 ** 9) }}", "may not"),
    "fromkeys": ("{{ {}.fromkeys(range(99999), 'a' * 1000000) }}", "may not"),
    "lipsum": ("{{ lipsum(n=10 ** 7) }}", "undefined"),
    "batch": ("{{ [1] | batch(10 ** 9, 'x') | list }}", "No filter named"),
    "date": ("{{ strftime_now('%1000000000d') }}", "unusual way"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "brackets": ("{{ " + "[" * 5000 + "]" * 5000 + " }}", "nested too deeply"),
    "long sum": ("{{ " + "+".join(["1"] * 9000) + " }}", "nested too deeply"),
    "long call": ("{{ f(" + "a," * 20000 + "1) }}", "parts"),
    "nested loops": ("{% for a in x %}" * 100 + "{% endfor %}" * 100, "cannot be compiled"),
    "long number": ("{{ " + "9" * 6000 + " }}", "cannot be compiled"),
    "long source": ("x" * (MAX_SOURCE_CHARACTERS + 1), "is too long"),
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "internals by filter": ("{{ (messages | attr('__class__')).__mro__ }}", "unsafe"),
    "internals of a function": ("{{ raise_exception.__globals__.a }}", "unsafe"),
    "internals by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_defused(name: str) -> None:
    source, problem = BOMBS[name]
    with pytest.raises(TemplateError, match=problem):
        ChatTemplate(source, seconds=0.3 if problem == TIME else 60).render(USER)


def test_every_thread_has_its_own_clock() -> None:
    results: dict[int, Any] = {}
    endless = ChatTemplate(BOMBS["loops without output"][0], seconds=0.5)
    quick = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")

    def work(number: int) -> None:
        try:
            results[number] = (endless if number % 2 else quick).render(USER)
        except TemplateError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[2] == "hi"
    assert TIME in results[1] and TIME in results[3]


def test_debuggers_and_coverage_are_left_alone() -> None:
    lines = []

    def trace(frame: Any, event: str, argument: Any) -> Any:
        lines.append(event)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(TemplateError, match=TIME):
            ChatTemplate(
                "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3, seconds=0.2
            ).render(USER)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert "line" in lines


def test_large_messages_are_refused_by_size_and_usual_ones_are_not() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert len(template.render([{"role": "user", "content": "x" * 2_000_000}])) == 2_000_000
    with pytest.raises(TemplateError, match=TEXT):
        template.render([{"role": "user", "content": "x" * 5_000_000}])


ATOMS = ["'ab'", "7", "messages", "[1, 2]", "{'a': 1}", "x", "range(9)", "none", "2.5"]
OPERATORS = ["+", "*", "**", "%", "~", "-", "//", "==", "in"]
FILTERS = ["list", "join", "length", "tojson", "string", "sort", "first", "sum", "int", "indent"]


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("({} | {})".format, inner, st.sampled_from(FILTERS)),
        st.builds("({} | replace('a', {}))".format, inner, inner),
        st.builds("({}).format({})".format, inner, inner),
        st.builds("{0}.join({0})".format, inner),
        st.builds("[{0}, {0}]".format, inner),
        st.builds("({})[::-1]".format, inner),
    )


@settings(max_examples=300, deadline=None)
@given(expression=st.recursive(st.sampled_from(ATOMS), larger, max_leaves=12))
@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's, about [1](2) and the like
def test_random_programs_end_or_fail_typed(expression: str) -> None:
    source = f"{{% for x in range(9) %}}{{{{ {expression} }}}}{{% endfor %}}"
    with contextlib.suppress(TemplateError):
        ChatTemplate(source, seconds=2).render(USER)


@settings(max_examples=300, deadline=None)
@given(source=st.text(alphabet="{}%#-ab |'\"()[]\n1.~+if endfor", max_size=40))
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_random_text_is_a_template_or_refused(source: str) -> None:
    with contextlib.suppress(TemplateError):
        ChatTemplate(source, seconds=2).render(USER)
