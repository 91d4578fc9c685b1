"""How much work the chat page's markdown is, counted and not timed: the blocks of script that ran
(V8's precise coverage), and the characters and entries that the browser's own functions were given.
"""

from __future__ import annotations

from typing import Any

import pytest
from browsing import Visits
from running import Server

PARTS = ("markdown.js", "inline.js", "highlight.js", "dom.js")

# Not counted: `startsWith` and `includes`, one comparison or search of memory.
COUNTING = """async () => {
    const { show } = await import("/web/markdown.js");
    let work = 0;
    function counted(prototype, name, costs) {
        const own = prototype[name];
        prototype[name] = function (...given) {
            const from = this.lastIndex;
            const result = own.apply(this, given);
            work += costs(this, given, result, from);
            return result;
        };
    }
    const read = (self) => self.length;
    for (const name of ["trim", "trimStart", "trimEnd", "split", "replace"])
        counted(String.prototype, name, read);
    for (const name of ["slice", "repeat"]) // not substring, which this here takes
        counted(String.prototype, name, (self, given, result) => result.length);
    counted(String.prototype, "indexOf", (self, [, from], at) =>
        (at === -1 ? self.length : at) - (from ?? 0));
    for (const name of ["slice", "splice", "map"])
        counted(Array.prototype, name, (self, given, result) => result.length);
    for (const name of ["join", "every", "reverse"]) counted(Array.prototype, name, read);
    counted(Array.prototype, "shift", read);
    // What looks at one place only goes as far as what it finds; others read on
    counted(RegExp.prototype, "exec", (self, [text], found, from) =>
        self.sticky ? (found ? found[0].length : 1)
        : self.global && found ? found.index + found[0].length - from
        : self.global ? text.length - from : text.length);
    counted(Element.prototype, "append", (self, given) =>
        given.reduce((sum, one) => sum + (one.length ?? 1), 1));
    window.work = (text, chunk) => {
        const into = document.createElement("div");
        work = 0;
        for (let end = chunk; end < text.length; end += chunk) show(into, text.substring(0, end));
        show(into, text);
        const nodes = document.evaluate("count(.//node())", into, null, 1, null).numberValue;
        return [work, nodes];
    };
}"""


class Counter:
    def __init__(self, page: Any) -> None:
        self.page = page
        self.session = page.context.new_cdp_session(page)
        self.session.send("Profiler.enable")
        self.session.send("Profiler.startPreciseCoverage", {"callCount": True, "detailed": True})
        page.evaluate(COUNTING)

    def _script(self) -> int:
        """The blocks that ran since the last call."""
        found = self.session.send("Profiler.takePreciseCoverage")["result"]
        scripts = [one for one in found if one["url"].endswith(PARTS)]
        functions = [function for one in scripts for function in one["functions"]]
        return sum(part["count"] for function in functions for part in function["ranges"])

    def work(self, text: str, chunk: int | None = None) -> tuple[int, int]:
        """Of showing a text, at once or as it grows; and the nodes it became."""
        self._script()
        browser, nodes = self.page.evaluate(
            "([text, chunk]) => window.work(text, chunk)", [text, chunk or len(text)]
        )
        return browser + self._script(), nodes


@pytest.fixture
def counter(visit: Visits, server: Server) -> Counter:
    return Counter(visit(server))


def repeated(unit: str, length: int, *, end: str = "") -> str:
    return unit * (length // len(unit)) + end


# What is repeated, and what follows: none of the marks finds its pair where it would want one.
INLINE = [
    *("*a ", "a* ", "**a*", "_*~~", "***", "*a_b ", "[", "]", "[a](", "![a](b", "![", "[*a](b) "),
    *("` `` ``` ", "`\\`", "<", "<http://a", "<mailto:", "&", "&am", "\\(", "\\[", "$$ \\", "!"),
    *("http://", "http://%", "http://)", "[http://a", "[http://%", "xhttp://a ", "http://a(", "\\"),
    *("(", ")", "[a](b", "a\n", "**a**", "[a](http://b)", "`a`", "https://a.example. ", "重点：**"),
]
LINES = [
    *("a\n|-\n", "|a|\n", "|a|b|\n|-|-|\n", "> a\n", "> > > ", ">", ">\n\n", "- ", "- a\n", "-\n"),
    *("- a\n\n", "1. a\n", "a\n\n", "# a\n", "#", "---\n", "- - ", "```\n", "~~~\na\n", "```a`\n"),
    *("> - ", "* a\n  * b\n    1. c\n", "- ```\n", "- a\n\n\n\n", "| ", "|\n", "\n", " ", "\t\n"),
]
SHAPES = {
    **{f"{unit!r} again and again": lambda n, unit=unit: repeated(unit, n) for unit in INLINE},
    **{f"lines of {unit!r}": lambda n, unit=unit: repeated(unit, n) for unit in LINES},
    "closed pictures in pictures": lambda n: repeated("![", n // 2) + repeated("](x)", n // 2),
    "marks in marks": lambda n: repeated("*a ", n // 2) + repeated("a* ", n // 2),
    "spaces before a mark": lambda n: "|-" + " " * n + "x\n|-" + " " * n + "x",
    "spaces in a fence": lambda n: "```" + " " * n + "`",
    "a long fence": lambda n: "~" * n + "`",
    "a long fence that is closed": lambda n: "~" * n + "\na\n" + "~" * n,
    "many columns, many rows": lambda n: (
        "|" * (n // 8 + 1) + "\n" + "|-" * (n // 8) + "\n" + "|\n" * (n // 4)
    ),
    "ever deeper": lambda n: "\n".join(" " * i + "- a" for i in range(int((2 * n) ** 0.5))),
    "a long cell": lambda n: "|a|\n|-|\n|" + "*a " * (n // 3),
    "code": lambda n: "```py\n" + repeated('x1 \'\\\' """ # /* \n', n),
    "code of numbers": lambda n: "```c\n" + repeated("1.1_1e1x", n),
}


def test_work_is_linear(counter: Counter) -> None:
    """Eight times the text: eight times the work, were it quadratic 64 times."""
    wrong = {}
    for name, shape in SHAPES.items():
        (small, _), (large, nodes) = counter.work(shape(4_000)), counter.work(shape(32_000))
        if large > 8 * 1.5 * small or large > 32_000 * 250 or nodes > 2 * 32_000:
            wrong[name] = (small, large, nodes)
    assert wrong == {}


def test_a_stream_is_linear_where_blocks_are_short(counter: Counter) -> None:
    block = "# A *heading*\n\nA paragraph with `code`.\n\n- one\n- two\n\n|a|b|\n|-|-|\n|c|d|\n\n"
    (small, _), (large, _) = (counter.work(repeated(block, n), 20) for n in (3_000, 24_000))
    assert large <= 8 * 1.5 * small
