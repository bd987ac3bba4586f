"""Fails when a file includes a file of a layer that it may not see (docs/design.md).

Usage: check_layers.py [path of src/]; include/ and python/ are looked for beside it.
"""

import pathlib
import re
import sys

# A folder of src/ sees itself, base/, the public headers, and what is listed here.
MAY_SEE = {
    "base": set(),
    "params": set(),
    "plan": {"params"},
    "cpu": {"params", "plan"},
    "cuda": {"params", "plan"},
    "run": {"params", "plan", "cpu", "cuda"},
    "api": {"params", "plan", "run"},
}
HOST_ONLY = {"base", "params", "plan", "run", "api", "cpu"}
SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".in"}
INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')


def refusal(source: tuple[str, ...], target: str) -> str | None:
    """Says why the file at source (its path parts below src/) may not include target."""
    layer, parts = source[0], target.split("/")
    if parts[0] not in MAY_SEE[layer] | {layer, "base", "fsattn"}:
        return f"{layer}/ may not include {target}"
    if layer in HOST_ONLY and target.endswith(".cuh"):
        return f"{layer}/ is host code and may not include {target}"
    if layer == "run" and parts[0] in {"cpu", "cuda"} and parts[1] != "backend.h":
        return f"run/ may include {parts[0]}/backend.h only, not {target}"
    if layer == "cuda" and parts[0] == "plan":
        if not target.endswith("_table.h") and target != "plan/problem.h":
            return f"cuda/ may include the kernel tables of plan/ only, not {target}"
    if layer == parts[0] == "cuda" and len(parts) == len(source) == 3:
        is_launcher = parts[2] == f"{parts[1]}.h"
        if parts[1] not in {source[1], "device"} and not is_launcher:
            return f"cuda/{source[1]}/ may include the launcher of another operator only: {target}"
    return None


def includes(folder: pathlib.Path):
    """Yields (file, line number, included path) for every quoted include below folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := INCLUDE.match(line):
                yield path, number, found.group(1)


def complaints(src: pathlib.Path):
    for path, number, target in includes(src):
        source = path.relative_to(src).parts
        if source[0] not in MAY_SEE:
            yield f"{path}:{number}: {source[0]} is not a layer"
        elif why := refusal(source, target):
            yield f"{path}:{number}: {why}"
    for path, number, target in includes(src.parent / "include"):
        if not target.startswith("fsattn/"):
            yield f"{path}:{number}: a public header may not include {target}"
    for path, number, target in includes(src.parent / "python"):
        if target.split("/")[0] in MAY_SEE:
            yield f"{path}:{number}: python/ sees the public headers only, not {target}"


def main() -> int:
    src = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "src")
    if not src.is_dir():
        print(f"{src}: no such folder")
        return 2
    found = list(complaints(src))
    print("\n".join(found) or "layers: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
