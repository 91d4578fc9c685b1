"""Conversations out of files, in a real browser: exports come back, and no file does harm."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import Visits, expect, replies, say
from running import Server

HOSTILE = '<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script>'


def conversation(**changes: Any) -> dict[str, Any]:
    """One as the page exports it."""
    asked = {"id": "a", "parent": None, "role": "user", "content": "Is water wet?", "created": 1}
    said = {"id": "b", "parent": "a", "role": "assistant", "content": "Yes.", "created": 2}
    said |= {"state": "done", "reasoning": "", "tokens": [], "stats": None}
    whole = {"id": "c", "title": "Water", "named": True, "kind": "chat", "system": "", "leaf": "b"}
    return whole | {"created": 1, "updated": 3, "nodes": {"a": asked, "b": said}} | changes


def changed(node: str, **changes: Any) -> dict[str, Any]:
    """One with other fields in a node."""
    made = conversation()
    made["nodes"][node] |= changes
    return made


def give(page: Any, data: Any, name: str = "talk.json") -> None:
    """Choose a file with this in it: bytes, or what becomes JSON."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    file = {"name": name, "mimeType": "application/json", "buffer": content}
    page.set_input_files("#file", file)


def exported(page: Any, label: str = "") -> Any:
    """What the page exports: the open conversation, or all."""
    with page.expect_download() as download:
        if label:
            page.get_by_role("button", name=label).click()
        else:
            page.locator(".entry.current").get_by_label("More").click()
            page.get_by_role("menuitem", name="Export as JSON").click()
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def without_ids(whole: dict[str, Any]) -> dict[str, Any]:
    """Its nodes in order, named by their place."""
    ids = {None: None} | {id: place for place, id in enumerate(whole["nodes"])}
    nodes = [
        node | {"id": ids[node["id"]], "parent": ids[node["parent"]]}
        for node in whole["nodes"].values()
    ]
    return whole | {"id": "", "leaf": ids[whole["leaf"]], "nodes": nodes}


def test_what_was_exported_comes_back(visit: Visits, server: Server) -> None:
    page = visit(server, max_tokens=8)
    say(page)  # the real model's, with token probabilities
    page.unroute_all()
    replies(page, [{"reasoning_content": "Hmm."}, {"content": "The *second*."}])
    page.get_by_label("Regenerate").click()
    expect(page.locator(".assistant .versions")).to_have_text("2 / 2")
    expect(page.locator(".assistant .stats")).to_be_visible()
    shown = page.locator(".message .body").all_inner_texts()
    first = exported(page)

    page.locator(".entry.current").get_by_label("More").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("menuitem", name="Import from JSON").click()
    content = json.dumps(first, indent=1).encode()
    file = {"name": "a.json", "mimeType": "application/json", "buffer": content}
    chooser.value.set_files(file)
    expect(page.locator("#toast")).to_have_text("Conversation imported.")
    expect(page.locator(".entry")).to_have_count(2)  # beside the first, not in its place
    expect(page.locator(".message .body")).to_have_text(shown)
    second = exported(page)
    assert second["id"] != first["id"] and not {*second["nodes"]} & {*first["nodes"]}
    assert without_ids(second) == without_ids(first)
    assert sum(len(node.get("tokens", [])) for node in second["nodes"].values()) == 8

    # It is kept, and goes on as any other.
    page.reload()
    expect(page.locator(".message .body")).to_have_text(shown)
    page.get_by_label("Earlier version").click()
    page.get_by_label("Token probabilities").click()
    expect(page.locator(".token")).to_have_count(8)
    asked = replies(page, "More.")
    say(page, "Go on.")
    assert len(asked[0]["messages"]) == 3


