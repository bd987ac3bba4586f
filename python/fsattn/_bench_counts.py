"""The work of each operator: useful FLOPs and compulsory bytes. The one place that holds them.

A *pair* is a (query, key) that the mask lets through, for one query head. FLOPs count pairs and not
the tiles that a kernel computes, so they are the same for every implementation. Bytes count every
input once and every output once: what has to move if nothing is read twice.

    forward   2 D (scores) + 2 Dv (output)                                   a pair
    backward  2 D (scores) + 2 Dv (dV) + 2 Dv (dP) + 2 D (dQ) + 2 D (dK)     a pair
"""

from __future__ import annotations

from dataclasses import dataclass

from ._bench_configs import Config

INT32 = 4
STATS = 4  # lse is fp32


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one call."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_seconds(self, flop_rate: float, byte_rate: float) -> float:
        """The least time at these rates, if arithmetic and traffic overlap perfectly."""
        return max(self.flops / flop_rate, self.bytes / byte_rate)


def num_windows(config: Config, tokens: int) -> int:
    if tokens < config.kernel_size:
        return 0
    return (tokens - config.kernel_size) // config.kernel_stride + 1


def dense_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def compressed_pairs(config: Config, tokens: int) -> int:
    # Window i is seen by the queries from i d + l - 1 on.
    count = num_windows(config, tokens)
    return count * (tokens - config.kernel_size + 1) - config.kernel_stride * (
        count * (count - 1) // 2
    )


def window_pairs(config: Config, tokens: int) -> int:
    reach = min(config.window_size + 1, tokens)
    return dense_pairs(reach) + (tokens - reach) * reach


def full_selection_pairs(config: Config, tokens: int) -> int:
    """Pairs of one head when every query selects min(topk, blocks in sight) blocks, its own too."""
    pairs = 0
    for block in range(-(-tokens // config.block_size)):
        queries = min(config.block_size, tokens - block * config.block_size)
        whole_blocks = min(config.topk, block + 1) - 1
        pairs += queries * whole_blocks * config.block_size + queries * (queries + 1) // 2
    return pairs


def _attention(config: Config, size: int, backward: bool, tokens: int, keys: int, pairs: int):
    d, dv = config.head_dim, config.head_dim_v
    queries = tokens * config.heads_q
    rows_q, rows_o = queries * d * size, queries * dv * size
    rows_kv = keys * config.heads_kv * (d + dv) * size
    stats = queries * STATS
    if not backward:
        flops = 2 * (d + dv) * pairs * config.heads_q
        return Work(flops, rows_q + rows_kv + rows_o + stats)
    # Reads q, k, v, o, dO and lse, writes dQ, dK and dV.
    flops = 2 * (3 * d + 2 * dv) * pairs * config.heads_q
    return Work(flops, 2 * rows_q + 2 * rows_kv + 2 * rows_o + stats)


def compress(config: Config, size: int, backward: bool, tokens: int, kind: str) -> Work:
    """compress_kv of one tensor with head_dim D."""
    windows, d = num_windows(config, tokens), config.head_dim
    per_window = config.kernel_size * d * (d if kind == "linear" else 1)
    x, y = tokens * config.heads_kv * d * size, windows * config.heads_kv * d * size
    weight = config.heads_kv * config.kernel_size * d * d * size if kind == "linear" else 0
    flops = 2 * windows * config.heads_kv * per_window
    if not backward:
        return Work(flops, x + y + weight)
    if kind == "mean":
        return Work(flops, x + y)  # dx from dy alone
    return Work(2 * flops, 2 * x + y + 2 * weight)


def compressed(config: Config, size: int, backward: bool, tokens: int) -> Work:
    keys, pairs = num_windows(config, tokens), compressed_pairs(config, tokens)
    return _attention(config, size, backward, tokens, keys, pairs)


def select(config: Config, size: int, tokens: int) -> Work:
    """Scores again, from q, the compressed keys and lse; the ranking counts as free."""
    queries = tokens * config.heads_q
    read = queries * (config.head_dim * size + STATS)
    read += num_windows(config, tokens) * config.heads_kv * config.head_dim * size
    flops = 2 * config.head_dim * compressed_pairs(config, tokens) * config.heads_q
    return Work(flops, read + tokens * config.heads_kv * config.topk * INT32)


def index(config: Config, tokens: int) -> Work:
    rows = tokens * config.heads_kv * config.topk
    return Work(0, 2 * rows * INT32)


def selected(config: Config, size: int, backward: bool, tokens: int, pairs: float) -> Work:
    """`pairs` a query head, averaged over the heads."""
    work = _attention(config, size, backward, tokens, tokens, pairs)
    return work + Work(0, tokens * config.heads_kv * config.topk * INT32)


def window(config: Config, size: int, backward: bool, tokens: int) -> Work:
    return _attention(config, size, backward, tokens, tokens, window_pairs(config, tokens))


def dense(config: Config, size: int, backward: bool, tokens: int) -> Work:
    return _attention(config, size, backward, tokens, tokens, dense_pairs(tokens))


def gate(config: Config, size: int, backward: bool, tokens: int) -> Work:
    values = tokens * config.heads_q * config.head_dim_v
    gates = tokens * config.heads_q * 3 * size
    if not backward:
        return Work(6 * values, 4 * values * size + gates)
    return Work(9 * values, 7 * values * size + 2 * gates)


def whole(config: Config, size: int, backward: bool, tokens: int) -> Work:
    """Compression of k and v by the mean, the three branches, the selection and the gate."""
    pairs = full_selection_pairs(config, tokens)
    work = selected(config, size, backward, tokens, pairs)
    if not config.has_compression:
        return work
    work = work + window(config, size, backward, tokens) + gate(config, size, backward, tokens)
    work = work + compressed(config, size, backward, tokens)
    work = work + compress(config, size, backward, tokens, "mean")
    work = work + compress(config, size, backward, tokens, "mean")
    return work if backward else work + select(config, size, tokens)
