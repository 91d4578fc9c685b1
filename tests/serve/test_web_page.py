"""The chat page in a real browser: what a reader does with it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import STORY, Visits, expect, expected_to_fail, replies, say
from running import Server

from earnest.runners.reference.runner import ReferenceRunner


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the model takes its time, so that there is some to do something in."""
    step = ReferenceRunner.step

    def slow(self: ReferenceRunner, *arguments: Any) -> Any:
        time.sleep(0.05)
        return step(self, *arguments)

    monkeypatch.setattr(ReferenceRunner, "step", slow)


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


def test_what_had_come_survives_a_reload(visit: Visits, server: Server, slowly: None) -> None:
    page = visit(server)
    answer = say(page, wait=False)
    expect(answer.locator(".body")).to_contain_text(re.compile(r"\w+ \w+"))
    page.reload()
    expect(page.locator(".assistant .stats")).to_contain_text("stopped")
    expect(page.locator(".assistant .body")).to_contain_text(re.compile(r"\w+ \w+"))
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    until = time.monotonic() + 5
    while server.served.service.load.running and time.monotonic() < until:
        time.sleep(0.02)
    assert server.served.service.load.running == 0


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
    expect(page.locator("#prompt")).to_be_focused()
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
    other = visit.page(visit.contexts[0], server.url)
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


def test_a_key_is_asked_for_and_a_wrong_one_refused(
    visit: Visits, start: Callable[..., Server]
) -> None:
    server = start(api_keys=("right",))
    page = visit(server)
    expect(page.locator("#key")).to_contain_text("This server asks for an API key.")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#banner")).to_contain_text("This server asks for an API key.")
    page.get_by_role("button", name="Enter the key").click()
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_contain_text("The server does not accept this API key.")
    page.fill("#key-field", "right")
    page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("stories")
    expect(page.locator("#banner")).to_be_empty()
    say(page)
    page.reload()  # of this tab: it need not be entered again
    expect(page.locator("#model-name")).to_have_text("stories")
    assert page.evaluate("JSON.stringify(localStorage)").count("right") == 0
    expected_to_fail(visit, 401)


def test_under_a_name_that_may_not_call(visit: Visits, server: Server) -> None:
    page = visit(server, host="chat.test")
    shown = f"Start it with --cors http://chat.test:{server.port}, or open"
    expect(page.locator("#banner")).to_contain_text(shown)
    expected_to_fail(visit, 403)


def test_without_what_only_safe_origins_have(visit: Visits, start: Callable[..., Server]) -> None:
    page = visit(start(origins=("*",)), host="chat.test")  # plain http, not of this machine
    assert not page.evaluate("isSecureContext")
    replies(page, "Yes.")
    answer = say(page)
    answer.get_by_label("Copy").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    page.reload()
    expect(page.locator(".assistant .body")).to_have_text("Yes.")
    page.fill("#prompt", "")
    page.keyboard.press("Control+v")
    expect(page.locator("#prompt")).to_have_value("Yes.")


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
