"""jinja2 for strangers' templates: sandboxed, and bounded in time and in size.

jinja2's own sandbox keeps a template away from Python's internals and from changing its input. It
does not keep `{{ 'a' * 10**10 }}` from taking all memory, nor two nested loops from running for
years. So, here:

* **Time.** Everything that can repeat looks at the clock: each turn of a loop, each call, filter,
  comparison, concatenation and slice. The looks are written into the parsed template, so nothing
  of the interpreter (trace functions, signals, threads) is touched and it works in every thread.
* **Size.** No value gets large: what can make one (operators, concatenation, string methods,
  filters, list literals, macros) is measured, where possible before it happens. Since values are
  small, no single step between two looks at the clock takes long.

The measure of a value counts what is in it as often as it is in it: ten lists that hold ten times
the list before have ten thousand million entries, and comparing or printing them would take that
long.
"""

from __future__ import annotations

import json
import re
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 4 * 2**20
"""The longest text a template may make, of any one value and of the whole output."""

MAX_ITEMS = 200_000
"""The most entries in a value, those of its entries included."""

_MAX_TOTAL = 32 * MAX_CHARACTERS
_MAX_BITS = 8192
_MAX_WIDTH = 1000
_MAX_DEPTH = 100
_MAX_NODES = 20_000


class LimitError(jinja2.TemplateRuntimeError):
    """A template exceeds a bound."""


class _Budget:
    """What one rendering may still take."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._characters = 0
        self.depth = 0

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise LimitError(f"it takes longer than {self._seconds:g} seconds")

    def charge(self, characters: int) -> None:
        """Account for a text that is made; `characters` long, all told at most `_MAX_TOTAL`."""
        if characters > MAX_CHARACTERS:
            raise LimitError(f"it makes a text longer than {MAX_CHARACTERS:,} characters")
        self._characters += characters
        if self._characters > _MAX_TOTAL:
            raise LimitError(f"its texts have more than {_MAX_TOTAL:,} characters in all")


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Everything done to templates inside this must be done in so many seconds."""
    token = _BUDGET.set(_Budget(seconds))
    try:
        yield
    finally:
        _BUDGET.reset(token)


# --- measuring ----------------------------------------------------------------------------------


def _tick(value: Any = True) -> Any:
    _BUDGET.get().tick()
    return value


def _sized(value: Any) -> Any:
    """`value`, if it is not too large; iterators are counted while they run."""
    _BUDGET.get().tick()
    if isinstance(value, str):
        _BUDGET.get().charge(len(value))
    elif isinstance(value, Iterator):
        return _counted(value)
    else:
        _measure(value)
    return value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for count, item in enumerate(items):
        if count >= MAX_ITEMS:
            raise LimitError(f"it makes a list of more than {MAX_ITEMS:,} entries")
        yield _tick(item)


def _measure(value: Any) -> int:
    """Characters in a value, all its entries' included, about as many as printing it takes."""
    characters, items, stack = 0, 0, [value]
    while stack:
        found = stack.pop()
        items += 1
        if isinstance(found, str | bytes):
            characters += len(found)
        elif isinstance(found, int):
            if found.bit_length() > _MAX_BITS:
                raise LimitError("it makes an absurdly large number")
        else:
            for entries in _entries(found):
                if items + len(stack) + len(entries) > MAX_ITEMS:
                    raise LimitError(f"it makes a value of more than {MAX_ITEMS:,} entries")
                stack += entries
    if characters > MAX_CHARACTERS:
        raise LimitError(f"it makes a value of more than {MAX_CHARACTERS:,} characters")
    return characters + 8 * items


def _entries(value: Any) -> tuple[Collection[Any], ...]:
    if isinstance(value, Namespace):
        value = value._Namespace__attrs  # its own dict; everything else reads a template's names
    if isinstance(value, Mapping):
        return value.keys(), value.values()
    if isinstance(value, list | tuple | Set | ValuesView):
        return (value,)
    return ()


def _text(value: Any) -> str:
    """A value as text, refusing first what would be too long."""
    if isinstance(value, str):
        text = value
    else:
        _measure(value)
        text = str(value)
    _BUDGET.get().charge(len(text))
    return text


def _concat(parts: Iterable[Any]) -> str:
    """The joined text of parts: `~`, and what macros and block assignments return."""
    texts = []
    total = 0
    for part in parts:
        text = part if isinstance(part, str) else _text(part)
        total += len(text)
        if total > MAX_CHARACTERS:
            break
        texts.append(text)
    _BUDGET.get().tick()
    _BUDGET.get().charge(total)
    return "".join(map(str, texts))


