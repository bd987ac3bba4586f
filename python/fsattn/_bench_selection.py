"""Selections to measure with: random ones, and ones whose neighbouring queries agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._bench_configs import Config

_CHUNK = 4096  # queries whose table is made at once


@dataclass(frozen=True)
class Selection:
    """How the free blocks of a query (those beside the forced ones) are chosen.

    persistence: the probability that a query keeps a pick of the query before it; 0 draws all
        afresh.
    zipf: the exponent of the blocks' popularity, early blocks first; 0 is uniform.
    """

    persistence: float = 0.0
    zipf: float = 0.0

    @property
    def name(self) -> str:
        if self.persistence == 0 and self.zipf == 0:
            return "random"
        zipf = f" zipf {self.zipf:g}" if self.zipf else ""
        return f"persistence {self.persistence:g}{zipf}"


def _draw(selection: Selection, uniform: Tensor, num_blocks: Tensor) -> Tensor:
    """A block below num_blocks for each uniform number."""
    if selection.zipf == 0:
        return (uniform * num_blocks).long()
    power = 1.0 - selection.zipf
    if abs(power) < 1e-6:
        rank = torch.exp(uniform * torch.log(num_blocks + 1.0))
    else:
        rank = (((num_blocks + 1.0) ** power - 1.0) * uniform + 1.0) ** (1.0 / power)
    return rank.long() - 1


def _candidates(
    selection: Selection, config: Config, tokens: int, count: int, rng: torch.Generator
) -> Tensor:
    """[tokens, count] free blocks; a column keeps its block with the probability `persistence`."""
    position = torch.arange(tokens, device=rng.device)
    # Free blocks lie between the initial ones and the local ones.
    num_free = position // config.block_size - config.local_blocks + 1 - config.init_blocks
    num_free = num_free.clamp(min=1).double().unsqueeze(1)
    uniform = torch.rand(tokens, count, generator=rng, dtype=torch.float64, device=rng.device)
    blocks = _draw(selection, uniform, num_free).clamp(min=0)
    is_new = torch.rand(tokens, count, generator=rng, device=rng.device) >= selection.persistence
    is_new[0] = True
    drawn_at = torch.where(is_new, position.unsqueeze(1), 0).cummax(dim=0).values
    return blocks.gather(0, drawn_at) + config.init_blocks


def _rows(config: Config, begin: int, candidates: Tensor) -> Tensor:
    """The forced blocks and the first different candidates, ascending, -1 at the end."""
    count, device = candidates.shape[0], candidates.device
    own = (torch.arange(begin, begin + count, device=device) // config.block_size).unsqueeze(1)
    initial = torch.arange(config.init_blocks, device=device).expand(count, -1)
    local = own - torch.arange(config.local_blocks, device=device)
    ids = torch.cat([initial, local, candidates], dim=1)
    ids = torch.where((ids >= 0) & (ids <= own), ids, -1)
    # A candidate of a query that has no free block is a forced one and goes out as a duplicate.
    repeats = torch.tril(ids.unsqueeze(2) == ids.unsqueeze(1), diagonal=-1).any(dim=2)
    is_kept = (ids >= 0) & ~repeats
    is_kept &= is_kept.cumsum(dim=1) <= config.topk
    behind_all = torch.iinfo(torch.int32).max
    ids = torch.where(is_kept, ids, behind_all).sort(dim=1).values[:, : config.topk]
    return torch.where(ids == behind_all, -1, ids).int()


def make_selection(
    selection: Selection, config: Config, tokens: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """topk_idx, int32 [Hkv, tokens, topk], for one sequence."""
    rng = torch.Generator(device).manual_seed(seed)
    # Twice as many candidates as free places: repeated ones are replaced by the next.
    count = 2 * max(config.topk - config.init_blocks - config.local_blocks, 1)
    heads = []
    for _ in range(config.heads_kv):
        candidates = _candidates(selection, config, tokens, count, rng)
        rows = [_rows(config, i, c) for i, c in _chunks(candidates)]
        heads.append(torch.cat(rows))
    return torch.stack(heads)


def _chunks(table: Tensor):
    """(first row, rows) of pieces of a table."""
    for begin in range(0, table.shape[0], _CHUNK):
        yield begin, table[begin : begin + _CHUNK]


def selected_pairs(topk_idx: Tensor, block_size: int) -> float:
    """(query, key) pairs that a selection lets through, averaged over the heads."""
    heads, tokens, _ = topk_idx.shape
    position = torch.arange(tokens, device=topk_idx.device).view(1, -1, 1)
    first_key = topk_idx.long() * block_size
    keys = (position - first_key + 1).clamp(min=0, max=block_size)
    return torch.where(topk_idx >= 0, keys, 0).sum().item() / heads
