"""Runs every operator once, forward and backward, on a small packed batch and a small paged cache.

Made for compute-sanitizer, which slows kernels down a hundredfold: results are only checked to be
finite, the tests in tests/python check their values. usage: run_operators.py [cpu|cuda] [part]...
Parts: valid, and the wrong lengths and offsets by name (CUDA only); default all. DIM: head_dim.
"""

import os
import sys
import time
from functools import partial

import torch

import fsattn

HEADS_Q, HEADS_KV = 4, 2
DIM = int(os.environ.get("DIM", "64"))
TOTAL = 333
LENGTHS = (0, 20, 20, TOTAL)
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


def randn(device, *shape):
    """A leaf of bf16 normal numbers; made on the host, so that no kernel of PyTorch is needed."""
    return torch.randn(*shape).to(torch.bfloat16).to(device).requires_grad_()


def backward(*outputs):
    torch.autograd.backward(
        outputs, [torch.ones(o.shape, dtype=o.dtype).to(o.device) for o in outputs]
    )


def compress_all(device, x, cu):
    """Every kind of compression, forward and backward; returns the rows of the last."""
    weights = {
        "mean": None,
        "weighted": randn(device, HEADS_KV, 32),
        "softmax": randn(device, HEADS_KV, 32),
        "linear": randn(device, HEADS_KV, 32 * DIM, DIM),
    }
    for kind, weight in weights.items():
        pos_emb = randn(device, HEADS_KV, 32, DIM)
        rows, cu_cmp = fsattn.compress_kv(
            x, cu, kind=kind, weight=weight, pos_emb=pos_emb, **WINDOWS
        )
        backward(rows)
    return rows.detach(), cu_cmp


def leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


