"""PagedCache: keys, values and compressed tokens of many sequences in pages, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._paged import append_kv, paged_native_sparse_attention
from ._pages import CacheFullError, PageList, PagePool
from .rope import RotaryEmbedding

__all__ = ["CacheFullError", "CacheStep", "PagedCache"]


@dataclass
class _Entry:
    """A sequence: its length and its pages.

    written: how far its last page has been written. More than length after tokens were taken back,
    whose raw keys have replaced older ones.
    """

    length: int
    tokens: PageList
    windows: PageList
    written: int = 0


@dataclass
class CacheStep:
    """New tokens of some sequences: where they lie. PagedCache.step makes it.

    The tensors keep their addresses when the step is renewed with PagedCache.step(out=...), so that
    a CUDA graph that has captured them goes on with the next tokens.
    """

    cache: PagedCache
    block_table: Tensor  # int32 [B, max_pages]
    cmp_block_table: Tensor  # int32 [B, max_cmp_pages]
    cache_seqlens: Tensor  # int32 [B], tokens before the new ones
    cu_seqlens_q: Tensor  # int32 [B + 1]
    positions: Tensor  # int64 [total_q]
    max_seqlen_q: int
    max_seqlen_k: int

    def _lengths(self) -> dict:
        return {
            "cache_seqlens": self.cache_seqlens,
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k,
        }

    def append(
        self,
        k: Tensor,
        v: Tensor,
        layer: int = 0,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        kind: str = "mean",
        weight_k: Tensor | None = None,
        weight_v: Tensor | None = None,
        pos_emb: Tensor | None = None,
    ) -> None:
        """Stores the keys and values [total_q, Hkv, ...] of the new tokens of a layer.

        rope: cos and sin [positions, D / 2], see append_kv; exactly when the cache has rope=True.
        """
        cache = self.cache
        if (rope is None) != (cache.k_raw is None):
            wanted = "needs" if rope is None else "must not be given for"
            state = "rope=False" if cache.k_raw is None else "rope=True"
            raise ValueError(f"rope: a cache with {state} {wanted} cos and sin")
        cos, sin = (None, None) if rope is None else rope
        append_kv(
            *(k, v, cache.k[layer], cache.v[layer], self.block_table),
            **self._lengths(),
            k_cmp_cache=cache.k_cmp[layer],
            v_cmp_cache=cache.v_cmp[layer],
            cmp_block_table=self.cmp_block_table,
            k_raw_cache=None if cache.k_raw is None else cache.k_raw[layer],
            rope_cos=cos,
            rope_sin=sin,
            kernel_size=cache.kernel_size,
            kernel_stride=cache.kernel_stride,
            kind=kind,
            weight_k=weight_k,
            weight_v=weight_v,
            pos_emb=pos_emb,
            layout=cache.layout,
        )

    def attend(self, q: Tensor, gates: Tensor, layer: int = 0, **options) -> Tensor:
        """paged_native_sparse_attention of the new tokens, which the layer has appended."""
        cache = self.cache
        return paged_native_sparse_attention(
            *(q, gates, cache.k[layer], cache.v[layer], self.block_table),
            *(cache.k_cmp[layer], cache.v_cmp[layer], self.cmp_block_table),
            **self._lengths(),
            kernel_size=cache.kernel_size,
            kernel_stride=cache.kernel_stride,
            layout=cache.layout,
            **options,
        )


class PagedCache:
    """The memory of attention layers for many sequences, allocated once.

    A sequence is a number from allocate(). step(sequences, new) makes room for new tokens and says
    where they lie; every layer then appends to that step and attends over it. Pages are counted:
    fork() shares them, and whoever appends to a shared page gets a copy of it.

    Args:
        num_pages, page_size: tokens for all sequences together are at most their product.
            page_size is a multiple of 16 and of the selection's block_size.
        num_kv_heads, head_dim, head_dim_v: as in the layers; head_dim_v defaults to head_dim.
        kernel_size, kernel_stride: of the compression.
        num_layers: layers with a cache of their own; they share tables and lengths.
        max_seqlen: the longest sequence; decides the width of the tables. Default: all pages.
        rope: keys are rotated; the keys before their rotation are kept for the compression.
        raw_size: how many of them a page remembers, see append_kv. Default: all, which allows
            truncate() and fork() at any length; kernel_size rounded up to a divisor of page_size
            saves the most memory.
        cmp_page_size, num_cmp_pages: of the compressed cache; by default as many pages as all
            tokens can need.
        layout: "HND" or "NHD".
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        num_layers: int = 1,
        max_seqlen: int | None = None,
        rope: bool = False,
        raw_size: int | None = None,
        cmp_page_size: int = 64,
        num_cmp_pages: int | None = None,
        layout: str = "HND",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        if layout not in ("HND", "NHD"):
            raise ValueError(f"layout: must be one of 'HND', 'NHD', found {layout!r}")
        sizes = {"page_size": page_size, "cmp_page_size": cmp_page_size, "num_pages": num_pages}
        for name, size in sizes.items():
            if size < 1 or (name != "num_pages" and size % 16):
                rule = "positive" if name == "num_pages" else "a positive multiple of 16"
                raise ValueError(f"{name}: must be {rule}, found {size}")
        if kernel_stride < 1 or kernel_size < 1 or kernel_size % kernel_stride:
            raise ValueError(
                f"kernel_size: must be a multiple of kernel_stride ({kernel_stride}), "
                f"found {kernel_size}"
            )
        self.page_size, self.cmp_page_size = page_size, cmp_page_size
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        self.layout, self.device = layout, torch.device(device)
        self.max_seqlen = num_pages * page_size if max_seqlen is None else max_seqlen
        self.raw_size = (page_size if raw_size is None else raw_size) if rope else 0
        if num_cmp_pages is None:
            # A page of compressed tokens for every full one, and a partial one a page of tokens:
            # sequences that are shorter than a page need one each.
            windows = num_pages * page_size // kernel_stride
            num_cmp_pages = windows // cmp_page_size + num_pages
        head_dim_v = head_dim if head_dim_v is None else head_dim_v

        def pages(count: int, size: int, dim: int) -> Tensor:
            inner = (num_kv_heads, size) if layout == "HND" else (size, num_kv_heads)
            return torch.zeros((num_layers, count, *inner, dim), dtype=dtype, device=self.device)

        self.k = pages(num_pages, page_size, head_dim)
        self.v = pages(num_pages, page_size, head_dim_v)
        self.k_cmp = pages(num_cmp_pages, cmp_page_size, head_dim)
        self.v_cmp = pages(num_cmp_pages, cmp_page_size, head_dim_v)
        self.k_raw = pages(num_pages, self.raw_size, head_dim) if rope else None
        self._tokens, self._windows = PagePool(num_pages), PagePool(num_cmp_pages)
        self._entries: dict[int, _Entry] = {}
        self._next = 0
        self._rope_tables: list[tuple[Tensor, torch.dtype, tuple[Tensor, Tensor]]] = []

    def __repr__(self) -> str:
        return (
            f"PagedCache({len(self._entries)} sequences, {self.num_free_pages} of "
            f"{self.k.shape[1]} pages of {self.page_size} tokens free)"
        )

    @property
    def num_free_pages(self) -> int:
        return self._tokens.num_free

    def _entry(self, sequence: int) -> _Entry:
        if sequence not in self._entries:
            raise ValueError(f"sequence: {sequence!r} is not in the cache")
        return self._entries[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, those of the last step included."""
        return self._entry(sequence).length

    def _add(self, entry: _Entry) -> int:
        self._entries[self._next] = entry
        self._next += 1
        return self._next - 1

    def allocate(self) -> int:
        """A new, empty sequence. It takes pages when it grows."""
        tokens = PageList(self._tokens, self.page_size)
        return self._add(_Entry(0, tokens, PageList(self._windows, self.cmp_page_size)))

    def free(self, sequence: int) -> None:
        """Forgets a sequence; pages that no other one shares can be used again."""
        self.truncate(sequence, 0)
        del self._entries[sequence]

    def _num_windows(self, length: int) -> int:
        if length < self.kernel_size:
            return 0
        return (length - self.kernel_size) // self.kernel_stride + 1

    def _check_raw_keys(self, entry: _Entry, length: int) -> None:
        """The keys before their rotation that windows behind `length` read are still there."""
        if self.raw_size in (0, self.page_size) or length in (0, entry.length):
            return
        page_begin = (length - 1) // self.page_size * self.page_size
        oldest_kept = min(entry.written, page_begin + self.page_size) - self.raw_size
        if oldest_kept > max(length - self.kernel_size + 1, page_begin):
            raise ValueError(
                f"length: raw_size={self.raw_size} does not remember the keys before token "
                f"{length} of {entry.length}; use a larger raw_size or a multiple of page_size"
            )

    def _check_length(self, entry: _Entry, length: int) -> None:
        if not 0 <= length <= entry.length:
            raise ValueError(f"length: must be between 0 and {entry.length}, found {length}")
        self._check_raw_keys(entry, length)

    def _written(self, entry: _Entry, length: int) -> int:
        """_Entry.written of the first `length` tokens."""
        page_end = -(-length // self.page_size) * self.page_size
        return length if length == page_end else min(entry.written, page_end)

    def truncate(self, sequence: int, length: int) -> None:
        """Takes back the tokens from `length` on, for instance rejected speculative ones."""
        entry = self._entry(sequence)
        self._check_length(entry, length)
        entry.tokens.shrink(length)
        entry.windows.shrink(self._num_windows(length))
        entry.written = self._written(entry, length)
        entry.length = length

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence with the first `length` tokens (default: all) of another, in its pages."""
        entry = self._entry(sequence)
        length = entry.length if length is None else length
        self._check_length(entry, length)
        windows = entry.windows.fork(self._num_windows(length))
        written = self._written(entry, length)
        return self._add(_Entry(length, entry.tokens.fork(length), windows, written))

    def reorder(self, sequences: Sequence[int], parents: Sequence[int]) -> None:
        """Beam search: sequences[i] becomes what parents[i] is; parents may repeat."""
        if len(sequences) != len(parents) or len(set(sequences)) != len(sequences):
            raise ValueError(
                "sequences: must be distinct and as many as parents, found "
                f"{list(sequences)} and {list(parents)}"
            )
        for sequence in sequences:
            self._entry(sequence)
        forks = [self.fork(parent) for parent in parents]
        for sequence, fork in zip(sequences, forks):
            self.truncate(sequence, 0)
            self._entries[sequence] = self._entries.pop(fork)

    def step(
        self,
        sequences: Sequence[int],
        new: int | Sequence[int] = 1,
        *,
        max_seqlen_k: int | None = None,
        out: CacheStep | None = None,
    ) -> CacheStep:
        """Makes room for `new` tokens of each sequence and counts them.

        Args:
            sequences: distinct sequences; the new tokens lie packed in this order.
            new: tokens of all, or of each.
            max_seqlen_k: bound of all tokens of a sequence that the step is launched for; default
                the longest one. For a CUDA graph, the longest that it will see.
            out: a step with as many sequences and tokens, to be renewed in place.

        Raises:
            CacheFullError: not enough free pages; nothing has changed.
            ValueError: a sequence would be longer than max_seqlen or the bound.
        """
        counts = [new] * len(sequences) if isinstance(new, int) else list(new)
        entries = [self._entry(sequence) for sequence in sequences]
        if len(counts) != len(entries) or len(set(sequences)) != len(entries):
            raise ValueError(
                "sequences: must be distinct and as many as new, found "
                f"{list(sequences)} and {counts}"
            )
        if min(counts, default=0) < 0:
            raise ValueError(f"new: must not be negative, found {min(counts)}")
        self._check_renewed(counts, out)
        before = [entry.length for entry in entries]
        after = [length + count for length, count in zip(before, counts)]
        bound = self._bound(max(after, default=0), max_seqlen_k, out)
        self._check_room(entries, after)
        self._grow(entries, after)
        return self._make_step(entries, before, counts, bound, out)

    def _bound(self, longest: int, max_seqlen_k: int | None, out: CacheStep | None) -> int:
        if longest > self.max_seqlen:
            raise ValueError(f"new: max_seqlen of the cache is {self.max_seqlen}, found {longest}")
        if max_seqlen_k is None:
            max_seqlen_k = max(longest, 1) if out is None else out.max_seqlen_k
        if longest > max_seqlen_k:
            raise ValueError(f"max_seqlen_k: must be at least {longest}, found {max_seqlen_k}")
        return max_seqlen_k

    def _check_room(self, entries: list[_Entry], after: list[int]) -> None:
        tokens = windows = 0
        for entry, length in zip(entries, after):
            tokens += entry.tokens.pages_wanted(entry.length, length)
            old, new = self._num_windows(entry.length), self._num_windows(length)
            windows += entry.windows.pages_wanted(old, new)
        if tokens > self._tokens.num_free or windows > self._windows.num_free:
            raise CacheFullError(
                f"the cache is full: {tokens} pages and {windows} compressed pages are needed, "
                f"{self._tokens.num_free} and {self._windows.num_free} are free"
            )

    def _grow(self, entries: list[_Entry], after: list[int]) -> None:
        for entry, length in zip(entries, after):
            copied = entry.tokens.grow(entry.length, length)
            if copied is not None:
                self._copy_page(copied, self.k, self.v, self.k_raw)
            old, new = self._num_windows(entry.length), self._num_windows(length)
            copied = entry.windows.grow(old, new)
            if copied is not None:
                self._copy_page(copied, self.k_cmp, self.v_cmp)
            entry.length, entry.written = length, max(entry.written, length)

    @staticmethod
    def _copy_page(copied: tuple[int, int], *pools: Tensor | None) -> None:
        old, new = copied
        for pool in pools:
            if pool is not None:
                pool[:, new].copy_(pool[:, old])

    def _table(self, rows: list[list[int]], width: int) -> Tensor:
        """int32 [B, width], 0 behind the pages of a row."""
        table = torch.zeros((len(rows), width), dtype=torch.int32)
        for row, pages in zip(table, rows):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table

    def _make_step(
        self,
        entries: list[_Entry],
        before: list[int],
        counts: list[int],
        bound: int,
        out: CacheStep | None,
    ) -> CacheStep:
        width = -(-self.max_seqlen // self.page_size)
        cmp_width = max(-(-self._num_windows(self.max_seqlen) // self.cmp_page_size), 1)
        starts = torch.tensor(before, dtype=torch.int64)
        lengths = torch.tensor(counts, dtype=torch.int64)
        cu = torch.zeros(len(counts) + 1, dtype=torch.int64)
        cu[1:] = lengths.cumsum(0)
        host = {
            "block_table": self._table([entry.tokens.pages for entry in entries], width),
            "cmp_block_table": self._table([entry.windows.pages for entry in entries], cmp_width),
            "cache_seqlens": starts.to(torch.int32),
            "cu_seqlens_q": cu.to(torch.int32),
            "positions": torch.arange(int(cu[-1]))
            + torch.repeat_interleave(starts - cu[:-1], lengths),
        }
        if out is None:
            tensors = {name: x.to(self.device) for name, x in host.items()}
            longest = max(max(counts, default=0), 1)
            return CacheStep(self, **tensors, max_seqlen_q=longest, max_seqlen_k=bound)
        for name, x in host.items():
            getattr(out, name).copy_(x)
        return out

    @staticmethod
    def _check_renewed(counts: list[int], out: CacheStep | None) -> None:
        if out is None:
            return
        fits = (len(counts), sum(counts)) == (out.cache_seqlens.shape[0], out.positions.shape[0])
        if not fits or max(counts, default=0) > out.max_seqlen_q:
            raise ValueError(
                f"out: must be a step of {len(counts)} sequences and {sum(counts)} tokens, at most "
                f"{max(counts, default=0)} each, found {out.cache_seqlens.shape[0]}, "
                f"{out.positions.shape[0]} and {out.max_seqlen_q}"
            )

    def rope_tables(self, rope: RotaryEmbedding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [max_seqlen, D / 2] of a rotary embedding, made once for equal ones."""
        for inv_freq, known_dtype, tables in self._rope_tables:
            same = inv_freq is rope.inv_freq
            if known_dtype == dtype and (same or torch.equal(inv_freq, rope.inv_freq)):
                return tables
        total = torch.tensor([0, self.max_seqlen], dtype=torch.int32, device=self.device)
        tables = rope.tables(total, self.max_seqlen, dtype)
        self._rope_tables.append((rope.inv_freq, dtype, tables))
        return tables
