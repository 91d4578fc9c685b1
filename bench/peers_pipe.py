"""How peers.py talks to the process of a side: a line of JSON each way, over pipes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np


class SideError(Exception):
    """A side failed or ended."""


class Pipe:
    """The process of a side, seen from peers.py.

    Args:
        python: interpreter to run it with.
        script: its file in this folder.
        options: more arguments.
    """

    def __init__(self, python: str, script: str, *options: str) -> None:
        # What limits the threads of numpy must not limit those of a peer.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        self._process = subprocess.Popen(
            [python, str(Path(__file__).parent / script), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """Call a method of the side and wait for its answer.

        Raises:
            SideError: it failed, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(self._how_it_ended(what))
        answer = json.loads(line)
        if isinstance(answer, dict) and "failed" in answer:
            raise SideError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _how_it_ended(self, what: str) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"ended with status {code} while doing {what!r}"
        name = signal.Signals(-code).name
        hint = ""
        if -code == signal.SIGSEGV:
            hint = (
                "; built by gcc 12 on a machine with AMX, llama.cpp crashes at its first prompt: "
                "build it without AMX (docs/benchmarks.md)"
            )
        if -code == signal.SIGKILL:
            hint = "; the system does that when memory runs out"
        return f"ended by {name} while doing {what!r}{hint}"


def serve(side: Any) -> None:
    """Answer requests with the methods of `side` until the input ends."""
    # Libraries may print to standard output; the answers keep it to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - told to the other end, whatever it is
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def packed(values: np.ndarray) -> str:
    """Float32 numbers as text."""
    return base64.b64encode(np.ascontiguousarray(values, np.float32).tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """What `packed` made."""
    return np.frombuffer(base64.b64decode(text), np.float32)
