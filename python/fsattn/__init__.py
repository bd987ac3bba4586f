"""Flash Sparse Attention: Native Sparse Attention for CPUs and CUDA GPUs.

The functions are documented in fsattn.functional, the layers in fsattn.module. The PyTorch
operators behind them live in torch.ops.fsattn.
"""

from . import _autograd, _fake, _library

_fake.register()
_autograd.register()

from ._explain import explain  # noqa: E402
from .cache import CacheFullError, CacheStep, PagedCache  # noqa: E402
from .functional import (  # noqa: E402
    BlockIndex,
    append_kv,
    build_block_index,
    compress_kv,
    compressed_attention,
    gate,
    native_sparse_attention,
    paged_native_sparse_attention,
    paged_selected_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from .module import FlashSparseAttention, NativeSparseAttention  # noqa: E402
from .rope import RopeConfig  # noqa: E402

__version__ = _library.version()

__all__ = [
    "BlockIndex",
    "CacheFullError",
    "CacheStep",
    "FlashSparseAttention",
    "NativeSparseAttention",
    "PagedCache",
    "RopeConfig",
    "__version__",
    "append_kv",
    "build_block_index",
    "compress_kv",
    "compressed_attention",
    "explain",
    "gate",
    "native_sparse_attention",
    "paged_native_sparse_attention",
    "paged_selected_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
