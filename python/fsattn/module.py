"""Native Sparse Attention as a layer: projections, compression, rotary embedding, gates.

`FlashSparseAttention` has the constructor, parameters and data flow of the published FSA module, so
that its checkpoints load unchanged. `NativeSparseAttention` is the same layer with every choice
open.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional as F
from .cache import CacheStep
from .rope import RopeConfig, RotaryEmbedding, rotate

__all__ = ["FlashSparseAttention", "NativeSparseAttention"]

_COMPRESS_KINDS = ("mean", "weighted", "softmax", "linear")
_KV_BRANCHES = 3  # compressed, selected, window
_WINDOWS = ("kernel_size", "kernel_stride")
_SELECTION = (
    "block_size",
    "topk",
    "init_blocks",
    "local_blocks",
    "group_reduce",
    "score_dtype",
)


class NativeSparseAttention(nn.Module):
    """Causal self-attention with three gated branches (NSA, arXiv 2502.11089).

    Every query attends to compressed windows of keys, to the `topk` blocks of keys that those
    windows rank highest, and to its last `window_size` keys; the gates, sigmoid(x W), weigh the
    three results. Works in bf16 and fp16 on CUDA, in fp64, fp32, bf16 and fp16 on the CPU, and
    under torch.autocast.

    Args:
        hidden_size: width of the input and the output.
        num_q_heads, num_kv_heads: grouped-query attention; the second divides the first.
        head_dim: of q and k. head_dim_v: of v, default head_dim.
        kernel_size, kernel_stride: tokens in a compression window and between two of them.
        block_size, topk: tokens in a selection block, blocks per query, forced ones included.
        init_blocks, local_blocks: blocks that are always selected: the first ones of the sequence,
            and the query's own with those before it.
        window_size: a query at t sees the keys t - window_size .. t in the window branch.
        rope_config: rotary embedding of q and k, and of the compressed keys at the first position
            of their window; None for none.
        compress: "linear", "softmax", "weighted" or "mean", see fsattn.compress_kv.
        gate_per_head: one gate per token, head and branch instead of per token and branch.
        shared_kv: one projection for the keys and values of all branches; False gives each branch
            its own, as in the paper.
        group_reduce, score_dtype: how the heads of a group rank blocks, see fsattn.select_blocks.
            The published FSA module behaves as "first_head" and "bf16".
        softmax_scale: default head_dim ** -0.5.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window_size: int = 512,
        rope_config: RopeConfig | None = None,
        *,
        head_dim_v: int | None = None,
        compress: str = "linear",
        gate_per_head: bool = True,
        shared_kv: bool = True,
        group_reduce: str = "sum",
        score_dtype: str = "fp32",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_q_heads, self.num_kv_heads = num_q_heads, num_kv_heads
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        self.block_size, self.topk = block_size, topk
        self.init_blocks, self.local_blocks = init_blocks, local_blocks
        self.window_size, self.rope_config = window_size, rope_config
        self.compress, self.gate_per_head, self.shared_kv = (
            compress,
            gate_per_head,
            shared_kv,
        )
        self.group_reduce, self.score_dtype = group_reduce, score_dtype
        self.softmax_scale = softmax_scale
        self._check_arguments()
        self._make_parameters()
        self.reset_parameters()

    def _check_arguments(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                "num_q_heads: must be a multiple of num_kv_heads, found "
                f"{self.num_q_heads} and {self.num_kv_heads}"
            )
        if self.compress not in _COMPRESS_KINDS:
            raise ValueError(
                f"compress: must be one of {', '.join(_COMPRESS_KINDS)}, found {self.compress!r}"
            )
        if self.rope_config is not None and self.rope_config.head_dim != self.head_dim:
            raise ValueError(
                f"rope_config: head_dim must be that of the module, {self.head_dim}, found "
                f"{self.rope_config.head_dim}"
            )

    def _make_parameters(self) -> None:
        """Registration order is part of the interface: it fixes state dicts and seeded runs."""
        kv_projections = 1 if self.shared_kv else _KV_BRANCHES
        k_dim, v_dim = (
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim_v,
        )
        gate_dim = 3 * self.num_q_heads if self.gate_per_head else 3
        self.register_parameter("compress_key", self._compress_weight(self.head_dim))
        self.register_parameter("compress_value", self._compress_weight(self.head_dim_v))
        self.intra_block_pe = nn.Parameter(
            torch.zeros(self.num_kv_heads, self.kernel_size, self.head_dim)
        )
        self.proj_q = nn.Linear(self.hidden_size, self.num_q_heads * self.head_dim, bias=False)
        self.proj_k = nn.Linear(self.hidden_size, kv_projections * k_dim, bias=False)
        self.proj_v = nn.Linear(self.hidden_size, kv_projections * v_dim, bias=False)
        self.proj_o = nn.Linear(self.num_q_heads * self.head_dim_v, self.hidden_size, bias=False)
        self.gate = nn.Sequential(nn.Linear(self.hidden_size, gate_dim, bias=False), nn.Sigmoid())
        self.rope = None if self.rope_config is None else RotaryEmbedding(self.rope_config)

    def _compress_weight(self, dim: int) -> nn.Parameter | None:
        if self.compress == "mean":
            return None
        if self.compress == "linear":
            return nn.Parameter(torch.zeros(self.num_kv_heads, self.kernel_size * dim, dim))
        return nn.Parameter(torch.zeros(self.num_kv_heads, self.kernel_size))

    def reset_parameters(self) -> None:
        """Xavier-uniform in named_parameters order; projections of several branches one by one."""
        per_branch = () if self.shared_kv else ("proj_k.weight", "proj_v.weight")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                for part in parameter.chunk(_KV_BRANCHES if name in per_branch else 1):
                    nn.init.xavier_uniform_(part)

    def extra_repr(self) -> str:
        return (
            f"l={self.kernel_size}, d={self.kernel_stride}, S={self.block_size}, topk={self.topk}, "
            f"window={self.window_size}, compress={self.compress!r}, "
            f"group_reduce={self.group_reduce!r}"
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        topk_idx: Tensor | None = None,
        return_topk_idx: bool = False,
        cache: CacheStep | None = None,
        layer: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends within each sequence of a packed batch; differentiable in x and the parameters.

        Args:
            x: [total, hidden_size], the sequences one behind the other.
            cu_seqlens: [B + 1] integers on the device of x, 0 first, total last.
            max_seqlen: an upper bound of the sequence lengths. Without it `total` is the bound on
                CUDA, where reading the lengths would stall the host.
            topk_idx: int32 [num_kv_heads, total, topk]; replaces the selection (for instance by
                that of another run). -1 stands for no block.
            return_topk_idx: return (y, topk_idx), the selected blocks of every query.
            cache: a step of a fsattn.PagedCache with rope=True if this module rotates: x are the
                new tokens of its sequences, which are stored and attend to everything stored. In
                place of cu_seqlens and max_seqlen; without gradients.
            layer: which layer of the cache this module is.

        Returns:
            y [total, hidden_size].
        """
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x: shape must be [total, {self.hidden_size}], found {list(x.shape)}")
        if cache is not None:
            given = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "topk_idx": topk_idx}
            return self._forward_cached(x, cache, layer, return_topk_idx, given)
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            found = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
            raise TypeError(f"cu_seqlens: must be a tensor of int32 or int64, found {found}")
        cu_seqlens = cu_seqlens.to(torch.int32)
        q = self.proj_q(x).unflatten(1, (self.num_q_heads, self.head_dim))
        k = self._branches(self.proj_k(x), self.head_dim)
        v = self._branches(self.proj_v(x), self.head_dim_v)
        k_cmp, cu_seqlens_cmp = self._compress(
            k[0], self.compress_key, self.intra_block_pe, cu_seqlens, max_seqlen
        )
        v_cmp, _ = self._compress(v[0], self.compress_value, None, cu_seqlens, max_seqlen)
        # What the selected and the window branch read: one projection for both, or the last two.
        k, v = k[-2:], v[-2:]
        if self.rope is not None:
            # After the compression, which reads keys before their rotation: the compressed key is
            # rotated as a whole, to the first position of its window.
            cos, sin = self.rope.tables(cu_seqlens, x.shape[0], q.dtype)
            q, k = rotate(q, cos, sin), [rotate(part, cos, sin) for part in k]
            k_cmp = self.rope(k_cmp, cu_seqlens_cmp, stride=self.kernel_stride)
        attend = self._attend_shared if self.shared_kv else self._attend_separate
        lengths = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "cu_seqlens_cmp": cu_seqlens_cmp,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
        }
        o, topk_idx = attend(q, k, v, k_cmp, v_cmp, self._gate_logits(x), topk_idx, lengths)
        y = self.proj_o(o.flatten(1))
        return (y, topk_idx) if return_topk_idx else y

    def _forward_cached(
        self, x: Tensor, cache: CacheStep, layer: int, return_topk_idx: bool, given: dict
    ) -> Tensor | tuple[Tensor, Tensor]:
        """forward() of new tokens whose sequences lie in a cache."""
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: must not be given with a cache")
        if torch.is_grad_enabled():
            raise ValueError("cache: has no gradients, use torch.no_grad() or inference_mode()")
        if not self.shared_kv:
            raise NotImplementedError("cache: needs shared_kv=True, one key and value a token")
        if x.shape[0] != cache.positions.shape[0]:
            raise ValueError(
                f"x: must have the {cache.positions.shape[0]} tokens of the step, found "
                f"{x.shape[0]}"
            )
        pages = cache.cache
        found = (pages.kernel_size, pages.kernel_stride, pages.k_raw is not None)
        if found != (self.kernel_size, self.kernel_stride, self.rope is not None):
            raise ValueError(
                f"cache: must have kernel_size={self.kernel_size}, kernel_stride="
                f"{self.kernel_stride} and rope={self.rope is not None}, found {found}"
            )
        q = self.proj_q(x).unflatten(1, (self.num_q_heads, self.head_dim))
        k = self._branches(self.proj_k(x), self.head_dim)[0]
        v = self._branches(self.proj_v(x), self.head_dim_v)[0]
        tables = None
        if self.rope is not None:
            tables = pages.rope_tables(self.rope, q.dtype)
            q = rotate(q, *(table[cache.positions] for table in tables))
        weights = (self.compress_key, self.compress_value, self.intra_block_pe)
        weight_k, weight_v, pos_emb = (None if w is None else w.to(k.dtype) for w in weights)
        cache.append(
            *(k, v, layer),
            rope=tables,
            kind=self.compress,
            weight_k=weight_k,
            weight_v=weight_v,
            pos_emb=pos_emb,
        )
        o = cache.attend(
            *(q, self._gate_logits(x), layer),
            return_topk_idx=return_topk_idx,
            **self._options(*_SELECTION, "window_size"),
        )
        o, topk_idx = o if return_topk_idx else (o, None)
        y = self.proj_o(o.flatten(1))
        return (y, topk_idx) if return_topk_idx else y

    def _branches(self, projected: Tensor, dim: int) -> list[Tensor]:
        """[total, branches * Hkv * dim] -> one [total, Hkv, dim] for each branch, or for all."""
        heads = projected.unflatten(1, (-1, self.num_kv_heads, dim))
        return list(heads.unbind(1))

    def _gate_logits(self, x: Tensor) -> Tensor:
        """[total, 3] or [total, Hq, 3]; the operator applies the sigmoid of `self.gate`."""
        logits = self.gate[0](x)
        return logits.unflatten(1, (self.num_q_heads, 3)) if self.gate_per_head else logits

    def _compress(
        self,
        x: Tensor,
        weight: Tensor | None,
        pos_emb: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
    ) -> tuple[Tensor, Tensor]:
        # The casts matter under autocast, where x is bf16 and the parameters are fp32.
        return F.compress_kv(
            x,
            cu_seqlens,
            max_seqlen,
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            kind=self.compress,
            weight=None if weight is None else weight.to(x.dtype),
            pos_emb=None if pos_emb is None else pos_emb.to(x.dtype),
        )

    def _options(self, *names: str) -> dict[str, int | float | str | None]:
        """Those attributes that an operator takes under the same name."""
        return {name: getattr(self, name) for name in ("softmax_scale", *names)}

    def _attend_shared(self, q, k, v, k_cmp, v_cmp, gates, topk_idx, lengths):
        """One key and value for the selected and the window branch: the fused operator."""
        options = self._options(*_WINDOWS, *_SELECTION, "window_size")
        return F.native_sparse_attention(
            *(q, k[0], v[0], k_cmp, v_cmp, gates),
            topk_idx=topk_idx,
            return_topk_idx=True,
            **lengths,
            **options,
        )

    def _attend_separate(self, q, k, v, k_cmp, v_cmp, gates, topk_idx, lengths):
        """Keys and values for each branch: the single operators."""
        windows = self._options(*_WINDOWS)
        o_cmp, lse = F.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **windows, **lengths)
        if topk_idx is None:
            options = self._options(*_WINDOWS, *_SELECTION)
            topk_idx = F.select_blocks(q, k_cmp, lse, **options, **lengths)
        lengths = {name: lengths[name] for name in lengths if name != "cu_seqlens_cmp"}
        options = self._options("block_size")
        o_sel = F.selected_attention(q, k[0], v[0], topk_idx, **options, **lengths)
        options = self._options("window_size")
        o_win = F.window_attention(q, k[1], v[1], **options, **lengths)
        return F.gate(o_cmp, o_sel, o_win, gates), topk_idx


class FlashSparseAttention(NativeSparseAttention):
    """NativeSparseAttention as the published FSA module defines it.

    Positional arguments, parameter names, shapes and order, initialisation from a seed, and the
    data flow are the same, so a published state dict loads with `load_state_dict`. Two defaults
    differ: scores are summed over the heads of a group, as in the NSA paper, and ranked in fp32.
    For the selection of the published code pass group_reduce="first_head", score_dtype="bf16".
    See docs/migration.md.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int,
        kernel_stride: int,
        block_size: int,
        topk: int,
        init_blocks: int,
        local_blocks: int,
        window_size: int,
        rope_config: RopeConfig,
        *,
        compress: str = "linear",
        gate_per_head: bool = False,
        group_reduce: str = "sum",
        score_dtype: str = "fp32",
    ):
        super().__init__(
            hidden_size,
            num_q_heads,
            num_kv_heads,
            head_dim,
            kernel_size,
            kernel_stride,
            block_size,
            topk,
            init_blocks,
            local_blocks,
            window_size,
            rope_config,
            compress=compress,
            gate_per_head=gate_per_head,
            group_reduce=group_reduce,
            score_dtype=score_dtype,
        )
