"""Functions around blocks of keys: compress_kv, select_blocks, build_block_index."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _arguments as arguments
from ._library import call

_ops = torch.ops.fsattn


class BlockIndex(NamedTuple):
    """For every block of keys the queries that selected it, as build_block_index returns it.

    start: int32 [Hkv, total_k // S + B + 1]; block b of sequence s is slot cu_seqlens_k[s] // S + s
    + b, whose entries are start[h, slot] .. start[h, slot + 1] - 1.
    entry: int32 [Hkv, total_q * topk], each query * topk + its place in the row, ascending.
    """

    start: Tensor
    entry: Tensor


def compress_kv(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    kernel_size: int,
    kernel_stride: int,
    kind: str = "mean",
    weight: Tensor | None = None,
    pos_emb: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One compressed key or value for every window of l tokens, d apart (NSA, eq. 7).

    Window i of a sequence covers its tokens i * d .. i * d + l - 1; a sequence of L tokens has
    (L - l) // d + 1 complete windows, none if L < l.

    Args:
        x: [total, Hkv, D] or [B, T, Hkv, D].
        kernel_size, kernel_stride: l and d; d divides l.
        kind: "mean"; "weighted": sum of weight[h, j] * x[j]; "softmax": the same with the softmax
            of weight[h]; "linear": the concatenated window times weight[h].
        weight: [Hkv, l] for "weighted" and "softmax", [Hkv, l * D, D] for "linear".
        pos_emb: [Hkv, l, D], added to the tokens of each window first. It and weight are copied
            unless they are contiguous.

    Returns:
        (x_cmp, cu_seqlens_cmp). Packed: x_cmp [total // d, Hkv, D], an upper bound of the rows,
        those behind the last sequence zero. Batched: x_cmp [B, windows, Hkv, D]. cu_seqlens_cmp is
        int32 [B + 1].
    """
    arguments.check_tensors(x=x)
    arguments.check_optional_tensors(cu_seqlens=cu_seqlens, weight=weight, pos_emb=pos_emb)
    arguments.check_ints(kernel_size=kernel_size, kernel_stride=kernel_stride)
    arguments.check_optional_ints(max_seqlen=max_seqlen)
    kind_code = arguments.choose("kind", kind, arguments.COMPRESS_KINDS)
    batched = arguments.is_batched("x", x)
    if batched:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: must not be given with a batched x")
        cu_seqlens = arguments.batch_seqlens(x.shape[0], x.shape[1], x)
        max_seqlen = x.shape[1]
    elif cu_seqlens is None:
        raise ValueError("cu_seqlens: must be given with a packed x, found None")
    rows = arguments.fold(x)
    max_seqlen = arguments.longest(cu_seqlens, max_seqlen, rows.shape[0])
    x_cmp, cu_seqlens_cmp = call(
        _ops.compress_kv_fwd.default,
        *(rows, cu_seqlens),
        None if weight is None else weight.contiguous(),
        None if pos_emb is None else pos_emb.contiguous(),
        *(max_seqlen, kernel_size, kernel_stride, kind_code),
    )
    if batched:
        length = x.shape[1]
        windows = 0 if length < kernel_size else (length - kernel_size) // kernel_stride + 1
        x_cmp = x_cmp[: x.shape[0] * windows].unflatten(0, (x.shape[0], windows))
    return x_cmp, cu_seqlens_cmp


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_cmp: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    softmax_scale: float | None = None,
    q_offset: Tensor | None = None,
    group_reduce: str = "sum",
    score_dtype: str = "fp32",
) -> Tensor:
    """The topk blocks of S keys with the most compressed attention (NSA, eq. 9 to 11).

    The score of block b is sum_i p_i * overlap(window i, block b) / d with p the softmax of
    compressed_attention, reduced over the G heads of the group. The first `init_blocks` blocks, and
    the `local_blocks` blocks up to the query's own, are always taken. Not differentiable.

    Args:
        q, k_cmp, cu_seqlens_*, max_seqlen_*, kernel_*: as in compressed_attention.
        lse: as compressed_attention returned it for the same softmax_scale.
        block_size: S: 16, 32, 64, 128 or 256, a multiple of d.
        topk: 1 to 128, at least init_blocks + local_blocks, which it includes.
        group_reduce: "sum", "max" or "first_head".
        score_dtype: "fp32", or "bf16" to round the scores before they are ranked.

    Returns:
        topk_idx, int32 [Hkv, total_q, topk] or [B, Hkv, T, topk]: ascending, padded with -1 at the
        end; ties go to the lower block.
    """
    arguments.check_tensors(q=q, k_cmp=k_cmp, lse=lse)
    arguments.check_same_layout("q", q, k_cmp=k_cmp)
    arguments.check_ints(
        block_size=block_size, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks
    )
    scale = arguments.resolve_scale(softmax_scale)
    reduce_code = arguments.choose("group_reduce", group_reduce, arguments.GROUP_REDUCES)
    score_code = arguments.choose("score_dtype", score_dtype, arguments.SCORE_DTYPES)
    seq, cu_cmp = arguments.compressed_sequences(
        q, k_cmp, cu_seqlens_q, cu_seqlens_k, cu_seqlens_cmp, max_seqlen_q, max_seqlen_k, q_offset,
        kernel_size, kernel_stride,
    )  # fmt: skip
    if seq.batch is not None and (lse.dim() != 3 or lse.shape[0] != seq.batch):
        raise ValueError(f"lse: must be [{seq.batch}, Hq, T], found {list(lse.shape)}")
    topk_idx = call(
        _ops.select_blocks.default,
        *(arguments.fold(q).detach(), arguments.fold(k_cmp).detach()),
        arguments.fold_heads_first(lse, seq.batch).detach(),
        *(seq.cu_q, seq.cu_k, cu_cmp, seq.q_offset, seq.max_q, seq.max_k),
        *(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks),
        *(scale, reduce_code, score_code),
    )
    return arguments.unfold_heads_first(topk_idx, seq.batch)


