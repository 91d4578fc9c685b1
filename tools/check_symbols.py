"""Fail if an instruction-set tier's object could leak code into another.

A linker keeps one copy of an inline function that several files emit; if that copy was compiled
for AVX-512, every caller gets it, and older processors stop at the first such instruction. So a
tier's object may define its table and nothing else that other files can see.

    python tools/check_symbols.py BUILD_FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def leaks(symbols: str) -> list[str]:
    """The lines of `nm` output that a tier must not have: weak (w, v), unique (u) or common (c)
    symbols, and defined global ones other than a kernel table."""
    bad = []
    for line in symbols.splitlines():
        *_, kind, name = line.split(maxsplit=2) if line.count(" ") else ("", "", "")
        if kind in "wWvVuC" or (
            kind in "TDBRSG"
            and not name.startswith("_ZN7earnest1")
            and not name.startswith("earnest::k")
        ):
            bad.append(line)
    return bad


def main(folder: Path) -> int:
    objects = sorted(path for path in folder.rglob("*.o*") if "tier_" in str(path))
    if not objects:
        print(f"no tier objects below {folder}: build first", file=sys.stderr)
        return 2
    failed = 0
    for path in objects:
        done = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for line in leaks(done.stdout):
            print(f"{path.name}: {line}", file=sys.stderr)
            failed = 1
    print(f"{len(objects)} tier objects checked")
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build")))
