"""Which replica a prompt goes to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ray", reason="Ray is not installed")

from ray.serve.schema import ServeDeploySchema

from earnest.serve.ray_app import Options, build, travelling
from earnest.serve.ray_router import Memory, beginnings, ranked

LONG = "Once upon a time there was a little girl. " * 40


def of(**body: Any) -> tuple[bytes, ...]:
    return beginnings(json.dumps(body).encode())


def shared(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> int:
    memory = Memory(1000)
    memory.learn(one)
    return memory.shared(other)


def test_a_conversation_that_goes_on_begins_as_it_did() -> None:
    first = [{"role": "user", "content": LONG}]
    more = [*first, {"content": "Yes.", "role": "assistant"}, {"role": "user", "content": LONG}]
    begun, later = of(messages=first, max_tokens=3), of(messages=more, temperature=0)
    assert len(later) > len(begun) >= 6
    assert shared(begun, later) == len(begun)
    assert shared(of(messages=first, tools=[{"a": 1}]), later) == 0
    assert shared(of(messages=first, cache_salt="mine"), later) == 0
    body = json.dumps({"messages": first}).encode()
    assert shared(beginnings(body, "one key"), beginnings(body, "another")) == 0
    assert shared(of(system=LONG, messages=first), of(system=LONG, messages=[])) >= 6


def test_texts_that_part_share_what_they_share() -> None:
    one, other = of(prompt=LONG + "cats"), of(prompt=LONG[:700] + "dogs" * 300)
    assert shared(one, other) == 2
    assert of(prompt=list(range(500))) and of(prompt=[LONG, "x"]) and of(input=LONG)


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[1]", b'"text"', b"{}", b"[" * 10**5, b'{"prompt": "short"}']
)
def test_what_has_no_beginning(body: bytes) -> None:
    assert beginnings(body) == ()


def test_a_body_without_end_has_beginnings_of_bounded_number() -> None:
    assert len(of(prompt="\ud800" * 10**6)) == 256


def test_a_memory_forgets_the_oldest_and_keeps_what_many_share() -> None:
    memory = Memory(4)
    first, second = (b"a", b"b", b"c"), (b"a", b"x", b"y")
    memory.learn(first)
    memory.learn(second)
    assert memory.shared(second) == 3
    assert memory.shared(first) == 2


NAMES = ("one", "two", "three")
STABLE = {name: name.encode() for name in NAMES}


def test_the_longest_beginning_wins_unless_its_replica_is_too_busy() -> None:
    known = {"one": 0, "two": 5, "three": 2}
    assert ranked(known, dict.fromkeys(NAMES, 3), STABLE, 8)[0] == "two"
    assert ranked(known, {"one": 0, "two": 8, "three": 1}, STABLE, 8)[0] == "two"
    assert ranked(known, {"one": 0, "two": 9, "three": 1}, STABLE, 8) == ["three", "one", "two"]


@given(
    st.tuples(*[st.integers(0, 3)] * 3),
    st.tuples(*[st.integers(0, 20)] * 3),
    st.integers(0, 10),
)
def test_all_replicas_are_ranked_and_the_first_is_never_too_busy(
    known: tuple[int, ...], load: tuple[int, ...], slack: int
) -> None:
    loads = dict(zip(NAMES, load, strict=True))
    order = ranked(dict(zip(NAMES, known, strict=True)), loads, STABLE, slack)
    assert sorted(order) == sorted(NAMES)
    assert loads[order[0]] <= min(load) + slack


def test_a_scope_travels_without_its_route_prefix() -> None:
    scope = {"type": "http", "path": "/ernie/v1/models", "root_path": "/ernie", "app": object()}
    found = travelling(scope)
    assert (found["path"], found["raw_path"], found["root_path"]) == (
        "/v1/models",
        b"/v1/models",
        "",
    )
    assert "app" not in found


def test_options_come_as_texts_and_mistakes_have_names() -> None:
    assert Options.model_validate({"model": "stories", "replicas": "2"}).replicas == 2
    for wrong in ({"replicas": 0}, {"replica": 2}, {"cpus": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            build({"model": "stories"} | wrong)


def test_the_configuration_in_the_documents_is_one() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "ray.md"
    found = re.search(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    config = yaml.safe_load(found[1])
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        assert application["import_path"] == f"{build.__module__}:{build.__name__}"
        Options.model_validate(application["args"])
