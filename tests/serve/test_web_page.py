"""The chat page in a real browser: what a reader does, and what a model must not be able to do."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Server

from earnest.runners.reference.runner import ReferenceRunner

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_BROWSER = next(filter(None, map(shutil.which, _BROWSERS)), None)
if _BROWSER is None:
    pytest.skip("no Chromium here; apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

STORY = "Tell me a story."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=_BROWSER)
        yield opened
        opened.close()


@dataclass
class Visits:
    """Pages that are watched: nothing may fail, nothing may leave the server."""

    browser: Any
    problems: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)

    def __call__(
        self, server: Server, path: str = "/", *, max_tokens: int | None = None, **options: Any
    ) -> Any:
        context = self.browser.new_context(**options)
        if max_tokens is not None:
            sampling = json.dumps(json.dumps({"max_tokens": max_tokens}))
            context.add_init_script(f"localStorage.setItem('earnest.sampling', {sampling})")
        context.set_default_timeout(10_000)
        self.contexts.append(context)
        return self.page(context, server, path)

    def page(self, context: Any, server: Server, path: str = "/") -> Any:
        page = context.new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._said)
        page.on(
            "request",
            lambda r: r.url.startswith((server.url, "blob:")) or self.problems.append(r.url),
        )
        page.goto(server.url + path)
        expect(page.locator("html[data-ready]")).to_be_attached()
        return page

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)


@pytest.fixture
def visit(browser: Any) -> Iterator[Visits]:
    expect.set_options(timeout=10_000)
    visits = Visits(browser)
    yield visits
    for context in visits.contexts:
        context.close()
    assert visits.problems == []


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the model takes its time, so that there is some to do something in."""
    step = ReferenceRunner.step

    def slow(self: ReferenceRunner, *arguments: Any) -> Any:
        time.sleep(0.02)
        return step(self, *arguments)

    monkeypatch.setattr(ReferenceRunner, "step", slow)


def say(page: Any, text: str = STORY, *, wait: bool = True) -> Any:
    """Send a message; its answer."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    expect(page.locator(".user .body").last).to_have_text(text)
    answer = page.locator(".message.assistant").last
    if wait:
        expect(answer).not_to_have_class(re.compile("running"))
    return answer


def replies(page: Any, *answers: Any, status: int = 200) -> list[Any]:
    """Let a made-up endpoint answer, in turn; the bodies it was sent."""
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        given = answers[min(len(asked), len(answers)) - 1]
        if status != 200 or isinstance(given, dict):
            route.fulfill(status=status, json=given)
            return
        deltas = [{"content": given}] if isinstance(given, str) else given
        events: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)
    return asked


def markdown(page: Any, text: str) -> str:
    """What the page's own renderer makes of a text."""
    script = """async (text) => {
        const { show } = await import("/web/markdown.js");
        const into = document.createElement("div");
        show(into, text);
        return into.innerHTML.replace(/<figcaption>.*?<\\/figcaption>/gs, "");
    }"""
    return str(page.evaluate(script, text))


# --- the files ------------------------------------------------------------------------------------


