"""The chat page's markdown, in a real browser: what it shows, and what a model must not be able to
do with it."""

from __future__ import annotations

import re
from random import Random
from typing import Any

from browsing import Visits, expect, replies, say
from running import Server


def markdown(page: Any, text: str) -> str:
    """What the page's own renderer makes of a text."""
    script = """async (text) => {
        const { show } = await import("/web/markdown.js");
        const into = document.createElement("div");
        show(into, text);
        return into.innerHTML.replace(/<figcaption>.*?<\\/figcaption>/gs, "");
    }"""
    return str(page.evaluate(script, text))


HOSTILE = """\
<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>
<iframe src="javascript:window.hacked=1"></iframe>

[one](javascript:window.hacked=1) [two](JaVaScRiPt:window.hacked=1) [three](data:text/html,x)
[four]( java\tscript:window.hacked=1) <javascript:window.hacked=1> [five](//evil.example/a)
![picture](https://evil.example/a.png "x" onload=window.hacked=1) <https://good.example/?a&b>

```html" onmouseover="window.hacked=1
<script>window.hacked=1</script>
```

| <img src=x onerror=window.hacked=1> | b |
|---|---|
| `<b>` | &lt;script&gt; |
"""


def test_what_a_model_writes_is_only_text(visit: Visits, server: Server) -> None:
    page = visit(server)
    replies(page, [{"reasoning_content": HOSTILE}, {"content": HOSTILE}])
    answer = say(page, "<img src=x onerror=window.hacked=1>")
    answer.locator("summary").click()
    assert page.evaluate("window.hacked") is None
    expect(page.locator("#messages :is(img, script, iframe, object, style)")).to_have_count(0)
    expect(answer.locator("pre code")).to_have_text("<script>window.hacked=1</script>")
    expect(answer.locator("td").first).to_have_text("<b>")
    links = answer.locator("a").evaluate_all("all => all.map(a => [a.href, a.target, a.rel])")
    assert links == [
        [address, "_blank", "noopener noreferrer nofollow"]
        for address in ("https://evil.example/a.png", "https://good.example/?a&b")
    ]
    handlers = """all => all.flatMap(e => [...e.attributes]).map(a => a.name)
                     .filter(name => name.startsWith("on") || name === "style")"""
    assert page.locator("#messages *").evaluate_all(handlers) == []
    for link in answer.locator(".refused").all():
        link.click()
    assert page.evaluate("window.hacked") is None
    # And the policy holds, should the page ever make a mistake.
    blocked = page.evaluate(
        """() => { try { document.body.innerHTML = "<b>x</b>"; return "set"; }
                   catch (error) { return error.name; } }"""
    )
    assert blocked == "TypeError"
    visit.problems = [said for said in visit.problems if "TrustedHTML" not in said]


