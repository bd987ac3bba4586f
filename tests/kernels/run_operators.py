"""Runs every operator once, forward and backward, on a small packed batch.

Made for compute-sanitizer, which slows kernels down a hundredfold: results are only checked to be
finite, the tests in tests/python check their values. usage: run_operators.py [cpu|cuda]
"""

import sys

import torch

import fsattn

HEADS_Q, HEADS_KV, DIM = 4, 2, 64
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


def randn(device, *shape):
    """A leaf of bf16 normal numbers; made on the host, so that no kernel of PyTorch is needed."""
    return torch.randn(*shape).to(torch.bfloat16).to(device).requires_grad_()


def backward(*outputs):
    torch.autograd.backward(
        outputs, [torch.ones(o.shape, dtype=o.dtype).to(o.device) for o in outputs]
    )


def compress_all(device, x, cu):
    """Every kind of compression; returns the rows of the last."""
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


def main(device):
    torch.manual_seed(0)
    total = 333
    cu = torch.tensor([0, 20, 20, total], dtype=torch.int32).to(device)
    q = randn(device, total, HEADS_Q, DIM)
    k = randn(device, total, HEADS_KV, DIM)
    v = randn(device, total, HEADS_KV, DIM)
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
    results = [cmp, sel, win, mixed, whole, q.grad, k.grad, v.grad, k_cmp.grad, v_cmp.grad]
    if not all(bool(r.cpu().isfinite().all()) for r in results):
        sys.exit("a result is not finite")
    print("all operators ran")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