def test_the_page_is_files_of_this_server_and_nothing_else(start: Callable[..., Server]) -> None:
    url = start(api_keys=("secret",)).url
    page = httpx.get(url)  # holds nothing secret: no key
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(url, headers={"if-none-match": page.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    assert httpx.head(url).headers["etag"] == page.headers["etag"]
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
    parts = re.findall(r'"(web/[^"]+)"', page.text)
    assert len(parts) >= 5
    for part in parts:
        found = httpx.get(f"{url}/{part}")
        assert found.status_code == 200
        kind = kinds.get(part.rpartition(".")[2], "image/svg+xml")
        assert found.headers["content-type"] == kind
        assert found.headers["content-security-policy"] == policy
    for path in ("web/", "web/no.js", "web/%2e%2e/page.py", "web/..%2fpage.py", "web/index.html"):
        assert httpx.get(f"{url}/{path}").status_code in (401, 404)
    assert httpx.get(f"{url}/v1/models").status_code == 401


def test_no_file_is_long_and_none_writes_markup() -> None:
    folder = Path(__file__).parents[2] / "src/earnest/serve/web"
    files = list(folder.iterdir())
    assert len(files) > 10
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 600
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text
        assert "://" not in text.replace("http://www.w3.org/", "").replace("https?:\\/\\/", "")


# --- a conversation -------------------------------------------------------------------------------


def test_an_answer_arrives_in_pieces(visit: Visits, server: Server, slowly: None) -> None:
    page = visit(server, max_tokens=40)
    page.evaluate(
        """() => {
            window.lengths = new Set();
            new MutationObserver(() => {
                const body = document.querySelector(".assistant.running .body");
                if (body) window.lengths.add(body.textContent.length);
            }).observe(document.body, { childList: true, subtree: true, characterData: true });
        }"""
    )
    answer = say(page)
    assert len(page.evaluate("[...window.lengths]")) > 10
    expected = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": STORY}], "max_tokens": 40},
    ).json()
    text = expected["choices"][0]["message"]["content"]
    assert "".join(answer.locator(".body").inner_text().split()) == "".join(text.split())
    expect(answer.locator(".stats")).to_contain_text(
        re.compile(r"^40 tokens · \d+\.\d tokens/s · first after \d\.\d\d s · cut off")
    )
    used = expected["usage"]["total_tokens"]
    expect(page.locator("#used")).to_have_text(f"{used} of 512 tokens")


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_stops_and_the_server_gives_it_up(
    visit: Visits, server: Server, slowly: None, how: str
) -> None:
    page = visit(server)
    counters = server.served.service.load.counters.generated_tokens
    answer = say(page, wait=False)
    expect(answer.locator(".body")).not_to_be_empty()
    if how == "click":
        page.click("#send[aria-label=Stop]")
    else:
        page.keyboard.press("Escape")
    expect(answer.locator(".stats")).to_contain_text("stopped")
    until = time.monotonic() + 5
    while server.served.service.load.running and time.monotonic() < until:
        time.sleep(0.02)
    load = server.served.service.load
    assert load.running == 0
    assert load.counters.generated_tokens - counters < 150  # the whole story has more
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    text = answer.locator(".body").inner_text()
    page.reload()
    expect(page.locator(".assistant .body")).to_have_text(text)


def test_regenerate_keeps_both_versions(visit: Visits, server: Server) -> None:
    page = visit(server)
    asked = replies(page, "The first.", "The second.")
    answer = say(page)
    answer.get_by_label("Regenerate").click()
    expect(page.locator(".assistant .body")).to_have_text("The second.")
    assert asked[0] == asked[1]
    expect(page.locator(".assistant .versions")).to_have_text("2 / 2")
    page.get_by_label("Earlier version").click()
    expect(page.locator(".assistant .body")).to_have_text("The first.")
    page.reload()
    expect(page.locator(".assistant .body")).to_have_text("The first.")
    page.get_by_label("Later version").click()
    expect(page.locator(".assistant .body")).to_have_text("The second.")


def test_an_edited_message_begins_another_branch(visit: Visits, server: Server) -> None:
    page = visit(server)
    asked = replies(page, "One.", "Two.", "Other.")
    say(page, "first")
    say(page, "second")
    assert [m["content"] for m in asked[1]["messages"]] == ["first", "One.", "second"]
    page.locator(".user").first.hover()
    page.get_by_label("Edit").first.click()
    page.get_by_label("Edit the message").fill("changed")
    page.get_by_role("button", name="Send").first.click()
    expect(page.locator(".assistant .body")).to_have_text(["Other."])
    assert [m["content"] for m in asked[2]["messages"]] == ["changed"]
    page.get_by_label("Earlier version").click()
    expect(page.locator(".message .body")).to_have_text(["first", "One.", "second", "Two."])
    page.press("#prompt", "ArrowUp")  # edits the last
    expect(page.get_by_label("Edit the message")).to_have_value("second")
    page.keyboard.press("Escape")
    expect(page.locator(".message .body")).to_have_count(4)


def test_conversations_last_and_can_be_managed(visit: Visits, server: Server) -> None:
    page = visit(server)
    replies(page, "Yes.", "No.")
    say(page, "Is water wet?")
    page.keyboard.press("Alt+n")
    expect(page.locator(".message")).to_have_count(0)
    say(page, "Is fire wet?")
    page.reload()
    titles = page.locator(".entry .row")
    expect(titles).to_have_text(["Is fire wet?", "Is water wet?"])
    expect(page.locator(".assistant .body")).to_have_text("No.")
    titles.nth(1).click()
    expect(page.locator(".assistant .body")).to_have_text("Yes.")

    def choose(name: str) -> None:
        page.locator(".entry.current").get_by_label("More").click()
        page.get_by_role("menuitem", name=name).click()

    choose("Rename")
    page.get_by_label("Title").fill("<b>Water</b>")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("<b>Water</b>")
    with page.expect_download() as markdown_file:
        choose("Export as Markdown")
    assert markdown_file.value.suggested_filename == "b-Water-b.md"
    text = Path(markdown_file.value.path()).read_text(encoding="utf-8")
    assert text == "# <b>Water</b>\n\n## You\n\nIs water wet?\n\n## stories\n\nYes.\n"
    with page.expect_download() as json_file:
        choose("Export as JSON")
    exported = json.loads(Path(json_file.value.path()).read_text(encoding="utf-8"))
    assert {node["content"] for node in exported["nodes"].values()} == {"Is water wet?", "Yes."}

    choose("Delete")
    expect(titles).to_have_text(["Is fire wet?"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".assistant .body")).to_have_text("Yes.")
    choose("Delete")
    expect(titles).to_have_count(1)
    page.reload()
    expect(titles).to_have_text(["Is fire wet?"])


def test_two_windows_show_the_same_list(visit: Visits, server: Server) -> None:
    one = visit(server)
    other = visit.page(visit.contexts[0], server)
    replies(one, "Yes.")
    say(one, "Is water wet?")
    expect(other.locator(".entry .row")).to_have_text(["Is water wet?"])


def test_an_answer_goes_on_while_another_conversation_is_open(
    visit: Visits, server: Server, slowly: None
) -> None:
    page = visit(server, max_tokens=40)
    say(page, wait=False)
    page.click("#new")
    expect(page.locator(".entry.busy")).to_have_count(1)
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator(".entry.busy")).to_have_count(0)
    page.locator(".entry .row").click()
    expect(page.locator(".assistant .stats")).to_contain_text("first after")


