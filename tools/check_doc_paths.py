"""Checks that every file a document names in `backticks` or links to exists in the tree."""

from __future__ import annotations

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = (
    "include/",
    "src/",
    "python/",
    "tests/",
    "docs/",
    "tools/",
    "bench/",
    "examples/",
    "cmake/",
)
TICKED = re.compile(r"`([A-Za-z0-9_./*-]+)`")
LINKED = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def named_paths(text: str) -> set[str]:
    ticked = {p for p in TICKED.findall(text) if p.startswith(FOLDERS)}
    return ticked | set(LINKED.findall(text))


def exists(path: str, document: pathlib.Path) -> bool:
    if "*" in path:
        return any(ROOT.glob(path))
    return (ROOT / path).exists() or (document.parent / path).exists()


def main() -> int:
    documents = [p for p in ROOT.glob("*.md")] + [p for p in (ROOT / "docs").rglob("*.md")]
    missing = [
        f"{document.relative_to(ROOT)}: {path} does not exist"
        for document in sorted(documents)
        for path in sorted(named_paths(document.read_text()))
        if not exists(path, document)
    ]
    print("\n".join(missing) or f"doc paths: ok ({len(documents)} documents)")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