def run_paged(device):
    """A cache filled by a chunk, then steps of one and of three tokens; every branch's result."""
    lens = [200, 70]

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32).to(device)

    def pages(count, size):
        return torch.zeros(count, HEADS_KV, size, DIM, dtype=torch.bfloat16).to(device)

    cache = (pages(9, 64), pages(9, 64), ints([8, 1, 6, 3], [0, 7, 2, 5]))
    cmp = (pages(3, 16), pages(3, 16), ints([2], [0]))
    names = ("k_cmp_cache", "v_cmp_cache", "cmp_block_table")
    options = {"kind": "softmax", "k_raw_cache": pages(9, 32), "layout": "HND", **WINDOWS}
    options |= {x: randn(device, 256, DIM // 2).detach() for x in ("rope_cos", "rope_sin")}
    options |= {x: randn(device, HEADS_KV, 32).detach() for x in ("weight_k", "weight_v")}
    results = []
    for new in (60, 1, 3):
        seqlens, total = ints(*(n - new for n in lens)), 2 * new
        cu, bounds = ints(0, new, total), {"max_seqlen_q": new, "max_seqlen_k": 256}
        k, v = (randn(device, total, HEADS_KV, DIM).detach() for _ in range(2))
        lengths = {"cache_seqlens": seqlens, "cu_seqlens_q": cu, **bounds}
        fsattn.append_kv(k, v, *cache, **lengths, **dict(zip(names, cmp)), **options)
        q = randn(device, total, HEADS_Q, DIM).detach()
        gates = randn(device, total, HEADS_Q, 3).detach()
        results += fsattn.paged_native_sparse_attention(
            q, gates, *cache, *cmp, **lengths, topk=4, layout="HND", return_topk_idx=True, **WINDOWS
        )
        results += fsattn.paged_selected_attention(
            q, results[-1], *cache, **lengths, block_size=64, layout="HND", return_lse=True
        )
    return [r for r in results if r.is_floating_point()]


def int32(device, *values):
    return torch.tensor(values, dtype=torch.int32).to(device)


def make_qkv(device):
    return [randn(device, TOTAL, heads, DIM) for heads in (HEADS_Q, HEADS_KV, HEADS_KV)]


def run_valid(device):
    """Every operator as it is meant to be called."""
    total, cu = TOTAL, int32(device, *LENGTHS)
    q, k, v = make_qkv(device)
    rows, cu_cmp = compress_all(device, k, cu)
    k_cmp, v_cmp = leaves(rows, rows)

    cmp, lse = fsattn.compressed_attention(
        q, k_cmp, v_cmp, cu, cu, cu_cmp, return_lse=True, **WINDOWS
    )
    backward(cmp)
    topk_idx = fsattn.select_blocks(
        q.detach(), k_cmp.detach(), lse.detach(), cu, cu, cu_cmp, block_size=64, topk=4, **WINDOWS
    )
    for max_seqlen in (None, total):
        index = fsattn.build_block_index(topk_idx, cu, cu, max_seqlen, max_seqlen, block_size=64)
        sel = fsattn.selected_attention(q, k, v, topk_idx, cu, cu, block_size=64, block_index=index)
        backward(sel)
    win = fsattn.window_attention(q, k, v, cu, cu, window_size=48)
    backward(win)
    for shape in ((total, HEADS_Q, 3), (total, 3)):
        mixed = fsattn.gate(*leaves(cmp, sel, win), randn(device, *shape))
        backward(mixed)
    whole = fsattn.native_sparse_attention(
        q, k, v, k_cmp, v_cmp, randn(device, total, HEADS_Q, 3), cu, cu, cu_cmp, topk=4, **WINDOWS
    )
    backward(whole)
    results = run_paged(device)
    results += [cmp, sel, win, mixed, whole, q.grad, k.grad, v.grad, k_cmp.grad, v_cmp.grad]
    if not all(bool(r.cpu().isfinite().all()) for r in results):
        sys.exit("a result is not finite")


FAR = 2**31 - 1
WRONG_LENGTHS = {
    "long": (0, 20, 20, 100_000),
    "descending": (0, 300, 20, TOTAL),
    "negative": (-5, -70, 20, TOTAL),
    "huge": (0, FAR, -FAR - 1, TOTAL),
    "late": (300, 310, 320, TOTAL + 50),
}
WRONG_OFFSETS = {"far": (FAR, FAR, FAR), "past": (-FAR - 1, -FAR - 1, -9)}


def run_attention(device, cu_q, cu_k, cu_cmp, q_offset=None):
    """Every operator over queries, with whatever lengths and offsets and with wild block ids."""
    q, k, v = make_qkv(device)
    k_cmp, v_cmp = (randn(device, 20, HEADS_KV, DIM) for _ in "kv")
    ids = torch.randint(-3, 9, (HEADS_KV, TOTAL, 4), dtype=torch.int32)
    ids[0, :, 1], ids[1, :, 2] = FAR, -FAR - 1
    ids = ids.to(device)
    seq, cmp = (cu_q, cu_k), (cu_q, cu_k, cu_cmp)
    offset = {"q_offset": q_offset}
    backward(fsattn.window_attention(q, k, v, *seq, window_size=48, **offset))
    backward(fsattn.selected_attention(q, k, v, ids, *seq, block_size=64, **offset))
    index = fsattn.build_block_index(ids, *seq, TOTAL, TOTAL, block_size=64, **offset)
    backward(fsattn.selected_attention(q, k, v, ids, *seq, TOTAL, TOTAL, block_size=64,
                                       block_index=index, **offset))  # fmt: skip
    backward(fsattn.compressed_attention(q, k_cmp, v_cmp, *cmp, **WINDOWS, **offset))
    lse = torch.randn(HEADS_Q, TOTAL).to(device)
    fsattn.select_blocks(
        q.detach(), k_cmp.detach(), lse, *cmp, block_size=64, topk=4, **WINDOWS, **offset
    )
    gates = randn(device, TOTAL, HEADS_Q, 3)
    backward(fsattn.native_sparse_attention(
        q, k, v, k_cmp, v_cmp, gates, *cmp, topk=4, **WINDOWS, **offset
    ))  # fmt: skip


def run_wrong_lengths(device, lengths):
    """One wrong vector of lengths for the queries, the keys and the compressed keys."""
    good, good_cmp = int32(device, *LENGTHS), int32(device, 0, 0, 0, 18)
    wrong = int32(device, *lengths)
    compress_all(device, randn(device, TOTAL, HEADS_KV, DIM), wrong)
    run_attention(device, wrong, good, good_cmp)
    run_attention(device, good, wrong, good_cmp)
    run_attention(device, good, good, wrong)


def run_wrong_offsets(device, offsets):
    good, good_cmp = int32(device, *LENGTHS), int32(device, 0, 0, 0, 18)
    run_attention(device, good, good, good_cmp, int32(device, *offsets))


PARTS = {"valid": run_valid}
PARTS |= {name: partial(run_wrong_lengths, lengths=x) for name, x in WRONG_LENGTHS.items()}
PARTS |= {name: partial(run_wrong_offsets, offsets=x) for name, x in WRONG_OFFSETS.items()}


def main(device="cuda", *names):
    start = time.monotonic()
    for name in names or PARTS:
        # Wrong lengths raise on the CPU, where the library can see them.
        if device == "cpu" and name != "valid":
            continue
        torch.manual_seed(0)
        PARTS[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
