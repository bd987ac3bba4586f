"""Linear memory: nothing of size T * T / d or T * T / S is stored; the workspace cap is kept."""

import re
import subprocess
import sys

import pytest
import torch
from support import cu_seqlens

import fsattn

SIZES = {"kernel_size": 32, "kernel_stride": 16}
BLOCKS = {"block_size": 64, "topk": 16}


def _calls(tokens, **options):
    """Forward calls of every operator over one sequence, as (name, function)."""
    q = torch.zeros(tokens, 2, 8, requires_grad=True)
    k = torch.zeros(tokens, 1, 8, requires_grad=True)
    cmp = torch.zeros(tokens // 16, 1, 8, requires_grad=True)
    gates = torch.zeros(tokens, 3, requires_grad=True)
    ids = torch.full((1, tokens, 16), -1, dtype=torch.int32)
    cu, cu_cmp = cu_seqlens([tokens]), cu_seqlens([(tokens - 32) // 16 + 1])
    lse = torch.zeros(2, tokens)
    return {
        "compress_kv": lambda: fsattn.compress_kv(k, cu, **SIZES),
        "compressed_attention": lambda: fsattn.compressed_attention(
            q, cmp, cmp, cu, cu, cu_cmp, **SIZES
        ),
        "select_blocks": lambda: fsattn.select_blocks(
            q.detach(), cmp.detach(), lse, cu, cu, cu_cmp, **SIZES, **BLOCKS
        ),
        "build_block_index": lambda: fsattn.build_block_index(ids, cu, cu, block_size=64),
        "selected_attention": lambda: fsattn.selected_attention(
            q, k, k, ids, cu, cu, block_size=64, **options
        ),
        "window_attention": lambda: fsattn.window_attention(q, k, k, cu, cu, window_size=512),
        "native_sparse_attention": lambda: fsattn.native_sparse_attention(
            q, k, k, cmp, cmp, gates, cu, cu, cu_cmp, **SIZES, **BLOCKS, window_size=512, **options
        ),
    }


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "bytes": 1, "": 1}


def workspaces(text):
    """Bytes of workspace of every entry of explain()'s text."""
    found = re.findall(r"workspace\D{0,3}([\d.]+) ?([KMG]?i?B|bytes|)", text)
    assert found, f"explain() names no workspace: {text}"
    return [float(number) * UNITS[unit] for number, unit in found]


OPERATORS = list(_calls(64))


@pytest.mark.parametrize("op", OPERATORS)
def test_workspace_grows_linearly(op):
    """4K, 16K and 64K tokens: a fourfold length takes at most about four times the workspace."""
    at = {n: sum(workspaces(fsattn.explain(_calls(n)[op]))) for n in (4096, 16384, 65536)}
    for small, large in [(4096, 16384), (16384, 65536)]:
        assert at[large] <= 4.5 * at[small] + 2**16, at
    # 65536 tokens: T * T / S of one byte would be 64 MiB.
    assert at[65536] < 65536 * 2 * 16 * 2 * 10 * 4, at


@pytest.mark.parametrize("op", ["selected_attention", "native_sparse_attention"])
def test_workspace_cap_is_kept(op):
    """A smaller cap gives a smaller workspace wherever the default takes more than the cap."""
    tokens = 65536
    default = workspaces(fsattn.explain(_calls(tokens)[op]))
    for cap in (2**30, 2**24):
        capped = workspaces(fsattn.explain(_calls(tokens, workspace_cap=cap)[op]))
        assert len(capped) == len(default)
        assert max(capped) <= max(cap, min(default)), (cap, capped)


_PEAK = """
import resource, sys
sys.path[:0] = {path!r}
import torch, fsattn
from support import cu_seqlens, randn
torch.set_num_threads(1)
def run(tokens):
    f = dict(dtype=torch.float32)
    q, k = randn(tokens, 2, 8, **f).requires_grad_(), randn(tokens, 1, 8, **f).requires_grad_()
    gates = randn(tokens, 3, **f).requires_grad_()
    cu = cu_seqlens([tokens])
    cmp, cu_cmp = fsattn.compress_kv(k, cu, kernel_size=32, kernel_stride=16)
    o = fsattn.native_sparse_attention(q, k, k, cmp, cmp, gates, cu, cu, cu_cmp, kernel_size=32,
        kernel_stride=16, block_size=64, topk=4, window_size=64)
    o.sum().backward()
run(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({tokens})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _peak_kib(tokens):
    script = _PEAK.format(path=sys.path[:], tokens=tokens)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_resident_memory_of_forward_and_backward():
    """32K tokens: T * T / d floats are 256 MiB and T * T / S floats 64 MiB; both must be absent."""
    tokens = 32768
    inputs = tokens * (2 + 1 + 1) * 8 * 4
    # o, its branches, the gradients, the selection and its index: below 12 times the inputs.
    assert _peak_kib(tokens) * 1024 < 12 * inputs + 24 * 2**20
