"""`earnest deploy`: what is wrong is said before a cluster is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from earnest.cli.main import main

pytest.importorskip("ray", reason="Ray is not installed")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(["deploy", *arguments])
    return ended.value.code, capsys.readouterr().err


def test_what_cannot_be_deployed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, told = refused(capsys, "stories", "--replicas", "3", "--max-replicas", "2")
    assert code == 2 and "--max-replicas" in told
    empty = tmp_path / "keys"
    empty.write_text("\n")
    code, told = refused(capsys, "stories", "--api-key-file", str(empty))
    assert code == 2 and "no keys" in told
    code, told = refused(capsys, "stories", "--runner", "reference", "--kv", "int8")
    assert code == 2 and "options of the native runner" in told


def test_what_replicas_are_told_of_the_runner() -> None:
    from earnest.serve.ray_app import Options

    def told(**given: object) -> dict[str, object]:
        return Options.model_validate({"model": "stories", **given}).how

    usual = {"lock": False, "kv": None, "activation_bits": None}
    assert told(cpus=3) == usual | {"runner": "auto", "threads": 3}
    assert told(runner="reference") == usual | {"runner": "reference", "threads": None}
    # `serve run` gives everything as text.
    text = {"cpus": "0.5", "threads": "2", "lock": "true", "kv": "int8", "activation_bits": "8"}
    assert told(runner="native", **text) == {
        "runner": "native",
        "threads": 2,
        "lock": True,
        "kv": "int8",
        "activation_bits": 8,
    }
    with pytest.raises(ValueError, match="activation_bits"):
        told(activation_bits="9")


def test_a_port_that_somebody_has_and_a_model_that_nobody_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, told = refused(capsys, "stories", "--port", port)
        assert code == 4 and f"another program listens on 127.0.0.1:{port}" in told
    code, told = refused(capsys, "no-such-model", "--port", port)
    assert code == 2 and "no-such-model" in told
    (tmp_path / "model.gguf").write_bytes(b"nonsense")
    code, told = refused(capsys, str(tmp_path / "model.gguf"), "--port", port)
    assert code == 3 and "model.gguf" in told