# --- what answers hold ----------------------------------------------------------------------------


def test_thoughts_are_folded(visit: Visits, server: Server) -> None:
    page = visit(server)
    replies(
        page, [{"reasoning_content": "Hmm, "}, {"reasoning_content": "wet."}, {"content": "Yes"}]
    )
    answer = say(page)
    expect(answer.locator(".body")).to_have_text("Yes")
    expect(answer.locator("summary")).to_have_text(re.compile(r"Thought for \d"))
    expect(answer.locator(".thoughts-text")).not_to_be_visible()
    answer.locator("summary").click()
    expect(answer.locator(".thoughts-text")).to_have_text("Hmm, wet.")
    expect(answer.locator(".thoughts-text")).to_be_visible()


def test_thinking_can_be_asked_for(visit: Visits, server: Server) -> None:
    page = visit(server, max_tokens=5)
    page.keyboard.press("Alt+s")
    page.get_by_label("Thinking", exact=True).select_option("On")
    page.keyboard.press("Escape")
    expect(page.locator("#changed")).to_have_text("most tokens 5 · thinking on")
    answer = say(page)
    expect(answer.locator("summary")).to_have_text("Thoughts")
    expect(answer.locator(".stats")).to_contain_text("cut off at the token limit")


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
    "*open **never": "<p>*open **never</p>",
    "# One\n## Two ##\ntext\nmore": "<h3>One</h3><h4>Two</h4><p>text<br>more</p>",
    "- a\n- b\n  - c\n    1. d": "<ul><li>a</li><li>b<ul><li>c<ol><li>d</li></ol></li></ul>"
    "</li></ul>",
    "- [x] a\n- [ ] b": '<ul><li class="task"><input type="checkbox" disabled="" aria-label="done">'
    'a</li><li class="task"><input type="checkbox" disabled="" aria-label="to do">b</li></ul>',
    "3. a\n\n4. b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "1. a\n   ```py\n   x = 1\n\n   y\n   ```\n2. b": '<ol><li>a<figure class="code">'
    '<pre tabindex="0"><code>x = 1\n\ny</code></pre></figure></li><li>b</li></ol>',
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
}


