"""Incidents that the source itself must rule out (docs/incidents.md), and that table."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import click

from earnest.cli.serve import command
from earnest.serve.run import Address

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "earnest"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@cache
def trees() -> dict[str, ast.Module]:
    """The parsed source, by path below `earnest`."""
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in SOURCE.rglob("*.py")
    }


def imports() -> Iterator[tuple[str, str]]:
    """Every (file, module) that is imported, anywhere in it."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield name, node.module
            elif isinstance(node, ast.Call) and called(node) in ("__import__", "import_module"):
                first = node.args[0]
                yield name, str(first.value) if isinstance(first, ast.Constant) else "?"


def called(node: ast.Call) -> str:
    """The last part of what is called: `load` of `torch.load(...)`."""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def calls() -> Iterator[tuple[str, ast.Call]]:
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield name, node


# Fewest versions without a known advisory that could matter here.
SAFE = {
    "jinja2": "3.1.6",  # CVE-2024-56326, CVE-2024-56201, CVE-2025-27516
    "sentencepiece": "0.2.1",  # CVE-2026-1260
    "h11": "0.16",  # CVE-2025-43859
    "starlette": "0.49.1",  # CVE-2025-62727
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_incident_11_lm_studio_2289_nobody_is_held_back() -> None:
    """Fixes of what we depend on arrive on their first day: bounds from below only, none of which
    lets in a version that is known to be unsafe; and no parser is a copy that ages here."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [
        line for name, lines in extras.items() if name not in ("test", "dev") for line in lines
    ]
    bounds = {}
    for line in lines:
        found = re.fullmatch(r"([A-Za-z0-9_.-]+)(\[[a-z,]+\])?(?:>=([\d.]+))?(\s*;.*)?", line)
        assert found, f"{line}: bounded from above, or in a way that this test does not know"
        if found[3] is not None:
            bounds[found[1].lower()] = found[3]
    for name, least in SAFE.items():
        assert numbers(bounds[name]) >= numbers(least), name
        assert numbers(version(name)) >= numbers(least), name
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    foreign = re.compile(r"(^|/)(third_?party|vendor|vendored|extern|external|deps)/")
    assert not [path for path in listed.stdout.splitlines() if foreign.search(path)]
    assert not (ROOT / ".gitmodules").exists()
    # Files are parsed in Python, where a length that lies is an exception: the compiled part gets
    # arrays and opens nothing but what the kernel says of the processors.
    opening = {
        path.name
        for path in (ROOT / "native").rglob("*.*")
        if path.suffix in (".cpp", ".h", ".inl")
        and re.search(r"\b(fopen|fread|ifstream|mmap)\b", path.read_text(encoding="utf-8"))
    }
    assert opening <= {"topology.cpp"}


def test_incident_13_cve_2026_5760_one_place_renders_templates() -> None:
    users = {name for name, module in imports() if module.split(".")[0] == "jinja2"}
    assert users == {"tokenizer/sandbox.py", "tokenizer/template.py"}
    made = {name for name, node in calls() if called(node) in ("from_string", "get_template")}
    assert made == {"tokenizer/template.py"}
    makers = [
        (name, called(node)) for name, node in calls() if called(node).endswith("Environment")
    ]
    assert makers == [("tokenizer/sandbox.py", "BoundedEnvironment")]


def test_incident_21_cve_2025_62164_nothing_of_torch_in_the_server() -> None:
    for name, module in imports():
        if module.split(".")[0] in ("torch", "transformers", "safetensors"):
            assert name.startswith("verify/"), f"{name} imports {module}"
    loads = {
        (name, called(node))
        for name, node in calls()
        if called(node) in ("load", "loads", "to_dense", "frombuffer")
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in ("torch", "np", "numpy")
    }
    assert {kind for _, kind in loads} <= {"frombuffer"}
    assert not [name for name, kind in loads if name.startswith("serve/") and name not in BYTES]


# Reads the masks of the grammar's compiler, never what came over the wire.
BYTES = ("serve/grammar.py",)

FORBIDDEN = (
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("yaml", "zmq", "xmlrpc", "jsonpickle", "runpy", "code", "codeop"),
)


def test_incident_24_cve_2025_32444_no_pickle_and_no_open_door() -> None:
    for name, module in imports():
        parts = module.split(".")
        assert parts[0] not in FORBIDDEN, f"{name} imports {module}"
        assert module != "multiprocessing.connection", name
    for name, node in calls():
        if isinstance(node.func, ast.Name):
            assert called(node) not in ("eval", "exec", "compile"), name
        told = {word.arg: word.value for word in node.keywords}
        if "allow_pickle" in told:
            assert ast.literal_eval(told["allow_pickle"]) is False, name
        if "shell" in told:
            assert ast.literal_eval(told["shell"]) is False, name
        if called(node) in ("from_pretrained", "from_config") and "trust_remote_code" in told:
            assert ast.literal_eval(told["trust_remote_code"]) is False, name
    assert Address().host == "127.0.0.1"
    (host,) = (option for option in command.params if option.name == "host")
    assert isinstance(host, click.Option) and host.default == "127.0.0.1"


def test_incident_25_cve_2025_59425_keys_are_compared_in_constant_time() -> None:
    (gate,) = (
        node
        for node in trees()["serve/http.py"].body
        if isinstance(node, ast.ClassDef) and node.name == "Gate"
    )
    compared = [
        {ast.unparse(side) for side in (node.left, *node.comparators)}
        for node in ast.walk(gate)
        if isinstance(node, ast.Compare)
    ]
    assert compared and not any({"key", "bearer", "self._keys"} & sides for sides in compared)
    assert "hmac.compare_digest" in {
        ast.unparse(node.func) for node in ast.walk(gate) if isinstance(node, ast.Call)
    }


# --- the table ----------------------------------------------------------------------------------


def test_every_incident_has_its_tests_and_the_table_names_them() -> None:
    table = (ROOT / "docs" / "incidents.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", table, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    named = {
        (path, test)
        for _, cell in rows
        for path, test in re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
    }
    for number, cell in rows:
        found = re.findall(r"::(\w+)`", cell)
        assert found, f"incident {number} has no test"
        assert all(test.startswith(f"test_incident_{int(number):02d}_") for test in found), found
    present = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for test in re.findall(r"^(?:async )?def (test_incident_\w+)", path.read_text(), re.M):
            present.add((str(path.relative_to(ROOT / "tests")), test))
    assert named == present