# --- operators ----------------------------------------------------------------------------------


def _check_binop(operator: str, left: Any, right: Any) -> None:
    charge = _BUDGET.get().charge
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (abs(right) if operator == "**" else 1)
        if operator == "**" and bits > _MAX_BITS:
            raise LimitError("it makes an absurdly large number")
    elif operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                charge(len(text) * max(times, 0))
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        charge(len(left) + len(right))
    elif operator == "%" and isinstance(left, str | bytes):
        _check_percent(left, right)


def _check_percent(template: str | bytes, values: Any) -> None:
    if isinstance(template, bytes):
        raise LimitError("it formats bytes")
    for width, precision in _PERCENT_NUMBER.findall(template):
        _check_width(width)
        _check_width(precision)
    if isinstance(values, Mapping):
        values = list(values.values())
    elif not isinstance(values, tuple):
        values = [values]
    longest = max((_printed(value) for value in values), default=0)
    _BUDGET.get().charge(len(template) + template.count("%") * (longest + _MAX_WIDTH))


# The width and the precision of a %-format, "*" meaning that an argument gives it.
_PERCENT_NUMBER = re.compile(r"%(?:\([^)]*\))?[-#0 +]*([0-9]+|\*)?(?:\.([0-9]+|\*))?")


def _check_width(digits: str) -> None:
    if digits == "*" or int(digits[:9] or "0") > _MAX_WIDTH:
        raise LimitError(f"it formats a value wider than {_MAX_WIDTH} characters")


def _printed(value: Any) -> int:
    """At most how long a value is when printed (`repr` may write a character as ten)."""
    return len(value) if isinstance(value, str) else 12 * _measure(value)


class _Formatter(SandboxedFormatter):
    """`str.format` with its widths and its whole length bounded."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        for digits in re.findall("[0-9]+", format_spec):
            _check_width(digits)
        _measure(value)
        return _sized(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        _measure(value)
        return _sized(super().convert_field(value, conversion))


# --- methods ------------------------------------------------------------------------------------

_HARMLESS: dict[type, str] = {
    str: "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip partition "
    "removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith "
    "strip swapcase title upper",
    dict: "copy get items keys values",
    list: "copy count index",
    tuple: "count index",
    int: "bit_length is_integer",
    float: "is_integer",
}
_PADDING = ("center", "ljust", "rjust", "zfill")


def _check_method(owner: Any, name: str, args: tuple[Any, ...]) -> None:
    for kind, harmless in _HARMLESS.items():
        if isinstance(owner, kind) and name in harmless.split():
            return
    if isinstance(owner, str):
        if name in _PADDING and args and isinstance(args[0], int):
            _BUDGET.get().charge(max(len(owner), args[0]))
            return
        if name == "replace" and len(args) >= 2 and all(isinstance(a, str) for a in args[:2]):
            _check_replace(owner, args[0], args[1])
            return
    raise LimitError(f"it calls {type(owner).__name__}.{name}, which templates may not")


def _check_replace(text: str, old: str, new: str) -> None:
    times = text.count(old)
    _BUDGET.get().charge(len(text) + times * max(len(new) - len(old), 0))


# --- filters ------------------------------------------------------------------------------------


def _filter_join(
    environment: jinja2.Environment, value: Any, d: str = "", attribute: Any = None
) -> str:
    items: Iterable[Any] = _counted(value)
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    return _join(_text(d), items)


def _join(separator: str, items: Iterable[Any]) -> str:
    texts = [_text(item) for item in _counted(items)]
    _BUDGET.get().charge(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _filter_replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = _text(value), _text(old), _text(new)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _filter_indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text = _text(value)
    size = len(width) if isinstance(width, str) else int(width)
    if size > _MAX_WIDTH:
        raise LimitError(f"it indents by more than {_MAX_WIDTH} characters")
    _BUDGET.get().charge(len(text) + (text.count("\n") + 1) * max(size, 0))
    return str(FILTERS["indent"](text, width, first, blank))


def _filter_format(value: Any, *args: Any, **kwargs: Any) -> str:
    template, values = _text(value), kwargs or args
    _check_percent(template, values)
    return template % values


def _filter_round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 300:
        raise LimitError("it rounds to an absurd number of digits")
    return FILTERS["round"](value, precision, method)


def _filter_sum(
    environment: jinja2.Environment, iterable: Any, attribute: Any = None, start: Any = 0
) -> Any:
    items: Iterable[Any] = _counted(iterable)
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    total = start
    for item in items:
        if not (isinstance(item, int | float) and isinstance(total, int | float)):
            raise TypeError("sum adds numbers only")
        total += item
    return total


def _filter_list(value: Any) -> list[Any]:
    return list(_counted(value))


def _filter_tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: keys in their order, nothing escaped for HTML."""
    size = len(indent) if isinstance(indent, str) else indent or 0
    if size > 64:
        raise LimitError("it indents JSON by more than 64 characters")
    _measure(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


_PLAIN_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float groupby int items last length
    lower map max min reject rejectattr reverse safe select selectattr sort title trim truncate
    unique upper wordcount
"""


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose result is measured; keeps jinja2's marks of what to pass to it."""

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _BUDGET.get().tick()
        return _sized(function(*args, **kwargs))

    return bounded


def _filters() -> dict[str, Callable[..., Any]]:
    own: dict[str, Callable[..., Any]] = {
        "format": _filter_format,
        "indent": _filter_indent,
        "join": jinja2.pass_environment(_filter_join),
        "list": _filter_list,
        "replace": _filter_replace,
        "round": _filter_round,
        "string": _text,
        "sum": jinja2.pass_environment(_filter_sum),
        "tojson": _filter_tojson,
    }
    plain = {name: FILTERS[name] for name in _PLAIN_FILTERS.split()}
    guards: dict[str, Callable[..., Any]] = {"_tick": _tick, "_sized": _sized, "_concat": _concat}
    return {name: _bounded(function) for name, function in (own | plain).items()} | guards


# --- globals ------------------------------------------------------------------------------------


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"%[^a-zA-Z%]", pattern):
        raise LimitError("it formats the date in an unusual way")
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# --- the environment ----------------------------------------------------------------------------


