"""Text for the demo, as bytes: the Python standard library, which every machine with Python has."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 10  # one file in ten is never trained on


@dataclass
class Text:
    """Two byte strings as uint8 tensors [length]; `name` says where they come from."""

    name: str
    train: Tensor
    held_out: Tensor

    def batch(self, generator: torch.Generator, batch: int, length: int) -> Tensor:
        """int64 [batch, length + 1]: random windows of the training text."""
        starts = torch.randint(len(self.train) - length, (batch, 1), generator=generator)
        return self.train[starts + torch.arange(length + 1)].long()

    def held_out_batches(self, count: int, batch: int, length: int) -> list[Tensor]:
        """`count` batches int64 [batch, length + 1] that lie evenly spread over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, count * batch).long()
        windows = self.held_out[starts[:, None] + torch.arange(length + 1)].long()
        return list(windows.split(batch))


def _as_bytes(chunks: list[bytes]) -> Tensor:
    content = bytearray(b"".join(chunks))
    # frombuffer refuses an empty buffer; load_text has the better message.
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()


def standard_library() -> Text:
    """The top-level modules of the running Python's standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    held_out = files[::HELD_OUT_EVERY]
    train = [text for i, text in enumerate(files) if i % HELD_OUT_EVERY]
    name = f"the standard library of Python {sysconfig.get_python_version()}, {len(files)} files"
    return Text(name, _as_bytes(train), _as_bytes(held_out))


def from_file(path: Path) -> Text:
    """The bytes of one file; its last tenth is held out."""
    content = path.read_bytes()
    split = len(content) - len(content) // HELD_OUT_EVERY
    return Text(str(path), _as_bytes([content[:split]]), _as_bytes([content[split:]]))


def load_text(path: Path | None, length: int) -> Text:
    """Text whose two parts both hold at least one window of `length` + 1 bytes."""
    text = standard_library() if path is None else from_file(path)
    shortest = min(len(text.train), len(text.held_out))
    if shortest < length + 2:
        raise ValueError(
            f"data: both parts of {text.name} must have at least {length + 2} bytes, "
            f"found {shortest}"
        )
    return text
