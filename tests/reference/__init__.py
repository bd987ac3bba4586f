"""The definition of every operator: naive, dense, readable PyTorch, from the contract alone.

Every function works in the dtype of its inputs. With float64 inputs it is the truth that tests
compare against; with the dtype under test it is "the same computation in PyTorch", whose error
sets the tolerance. Gradients come from autograd. Nothing here shares code with the library.

Layouts are packed: q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv]; cu_seqlens are
sequences of B + 1 integers (lists or tensors); lse is [Hq, total_q].
"""

from .attention import compressed_attention, selected_attention, window_attention
from .blocks import (
    block_scores,
    build_block_index,
    overlap_weight,
    rank_blocks,
    select_blocks,
)
from .compress import compress_kv, compressed_cu_seqlens, compressed_length
from .gate import gate
from .nsa import native_sparse_attention

__all__ = [
    "block_scores",
    "build_block_index",
    "compress_kv",
    "compressed_attention",
    "compressed_cu_seqlens",
    "compressed_length",
    "gate",
    "native_sparse_attention",
    "overlap_weight",
    "rank_blocks",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
