"""Runs the examples of the documents, so that they stay true."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name):
    text = (DOCS / name).read_text()
    for match in BLOCK.finditer(text):
        yield text[: match.start(1)].count("\n"), match.group(1)


def run(name, namespace):
    for lines_before, source in blocks(name):
        exec(compile("\n" * lines_before + source, str(DOCS / name), "exec"), namespace)


def test_operator_examples_run():
    namespace = {}
    run("operators.md", namespace)
    assert namespace["o2"].shape == namespace["q"].shape


def test_quickstart_examples_run():
    def my_indexer(q, k):
        import torch

        return torch.zeros(k.shape[1], q.shape[0], 1, dtype=torch.int32)

    found = list(blocks("quickstart.md"))
    assert len(found) == 3
    namespace = {"my_indexer": my_indexer}
    for lines_before, source in found[:2]:
        exec(compile("\n" * lines_before + source, "quickstart.md", "exec"), namespace)
    torch = pytest.importorskip("torch")
    namespace["q"], namespace["k"], namespace["v"] = (torch.randn(512, h, 64) for h in (8, 2, 2))
    namespace["cu_seqlens"] = torch.tensor([0, 512], dtype=torch.int32)
    exec(compile(found[2][1], "quickstart.md", "exec"), namespace)
    assert namespace["o"].shape == (512, 8, 64)
