"""The operators of Native Sparse Attention as functions of PyTorch tensors.

Tensors are packed, [total, heads, dim] with int32 cu_seqlens [B + 1], or batched without,
[B, T, heads, dim]. Hq query heads, Hkv KV heads, G = Hq / Hkv: query head h reads KV head h // G. D
and Dv are the head dims of q and v: multiples of 8 up to 256. The last dimension is contiguous,
other strides are free. dtypes: float64, float32, bfloat16, float16 on the CPU; bfloat16, float16 on CUDA. lse is
float32, for float64 inputs float64, and natural: [Hq, total_q], batched [B, Hq, T].

Query i of a sequence stands at position i + q_offset[b], by default i + seqlen_k - seqlen_q: the
last query stands at the last key. A query that sees no key gets o = 0, lse = -inf and zero
gradients. max_seqlen_* are upper bounds; without them the lengths are read on the CPU; on CUDA,
where reading would synchronise, the number of tokens stands in.

Everything is differentiable once, but for select_blocks, build_block_index and the paged cache
(append_kv, paged_*), which serves inference. Errors: ValueError
for a value that breaks a rule, TypeError for a wrong type, dtype or device, NotImplementedError for
what this build and device have no kernel for. The symbols l, d, S, w of NSA, arXiv 2502.11089, are
kernel_size, kernel_stride, block_size and window_size.
"""

from ._attention import compressed_attention, gate, selected_attention, window_attention
from ._blocks import BlockIndex, build_block_index, compress_kv, select_blocks
from ._native import native_sparse_attention
from ._paged import append_kv, paged_native_sparse_attention, paged_selected_attention

__all__ = [
    "BlockIndex",
    "append_kv",
    "build_block_index",
    "compress_kv",
    "compressed_attention",
    "gate",
    "native_sparse_attention",
    "paged_native_sparse_attention",
    "paged_selected_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