def test_all_that_was_exported_comes_back_elsewhere(visit: Visits, server: Server) -> None:
    page = visit(server)
    give(page, [conversation(), conversation(title="Fire", kind="text", updated=2)])
    expect(page.locator("#toast")).to_have_text("2 conversations imported.")
    expect(page.locator(".entry .row")).to_have_text(["Water", "Fire"])
    page.click("#open-settings")
    both = exported(page, "Export all")
    assert len(both) == 2

    other = visit(server)  # a browser of its own, with nothing in it
    expect(other.locator(".entry")).to_have_count(0)
    other.click("#open-settings")
    with other.expect_file_chooser() as chooser:
        other.get_by_role("button", name="Import").click()
    content = json.dumps(both).encode()
    chooser.value.set_files({"name": "a", "mimeType": "application/json", "buffer": content})
    expect(other.locator(".entry .row")).to_have_text(["Water", "Fire"])
    other.click("#open-settings")
    again = exported(other, "Export all")
    assert list(map(without_ids, again)) == list(map(without_ids, both))


def test_what_is_missing_is_made_up_and_what_is_more_is_left_out(
    visit: Visits, server: Server
) -> None:
    page = visit(server)
    least = {"kind": "chat", "leaf": "__proto__", "more": [1], "nodes": {"constructor": {}}}
    asked = {"parent": None, "role": "user", "content": "a", "state": "running", "x": {}}
    said = {"parent": "constructor", "role": "assistant", "content": "b", "state": "running"}
    least["nodes"] = {"constructor": asked, "__proto__": said}
    give(page, least | {"updated": 9e15})
    expect(page.locator(".message .body")).to_have_text(["a", "b"])
    expect(page.locator(".assistant .stats")).to_have_text("stopped")
    found = exported(page)
    assert "more" not in found and found["updated"] < 9e15
    fields = {"id", "parent", "role", "content", "created"}
    first, second = found["nodes"].values()
    assert {*first} == fields and {*second} == fields | {"state", "reasoning", "tokens", "stats"}


def test_text_of_a_file_stays_text(visit: Visits, server: Server) -> None:
    page = visit(server)
    hostile = json.loads(json.dumps(conversation()).replace("Water", "@").replace("water", "@"))
    hostile |= {"title": HOSTILE, "system": HOSTILE}
    hostile["nodes"]["a"]["content"] = HOSTILE
    problem = dict.fromkeys(("kind", "title", "remedy", "said"), HOSTILE)
    answer = {"content": HOSTILE + " [a](javascript:window.hurt=1)", "reasoning": HOSTILE}
    answer |= {"state": "failed", "problem": problem, "model": HOSTILE, "finish": HOSTILE}
    answer["tokens"] = [[HOSTILE, -1, [[HOSTILE, -1]]]]
    hostile["nodes"]["b"] |= answer
    give(page, hostile, name=HOSTILE.replace("/", "") + ".json")
    expect(page.locator("#title")).to_have_text(HOSTILE)
    expect(page.locator(".entry .row")).to_have_text(HOSTILE)
    expect(page.locator(".user .body")).to_have_text(HOSTILE)
    expect(page.locator(".assistant .body")).to_contain_text(HOSTILE)
    page.locator(".system summary").click()
    page.locator(".thoughts summary").click()
    page.get_by_label("Token probabilities").click()
    page.locator(".token").click()
    expect(page.locator(".alternatives code")).to_have_count(1)
    assert page.locator("img, iframe, #main script, a[href^=javascript]").count() == 0
    assert page.evaluate("window.hurt") is None


def test_a_very_long_answer_is_shown_as_it_is_written(visit: Visits, server: Server) -> None:
    page = visit(server)
    body = page.locator(".assistant .body")
    give(page, changed("b", content="**a**" + " b" * 49_997))
    expect(body.locator("strong")).to_have_text("a")
    long = "[_a*](" * 250_000
    give(page, changed("b", content=long))
    expect(page.locator(".entry")).to_have_count(2)
    expect(body.locator("*")).to_have_count(0)
    assert body.text_content() == long


