"""native_sparse_attention: the composition of the single operators."""

from .attention import compressed_attention, selected_attention, window_attention
from .blocks import select_blocks
from .gate import gate


def native_sparse_attention(
    q,
    k,
    v,
    k_cmp,
    v_cmp,
    gates,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_cmp,
    *,
    kernel_size,
    kernel_stride,
    block_size,
    topk,
    window_size,
    init_blocks=1,
    local_blocks=2,
    softmax_scale=None,
    q_offset=None,
    group_reduce="sum",
    score_dtype="fp32",
    activation="sigmoid",
    topk_idx=None,
):
    """Returns (o, topk_idx). Brings its own selection unless topk_idx is given."""
    where = {"softmax_scale": softmax_scale, "q_offset": q_offset}
    cmp = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, **where}
    seqs = (cu_seqlens_q, cu_seqlens_k)
    o_cmp, _ = compressed_attention(q, k_cmp, v_cmp, *seqs, cu_seqlens_cmp, **cmp)
    if topk_idx is None:
        topk_idx, _ = select_blocks(
            q.detach(),
            k_cmp.detach(),
            *seqs,
            cu_seqlens_cmp,
            block_size=block_size,
            topk=topk,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
            group_reduce=group_reduce,
            score_dtype=score_dtype,
            **cmp,
        )
    o_sel, _ = selected_attention(q, k, v, topk_idx, *seqs, block_size=block_size, **where)
    o_win, _ = window_attention(q, k, v, *seqs, window_size=window_size, **where)
    return gate(o_cmp, o_sel, o_win, gates, activation=activation), topk_idx
