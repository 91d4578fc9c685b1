"""Installing where nothing can be compiled: a wheel of Python alone, which runs and says so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

for _needed in ("pip", "scikit_build_core"):
    if importlib.util.find_spec(_needed) is None:
        pytest.skip(f"{_needed}, which builds the wheel, is not installed", allow_module_level=True)

# An editable installation of Earnest puts itself before PYTHONPATH, by a finder of its own.
_RUN = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
import earnest
from earnest.cli.main import main
print(earnest.__file__, flush=True)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel is made of, away from the checkout, which other tests read."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("native", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


@pytest.mark.parametrize(
    "setting",
    [{"EARNEST_NO_NATIVE": "1"}, {"CXX": "/bin/false"}],
    ids=["not wanted", "no compiler"],
)
def test_without_a_compiler_it_installs_runs_and_says_what_that_costs(
    setting: dict[str, str], tree: Path, tmp_path: Path
) -> None:
    own = ("EARNEST_NO_NATIVE", "CXX", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    build = [sys.executable, "-m", "pip", "wheel", str(tree), "--wheel-dir", str(tmp_path)]
    made = subprocess.run(
        [*build, "--no-build-isolation", "--no-deps", "--no-index", "-q"],
        env={**clean, **setting},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "it claims to be of one system"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if Path(name).suffix in (".so", ".pyd")]
        archive.extractall(tmp_path / "site")
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, "run", "stories", "Once upon a time", "--max-tokens", "8"],
        env={**clean, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    where, text = ran.stdout.split("\n", 1)
    assert Path(where).is_relative_to(tmp_path / "site")
    assert text.startswith("Once upon a time")
    assert "without its compiled kernels" in ran.stderr
