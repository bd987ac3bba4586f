"""Shapes, dtypes and strides of every operator's results, for tracing without data.

They must agree with python/csrc: all results are new and contiguous.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _int32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.int32)


def _attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total_q, heads = q.shape[0], q.shape[1]
    lse = q.new_empty((heads, total_q), dtype=_stats_dtype(q.dtype))
    return q.new_empty((total_q, heads, v.shape[2])), lse


def _branch_fwd(q, k, v, *options):
    return _attention(q, v)


def _branch_bwd(dout, dlse, q, k, v, *options):
    return _like(q), _like(k), _like(v)


def _compress_kv_fwd(x, cu_seqlens, weight, pos_emb, max_seqlen, kernel_size, kernel_stride, kind):
    rows = x.shape[0] // kernel_stride
    return x.new_empty((rows, x.shape[1], x.shape[2])), _int32(x, cu_seqlens.shape[0])


def _compress_kv_bwd(dx_cmp, x, cu_seqlens, cu_seqlens_cmp, weight, pos_emb, *options):
    absent = x.new_empty((0,))
    dweight = absent if weight is None else _like(weight)
    return _like(x), dweight, x.new_empty((0,)) if pos_emb is None else _like(pos_emb)


def _select_blocks(
    q,
    k_cmp,
    lse,
    cu_q,
    cu_k,
    cu_cmp,
    q_offset,
    max_q,
    max_k,
    kernel_size,
    kernel_stride,
    block_size,
    topk,
    *options,
):
    return _int32(q, k_cmp.shape[1], q.shape[0], topk)


def _build_block_index(topk_idx, cu_q, cu_k, q_offset, max_q, max_k, total_k, block_size):
    heads, total_q, topk = topk_idx.shape
    num_slots = total_k // block_size + cu_k.shape[0] - 1
    return _int32(topk_idx, heads, num_slots + 1), _int32(topk_idx, heads, total_q * topk)


def _writes_to_its_arguments(*args):
    return None


def _gate_fwd(o_cmp, o_sel, o_win, gates, activation):
    return _like(o_cmp)


def _gate_bwd(dout, o_cmp, o_sel, o_win, gates, activation):
    return _like(o_cmp), _like(o_sel), _like(o_win), _like(gates)


def _native_sparse_attention_fwd(
    q,
    k,
    v,
    k_cmp,
    v_cmp,
    gates,
    topk_idx,
    cu_q,
    cu_k,
    cu_cmp,
    q_offset,
    max_q,
    max_k,
    kernel_size,
    kernel_stride,
    block_size,
    topk,
    *options,
):
    if topk_idx is None:
        selection = _int32(q, k.shape[1], q.shape[0], topk)
    else:
        selection = _int32(q, 0)  # the caller has it already
    branches = [_attention(q, v) for _ in range(3)]
    o, outputs = _like(branches[0][0]), [b[0] for b in branches]
    keeps_o_sel = len(options) < 9 or options[8]
    if not keeps_o_sel:
        outputs[1] = o.new_empty((0,))
    return o, selection, *outputs, *(b[1] for b in branches)


def _native_sparse_attention_bwd(dout, q, k, v, k_cmp, v_cmp, gates, *options):
    return tuple(_like(x) for x in (q, k, v, k_cmp, v_cmp, gates))


_FAKES = {
    "compress_kv_fwd": _compress_kv_fwd,
    "compress_kv_bwd": _compress_kv_bwd,
    "compressed_attention_fwd": _branch_fwd,
    "compressed_attention_bwd": _branch_bwd,
    "select_blocks": _select_blocks,
    "build_block_index": _build_block_index,
    "selected_attention_fwd": _branch_fwd,
    "selected_attention_fwd_out": _writes_to_its_arguments,
    "selected_attention_bwd": _branch_bwd,
    "window_attention_fwd": _branch_fwd,
    "window_attention_bwd": _branch_bwd,
    "gate_fwd": _gate_fwd,
    "gate_bwd": _gate_bwd,
    "native_sparse_attention_fwd": _native_sparse_attention_fwd,
    "native_sparse_attention_bwd": _native_sparse_attention_bwd,
    "append_kv": _writes_to_its_arguments,
    "paged_native_sparse_attention_out": _writes_to_its_arguments,
    "paged_selected_attention_out": _writes_to_its_arguments,
}


# Arguments of the operators whose public name differs.
_PUBLIC_NAMES = {"cu_q": "cu_seqlens_q", "cu_k": "cu_seqlens_k", "cu_cmp": "cu_seqlens_cmp"}


def _refusing_mixed_devices(name: str, fake: Callable) -> Callable:
    """`fake` for real meta tensors too: PyTorch sends a call here if any of its tensors is one."""
    schema = getattr(torch.ops.fsattn, name).default._schema

    def checked(*args):
        tensors = [(a.name, x) for a, x in zip(schema.arguments, args) if isinstance(x, Tensor)]
        lead_name, lead = tensors[0]
        for arg_name, x in tensors:
            if x.is_meta != lead.is_meta:
                raise TypeError(
                    f"{_PUBLIC_NAMES.get(arg_name, arg_name)}: device must be that of {lead_name} "
                    f"({lead.device}), found {x.device}"
                )
        return fake(*args)

    return checked


def register() -> None:
    """Registers them all, once the operator library is loaded."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"fsattn::{name}", _refusing_mixed_devices(name, fake))
