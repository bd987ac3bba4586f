"""The shapes that are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """One layer. Without compression the selection comes from outside and no window is added."""

    name: str
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    block_size: int = 64
    topk: int = 16
    kernel_size: int = 32
    kernel_stride: int = 16
    window_size: int = 512
    init_blocks: int = 1
    local_blocks: int = 2
    has_compression: bool = True


_LIST = (
    Config("small", 8, 2, 64, 64),
    Config("nsa", 64, 4, 128, 128),
    Config("llama", 32, 8, 128, 128),
    Config("mha", 32, 32, 128, 128),
    Config("fsa128", 32, 8, 128, 128, block_size=128, topk=8),
    Config("m3", 64, 4, 128, 128, block_size=128, has_compression=False),
    Config("m3_shard", 8, 1, 128, 128, block_size=128, has_compression=False),
    Config("minicpm", 32, 2, 128, 128, topk=64, window_size=2048),
    Config("minicpm96", 32, 2, 128, 128, topk=96, window_size=2048),
    Config("moba", 16, 16, 128, 128, block_size=128, topk=8, has_compression=False),
    Config("qsa", 24, 2, 256, 256, topk=32, has_compression=False),
    Config("nsa192", 64, 4, 192, 128),
    Config("d64", 32, 2, 64, 64),
)
CONFIGS = {config.name: config for config in _LIST}
# What `--configs all` stands for: every published shape.
PUBLISHED = tuple(name for name in CONFIGS if name != "small")
