"""Makes a virtual environment and installs a requirements file into it.

usage: setup_venv.py VENV REQUIREMENTS

Works where the venv module lacks ensurepip (Debian without python3-venv): pip is then taken from
PyPI as a wheel, which runs as it lies. Needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv

PIP_INDEX = "https://pypi.org/pypi/pip/json"


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as reply:
        return reply.read()


def download_pip(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the newest pip wheel and checks it against the digest that the index states."""
    files = json.loads(fetch(PIP_INDEX))["urls"]
    wheel = next(f for f in files if f["packagetype"] == "bdist_wheel")
    data = fetch(urllib.parse.urljoin(PIP_INDEX, wheel["url"]))
    found = hashlib.sha256(data).hexdigest()
    if found != wheel["digests"]["sha256"]:
        raise SystemExit(f"pip wheel: sha256 must be {wheel['digests']['sha256']}, found {found}")
    path = folder / wheel["filename"]
    path.write_bytes(data)
    return path


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    """Returns the environment's interpreter; the environment has pip."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=True)
    has_pip = (
        subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    )
    if not has_pip:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = download_pip(pathlib.Path(scratch))
            subprocess.run([python, f"{wheel}/pip", "install", "-q", "pip"], check=True)
    return python


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    if sys.version_info < (3, 10):
        raise SystemExit(f"python3: version must be at least 3.10, found {sys.version.split()[0]}")
    folder, requirements = pathlib.Path(sys.argv[1]), sys.argv[2]
    python = make_environment(folder)
    print(f"installing {requirements} into {folder} (PyTorch is large: a few minutes)", flush=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", requirements],
        check=True,
    )


if __name__ == "__main__":
    main()
