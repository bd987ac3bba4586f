"""Checks (or with --fix makes) the formatting of C++, CUDA and Python files that git tracks."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_LINES = 500
CXX = (".h", ".cpp", ".cu", ".cuh", ".inc")


def tracked() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def run(command: list[str], files: list[str]) -> bool:
    return not files or subprocess.run(command + files, cwd=ROOT).returncode == 0


def main() -> int:
    fix = "--fix" in sys.argv[1:]
    files = tracked()
    cxx = [f for f in files if f.endswith(CXX)]
    python = [f for f in files if f.endswith(".py")]
    ok = run(["clang-format", "-i"] if fix else ["clang-format", "--dry-run", "-Werror"], cxx)
    ok &= run(["ruff", "format"] + ([] if fix else ["--check", "-q"]), python)
    ok &= run(["ruff", "check", "-q"] + (["--fix"] if fix else []), python)
    for name in cxx + python:
        count = len((ROOT / name).read_text().splitlines())
        if count > MAX_LINES:
            print(f"{name}: at most {MAX_LINES} lines, found {count}")
            ok = False
    print("format: " + ("ok" if ok else "failed"))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