@pytest.fixture(scope="module")
def refused() -> list[tuple[Any, str]]:
    """Files, and what is said of them."""
    deep = b'{"kind":"chat","leaf":"a","nodes":{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}}"
    circle = changed("a", parent="b")
    many = conversation()
    many["nodes"] = {str(i): many["nodes"]["a"] for i in range(5001)}
    endless = json.dumps(changed("a", created=7)).replace("7", "1e999").encode()
    second_is_bad = [conversation(), changed("b", content=7)]
    return [
        (b"", "It is not JSON."),
        (b"{", "It is not JSON."),
        (b"\xff\xfe{\x00}\x00", "It is not JSON."),
        (b"# Water\n\n## You\n", "It is not JSON."),
        (b"[" * 300_000, "It is not JSON."),
        (deep, "no text"),
        ([], "no conversation"),
        (7, "not a conversation"),
        ([[conversation()]], "not a conversation"),
        ({"messages": [{"role": "user", "content": "a"}]}, "not a conversation"),
        (conversation(nodes=[]), "not a conversation"),
        (conversation(nodes={}), "no messages"),
        (many, "more than 5,000 messages"),
        (conversation(kind="x"), "“kind”"),
        (conversation(title=[HOSTILE]), "“title”"),
        (conversation(title="a" * 1001), "“title”"),
        (conversation(system={"a": 1}), "“system”"),
        (conversation(updated="now"), "“updated”"),
        (endless, "“created”"),
        (conversation(leaf="z"), "which message is the last"),
        (conversation(leaf=None), "which message is the last"),
        (circle, "in a circle"),
        (changed("b", parent="z"), "not there"),
        (changed("b", parent="toString"), "not there"),
        (changed("b", role="system"), "by “system”"),
        (changed("b", role=HOSTILE), "by “<img"),
        (changed("b", role=["user"]), "by “object”"),
        (changed("b", content=None), "no text"),
        (changed("b", content="a" * 2_000_001), "too much"),
        (changed("b", content="a" * 2_000_000), "more than 2,000,000 characters"),
        (changed("b", state="busy"), "“state”"),
        (changed("b", tokens=[["a", "b", []]]), "“tokens”"),
        (changed("b", tokens=[["a", -1, [[1, 2]]]]), "“tokens”"),
        (changed("b", stats={"speed": "fast"}), "“speed”"),
        (changed("b", stats=[1]), "“stats”"),
        (changed("b", problem={"title": {}}), "“title”"),
        (second_is_bad, "no text"),
    ]


def test_a_file_that_is_not_right_changes_nothing(
    visit: Visits, server: Server, refused: list[tuple[Any, str]], tmp_path: Path
) -> None:
    page = visit(server)
    give(page, conversation())
    expect(page.locator(".message .body")).to_have_text(["Is water wet?", "Yes."])
    before = exported(page)
    said = page.get_by_role("alert").filter(has_text="Nothing was imported from")
    for i, (data, why) in enumerate(refused):
        give(page, copy.deepcopy(data), name=f"{i}.json")
        expect(said).to_contain_text(f"imported from {i}.json.")
        expect(said).to_contain_text(why)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(100 * 2**20 + 1)
    page.set_input_files("#file", large)
    expect(said).to_contain_text("It is larger than 100 MB. Choose a file that “Export as JSON”")
    expect(page.locator(".message .body")).to_have_text(["Is water wet?", "Yes."])
    expect(page.locator(".entry")).to_have_count(1)
    assert exported(page) == before
    assert page.evaluate("[window.hurt, {}.role, document.images.length]") == [None, None, 0]

    said.get_by_role("button", name="Close").click()
    expect(said).to_have_count(0)
    give(page, b"{")
    with page.expect_file_chooser():
        said.get_by_role("button", name="Choose another file").click()
    give(page, conversation(title="Another"))
    expect(page.locator("#title")).to_have_text("Another")
    expect(said).to_have_count(0)


def test_without_room_nothing_is_kept(visit: Visits, server: Server) -> None:
    page = visit(server)
    page.evaluate(
        """() => {
            const put = IDBObjectStore.prototype.put;
            let left = 4; // two of each conversation
            IDBObjectStore.prototype.put = function (...given) {
                const request = put.apply(this, given);
                if (--left === 0) this.transaction.abort();
                return request;
            };
        }"""
    )
    give(page, [conversation(), conversation(title="Fire")])
    expect(page.get_by_role("alert")).to_contain_text(re.compile("Nothing .* has no room for it"))
    page.reload()
    expect(page.locator("html[data-ready]")).to_be_attached()
    expect(page.locator(".entry")).to_have_count(0)