class _Guards(NodeTransformer):
    """Writes looks at the clock and measurements into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node.lineno))
        if node.test is not None:
            node.test = nodes.And(
                _guarded(nodes.Const(True), "_tick", node.lineno), node.test, lineno=node.lineno
            )
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(node, "_tick", node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(nodes.List(node.nodes, lineno=node.lineno), "_concat", node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sliced = isinstance(node.arg, nodes.Slice)
        return _guarded(node, "_sized", node.lineno) if sliced else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(node, "_sized", node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(node, "_sized", node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(node, "_sized", node.lineno) if node.ctx == "load" else node


def _guarded(node: nodes.Expr, guard: str, lineno: int) -> nodes.Filter:
    return nodes.Filter(node, guard, [], [], None, None, lineno=lineno)


def _tick_statement(lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_guarded(nodes.Const(True), "_tick", lineno), lineno=lineno)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled and run in, always inside a `budget`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=_finalize,
            optimized=False,
            cache_size=0,
        )
        self.filters = _filters()
        self.tests = {name: _bounded(function) for name, function in TESTS.items()}  # type: ignore[arg-type]
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {
            "dict": _dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        if sum(1 for _ in source.find_all(nodes.Node)) > _MAX_NODES:
            raise LimitError(f"it has more than {_MAX_NODES:,} parts")
        guarded = _Guards().visit(source).set_environment(self)
        return super()._generate(guarded, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result may be large."""
        _BUDGET.get().tick()
        _check_binop(operator, left, right)
        return _sized(super().call_binop(context, operator, left, right))

    def call(self, context: Context, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a global function or a method."""
        current = _BUDGET.get()
        current.tick()
        if isinstance(target, types.BuiltinMethodType | types.MethodType):
            owner, name = target.__self__, target.__name__
            if isinstance(owner, str) and name == "join" and len(args) == 1:
                return _join(owner, args[0])
            if isinstance(owner, str | bytes | int | float | list | tuple | Mapping | type):
                _check_method(owner, name, args)
        if current.depth >= _MAX_DEPTH:
            raise LimitError(f"its calls are nested more than {_MAX_DEPTH} deep")
        current.depth += 1
        try:
            return _sized(super().call(context, target, *args, **kwargs))
        finally:
            current.depth -= 1

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, bounded; `format_map` is refused."""
        if not isinstance(value, types.BuiltinMethodType | types.MethodType):
            return None
        owner, name = value.__self__, value.__name__
        if not isinstance(owner, str) or name not in ("format", "format_map"):
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            if name == "format_map":
                raise LimitError("it calls str.format_map, which templates may not")
            return str(_Formatter(self).vformat(owner, args, kwargs))

        return bounded


def _finalize(value: Any) -> Any:
    """What `{{ value }}` prints."""
    return _text(value)


ENVIRONMENT = BoundedEnvironment()
