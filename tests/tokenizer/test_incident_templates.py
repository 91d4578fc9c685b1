"""Incidents with tokens and chat templates (docs/incidents.md), by their numbers."""

from __future__ import annotations

import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import earnest.hub
from earnest.checkpoint.export import export
from earnest.checkpoint.open import open_checkpoint
from earnest.errors import EarnestError, TemplateError
from earnest.tokenizer import ChatTemplate, Tokenizer

STORIES = Path(earnest.hub.__file__).parent / "stories"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from earnest.checkpoint.containers.gguf import open_file

    path = tmp_path_factory.mktemp("incidents") / "stories.gguf"
    export(open_checkpoint(STORIES), path)
    return dict(open_file(path).metadata)


@pytest.mark.parametrize(
    "piece",
    ["<0x-1>", "<0x+1>", "<0xZZ>", "<0x100>", "<0x 1>", "<0x>", "<0xＡＢ>", "<0x0a>", "<0x1_1>"],
)
@pytest.mark.parametrize("kind", [1, 6])
def test_incident_07_llama_cpp_25969_bytes_that_are_none(
    metadata: dict[str, Any], piece: str, kind: int
) -> None:
    """A piece that looks like a byte and is none stays the text it is, or the file is refused."""
    at = metadata["tokenizer.ggml.tokens"].index("<0x41>")
    tokens, types = (list(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type"))
    tokens[at], types[at] = piece, kind
    changed = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    try:
        tokenizer = Tokenizer.from_gguf(changed)
    except EarnestError:
        return
    assert tokenizer.token_bytes(at) == piece.encode()
    assert tokenizer.decode(tokenizer.encode("héllo wörld\x01\x00A", add_special_tokens=False))


# Ways out of sandboxes: of the advisories, of write-ups of them, and what they have in common.
ESCAPES = [
    *(
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ ().__class__.__bases__[0].__subclasses__()[40]('MARK', 'w') }}",
        "{{ ''['__cl' ~ 'ass__'] }}",
        "{{ ''[['__cl', 'ass__'] | join] }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages | attr('__class__') | attr('__mro__') }}",
        "{{ messages | attr('__cla' ~ 'ss__') }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('touch MARK') }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ joiner.__init__.__globals__.os.system('touch MARK') }}",
        "{{ namespace.__init__.__globals__.os.system('touch MARK') }}",
        "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
        "{{ strftime_now.__globals__['__builtins__'].__import__('os').system('touch MARK') }}",
        "{{ url_for.__globals__ }}",
        "{{ config.__class__.__init__.__globals__['os'].system('touch MARK') }}",
        "{{ request.application.__globals__.__builtins__.__import__('os') }}",
        "{{ ''.__doc__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__subclasses__ }}",
        "{{ (messages | map('attr', '__class__') | first).__mro__ }}",
        "{{ messages | sort(attribute='__class__.__init__.__globals__') }}",
        "{{ (messages | groupby('__class__'))[0].grouper.__base__ }}",
        "{{ messages | selectattr('__class__.__mro__') | list }}",
        "{% set x = messages.append %}{{ x(1) }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
        "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
        "{% set f %}{% endset %}{{ f.__class__.__init__.__globals__ }}",
        "{{ (messages | tojson).__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.join.__self__.__class__.__base__.__subclasses__() }}",
        "{{ g.pop.__globals__.__builtins__ }}",
        "{% block a %}{% endblock %}{{ self.a.__globals__ }}",
        "{{ loop.__class__ }}{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{{ (range(3) | batch(1)).gi_frame.f_globals }}",
        "{{ (messages | map('upper')).gi_frame.f_builtins }}",
        "{{ (messages | select).gi_code.co_consts }}",
        "{{ raise_exception.func_globals }}",
        "{{ raise_exception.__code__ }}",
        "{{ raise_exception.__closure__ }}",
    )
]
# CVE-2024-56326, CVE-2025-27516: `str.format` reached by a way that the sandbox does not watch.
FORMATS = [
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0[__class__]}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(raise_exception) }}",
    "{% set ns = namespace(f='{0.__class__}'.format) %}{{ ns.f(1) }}",
    "{{ ['{0.__class__.__mro__}'.format] | map('first') | list }}{{ ('{0.__class__}'.format)(1) }}",
    "{{ ('{0.__class__.__base__}' | attr('format'))(1) }}",
    "{{ ('{a.__class__}' | attr('format_map'))({'a': 1}) }}",
    "{{ ('{0.__class__}' | attr('for' ~ 'mat'))(1) }}",
    "{{ (['{0.__class__}'] | map('attr', 'format') | first)(1) }}",
    "{{ (['{0.__class__}'] | map(attribute='format') | first)(1) }}",
    "{{ ('{0.__class__}' | safe).format(1) }}",
    "{{ ('{0.__class__}' | e).format(1) }}",
    "{% macro m(f) %}{{ f(1) }}{% endmacro %}{{ m('{0.__class__}'.format) }}",
    "{{ '%s' | format(messages.__class__) }}",
    "{{ '{:{}}'.format(1, '{0.__class__}') }}",
    # CVE-2024-56201: names of templates that end up in compiled code
    "{% include 'x' ~ '\\n' %}",
    '{% extends \'{__import__("os").system("touch MARK")}\' %}',
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% from 'os' import system %}{{ system('touch MARK') }}",
]


def must_not_get_out(tmp_path: Path, source: str) -> None:
    mark = tmp_path / "mark"
    try:
        text = ChatTemplate(source.replace("MARK", str(mark)), seconds=2).render(USER)
    except TemplateError:
        text = ""
    assert not mark.exists()
    for inside in ("class '", "<built-in", "<function", "<module", "subclasses", "object at 0x"):
        assert inside not in text, text


@pytest.mark.parametrize("source", ESCAPES)
def test_incident_12_cve_2024_34359_templates_that_run_programs(
    tmp_path: Path, source: str
) -> None:
    must_not_get_out(tmp_path, source)


@pytest.mark.parametrize("source", FORMATS)
def test_incident_14_cve_2025_27516_ways_around_the_sandbox(tmp_path: Path, source: str) -> None:
    must_not_get_out(tmp_path, source)


def test_incident_14_cve_2024_56326_jinja_is_new_enough() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert "jinja2>=3.1.6" in project["dependencies"]
    assert tuple(map(int, version("jinja2").split(".")[:3])) >= (3, 1, 6)


def test_incident_15_cve_2025_62426_rendering_is_bounded_in_time() -> None:
    """Whatever a checkpoint's template does with the messages, it ends when its time is over."""
    source = "{% for a in messages %}{% for b in range(99999) %}{% for c in range(99999) %}"
    source += "{% endfor %}{% endfor %}{% endfor %}"
    begun = time.thread_time()
    with pytest.raises(TemplateError, match=r"takes longer than 0\.3 seconds"):
        ChatTemplate(source, seconds=0.3).render(USER)
    assert time.thread_time() - begun < 5
