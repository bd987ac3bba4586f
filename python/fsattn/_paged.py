"""append_kv, paged_native_sparse_attention, paged_selected_attention."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _arguments as arguments
from ._library import call

_ops = torch.ops.fsattn

LAYOUTS = {"NHD": 0, "HND": 1}


class PagedSequences(NamedTuple):
    """How new tokens lie in the packed tensors and behind the cached ones."""

    cu_q: Tensor
    max_q: int
    max_k: int
    batch: int | None  # of [B, T, H, D] tensors; None when the caller packed them


def _longest_total(cache_seqlens: Tensor, cu_q: Tensor, capacity: int) -> int:
    """The longest sequence with its new tokens, where the host can read it; else the capacity."""
    unreadable = torch.compiler.is_compiling() or type(cache_seqlens) is not Tensor
    if unreadable or not (cache_seqlens.is_cpu and cu_q.is_cpu) or cache_seqlens.numel() == 0:
        return capacity
    if cache_seqlens.shape[0] != cu_q.shape[0] - 1 or cache_seqlens.dtype != torch.int32:
        return capacity  # the library names the mistake
    return max(int((cache_seqlens + cu_q.diff()).max()), 1)


def _capacity(k_cache: Tensor, block_table: Tensor, layout: int) -> int:
    if k_cache.dim() != 4 or block_table.dim() != 2:
        return 1  # the library names the mistake
    page_size = k_cache.shape[2 if layout == LAYOUTS["HND"] else 1]
    return max(block_table.shape[1] * page_size, 1)


def _sequences(
    name: str,
    x: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    capacity: int,
) -> PagedSequences:
    arguments.check_optional_tensors(cu_seqlens_q=cu_seqlens_q)
    arguments.check_optional_ints(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    batch = None
    if arguments.is_batched(name, x):
        if cu_seqlens_q is not None:
            raise ValueError(f"cu_seqlens_q: must not be given with a batched {name}")
        batch, max_q = x.shape[0], x.shape[1]
        cu_seqlens_q = arguments.batch_seqlens(batch, max_q, x)
    elif cu_seqlens_q is None:
        raise ValueError(f"cu_seqlens_q: must be given with a packed {name}, found None")
    else:
        max_q = arguments.longest(cu_seqlens_q, max_seqlen_q, x.shape[0])
    if max_seqlen_k is None:
        max_seqlen_k = _longest_total(cache_seqlens, cu_seqlens_q, capacity)
    return PagedSequences(cu_seqlens_q, max_q, max_seqlen_k, batch)


@torch.no_grad()
def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    k_cmp_cache: Tensor | None = None,
    v_cmp_cache: Tensor | None = None,
    cmp_block_table: Tensor | None = None,
    k_raw_cache: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    kind: str = "mean",
    weight_k: Tensor | None = None,
    weight_v: Tensor | None = None,
    pos_emb: Tensor | None = None,
    layout: str = "NHD",
) -> None:
    """Stores new keys and values in a paged cache, and the compressed tokens that they complete.

    Token p of sequence b lies in row p % page_size of page block_table[b, p // page_size]; window i
    lies in the compressed cache in the same way, through cmp_block_table. Sequences may share
    pages that nobody appends to.

    Args:
        k, v: the new tokens, [total_q, Hkv, D], [total_q, Hkv, Dv], or [B, T, ...].
        k_cache, v_cache: [num_pages, page_size, Hkv, D or Dv], written; or [num_pages, Hkv,
            page_size, ...] with layout="HND". page_size is a multiple of 16.
        block_table: int32 [B, max_pages].
        cache_seqlens: int32 [B], the tokens of each sequence before the new ones.
        cu_seqlens_q: int32 [B + 1], with packed k.
        max_seqlen_q, max_seqlen_k: bounds of the new tokens of a sequence and of all its tokens.
            On CUDA they decide how much is launched, so that a captured graph serves every length
            up to them; defaults there: total_q and what block_table can hold.
        k_cmp_cache, v_cmp_cache, cmp_block_table: the compressed cache, likewise; None: no
            compression.
        rope_cos, rope_sin: [positions, D / 2] in the dtype of k: keys are stored rotated (half
            split), compressed keys rotated to the first position of their window.
        k_raw_cache: [num_pages, R, Hkv, D], written; keys before their rotation, which later
            windows read. With rope_cos and a compressed cache only. R is page_size, or a divisor
            of it that is at least kernel_size.
        kernel_size, kernel_stride, kind, weight_k, weight_v, pos_emb: as in compress_kv; pos_emb
            is added to keys only.
    """
    arguments.check_tensors(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    arguments.check_tensors(block_table=block_table, cache_seqlens=cache_seqlens)
    optional = {"k_cmp_cache": k_cmp_cache, "v_cmp_cache": v_cmp_cache}
    optional |= {"cmp_block_table": cmp_block_table, "k_raw_cache": k_raw_cache}
    optional |= {"rope_cos": rope_cos, "rope_sin": rope_sin}
    optional |= {"weight_k": weight_k, "weight_v": weight_v, "pos_emb": pos_emb}
    arguments.check_optional_tensors(**optional)
    arguments.check_same_layout("k", k, v=v)
    arguments.check_ints(kernel_size=kernel_size, kernel_stride=kernel_stride)
    code = arguments.choose("layout", layout, LAYOUTS)
    kind_code = arguments.choose("kind", kind, arguments.COMPRESS_KINDS)
    capacity = _capacity(k_cache, block_table, code)
    seq = _sequences("k", k, cache_seqlens, cu_seqlens_q, max_seqlen_q, max_seqlen_k, capacity)
    call(
        _ops.append_kv.default,
        *(arguments.fold(k), arguments.fold(v), seq.cu_q, cache_seqlens),
        *(k_cache, v_cache, block_table),
        *optional.values(),
        *(seq.max_q, seq.max_k, code, kernel_size, kernel_stride, kind_code),
    )


def _new_output(q: Tensor, v_cache: Tensor, out: Tensor | None) -> Tensor:
    arguments.check_optional_tensors(out=out)
    if out is not None:
        return out
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1]))


def _packed_output(out: Tensor, batch: int | None) -> Tensor:
    """The packed view of an output that the operator writes; a copy would be lost."""
    if batch is None:
        return out
    if out.dim() != 4:
        raise ValueError(f"out: must have 4 dimensions as q has, found {out.dim()}")
    try:
        return out.view(out.shape[0] * out.shape[1], *out.shape[2:])
    except RuntimeError:
        raise ValueError("out: batch and token strides must be those of one token axis") from None


@torch.no_grad()
def paged_native_sparse_attention(
    q: Tensor,
    gates: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    k_cmp_cache: Tensor,
    v_cmp_cache: Tensor,
    cmp_block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
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
    group_reduce: str = "sum",
    score_dtype: str = "fp32",
    activation: str | None = "sigmoid",
    layout: str = "NHD",
    batch_invariant: bool = False,
    return_topk_idx: bool = False,
    out: Tensor | None = None,
    workspace_cap: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """native_sparse_attention of new tokens over a paged cache that append_kv has filled.

    One new token a sequence, several, or a chunk of a prompt: the result is that of the last rows
    of a full forward pass. Not differentiable.

    Args:
        q: the new tokens, rotated: [total_q, Hq, D] or [B, T, Hq, D].
        gates: [total_q, 3] or [total_q, Hq, 3], or batched.
        k_cache, ..., cmp_block_table: as append_kv was given them; page_size is a multiple of
            block_size. The new tokens are in the cache already.
        cache_seqlens: int32 [B], the tokens before the new ones, as append_kv was given it: query
            i of sequence b stands at cache_seqlens[b] + i.
        max_seqlen_q, max_seqlen_k: see append_kv. Pass max_seqlen_q for packed q on CUDA, which
            decides between the kernels for few queries and for many.
        batch_invariant: the bits of a sequence depend neither on the others nor on max_seqlen_k.
        return_topk_idx: also return the selection, int32 [Hkv, total_q, topk] or batched.
        out: written instead of a new tensor.

    Returns:
        o like q with Dv, or (o, topk_idx).
    """
    arguments.check_tensors(q=q, gates=gates, k_cache=k_cache, v_cache=v_cache)
    arguments.check_tensors(block_table=block_table, k_cmp_cache=k_cmp_cache)
    arguments.check_tensors(v_cmp_cache=v_cmp_cache, cmp_block_table=cmp_block_table)
    arguments.check_tensors(cache_seqlens=cache_seqlens)
    config = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "block_size": block_size}
    config |= {"topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
    config |= {"window_size": window_size}
    arguments.check_ints(**config)
    codes = (
        arguments.choose("group_reduce", group_reduce, arguments.GROUP_REDUCES),
        arguments.choose("score_dtype", score_dtype, arguments.SCORE_DTYPES),
        arguments.choose("activation", activation, arguments.ACTIVATIONS),
    )
    code = arguments.choose("layout", layout, LAYOUTS)
    capacity = _capacity(k_cache, block_table, code)
    seq = _sequences("q", q, cache_seqlens, cu_seqlens_q, max_seqlen_q, max_seqlen_k, capacity)
    out = _new_output(q, v_cache, out)
    packed, selection = arguments.fold(q), None
    if return_topk_idx:
        heads = k_cache.shape[1 if code == LAYOUTS["HND"] else 2]
        selection = packed.new_empty((heads, packed.shape[0], max(topk, 0)), dtype=torch.int32)
    call(
        _ops.paged_native_sparse_attention_out.default,
        *(packed, arguments.fold_gates(gates, seq.batch), seq.cu_q, cache_seqlens),
        *(k_cache, v_cache, block_table, k_cmp_cache, v_cmp_cache, cmp_block_table),
        *(seq.max_q, seq.max_k, code, *config.values(), arguments.resolve_scale(softmax_scale)),
        *(*codes, bool(batch_invariant), arguments.resolve_cap(workspace_cap)),
        *(_packed_output(out, seq.batch), selection),
    )
    if selection is None:
        return out
    return out, arguments.unfold_heads_first(selection, seq.batch)


@torch.no_grad()
def paged_selected_attention(
    q: Tensor,
    topk_idx: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    layout: str = "NHD",
    batch_invariant: bool = False,
    return_lse: bool = False,
    out: Tensor | None = None,
    workspace_cap: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """selected_attention of new tokens over a paged cache, for models with their own indexer.

    Args:
        q: the new tokens, rotated: [total_q, Hq, D] or [B, T, Hq, D].
        topk_idx: int32 [Hkv, total_q, topk] or [B, Hkv, T, topk], a set a row: see
            selected_attention.
        k_cache, v_cache, block_table, cache_seqlens, layout, batch_invariant: as in
            paged_native_sparse_attention.
        out: written instead of a new tensor.

    Returns:
        o like q with Dv, and lse if return_lse.
    """
    arguments.check_tensors(q=q, topk_idx=topk_idx, k_cache=k_cache, v_cache=v_cache)
    arguments.check_tensors(block_table=block_table, cache_seqlens=cache_seqlens)
    arguments.check_same_layout("q", q, topk_idx=topk_idx)
    arguments.check_ints(block_size=block_size)
    code = arguments.choose("layout", layout, LAYOUTS)
    capacity = _capacity(k_cache, block_table, code)
    seq = _sequences("q", q, cache_seqlens, cu_seqlens_q, max_seqlen_q, max_seqlen_k, capacity)
    out = _new_output(q, v_cache, out)
    packed = arguments.fold(q)
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = packed.new_empty((packed.shape[1], packed.shape[0]), dtype=stats)
    call(
        _ops.paged_selected_attention_out.default,
        *(packed, arguments.fold_heads_first(topk_idx, seq.batch), seq.cu_q, cache_seqlens),
        *(k_cache, v_cache, block_table, seq.max_q, seq.max_k, code, block_size),
        *(arguments.resolve_scale(softmax_scale), bool(batch_invariant)),
        *(arguments.resolve_cap(workspace_cap), _packed_output(out, seq.batch), lse),
    )
    return (out, arguments.unfold_heads_first(lse, seq.batch)) if return_lse else out