def test_markdown(visit: Visits, server: Server) -> None:
    page = visit(server)
    for text, expected in MARKDOWN.items():
        assert markdown(page, text) == expected
    linked = markdown(page, '[*x*](https://a.example/ "t")')
    assert re.fullmatch(r'<p><a href="https://a.example/" [^>]*><em>x</em></a></p>', linked)


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


def test_code_can_be_copied(visit: Visits, server: Server) -> None:
    page = visit(server, permissions=["clipboard-read", "clipboard-write"])
    replies(page, "Here:\n\n```python\nprint('a')\n```\n")
    answer = say(page)
    expect(answer.locator("figcaption span")).to_have_text("python")
    answer.get_by_label("Copy code").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "print('a')"


def test_token_probabilities_on_click(visit: Visits, server: Server) -> None:
    page = visit(server, max_tokens=12)
    answer = say(page)
    body = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 12}
    expected = httpx.post(
        f"{server.url}/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 5}
    ).json()["choices"][0]["logprobs"]["content"]
    answer.get_by_label("Token probabilities").click()
    tokens = answer.locator(".token")
    expect(tokens).to_have_count(12)
    assert tokens.all_text_contents() == [entry["token"].replace("\n", "⏎") for entry in expected]
    tokens.nth(3).click()
    rows = answer.locator(".alternatives li")
    expect(rows).to_have_count(5)
    first = expected[3]["top_logprobs"][0]
    share = f"{100 * 2.718281828 ** first['logprob']:.1f} %"
    expect(rows.first).to_have_text(first["token"].replace(" ", "·") + share)
    expect(answer.locator(".taken")).to_contain_text(expected[3]["token"].strip())
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(4)).to_have_attribute("aria-pressed", "true")
    expect(answer.locator(".taken")).to_contain_text(expected[4]["token"].strip())
    page.keyboard.press("Escape")
    expect(answer.locator(".alternatives")).not_to_be_visible()
    answer.get_by_label("Token probabilities").click()
    expect(answer.locator(".body")).to_be_visible()


