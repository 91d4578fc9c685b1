"""The interactive chat, on a pseudo-terminal."""

from __future__ import annotations

import os
import sys
import time

import pytest

pexpect = pytest.importorskip("pexpect")


def chat(*arguments: str) -> pexpect.spawn:
    environment = os.environ | {"EARNEST_OFFLINE": "1", "TERM": "dumb", "NO_COLOR": "1"}
    return pexpect.spawn(
        sys.executable,
        ["-m", "earnest", "run", *arguments],
        env=environment,
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 200),
    )


def test_a_line_is_answered_and_the_end_of_input_leaves() -> None:
    child = chat("stories", "--temperature", "0", "--max-tokens", "12")
    child.expect("260")
    child.expect("no chat format")
    child.expect(">>> ")
    child.sendline("Once upon a time")
    child.expect("there was a little girl")
    child.expect(">>> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_commands() -> None:
    child = chat("stories", "--max-tokens", "3")
    child.expect(">>> ")
    child.sendline("/help")
    child.expect("/system TEXT")
    child.expect(">>> ")
    child.sendline("/reset")
    child.expect("forgotten")
    child.expect(">>> ")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_line_that_is_too_long_does_not_end_the_chat() -> None:
    child = chat("stories", "--max-tokens", "3", "--temperature", "0")
    child.expect(">>> ")
    child.sendline("word " * 700)
    child.expect("context")
    child.expect(">>> ")
    child.sendline("Once upon a time")
    child.expect("there")
    child.sendline("/exit")
    child.expect(pexpect.EOF)


def test_ctrl_c_stops_the_answer_and_then_leaves() -> None:
    child = chat("stories", "--ignore-eos", "--max-tokens", "450", "--temperature", "0")
    child.expect(">>> ")
    child.sendline("Once upon a time")
    child.expect("Lily")
    child.sendintr()
    child.expect(">>> ")  # stopped, or over before the signal came
    time.sleep(0.5)  # Python's input() loses a signal that comes just before it waits for keys
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus in (0, 130)
