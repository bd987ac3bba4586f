"""The demo's language model: a byte-level transformer over either kind of attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import CacheStep, PagedCache
from .module import NativeSparseAttention
from .rope import RopeConfig, rotate

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its sparse attention; names as in NativeSparseAttention."""

    layers: int = 4
    hidden_size: int = 128
    mlp_size: int = 384
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    length: int = 2048
    kernel_size: int = 16
    kernel_stride: int = 8
    block_size: int = 32
    topk: int = 8
    window_size: int = 64


class DenseAttention(nn.Module):
    """Causal attention to every earlier token, with the projections of a sparse layer (copied)."""

    def __init__(self, sparse: NativeSparseAttention):
        super().__init__()
        self.num_q_heads, self.num_kv_heads = sparse.num_q_heads, sparse.num_kv_heads
        for name in ("proj_q", "proj_k", "proj_v", "proj_o", "rope"):
            setattr(self, name, copy.deepcopy(getattr(sparse, name)))

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x [total, hidden_size], all sequences `max_seqlen` long."""
        q = self.proj_q(x).unflatten(1, (self.num_q_heads, -1))
        k = self.proj_k(x).unflatten(1, (self.num_kv_heads, -1))
        v = self.proj_v(x).unflatten(1, (self.num_kv_heads, -1))
        tables = self.rope.tables(cu_seqlens, x.shape[0], q.dtype)
        group = self.num_q_heads // self.num_kv_heads
        k, v = (part.repeat_interleave(group, 1) for part in (rotate(k, *tables), v))
        q, k, v = (
            part.unflatten(0, (-1, max_seqlen)).transpose(1, 2)
            for part in (rotate(q, *tables), k, v)
        )
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj_o(o.transpose(1, 2).flatten(0, 1).flatten(1))


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size)
        self.attention = NativeSparseAttention(
            shape.hidden_size,
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            kernel_size=shape.kernel_size,
            kernel_stride=shape.kernel_stride,
            block_size=shape.block_size,
            topk=shape.topk,
            window_size=shape.window_size,
            rope_config=RopeConfig(head_dim=shape.head_dim, rope_theta=10000.0, rope_scaling=None),
        )
        self.mlp_norm = nn.RMSNorm(shape.hidden_size)
        self.mlp = Mlp(shape.hidden_size, shape.mlp_size)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cu_seqlens, max_seqlen)
        return x + self.mlp(self.mlp_norm(x))

    def forward_cached(self, x: Tensor, step: CacheStep, layer: int) -> Tensor:
        """The new tokens x of a step, as the cache's layer of this number."""
        x = x + self.attention(self.attention_norm(x), cache=step, layer=layer)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Predicts the next byte. The embedding is also the output layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size)
        nn.init.normal_(self.embedding.weight, std=shape.hidden_size**-0.5)
        with torch.no_grad():
            for layer in self.layers:
                # Every layer adds to the residual stream twice; this keeps its variance near one.
                layer.attention.proj_o.weight.mul_((2 * shape.layers) ** -0.5)
                layer.mlp.down.weight.mul_((2 * shape.layers) ** -0.5)

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """ids [B, T] -> the input of every layer and the output of the last, each [B * T, hidden]."""
        batch, length = ids.shape
        cu_seqlens = torch.arange(batch + 1, device=ids.device, dtype=torch.int32) * length
        states = [self.embedding(ids).flatten(0, 1)]
        for layer in self.layers:
            states.append(layer(states[-1], cu_seqlens, length))
        return states

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> logits [B * T, 256]."""
        return self.norm(self.hidden_states(ids)[-1]) @ self.embedding.weight.T

    def make_cache(self, max_seqlen: int, dtype: torch.dtype) -> PagedCache:
        """Room for one sequence, in the dtype that keys and values have."""
        shape, page_size = self.shape, 64
        return PagedCache(
            -(-max_seqlen // page_size),
            page_size,
            shape.num_kv_heads,
            shape.head_dim,
            kernel_size=shape.kernel_size,
            kernel_stride=shape.kernel_stride,
            num_layers=shape.layers,
            rope=True,
            dtype=dtype,
            device=self.embedding.weight.device,
        )

    def next_logits(self, ids: Tensor, step: CacheStep) -> Tensor:
        """ids int64 [T], the new tokens of a step -> logits [256] of the byte behind them."""
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            x = layer.forward_cached(x, step, i)
        return self.norm(x[-1]) @ self.embedding.weight.T

    def selections(self, ids: Tensor) -> list[Tensor]:
        """ids [1, T] -> for every layer of sparse attention topk_idx int32 [Hkv, T, topk]."""
        cu_seqlens = torch.tensor([0, ids.shape[1]], device=ids.device, dtype=torch.int32)
        found = []
        for layer, state in zip(self.layers, self.hidden_states(ids)[:-1], strict=True):
            x = layer.attention_norm(state)
            _, topk_idx = layer.attention(x, cu_seqlens, ids.shape[1], return_topk_idx=True)
            found.append(topk_idx)
        return found


def make_models(shape: Shape, seed: int) -> tuple[LanguageModel, LanguageModel]:
    """(sparse, dense): the same model from the same seed but for the attention."""
    torch.manual_seed(seed)
    sparse = LanguageModel(shape)
    dense = copy.deepcopy(sparse)
    for layer in dense.layers:
        layer.attention = DenseAttention(layer.attention)
    return sparse, dense
