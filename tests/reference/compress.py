"""compress_kv: a window of kernel_size tokens, every kernel_stride tokens, becomes one token."""

import torch

from .packing import spans


def compressed_length(length, kernel_size, kernel_stride):
    """Number of complete windows in a sequence."""
    count = 0
    while count * kernel_stride + kernel_size <= length:
        count += 1
    return count


def compressed_cu_seqlens(cu_seqlens, kernel_size, kernel_stride):
    """cu_seqlens of the compressed sequences, as a list."""
    cu = [0]
    for start, end in spans(cu_seqlens):
        cu.append(cu[-1] + compressed_length(end - start, kernel_size, kernel_stride))
    return cu


def _merge(window, kind, weight):
    """[l, H, D] -> [H, D]."""
    if kind == "mean":
        return window.mean(0)
    window = window.transpose(0, 1)  # [H, l, D]
    if kind == "weighted":
        return (weight[:, :, None] * window).sum(1)
    if kind == "softmax":
        return (torch.softmax(weight, -1)[:, :, None] * window).sum(1)
    if kind == "linear":
        flat = window.reshape(window.shape[0], 1, -1)  # [H, 1, l * D], token-major
        return torch.bmm(flat, weight)[:, 0]
    raise ValueError(f"unknown kind {kind!r}")


def compress_kv(
    x, cu_seqlens, *, kernel_size, kernel_stride, kind="mean", weight=None, pos_emb=None
):
    """x [total, H, D] -> (x_cmp [total // d, H, D], cu_seqlens_cmp). y = f(x + pos_emb)."""
    rows = []
    for start, end in spans(cu_seqlens):
        for i in range(compressed_length(end - start, kernel_size, kernel_stride)):
            first = start + i * kernel_stride
            window = x[first : first + kernel_size]
            if pos_emb is not None:
                window = window + pos_emb.transpose(0, 1)
            rows.append(_merge(window, kind, weight))
    behind = x.shape[0] // kernel_stride - len(rows)
    zeros = x.new_zeros((behind, *x.shape[1:]))
    x_cmp = torch.cat([torch.stack(rows), zeros]) if rows else zeros
    return x_cmp, compressed_cu_seqlens(cu_seqlens, kernel_size, kernel_stride)
