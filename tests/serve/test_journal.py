"""One line for each request, which tells what happened and nothing that is private."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from running import Server

from earnest.errors import DeadlineError
from earnest.log import logger
from earnest.serve import answering, journal

SECRET = "kangaroo"


class Log(io.StringIO):
    """What was logged."""

    def lines(self, count: int) -> list[str]:
        """The first so many lines, once they are there: a reply may arrive before its line."""
        for _ in range(200):
            logger.handlers[-1].flush()
            found = self.getvalue().splitlines()
            if len(found) >= count:
                return found
            time.sleep(0.01)
        raise AssertionError(f"{count} lines were expected: {self.getvalue()!r}")

    def last(self) -> dict[str, Any]:
        found = json.loads(self.lines(1)[-1])
        assert isinstance(found, dict)
        return found


_LOGGERS = ("earnest", "uvicorn", "uvicorn.error", "asyncio")


@pytest.fixture
def log() -> Iterator[Log]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(found.handlers, found.propagate, found.level) for found in loggers]
    written = Log()
    journal.configure("debug", "json", written)
    yield written
    logging.captureWarnings(False)
    for found, (handlers, propagate, level) in zip(loggers, before, strict=True):
        found.handlers, found.propagate = handlers, propagate
        found.setLevel(level)


def test_a_request_has_one_line_without_its_text(start: Callable[..., Server], log: Log) -> None:
    server = start(api_keys=(SECRET + "-key",))
    body = {
        "messages": [{"role": "user", "content": f"Tell of a {SECRET}."}],
        "max_tokens": 20,
        "n": 2,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer {SECRET}-key", "x-request-id": "mine:1"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200 and reply.headers["x-request-id"] == "mine:1"
    usage = reply.json()["usage"]
    (line,) = log.lines(1)
    found = json.loads(line)
    assert SECRET not in line
    duration, first, queue = (
        found.pop(name) for name in ("duration", "time_to_first_token", "queue_time")
    )
    assert 0 <= queue <= first <= duration < 60
    del found["time"]
    assert found == {
        "level": "info",
        "logger": "earnest.serve",
        "message": "request",
        "request_id": "mine:1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "client": "127.0.0.1",
        "model": "stories",
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reason": "length,length",
    }
    refused = httpx.post(f"{server.url}/v1/chat/completions?{SECRET}", json=body)
    assert refused.status_code == 401 and len(refused.headers["x-request-id"]) == 32
    _, line = log.lines(2)
    found = json.loads(line)
    assert SECRET not in line and found["error"] == "authentication_error"
    assert found["request_id"] == refused.headers["x-request-id"] and "model" not in found


def test_refusals_do_not_quote_what_was_sent(server: Server, log: Log) -> None:
    for body in (
        {"prompt": "hi", SECRET: 1},
        {"prompt": "hi", "regex": SECRET},
        {"prompt": [SECRET, SECRET], "stream": True},
        {"prompt": SECRET, "temperature": SECRET},
        {"prompt": SECRET, "model": SECRET},
    ):
        reply = httpx.post(f"{server.url}/v1/completions", json=body)
        assert reply.status_code in (400, 404, 422), reply.text
    lines = log.lines(5)
    assert len(lines) == 5
    assert all(json.loads(line)["status"] >= 400 for line in lines)
    assert SECRET not in "".join(line.replace(f'"param": "{SECRET}"', "") for line in lines)


@pytest.mark.parametrize("given", ["", "two words", "é", "x" * 129, "<script>"])
def test_ids_that_cannot_be_written_anywhere(server: Server, log: Log, given: str) -> None:
    headers = {"x-request-id": given.encode("latin-1")}
    reply = httpx.get(f"{server.url}/v1/models", headers=headers)
    assert reply.headers["x-request-id"] == log.last()["request_id"] != given
    assert len(reply.headers["x-request-id"]) == 32


def test_a_stream_that_is_left(server: Server, log: Log) -> None:
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        next(reply.iter_bytes())
    found = log.last()
    assert found["incomplete"] is True and found["status"] == 200
    assert 0 < found["completion_tokens"] < 400 and "finish_reason" not in found


def test_a_stream_that_ends_with_an_error(
    server: Server, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = journal.Record.took

    def late(self: journal.Record, *arguments: Any) -> None:
        took(self, *arguments)
        if self.completion == 3:
            raise DeadlineError("too late")

    monkeypatch.setattr(journal.Record, "took", late)
    body = {"prompt": "Once", "max_tokens": 40, "stream": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body)
    assert reply.status_code == 200 and "too late" in reply.text
    found = log.last()
    assert (
        found["status"] == 504 and found["level"] == "error" and found["error"] == "timeout_error"
    )


def test_a_defect_is_told_once_with_the_id(
    server: Server, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(answering, "form_of", broken)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    for path, place in (("/v1/chat/completions", "message"), ("/v1/messages", "message")):
        log.truncate(0)
        log.seek(0)
        reply = httpx.post(server.url + path, json=body, headers={"x-request-id": "seven"})
        assert reply.status_code == 500 and "seven" in reply.json()["error"][place]
        assert reply.headers["x-request-id"] == "seven" and "defect" not in reply.text
        lines = [json.loads(line) for line in log.lines(2)]
        assert [line["request_id"] for line in lines] == ["seven", "seven"]
        assert "ZeroDivisionError: a defect" in lines[0]["exception"]
        assert lines[1]["status"] == 500 and lines[1]["error"] == "api_error"


def test_those_who_only_look_are_told_of_at_level_debug(server: Server, log: Log) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert httpx.get(server.url + path).status_code == 200
    levels = [json.loads(line)["level"] for line in log.lines(4)]
    assert levels == ["debug", "debug", "debug", "info"]
    journal.configure("info", "json", log)
    httpx.get(f"{server.url}/health")
    httpx.get(f"{server.url}/v1/models")
    assert json.loads(log.lines(5)[4])["path"] == "/v1/models"


def test_text_lines_cannot_be_forged(server: Server, log: Log) -> None:
    journal.configure("info", "text", log)
    httpx.get(f"{server.url}/nothing%0Ahere status=200")
    (line,) = log.lines(1)
    assert ' path="/nothing\\nhere status=200" status=404 ' in line
    assert line[10] == "T" and " info request request_id=" in line
    logger.warning("told by nobody")
    assert log.lines(2)[1].endswith(" warning told by nobody")
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("it broke")
    logger.handlers[-1].flush()
    assert log.getvalue().endswith("ValueError: x\n")


class Stuck(io.StringIO):
    """A pipe that nobody reads, for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        assert self.go.wait(20)
        return super().write(text)