def test_settings_reach_the_model_and_stay(visit: Visits, server: Server) -> None:
    page = visit(server)
    asked = replies(page, "Aye.")
    page.click("#open-settings")
    page.get_by_label("System prompt").fill("You are a pirate.")
    values = {"Temperature": "0.3", "Top-p": "0.9", "Top-k": "7", "Min-p": "0.01", "Seed": "42"}
    for name, value in (values | {"Repetition penalty": "1.1", "Most tokens": "33"}).items():
        page.get_by_label(name).fill(value)
    page.get_by_label("Keep token probabilities").uncheck()
    page.get_by_label("Close").click()
    say(page, "Hello")
    page.reload()
    replies(page, "Aye again.")
    page.click("#open-settings")
    expect(page.get_by_label("System prompt")).to_have_value("You are a pirate.")
    expect(page.get_by_label("Top-k")).to_have_value("7")
    page.get_by_label("Top-k").fill("-3")  # refused, and not kept
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    expect(page.locator("#changed")).to_contain_text("top-k 7")
    assert asked == [
        {
            "model": "stories",
            "stream": True,
            "stream_options": {"include_usage": True},
            **{"temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "seed": 42},
            **{"repetition_penalty": 1.1, "max_tokens": 33},
            "messages": [
                {"role": "system", "content": "You are a pirate."},
                {"role": "user", "content": "Hello"},
            ],
        }
    ]
    page.unroute_all()
    expect(say(page).locator(".stats")).to_contain_text("tokens")  # the real server takes them


def test_the_model_card(visit: Visits, server: Server) -> None:
    page = visit(server)
    expect(page.locator("#welcome")).to_contain_text("512 tokens of context")
    page.click("#model")
    card = page.locator("#card")
    for fact in ("stories", "512 tokens", "Parameters", "Layers", "temperature 0", "Earnest 0."):
        expect(card).to_contain_text(fact)
    page.keyboard.press("Escape")
    expect(card).not_to_be_visible()


def test_a_base_model_continues_text(
    visit: Visits, server: Server, stories: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(stories.tokenizer), "chat_template", None)
    page = visit(server)
    expect(page.locator("#welcome")).to_contain_text(
        "This is a Base model. It has no chat template"
    )
    page.fill("#prompt", "Once upon a time")
    page.press("#prompt", "Control+Enter")
    answer = page.locator(".assistant").last
    expect(answer).not_to_have_class(re.compile("running"))
    whole = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 256}
    ).json()["choices"][0]["text"]
    assert answer.locator(".body").text_content() == whole
    answer.get_by_label("Token probabilities").click()
    answer.locator(".token").first.click()
    expect(answer.locator(".alternatives li")).to_have_count(5)
    page.click("#send[aria-label=Continue]")  # goes on from there
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator(".running")).to_have_count(0)


# --- when things go wrong -------------------------------------------------------------------------


def expected_to_fail(visit: Visits, *statuses: int) -> None:
    """The browser itself reports such answers; nothing else may be said."""
    said = [f"status of {status} " for status in statuses]
    visit.problems = [p for p in visit.problems if not any(one in p for one in said)]


def test_a_key_is_asked_for_and_a_wrong_one_refused(
    visit: Visits, start: Callable[..., Server]
) -> None:
    server = start(api_keys=("right",))
    page = visit(server)
    expect(page.locator("#banner")).to_contain_text("This server asks for an API key.")
    page.get_by_role("button", name="Enter the key").click()
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("The server does not accept this API key.")
    page.get_by_role("button", name="Enter the key").click()
    page.fill("#key-field", "right")
    page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("stories")
    expect(page.locator("#banner")).to_be_empty()
    say(page)
    page.reload()  # of this tab: it need not be entered again
    expect(page.locator("#model-name")).to_have_text("stories")
    assert page.evaluate("JSON.stringify(localStorage)").count("right") == 0
    expected_to_fail(visit, 401)


REFUSALS = (
    (429, {"error": {"message": "full"}}, "Too many answers are waiting already."),
    (503, {"error": {"message": "ending"}}, "The server takes no requests now"),
    (400, {"error": {"message": "top_p is odd"}}, "Check the settings. top_p is odd"),
    (500, {}, "The server failed (status 500)."),
    (
        400,
        {"error": {"message": "x", "code": "context_length_exceeded"}},
        "does not fit into the model's context any more",
    ),
)


def test_refusals_are_explained(visit: Visits, server: Server) -> None:
    page = visit(server)
    for status, answer, said in REFUSALS:
        replies(page, answer, status=status)
        failed = say(page)
        problem = failed.get_by_role("alert").inner_text()
        assert said in re.sub(r"\s+", " ", problem)
        page.unroute_all()
        replies(page, "At last.")
        failed.get_by_role("button", name="Try again").click()
        expect(page.locator(".assistant .body").last).to_have_text("At last.")
        page.unroute_all()
        expected_to_fail(visit, status)
    expect(page.locator(".versions")).to_have_count(0)  # an empty version is not worth keeping


