"""`earnest deploy`: what is wrong is said before a cluster is started."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import click
import pytest

from earnest.cli import deploy, serve
from earnest.cli.main import main
from earnest.errors import MachineError

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


def without(path: Path, part: str) -> None:
    """Leave the tensors out of a safetensors file whose names contain `part`."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header, kept, body = json.loads(data[8:begin]), dict[str, Any](), b""
    for name, found in header.items():
        if name == "__metadata__":
            kept[name] = found
        elif part not in name:
            first, last = found["data_offsets"]
            kept[name] = found | {"data_offsets": [len(body), len(body) + last - first]}
            body += data[begin + first : begin + last]
    assert len(kept) < len(header)
    text = json.dumps(kept).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_what_serve_and_deploy_share() -> None:
    def options(command: click.Command) -> dict[str, dict[str, Any]]:
        return {p.name: p.to_info_dict() for p in command.params if p.name and p.name != "model"}

    serving, deploying = options(serve.command), options(deploy.command)
    # What only a cluster has; everything else is an option of `earnest serve`, the same one.
    assert set(deploying) - set(serving) == {"replicas", "max_replicas", "cpus", "address"}
    unlike = {name for name in set(serving) & set(deploying) if serving[name] != deploying[name]}
    assert unlike == {"port"}  # of a cluster's proxies there is none that tells which it took
    assert serving["port"]["default"] == deploying["port"]["default"] == 8000
    assert (serving["port"]["type"]["min"], deploying["port"]["type"]["min"]) == (0, 1)


def test_a_model_without_its_correction_bias(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from earnest.serve import ray_app

    def no_cluster(**_: object) -> None:
        raise MachineError("no cluster today")

    build, built = ray_app.build, list[dict[str, Any]]()
    monkeypatch.setattr(ray, "init", no_cluster)
    monkeypatch.setattr(ray_app, "build", lambda given: (built.append(given), build(given))[1])
    path = str(tmp_path / "moe")
    with pytest.raises(SystemExit):
        main(["synth", path, "--preset", "small-moe"])
    (weights,) = Path(path).glob("*.safetensors")
    without(weights, "e_score")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code, told = refused(capsys, path, "--port", port)
    assert code == 3 and "correction" in told
    code, told = refused(capsys, path, "--port", port, "--allow-missing-correction-bias")
    assert code == 4 and "no cluster today" in told
    assert [given["allow_missing_correction_bias"] for given in built] == [False, True]
    assert ray_app.Options.model_validate(built[1]).allow_missing_correction_bias