def _keys_of_index(seq: arguments.Sequences, total_q: int) -> int:
    """total_k of build_block_index, without k."""
    if seq.batch is not None:
        return seq.batch * seq.max_k
    cu_k = seq.cu_k
    readable = type(cu_k) is Tensor and cu_k.device.type == "cpu" and cu_k.numel() > 0
    if cu_k is seq.cu_q or torch.compiler.is_compiling() or not readable:
        return total_q
    return int(cu_k[-1])


def build_block_index(
    topk_idx: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    block_size: int,
    total_k: int | None = None,
    q_offset: Tensor | None = None,
) -> BlockIndex:
    """The inverse of topk_idx: for each block of keys the queries that selected it.

    selected_attention builds it when it needs one; layers that share a selection can build it once
    and pass it on. Repeated ids count once; ids outside the sequence and blocks behind the query
    are left out. Not differentiable.

    Args:
        topk_idx: int32 [Hkv, total_q, topk] or [B, Hkv, T, topk].
        cu_seqlens_k: default cu_seqlens_q. For batched tensors max_seqlen_k is the number of keys
            T_k, default T.
        block_size: S.
        total_k: rows of k. Without it the end of cu_seqlens_k on the CPU; total_q on CUDA, where
            reading would synchronise, and under torch.compile.
        q_offset: int32 [B], the position of the first query of each sequence.
    """
    arguments.check_tensors(topk_idx=topk_idx)
    arguments.check_ints(block_size=block_size)
    arguments.check_optional_ints(total_k=total_k)
    batched = arguments.is_batched("topk_idx", topk_idx)
    total_q = topk_idx.shape[0] * topk_idx.shape[2] if batched else topk_idx.shape[1]
    seq = arguments.make_sequences(
        topk_idx,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        q_offset,
        rows_k=None,
        query_axis=1,
        name="topk_idx",
        bound_k=total_q if total_k is None else total_k,
    )
    if total_k is None:
        total_k = _keys_of_index(seq, total_q)
    start, entry = call(
        _ops.build_block_index.default,
        arguments.fold_heads_first(topk_idx, seq.batch),
        *seq.operator_args(),
        *(total_k, block_size),
    )
    return BlockIndex(start, entry)
