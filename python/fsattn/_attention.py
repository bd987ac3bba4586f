"""The attention branches and their gate."""

import torch
from torch import Tensor

from . import _arguments as arguments
from ._blocks import BlockIndex
from ._library import call

_ops = torch.ops.fsattn


def _branch_result(o: Tensor, lse: Tensor, batch: int | None, return_lse: bool):
    o = arguments.unfold(o, batch)
    return (o, arguments.unfold_heads_first(lse, batch)) if return_lse else o


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_cmp: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    kernel_size: int,
    kernel_stride: int,
    softmax_scale: float | None = None,
    q_offset: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to compressed keys: query t sees window i iff t >= i * d + l - 1.

    Args:
        q: [total_q, Hq, D] or [B, T, Hq, D].
        k_cmp, v_cmp: from compress_kv, [rows, Hkv, D] and [rows, Hkv, Dv], or batched.
        cu_seqlens_k, max_seqlen_k: of the keys before compression, in tokens; default those of q.
            For batched tensors max_seqlen_k is the number of keys T_k, default T.
        cu_seqlens_cmp: from compress_kv.
        softmax_scale: default D ** -0.5.
        q_offset: int32 [B], the position of the first query of each sequence.

    Returns:
        o like q with Dv, and lse if return_lse; both differentiable.
    """
    arguments.check_tensors(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
    arguments.check_same_layout("q", q, k_cmp=k_cmp, v_cmp=v_cmp)
    scale = arguments.resolve_scale(softmax_scale)
    seq, cu_cmp = arguments.compressed_sequences(
        q, k_cmp, cu_seqlens_q, cu_seqlens_k, cu_seqlens_cmp, max_seqlen_q, max_seqlen_k, q_offset,
        kernel_size, kernel_stride,
    )  # fmt: skip
    o, lse = call(
        _ops.compressed_attention_fwd.default,
        *(arguments.fold(q), arguments.fold(k_cmp), arguments.fold(v_cmp)),
        *(seq.cu_q, seq.cu_k, cu_cmp, seq.q_offset, seq.max_q, seq.max_k),
        *(kernel_size, kernel_stride, scale),
    )
    return _branch_result(o, lse, seq.batch, return_lse)


def _check_block_index(block_index: object) -> tuple[Tensor | None, Tensor | None]:
    if block_index is None:
        return None, None
    if not isinstance(block_index, tuple) or len(block_index) != 2:
        found = type(block_index).__name__
        raise TypeError(f"block_index: must be what build_block_index returns, found {found}")
    start, entry = block_index
    arguments.check_tensors(**{"block_index.start": start, "block_index.entry": entry})
    return start, entry


def _selected_attention_out(args: tuple, out: Tensor, batch: int | None) -> tuple[Tensor, Tensor]:
    """Into the caller's memory; returns (o, lse) of the packed call."""
    arguments.check_tensors(out=out)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*args[:3], out)):
        raise ValueError(
            "out: must not be given when a gradient is required; use torch.no_grad() or leave it"
        )
    q = args[0]
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=stats)
    if batch is None:
        rows = out
    elif out.dim() == 4:
        rows = out.view(out.shape[0] * out.shape[1], *out.shape[2:])
    else:
        raise ValueError(f"out: must have 4 dimensions as q has, found {out.dim()}")
    call(_ops.selected_attention_fwd_out.default, *args, rows, lse)
    return rows, lse


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    q_offset: Tensor | None = None,
    block_index: BlockIndex | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    workspace_cap: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to selected blocks: query t sees key j iff block j // S is in its row and j <= t.

    Args:
        q, k, v: [total_q, Hq, D], [total_k, Hkv, D], [total_k, Hkv, Dv], or batched.
        topk_idx: int32 [Hkv, total_q, topk] or [B, Hkv, T, topk]. A row is a set: any order, -1
            anywhere, repeated ids count once, ids outside the sequence count as -1.
        cu_seqlens_k: default cu_seqlens_q when k has as many rows as q.
        block_size: S: 16, 32, 64, 128 or 256.
        softmax_scale: default D ** -0.5.
        q_offset: int32 [B], the position of the first query of each sequence.
        block_index: from build_block_index for the same topk_idx, to share it between calls.
        out: written instead of a new tensor; no gradient may be required then.
        workspace_cap: bytes of scratch memory to stay under where there is a choice; default 1 GiB.

    Returns:
        o like q with Dv, and lse if return_lse; both differentiable.
    """
    arguments.check_tensors(q=q, k=k, v=v, topk_idx=topk_idx)
    arguments.check_same_layout("q", q, k=k, v=v, topk_idx=topk_idx)
    arguments.check_ints(block_size=block_size)
    index = _check_block_index(block_index)
    seq = arguments.make_sequences(
        *(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q_offset),
        **arguments.key_rows(k),
    )
    args = (
        *(arguments.fold(q), arguments.fold(k), arguments.fold(v)),
        arguments.fold_heads_first(topk_idx, seq.batch),
        *index,
        *seq.operator_args(),
        *(block_size, arguments.resolve_scale(softmax_scale), arguments.resolve_cap(workspace_cap)),
    )
    if out is None:
        o, lse = call(_ops.selected_attention_fwd.default, *args)
        return _branch_result(o, lse, seq.batch, return_lse)
    _, lse = _selected_attention_out(args, out, seq.batch)
    return (out, arguments.unfold_heads_first(lse, seq.batch)) if return_lse else out


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    window_size: int,
    softmax_scale: float | None = None,
    q_offset: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the last keys: query t sees key j iff t - w <= j <= t, which are w + 1 keys.

    Args:
        q, k, v: [total_q, Hq, D], [total_k, Hkv, D], [total_k, Hkv, Dv], or batched.
        cu_seqlens_k: default cu_seqlens_q when k has as many rows as q.
        window_size: w, as window_size=(w, 0) of other libraries.
        softmax_scale: default D ** -0.5.
        q_offset: int32 [B], the position of the first query of each sequence.

    Returns:
        o like q with Dv, and lse if return_lse; both differentiable.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    arguments.check_same_layout("q", q, k=k, v=v)
    arguments.check_ints(window_size=window_size)
    scale = arguments.resolve_scale(softmax_scale)
    seq = arguments.make_sequences(
        *(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q_offset),
        **arguments.key_rows(k),
    )
    o, lse = call(
        _ops.window_attention_fwd.default,
        *(arguments.fold(q), arguments.fold(k), arguments.fold(v)),
        *seq.operator_args(),
        *(window_size, scale),
    )
    return _branch_result(o, lse, seq.batch, return_lse)


def gate(
    o_cmp: Tensor,
    o_sel: Tensor,
    o_win: Tensor,
    gates: Tensor,
    *,
    activation: str | None = "sigmoid",
) -> Tensor:
    """o = g0 * o_cmp + g1 * o_sel + g2 * o_win (NSA, eq. 5).

    Args:
        o_cmp, o_sel, o_win: [total_q, Hq, Dv] or [B, T, Hq, Dv].
        gates: [total_q, 3] for one gate a token or [total_q, Hq, 3], or batched.
        activation: "sigmoid" if gates are logits, None if they are ready values.

    Returns:
        o like o_cmp.
    """
    arguments.check_tensors(o_cmp=o_cmp, o_sel=o_sel, o_win=o_win, gates=gates)
    arguments.check_same_layout("o_cmp", o_cmp, o_sel=o_sel, o_win=o_win)
    code = arguments.choose("activation", activation, arguments.ACTIVATIONS)
    batch = o_cmp.shape[0] if o_cmp.dim() == 4 else None
    branches = (arguments.fold(o_cmp), arguments.fold(o_sel), arguments.fold(o_win))
    o = call(_ops.gate_fwd.default, *branches, arguments.fold_gates(gates, batch), code)
    return arguments.unfold(o, batch)
