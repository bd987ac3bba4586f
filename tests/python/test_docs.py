"""Runs the examples of the documents, so that they stay true."""

import pathlib
import re

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(name, namespace, start=0, stop=None):
    """Executes the Python blocks start .. stop - 1 of a document; returns how many it has."""
    text = (ROOT / name).read_text()
    found = list(BLOCK.finditer(text))
    for match in found[start:stop]:
        lines_before = text[: match.start(1)].count("\n")
        exec(compile("\n" * lines_before + match.group(1), name, "exec"), namespace)
    return len(found)


def test_readme_example_runs():
    namespace = {}
    assert run("README.md", namespace) == 1
    assert namespace["o"].shape == namespace["q"].shape


def test_operator_examples_run():
    namespace = {}
    run("docs/operators.md", namespace)
    assert namespace["o2"].shape == namespace["q"].shape


def test_inference_examples_run():
    namespace = {}
    assert run("docs/inference.md", namespace) == 4
    assert namespace["cache_seqlens"].tolist() == [151, 151]


def test_quickstart_examples_run():
    def my_indexer(q, k):
        return torch.zeros(k.shape[1], q.shape[0], 1, dtype=torch.int32)

    namespace = {"my_indexer": my_indexer}
    assert run("docs/quickstart.md", namespace, stop=2) == 3
    namespace["q"], namespace["k"], namespace["v"] = (torch.randn(512, h, 64) for h in (8, 2, 2))
    namespace["cu_seqlens"] = torch.tensor([0, 512], dtype=torch.int32)
    run("docs/quickstart.md", namespace, start=2)
    assert namespace["o"].shape == (512, 8, 64)