def test_a_failure_in_the_middle_keeps_what_has_come(visit: Visits, server: Server) -> None:
    page = visit(server)
    begun = json.dumps({"choices": [{"index": 0, "delta": {"content": "Once"}}]})
    error = json.dumps({"error": {"type": "api_error", "message": "no memory"}})
    bodies = [f"data: {begun}\n\n", f"data: {begun}\n\ndata: {error}\n\n"]
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=bodies.pop()),
    )
    answer = say(page)
    expect(answer.locator(".body")).to_have_text("Once")
    expect(answer.get_by_role("alert")).to_contain_text("The server failed")
    answer.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert").last).to_contain_text("The connection broke off.")
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator(".assistant").get_by_role("button", name="Try again").click()
    expect(page.locator(".assistant [role=alert]")).to_contain_text("cannot be reached")
    visit.problems = [said for said in visit.problems if "ERR_FAILED" not in said]


# --- how it looks ---------------------------------------------------------------------------------

LONG = (
    "W" * 300 + "\n\n```\n" + "x = 1; " * 80 + "\n```\n\n|" + " head |" * 20 + "\n|" + "---|" * 20
)


def test_on_a_phone(visit: Visits, server: Server) -> None:
    page = visit(server, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    replies(page, LONG)
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.fill("#prompt", "Y" * 200)
    page.press("#prompt", "Enter")  # begins a line there
    expect(page.locator(".message")).to_have_count(0)
    page.tap("#send")
    answer = page.locator(".assistant")
    expect(answer.locator("table")).to_be_visible()
    wide = "[document.documentElement, document.body, document.querySelector('#scroll')]"
    assert page.evaluate(f"{wide}.every(e => e.scrollWidth <= e.clientWidth)")
    page.tap("#toggle")
    expect(page.locator("#new")).to_be_in_viewport(ratio=1)
    expect(page.locator("#main")).to_have_attribute("inert", "")
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.tap("#open-settings")
    assert page.evaluate("document.querySelector('#settings').scrollWidth <= innerWidth")


def luminance(page: Any, selector: str, what: str) -> float:
    style = f"getComputedStyle(document.querySelector('{selector}')).{what}"
    channels = re.findall(r"[\d.]+", page.evaluate(style))
    return sum(map(float, channels[:3])) / 3


def test_dark_and_light(visit: Visits, server: Server) -> None:
    page = visit(server, color_scheme="dark")
    assert luminance(page, "body", "backgroundColor") < 60
    assert luminance(page, "body", "color") > 180
    page.emulate_media(color_scheme="light")
    assert luminance(page, "body", "backgroundColor") > 230
    page.click("#open-settings")
    page.get_by_label("Theme").select_option("Dark")
    assert luminance(page, "body", "backgroundColor") < 60
    page.reload()
    assert luminance(page, "body", "backgroundColor") < 60


def test_by_keyboard_and_without_motion(visit: Visits, server: Server) -> None:
    page = visit(server, reduced_motion="reduce")
    replies(page, "Yes.")
    expect(page.locator("#prompt")).to_be_focused()
    say(page)
    # Every control has a name, and the open conversation is marked.
    names = """all => all.filter(e => !(e.getAttribute("aria-label") || e.textContent.trim()))
                         .map(e => e.outerHTML)"""
    assert page.locator("button").evaluate_all(names) == []
    expect(page.locator("[aria-current=page]")).to_have_text(STORY)
    page.locator(".entry").get_by_label("More").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".entry").get_by_label("More")).to_be_focused()
    page.keyboard.press("Alt+s")
    moving = "document.querySelector('#settings').getAnimations().length"
    assert page.evaluate(moving) == 0
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_visible()
