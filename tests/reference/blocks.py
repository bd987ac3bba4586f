"""select_blocks and build_block_index, by definition."""

import torch

from .attention import compressed_mask
from .packing import as_list, sequences, spans


def overlap_weight(window, block, kernel_size, kernel_stride, block_size):
    """Tokens that window i and block b share, over d."""
    first = max(window * kernel_stride, block * block_size)
    last = min(window * kernel_stride + kernel_size, (block + 1) * block_size)
    return max(0, last - first) / kernel_stride


def _group_probabilities(q, k_cmp, mask, scale, group_reduce):
    """[Hkv, Lq, C]: the softmax of every head, reduced over the heads of its group."""
    heads_kv = k_cmp.shape[1]
    group = q.shape[1] // heads_kv
    s = torch.einsum("qhd,khd->hqk", q, k_cmp.repeat_interleave(group, 1)) * scale
    empty = ~mask.any(-1, keepdim=True)
    p = torch.where(mask, torch.softmax(torch.where(mask | empty, s, -torch.inf), -1), 0.0)
    p = p.unflatten(0, (heads_kv, group))
    if group_reduce == "sum":
        return p.sum(1)
    return p.amax(1) if group_reduce == "max" else p[:, 0]


def block_scores(
    q,
    k_cmp,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_cmp,
    *,
    kernel_size,
    kernel_stride,
    block_size,
    softmax_scale=None,
    q_offset=None,
    group_reduce="sum",
):
    """One table [Hkv, Lq, ceil(Lk / S)] per sequence: sum_i p_i * overlap(i, b) / d."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    tables = []
    walk = zip(sequences(cu_seqlens_q, cu_seqlens_k, q_offset), spans(cu_seqlens_cmp), strict=True)
    for (queries, keys, positions), (c0, c1) in walk:
        num_blocks = -(-(keys.stop - keys.start) // block_size)
        weights = [
            [
                overlap_weight(i, b, kernel_size, kernel_stride, block_size)
                for b in range(num_blocks)
            ]
            for i in range(c1 - c0)
        ]
        weights = torch.tensor(weights, dtype=q.dtype).reshape(c1 - c0, num_blocks)
        mask = compressed_mask(positions, c1 - c0, kernel_size, kernel_stride)
        p = _group_probabilities(q[queries], k_cmp[c0:c1], mask, scale, group_reduce)
        tables.append(p @ weights)
    return tables


def rank_blocks(scores, position, *, block_size, topk, init_blocks, local_blocks):
    """scores: one row of block scores. Returns topk ids, ascending, -1 behind the last.

    Candidates are the blocks of the sequence that do not lie after the query. Forced ones come
    first, then the best scores; ties go to the lowest index.
    """
    query_block = position // block_size
    candidates = [b for b in range(len(scores)) if b <= query_block]

    def is_forced(b):
        return b < init_blocks or query_block - local_blocks < b

    best = sorted(
        candidates, key=lambda b: (not is_forced(b), 0 if is_forced(b) else -scores[b], b)
    )
    chosen = sorted(best[:topk])
    return chosen + [-1] * (topk - len(chosen))


def select_blocks(
    q,
    k_cmp,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_cmp,
    *,
    kernel_size,
    kernel_stride,
    block_size,
    topk,
    init_blocks=1,
    local_blocks=2,
    softmax_scale=None,
    q_offset=None,
    group_reduce="sum",
    score_dtype="fp32",
):
    """Returns topk_idx int32 [Hkv, total_q, topk] and the score tables of block_scores."""
    tables = block_scores(
        q.double(),
        k_cmp.double(),
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_cmp,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
        group_reduce=group_reduce,
    )
    rounding = torch.bfloat16 if score_dtype == "bf16" else torch.float32
    topk_idx = torch.full((k_cmp.shape[1], q.shape[0], topk), -1, dtype=torch.int32)
    walk = zip(sequences(cu_seqlens_q, cu_seqlens_k, q_offset), tables, strict=True)
    for (queries, _, positions), table in walk:
        rounded = table.to(rounding).double().tolist()
        for head, rows in enumerate(rounded):
            for i, (row, t) in enumerate(zip(rows, positions.tolist(), strict=True)):
                ids = rank_blocks(
                    row,
                    t,
                    block_size=block_size,
                    topk=topk,
                    init_blocks=init_blocks,
                    local_blocks=local_blocks,
                )
                topk_idx[head, queries.start + i] = torch.tensor(ids, dtype=torch.int32)
    return topk_idx, tables


def build_block_index(topk_idx, cu_seqlens_q, cu_seqlens_k, *, block_size, q_offset=None):
    """block_start as nested lists [Hkv][num_slots + 1] and block_entry as [Hkv][used entries].

    Slot of block b of sequence s: cu_seqlens_k[s] / S + s + b. An entry is query * topk + position
    in its row; the first of equal ids counts, ids outside the sequence or after the query do not.
    """
    cu_k = as_list(cu_seqlens_k)
    heads, _, topk = topk_idx.shape
    num_slots = cu_k[-1] // block_size + len(cu_k) - 1
    starts, entries = [], []
    for head in range(heads):
        slots = [[] for _ in range(num_slots)]
        walk = sequences(cu_seqlens_q, cu_seqlens_k, q_offset)
        for s, (queries, keys, positions) in enumerate(walk):
            num_blocks = -(-(keys.stop - keys.start) // block_size)
            for query, t in zip(
                range(queries.start, queries.stop), positions.tolist(), strict=True
            ):
                row = topk_idx[head, query].tolist()
                for place, b in enumerate(row):
                    if 0 <= b < num_blocks and b * block_size <= t and b not in row[:place]:
                        slots[cu_k[s] // block_size + s + b].append(query * topk + place)
        start = [0]
        for slot in slots:
            start.append(start[-1] + len(slot))
        starts.append(start)
        entries.append([entry for slot in slots for entry in slot])
    return starts, entries
