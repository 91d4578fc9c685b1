"""Vectors through `/v1/embeddings` and Ollama's `/api/embed`, by the official clients."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
from running import Server

from earnest.engine.language_model import LanguageModel, load
from earnest.runners.native import isa
from earnest.serve.journal import Record
from earnest.serve.state import Served

TEXTS = ["Once upon a time", "The big red dog ran to the park and played.", "a"]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def post(server: Server, path: str = "/v1/embeddings", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def vectors(reply: httpx.Response) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.array([part["embedding"] for part in reply.json()["data"]], np.float32)


# --- OpenAI ---------------------------------------------------------------------------------------


def test_they_are_what_the_model_says_in_python(
    client: openai.OpenAI, stories: LanguageModel
) -> None:
    reply = client.embeddings.create(model="stories", input=TEXTS)
    found = np.array([part.embedding for part in reply.data], np.float32)
    assert [part.index for part in reply.data] == [0, 1, 2]
    expected = stories.embed(TEXTS)
    assert expected.shape == (3, stories.config.hidden_size) and expected.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0)
    tokens = sum(len(stories.text_ids(text)) for text in TEXTS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (tokens, tokens)
    assert reply.model == "stories"


def test_base64_holds_the_same_numbers_as_the_list(server: Server) -> None:
    listed = vectors(post(server, input=TEXTS))
    packed = post(server, input=TEXTS, encoding_format="base64", user="somebody").json()
    for row, part in zip(listed, packed["data"], strict=True):
        found = np.frombuffer(base64.b64decode(part["embedding"]), "<f4")
        assert found == pytest.approx(row, abs=1e-6)


def test_ids_are_taken_as_they_are(server: Server, stories: LanguageModel) -> None:
    ids = [stories.text_ids(text) for text in TEXTS]
    several = vectors(post(server, input=ids))
    assert several == pytest.approx(stories.embed(TEXTS), abs=1e-5)
    assert vectors(post(server, input=ids[1])) == pytest.approx(several[1:2], abs=1e-5)
    assert vectors(post(server, input=TEXTS[1])) == pytest.approx(several[1:2], abs=1e-5)
    bare = vectors(post(server, input=TEXTS[1], add_special_tokens=False))
    assert bare == pytest.approx(vectors(post(server, input=ids[1][1:])), abs=1e-5)


def test_pooling_and_length_are_chosen_and_said(server: Server, stories: LanguageModel) -> None:
    for pooling in ("mean", "last"):
        for normalize in (True, False):
            reply = post(server, input=TEXTS, pooling=pooling, normalize=normalize)
            expected = stories.embed(TEXTS, pooling=pooling, normalize=normalize)
            assert vectors(reply) == pytest.approx(expected, rel=1e-4, abs=1e-4)
            said = reply.json()
            assert (said["pooling"], said["normalized"]) == (pooling, normalize)
    plain = stories.embed(TEXTS[0], normalize=False)
    assert plain.shape == (stories.config.hidden_size,)
    assert not np.allclose(np.linalg.norm(plain), 1.0)


def test_a_common_beginning_changes_no_mean(server: Server, stories: LanguageModel) -> None:
    """Blocks are remembered, hidden states are not: the mean computes them again."""
    long = " ".join([TEXTS[1]] * 12)
    first = post(server, input=long)
    again, last = post(server, input=long), post(server, input=long, pooling="last")
    assert np.array_equal(vectors(first), vectors(again))
    cached = [
        reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for reply in (first, again, last)
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] >= 32
    assert vectors(last)[0] == pytest.approx(stories.embed(long, pooling="last"), abs=1e-4)


def test_more_texts_than_run_at_a_time(client: openai.OpenAI, stories: LanguageModel) -> None:
    texts = [f"Tom has {n} dogs." for n in range(150)]
    reply = client.embeddings.create(model="stories", input=texts)
    found = np.array([part.embedding for part in reply.data], np.float32)
    assert found[[0, 77, 149]] == pytest.approx(
        stories.embed([texts[0], texts[77], texts[149]]), abs=1e-5
    )


def test_one_request_does_not_fill_the_queue(start: Callable[..., Server]) -> None:
    server = start(limits={"waiting": 2})
    assert vectors(post(server, input=["Tom ran."] * 20)).shape[0] == 20


@pytest.mark.parametrize(
    "body, named",
    [
        ({"input": "Hi", "dimensions": 7}, "dimensions"),
        ({"input": "Hi", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "Hi", "pooling": "max"}, "pooling"),
        ({"input": "Hi", "task": "query"}, "task"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["Hi", ""]}, "input"),
        ({"input": [[1, 2], []]}, "input"),
        ({"input": ["Hi"] * 2049}, "too many"),
        ({"input": [999_999]}, "vocabulary"),
        ({"input": [-1]}, "vocabulary"),
        ({"input": [5] * 600}, "context"),
        ({"input": "Hi", "model": "gpt-4"}, "gpt-4"),
        ({}, "input"),
    ],
)
def test_refused_by_name(server: Server, body: dict[str, Any], named: str) -> None:
    reply = post(server, **body)
    assert reply.status_code in (400, 404, 422), reply.text
    assert named in reply.json()["error"]["message"], reply.text


def test_the_whole_context_can_be_read(server: Server, stories: LanguageModel) -> None:
    size = stories.config.hidden_size
    reply = post(server, input=[7] * stories.max_context, dimensions=size)
    assert vectors(reply).shape == (1, size)


@pytest.mark.skipif(not isa.installed(), reason="the compiled kernels are not built")
def test_under_load_they_have_the_bits_they_have_alone(
    start: Callable[..., Server],
) -> None:
    model = load("stories", runner="native", threads=2)
    server = Server(Served(model, "stories"))
    try:
        alone = {
            (text, kind): model.embed(text, pooling=kind)
            for text in (*TEXTS, " ".join(TEXTS * 9))
            for kind in ("mean", "last")
        }
        jobs = list(alone) * 4

        def ask(job: tuple[str, str]) -> Any:
            return post(server, input=job[0], pooling=job[1], encoding_format="base64").json()

        def chatter(number: int) -> int:
            body = {"prompt": TEXTS[number % 3], "max_tokens": 30, "seed": number}
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code

        with ThreadPoolExecutor(16) as pool:
            talk = [pool.submit(chatter, number) for number in range(12)]
            found = list(pool.map(ask, jobs))
            assert {done.result() for done in talk} == {200}
        for job, reply in zip(jobs, found, strict=True):
            raw = base64.b64decode(reply["data"][0]["embedding"])
            assert raw == alone[job].astype("<f4").tobytes()
    finally:
        server.close()


# --- Ollama ---------------------------------------------------------------------------------------


def test_ollamas_client_gets_the_same(server: Server, stories: LanguageModel) -> None:
    client = ollama.Client(host=server.url)
    expected = stories.embed(TEXTS)
    reply = client.embed(model="stories", input=TEXTS)
    assert np.array(reply.embeddings) == pytest.approx(expected, abs=1e-5)
    assert reply.prompt_eval_count == sum(len(stories.text_ids(text)) for text in TEXTS)
    assert reply.total_duration > 0 and reply.load_duration == 0
    one = client.embed(model="stories:latest", input=TEXTS[0])
    assert np.array(one.embeddings) == pytest.approx(expected[:1], abs=1e-5)
    old = client.embeddings(model="stories", prompt=TEXTS[0])
    plain = stories.embed(TEXTS[0], normalize=False)
    assert np.array(old.embedding) == pytest.approx(plain, rel=1e-4, abs=1e-4)


def test_ollama_cuts_what_is_too_long_unless_told_not_to(
    server: Server, stories: LanguageModel
) -> None:
    long = "The dog ran. " * 300
    room = stories.max_context
    cut = post(server, "/api/embed", model="stories", input=long).json()
    assert cut["prompt_eval_count"] == room
    expected = stories.embed(stories.text_ids(long)[:room])
    assert np.array(cut["embeddings"][0]) == pytest.approx(expected, abs=1e-4)
    short = post(server, "/api/embed", model="stories", input=long, options={"num_ctx": 9}).json()
    assert short["prompt_eval_count"] == 9
    refused = post(server, "/api/embed", model="stories", input=long, truncate=False)
    assert refused.status_code == 400 and "tokens" in refused.json()["error"]


def test_ollama_has_no_vector_for_no_text(server: Server) -> None:
    for nothing in ("", [], [""]):
        reply = post(server, "/api/embed", model="stories", input=nothing)
        assert (reply.status_code, reply.json()["embeddings"]) == (200, [])
    assert post(server, "/api/embeddings", model="stories").json() == {"embedding": []}


@pytest.mark.parametrize(
    "body, named",
    [
        ({"input": "Hi", "dimensions": 7}, "dimensions"),
        ({"input": "Hi", "options": {"num_ctx": 10**6}}, "num_ctx"),
        ({"input": "Hi", "options": {"temperature": 0.5}}, "temperature"),
        ({"input": "Hi", "model": "other"}, "other"),
    ],
)
def test_ollama_refuses_by_name(server: Server, body: dict[str, Any], named: str) -> None:
    reply = post(server, "/api/embed", **{"model": "stories"} | body)
    assert reply.status_code in (400, 404, 422)
    assert named in reply.json()["error"]


def test_they_are_counted(server: Server) -> None:
    def counted() -> float:
        page = httpx.get(f"{server.url}/metrics").text
        return sum(
            float(line.split()[-1])
            for line in page.splitlines()
            if line.startswith("vllm:request_success_total") and '"stop"' in line
        )

    before = counted()
    reply = post(server, input=TEXTS)
    assert reply.status_code == 200
    assert counted() == before + len(TEXTS)


def test_they_have_a_line_in_the_log(
    server: Server, stories: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = []

    def write(record: Record) -> None:
        if record.prompt:  # not the end of a request before
            records.append(record.to_dict())

    monkeypatch.setattr(Record, "write", write)
    post(server, input=TEXTS)
    for _ in range(200):
        if records:
            break
        time.sleep(0.01)
    (record,) = records
    assert record["prompt_tokens"] == sum(len(stories.text_ids(text)) for text in TEXTS)
    assert (record["completion_tokens"], record["finish_reason"]) == (0, "stop")
    assert record["time_to_first_token"] > 0
