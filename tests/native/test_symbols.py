"""No tier's object leaks code for its processors into what others run (tools/check_symbols.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tools" / "check_symbols.py"

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm (binutils)")


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CHECK, folder], capture_output=True, text=True, check=False
    )


def test_the_objects_of_this_installation() -> None:
    """Where `pip install .` left them (`build-dir`), or the CMake call of CONTRIBUTING.md."""
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folders = [*(ROOT / "build").glob(f"{version}-*"), ROOT / "build" / "native"]
    built = [folder for folder in folders if any(folder.rglob("tier_*/**/*.o"))]
    if not built:
        pytest.skip("nothing was compiled in this checkout: no objects below build/")
    for folder in built:
        done = checked(folder)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[0]) >= 1


TABLE = "namespace earnest {{ extern const int kTable; const int kTable = 1; {} }}\n"


@pytest.mark.parametrize(
    ("code", "leaked"),
    [
        ("namespace { int f(int x) { return x; } } int (*const p)(int) = f;", None),
        ("inline int f(int x) { return x; } int (*const p)(int) = f;", "earnest::f(int)"),
        ("template <class T> T g(T x) { return x; } template int g(int);", "earnest::g<int>"),
        ("int h(int x) { return x; }", "earnest::h(int)"),
        ("inline int counter = 0; int& k() { return counter; }", "earnest::counter"),
    ],
)
def test_what_another_file_could_take_is_found(
    code: str, leaked: str | None, tmp_path: Path
) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    assert checked(tmp_path).returncode == 2, "no objects are no success"
    folder = tmp_path / "tier_test.dir"
    folder.mkdir()
    (folder / "test.cpp").write_text(TABLE.format(code))
    call = [compiler, "-std=c++20", "-c", "test.cpp", "-o", "test.cpp.o"]
    subprocess.run(call, cwd=folder, check=True)
    done = checked(tmp_path)
    assert done.returncode == (0 if leaked is None else 1), done.stdout + done.stderr
    assert leaked is None or leaked in done.stderr