MARKDOWN = {
    "plain *em* **strong** ***both*** ~~gone~~ `a*b`": "<p>plain <em>em</em> "
    "<strong>strong</strong> <em><strong>both</strong></em> <del>gone</del> <code>a*b</code></p>",
    "snake_case_name and 2 * 3 * 4 \\*no\\*": "<p>snake_case_name and 2 * 3 * 4 *no*</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "**重点：**内容**“引”**后": "<p><strong>重点：</strong>内容<strong>“引”</strong>后</p>",
    "*open **never": "<p>*open **never</p>",
    "# One\n## Two ##\ntext\nmore": "<h3>One</h3><h4>Two</h4><p>text<br>more</p>",
    "- a\n- b\n  - c\n    1. d": "<ul><li>a</li><li>b<ul><li>c<ol><li>d</li></ol></li></ul>"
    "</li></ul>",
    "- [x] a\n- [ ] b": '<ul><li class="task"><input type="checkbox" disabled="" aria-label="done">'
    'a</li><li class="task"><input type="checkbox" disabled="" aria-label="to do">b</li></ul>',
    "3. a\n\n4. b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "1. a\n   ```py\n   x = 1\n\n   y\n   ```\n2. b": '<ol><li>a<figure class="code">'
    '<pre tabindex="0"><code>x = <span class="number">1</span>\n\ny</code></pre></figure></li>'
    "<li>b</li></ol>",
    "> a\n> > b\n\n---": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><hr>",
    "```\nnot *em*\n": '<figure class="code"><pre tabindex="0"><code>not *em*\n</code></pre>'
    "</figure>",
    "| a | b |\n|:--|--:|\n| 1 \\| 2 | *x* |": '<div class="table" tabindex="0" role="group" '
    'aria-label="Table"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td>1 | 2</td><td class="right"><em>x</em></td></tr></tbody></table></div>',
    "$$a_1 * b_2 * c$$ and \\(x_i\\)": '<p><span class="math">a_1 * b_2 * c</span> and '
    '<span class="math">x_i</span></p>',
    "[a](b) ![p](q) [c]": '<p><span class="refused" title="This address is not shown as a link">a'
    '</span> <span class="refused" title="This address is not shown as a link">Picture: p</span> '
    "[c]</p>",
    "see http://a.example/x_(y)_z. <br> &amp; &copy;": '<p>see <a href="http://a.example/x_(y)_z" '
    'target="_blank" rel="noopener noreferrer nofollow" title="http://a.example/x_(y)_z">'
    "http://a.example/x_(y)_z</a>. <br> &amp; &amp;copy;</p>",
    "a | b\nis no table": "<p>a | b<br>is no table</p>",
    "|a|b|c|\n|-|-|-|\n|1|": '<div class="table" tabindex="0" role="group" aria-label="Table">'
    "<table><thead><tr><th>a</th><th>b</th><th>c</th></tr></thead>"
    '<tbody><tr><td>1</td><td colspan="2"></td></tr></tbody></table></div>',
    "a|\n|": "<p>a|<br>|</p>",
    "*a** b*": "<p><em>a</em>* b*</p>",
    "&lt;b&gt; `` ` `` \\` `": "<p>&lt;b&gt; <code>`</code> ` `</p>",
}
LINKS = {  # without what is the same for each
    "[0, 1) see https://a.example/": "[0, 1) see <a>https://a.example/</a>",
    "[https://a.example/b](https://c.example/)": "<a>https://a.example/b</a>",
    "见https://a.example/b，然后（https://c.example/）。": "见<a>https://a.example/b</a>，然后"
    "（<a>https://c.example/</a>）。",
    "[![a](https://b.example/)](https://c.example/)": "<a>Picture: a</a>",
    "![](https://a.example/)": "<a>Picture: https://a.example/</a>",
    "**https://a.example/**": "<strong><a>https://a.example/</a></strong>",
    "(https://a.example/(b)), https://%, https://": "(<a>https://a.example/(b)</a>), https://%, "
    "https://",
    "*[a](https://a.example/ 'b')* [c](d": "<em><a>a</a></em> [c](d",
}


def test_markdown(visit: Visits, server: Server) -> None:
    page = visit(server)
    for text, expected in MARKDOWN.items():
        assert markdown(page, text) == expected
    linked = markdown(page, '[*x*](https://a.example/ "t")')
    assert re.fullmatch(r'<p><a href="https://a.example/" [^>]*><em>x</em></a></p>', linked)
    for text, expected in LINKS.items():
        assert re.sub("<a [^>]*>", "<a>", markdown(page, text)) == f"<p>{expected}</p>"


CODE = {
    ("py", "def f(x):  # \"no\"\n    return \"a\\\"#\" + '''b\nc'''"): [
        *(["word", "def"], ["comment", '# "no"'], ["word", "return"], ["text", '"a\\"#"']),
        ["text", "'''b\nc'''"],
    ],
    ("JS", "const a1 = 0x1f + 2.5e3; /* if\n*/ `x ${if}` // end"): [
        *(["word", "const"], ["number", "0x1f"], ["number", "2.5e3"], ["comment", "/* if\n*/"]),
        *(["text", "`x ${if}`"], ["comment", "// end"]),
    ],
    ("sql", "SELECT a -- b"): [["word", "SELECT"], ["comment", "-- b"]],
    ("constructor", "if 1"): [],
    ("", "if 1"): [],
}


