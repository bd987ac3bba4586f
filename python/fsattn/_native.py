"""native_sparse_attention."""

import torch
from torch import Tensor

from . import _arguments as arguments
from ._blocks import compress_kv
from ._library import call, wants_gradient

_ops = torch.ops.fsattn


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_cmp: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    softmax_scale: float | None = None,
    q_offset: Tensor | None = None,
    group_reduce: str = "sum",
    score_dtype: str = "fp32",
    activation: str | None = "sigmoid",
    topk_idx: Tensor | None = None,
    return_topk_idx: bool = False,
    return_lse: bool = False,
    workspace_cap: int | None = None,
):
    """The three attention branches, the selection and the gate as one call (NSA, eq. 5 to 12).

    Equal to compressed_attention, select_blocks, selected_attention, window_attention and gate one
    after the other, whose arguments these are. Differentiable in q, k, v, k_cmp, v_cmp and gates.

    Args:
        k, v: what the selected and the window branch read.
        k_cmp, v_cmp: from compress_kv, what the compressed branch and the selection read. None for both
            stands for the means of k and v, whose gradients then cost next to nothing on CUDA.
        topk_idx: replaces the selection; topk, init_blocks, local_blocks, group_reduce and
            score_dtype are not used then.
        return_topk_idx: also return the selection, int32 [Hkv, total_q, topk] or batched.
        return_lse: also return (lse_cmp, lse_sel, lse_win), without gradients.

    Returns:
        o, or a tuple (o, topk_idx, lses) of it and what was asked for.
    """
    arguments.check_tensors(q=q, k=k, v=v, gates=gates)
    arguments.check_optional_tensors(k_cmp=k_cmp, v_cmp=v_cmp, topk_idx=topk_idx)
    arguments.check_same_layout("q", q, k=k, v=v)
    arguments.check_ints(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        window_size=window_size,
    )
    codes = (
        arguments.choose("group_reduce", group_reduce, arguments.GROUP_REDUCES),
        arguments.choose("score_dtype", score_dtype, arguments.SCORE_DTYPES),
        arguments.choose("activation", activation, arguments.ACTIVATIONS),
    )
    seq = arguments.make_sequences(
        *(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q_offset),
        **arguments.key_rows(k),
    )
    rows = [arguments.fold(x) for x in (q, k, v)]
    adds_means = False
    if k_cmp is None and v_cmp is None:
        if cu_seqlens_cmp is not None:
            raise ValueError("cu_seqlens_cmp: must not be given without k_cmp and v_cmp")
        # The backward on CUDA adds the gradients of the means to those of k and v itself.
        adds_means = k.is_cuda
        (k_rows, cu_cmp), (v_rows, _) = (
            compress_kv(
                *(x.detach() if adds_means else x, seq.cu_k, seq.max_k),
                kernel_size=kernel_size,
                kernel_stride=kernel_stride,
            )
            for x in rows[1:]
        )
    else:
        arguments.check_tensors(k_cmp=k_cmp, v_cmp=v_cmp)
        arguments.check_same_layout("q", q, k_cmp=k_cmp, v_cmp=v_cmp)
        cu_cmp = arguments.check_cu_cmp(cu_seqlens_cmp, k_cmp, seq.batch)
        k_rows, v_rows = arguments.fold(k_cmp), arguments.fold(v_cmp)
    given = None
    if topk_idx is not None:
        arguments.check_same_layout("q", q, topk_idx=topk_idx)
        given = arguments.fold_heads_first(topk_idx, seq.batch)
        topk = topk_idx.shape[-1]
    keeps_o_sel = wants_gradient((*rows, k_rows, v_rows, gates))
    o, selection, *branches = call(
        _ops.native_sparse_attention_fwd.default,
        *(*rows, k_rows, v_rows),
        *(arguments.fold_gates(gates, seq.batch), given),
        *(seq.cu_q, seq.cu_k, cu_cmp, seq.q_offset, seq.max_q, seq.max_k),
        *(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size),
        *(arguments.resolve_scale(softmax_scale), *codes, arguments.resolve_cap(workspace_cap)),
        *(keeps_o_sel, adds_means),
    )
    results = [arguments.unfold(o, seq.batch)]
    if return_topk_idx:
        results.append(
            arguments.unfold_heads_first(selection, seq.batch) if topk_idx is None else topk_idx
        )
    if return_lse:
        results.append(tuple(arguments.unfold_heads_first(x, seq.batch) for x in branches[3:]))
    return results[0] if len(results) == 1 else tuple(results)
