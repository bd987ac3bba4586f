"""python -m fsattn info | demo | bench."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "info": "versions, devices and the kernels of this build",
    "demo": "train a small language model with sparse and with dense attention",
    "bench": "time the operators",
}


def usage() -> str:
    lines = [f"  {name:6} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: python -m fsattn <command> [options]", "", "commands:", *lines])


def main(argv: list[str]) -> int:
    """Runs a command with the arguments behind its name; returns its exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # Imported when asked for: the demo needs packages that the library does not.
    return importlib.import_module(f"fsattn.{command}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