def test_a_log_that_nobody_reads_stops_nothing(
    server: Server, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_MOST_LINES", 5)
    stuck = Stuck()
    journal.configure("info", "text", stuck)
    for _ in range(20):
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
    stuck.go.set()
    logger.handlers[-1].flush()
    logger.warning("again")
    logger.handlers[-1].flush()
    lines = stuck.getvalue().splitlines()
    assert len(lines) < 20 and "again" in lines[-2]
    assert re.search(r"warning 1\d lines of this log were lost", lines[-1])


def test_told_again_the_log_goes_elsewhere_and_nothing_is_left() -> None:
    """In a process of its own, where the root logger has no handler but what is made here."""
    code = """if True:
        import io, logging, threading
        from earnest.log import logger
        from earnest.serve import journal
        def threads():
            return [one for one in threading.enumerate() if one.name == "earnest-log"]
        streams = [io.StringIO() for _ in range(4)]
        somebodys = logging.StreamHandler(io.StringIO())
        for number, stream in enumerate(streams):
            if number == 3:
                logging.getLogger().addHandler(somebodys)
            journal.configure("info", "text", stream)
            logger.info("ours %d", number)
            logging.getLogger("somebody.else").error("theirs %d", number)
        logging.shutdown()
        former, root = threads(), logging.getLogger()
        for one in former:
            one.join(20)
        assert threads() == [], threads()
        assert root.handlers == [somebodys], root.handlers
        for number, stream in enumerate(streams):
            said = [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()]
            theirs = [] if number == 3 else [f"theirs {number}"]
            assert said == [f"ours {number}", *theirs], said
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "told",
    [
        pytest.param("logging.getLogger('asyncio').error(text)", id="asyncio"),
        pytest.param("logging.getLogger('asyncio').warning(text)", id="asyncio, a client has gone"),
        pytest.param("logging.getLogger('somebody.else').warning(text)", id="another package"),
        pytest.param("warnings.warn(text + str(number))", id="a warning"),
    ],
)
def test_what_others_log_stops_nothing_either(told: str) -> None:
    """A half-hour soak ended after 19 minutes: asyncio's warnings had filled the pipe."""
    code = f"""if True:
        import logging, warnings
        from earnest.serve import journal
        journal.configure("info", "text")
        text = 200 * "x"
        for number in range(2000):
            {told}
        print("done", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ended = threading.Timer(20, process.kill)
    ended.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"  # nobody reads the other pipe
    finally:
        ended.cancel()
        process.kill()
        process.communicate()