def test_code_is_coloured(visit: Visits, server: Server) -> None:
    page = visit(server)
    script = """async ([text, name]) => {
        const { coloured } = await import("/web/highlight.js");
        const into = document.createElement("code");
        into.append(...coloured(text, name));
        return [into.textContent, [...into.children].map(e => [e.className, e.textContent])];
    }"""
    for (name, text), expected in CODE.items():
        assert page.evaluate(script, [text, name]) == [text, expected]


def test_markdown_of_a_stream_is_that_of_the_whole(visit: Visits, server: Server) -> None:
    page = visit(server)
    text = "\n\n".join(MARKDOWN) + HOSTILE
    script = """async (text) => {
        const { show } = await import("/web/markdown.js");
        const [grown, whole] = [document.createElement("div"), document.createElement("div")];
        for (let end = 0; end < text.length; end += 3) show(grown, text.slice(0, end));
        const first = grown.firstChild;
        show(grown, text);
        show(whole, text);
        return [grown.innerHTML === whole.innerHTML, first === grown.firstChild];
    }"""
    assert page.evaluate(script, text) == [True, True]


def test_markdown_of_a_stream_is_that_of_the_whole_at_every_moment(
    visit: Visits, server: Server
) -> None:
    page = visit(server)
    lines = [
        *(
            "a",
            "# a",
            "#a",
            "- a",
            "  - b",
            "1.",
            "1.5",
            "> a",
            "```",
            "  ```py",
            "~~~",
            "---",
            "-",
        ),
        *(
            "|a|",
            "|-|",
            "|-x",
            "a|b",
            "",
            "",
            "",
            "   ",
            "*a",
            "b*",
            "    c",
            "\r",
            "a\r",
            "2) b",
            "* *",
        ),
    ]
    random = Random(29)
    texts = ["\n".join(random.choices(lines, k=12)) for _ in range(150)]
    script = """async (texts) => {
        const { show } = await import("/web/markdown.js");
        const wrong = [];
        for (const text of texts) {
            const grown = document.createElement("div");
            for (let end = 0; end <= text.length; end++) {
                const whole = document.createElement("div");
                show(grown, text.slice(0, end));
                show(whole, text.slice(0, end));
                if (grown.innerHTML !== whole.innerHTML) wrong.push(text.slice(0, end));
            }
        }
        return wrong;
    }"""
    assert page.evaluate(script, texts) == []
    assert (
        page.evaluate(
            """async () => {
            const { show } = await import("/web/markdown.js");
            const into = document.createElement("div");
            for (const text of ["a\\n\\nb\\n\\nc", "d\\n\\nb", "", "e"]) show(into, text);
            return into.innerHTML;
        }"""
        )
        == "<p>e</p>"
    )


def test_markdown_that_wants_to_take_forever(visit: Visits, server: Server) -> None:
    page = visit(server)
    hostile = [
        *(
            "*a " * 20_000,
            "**a*" * 20_000,
            "[" * 50_000,
            "[a](" * 20_000,
            "`" * 300 + "` ``" * 9_000,
        ),
        *(">" * 20_000, "- " * 5_000, "\\(" * 20_000, "$$" * 20_001, "_*~~" * 20_000, "<" * 50_000),
        *(
            "|" * 20_000 + "\n" + "|-" * 20_000,
            "#" * 50_000,
            "\n".join(" " * i + "- a" for i in range(300)),
        ),
        *(
            "[http://a" * 10_000,
            "&" * 50_000,
            "* " * 20_000 + "x",
            "![a](b" * 10_000,
            "a\n|-\n" * 5_000,
            "![" * 10_000 + "](x)" * 10_000,
            "- ```\n" * 5_000,
        ),
    ]
    script = """async (text) => {
        const { show } = await import("/web/markdown.js");
        const into = document.createElement("div");
        show(into, text);
        let deepest = 0;
        for (const leaf of into.querySelectorAll("*")) {
            let depth = 0;
            for (let node = leaf; node !== into && depth < 100; node = node.parentNode) depth++;
            deepest = Math.max(deepest, depth);
        }
        return deepest;
    }"""
    for text in hostile:  # each takes minutes where anything is quadratic
        assert page.evaluate(script, text) < 60
