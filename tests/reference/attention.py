"""The three attention branches: a dense mask per sequence, then an ordinary masked softmax."""

import torch

from .packing import sequences, spans


def masked_attention(q, k, v, mask, scale):
    """q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], mask [Hkv or 1, Tq, Tk] -> o, lse [Hq, Tq].

    A row without a visible key has o = 0, lse = -inf and zero gradients.
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    mask = mask.expand(q.shape[1] // group, -1, -1).repeat_interleave(group, 0)
    empty = ~mask.any(-1, keepdim=True)
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    # Empty rows keep finite scores, so that softmax has no NaN to spread through the gradient.
    s = torch.where(mask | empty, s, -torch.inf)
    p = torch.where(mask, torch.softmax(s, -1), 0.0)
    o = torch.einsum("hqk,khd->qhd", p, v)
    finite = torch.where(empty[..., 0], 0.0, torch.logsumexp(s, -1)) if k.shape[0] else s.sum(-1)
    lse = torch.where(empty[..., 0], -torch.inf, finite)
    return o, lse


def packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, masks, scale):
    """masked_attention over every sequence; `masks` yields one mask per sequence."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [q.new_zeros((0, q.shape[1], v.shape[-1]))], [q.new_zeros((q.shape[1], 0))]
    for (q0, q1), (k0, k1), mask in zip(
        spans(cu_seqlens_q), spans(cu_seqlens_k), masks, strict=True
    ):
        o, lse = masked_attention(q[q0:q1], k[k0:k1], v[k0:k1], mask, scale)
        outs.append(o)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def compressed_mask(positions, num_windows, kernel_size, kernel_stride):
    """Query t sees window i iff the whole window lies at or before t."""
    last_token = torch.arange(num_windows) * kernel_stride + kernel_size - 1
    return (positions[:, None] >= last_token[None])[None]


def compressed_attention(
    q,
    k_cmp,
    v_cmp,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_cmp,
    *,
    kernel_size,
    kernel_stride,
    softmax_scale=None,
    q_offset=None,
):
    """Query t sees compressed key i iff t >= i * d + l - 1."""
    cmp_spans = spans(cu_seqlens_cmp)
    masks = [
        compressed_mask(positions, c1 - c0, kernel_size, kernel_stride)
        for (_, _, positions), (c0, c1) in zip(
            sequences(cu_seqlens_q, cu_seqlens_k, q_offset), cmp_spans, strict=True
        )
    ]
    return packed_attention(q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_cmp, masks, softmax_scale)


def selected_mask(topk_idx, positions, len_k, block_size):
    """topk_idx [Hkv, Lq, topk] of one sequence -> [Hkv, Lq, len_k]. A row is a set of blocks."""
    heads, len_q, topk = topk_idx.shape
    key_block = torch.arange(len_k) // block_size
    mask = torch.zeros(heads, len_q, len_k, dtype=torch.bool)
    for slot in range(topk):
        mask |= topk_idx[:, :, slot, None].long() == key_block
    return mask & (torch.arange(len_k) <= positions[:, None])


def selected_attention(
    q,
    k,
    v,
    topk_idx,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    block_size,
    softmax_scale=None,
    q_offset=None,
):
    """Query t sees key j iff block j / S is in its row and j <= t."""
    masks = [
        selected_mask(topk_idx[:, queries], positions, keys.stop - keys.start, block_size)
        for queries, keys, positions in sequences(cu_seqlens_q, cu_seqlens_k, q_offset)
    ]
    return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, masks, softmax_scale)


def window_mask(positions, len_k, window_size):
    """Key j is seen iff t - w <= j <= t."""
    j = torch.arange(len_k)
    t = positions[:, None]
    return ((t - window_size <= j) & (j <= t))[None]


def window_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, window_size, softmax_scale=None, q_offset=None
):
    """Sliding window of w + 1 keys, the query's own included."""
    masks = [
        window_mask(positions, keys.stop - keys.start, window_size)
        for _, keys, positions in sequences(cu_seqlens_q, cu_seqlens_k, q_offset)
    ]
    return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, masks, softmax_scale)
