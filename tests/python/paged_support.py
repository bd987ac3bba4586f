"""A batch that lives in a paged cache: append and attend piece by piece, then compare everything with
one full forward by the definition."""

import itertools

import reference
import torch
from selection import CLOSE, check_row
from support import check, convert, cu_seqlens, randn

import fsattn

ROPE_THETA = 10000.0


def rope_tables(positions, dim, dtype, device):
    """cos and sin [positions, dim / 2]."""
    freq = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * freq
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def rotate(x, cos, sin):
    """Half-split rotation of x [tokens, heads, dim] by one row of cos and sin a token."""
    x0, x1 = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1)


def scattered_tables(rows, width, num_pages, seed, device):
    """int32 [rows, width]: distinct pages in random order."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(num_pages, generator=generator)[: rows * width]
    return pages.reshape(rows, width).to(torch.int32).to(device)


class PagedCase:
    """Sequences of `lens` tokens in the end. Every row of the caches starts as NaN.

    advance(counts) appends and attends to the next tokens of every sequence; check() compares
    what is stored and what came out with the definition. options: of native_sparse_attention.
    """

    def __init__(
        self,
        lens,
        *,
        heads_kv=2,
        group=2,
        dim=16,
        dim_v=None,
        page_size=64,
        cmp_page_size=16,
        layout="NHD",
        kind="mean",
        pos_emb=False,
        rope=False,
        raw_size=None,
        gate_heads=True,
        dtype=torch.float64,
        device="cpu",
        seed=0,
        spare_pages=3,
        **options,
    ):
        defaults = {"kernel_size": 32, "kernel_stride": 16, "block_size": 32, "topk": 4}
        defaults |= {"window_size": 50, "init_blocks": 1, "local_blocks": 2}
        self.options = defaults | options
        self.lens, self.kind, self.layout = list(lens), kind, layout
        self.dtype, self.device = dtype, device
        self.page_size, self.cmp_page_size = page_size, cmp_page_size
        dim_v = dim if dim_v is None else dim_v
        self._make_inputs(heads_kv, group, dim, dim_v, gate_heads, pos_emb, seed)
        self._make_caches(heads_kv, dim, dim_v, rope, raw_size, spare_pages, seed)
        self.at = [0] * len(self.lens)
        total, heads = sum(self.lens), heads_kv * group
        # On the device, so that a step copies nothing from the host, which would wait for it.
        self.tokens = torch.arange(total, device=device)
        self.positions = torch.cat([torch.arange(n) for n in [*self.lens, 0]]).to(device)
        self.o = torch.full((total, heads, dim_v), torch.nan, dtype=dtype, device=device)
        topk = self.options["topk"]
        self.ids = torch.full((heads_kv, total, topk), -7, dtype=torch.int32, device=device)

    def _make_inputs(self, heads_kv, group, dim, dim_v, gate_heads, pos_emb, seed):
        like = {"dtype": self.dtype, "device": self.device}
        total, length = sum(self.lens), self.options["kernel_size"]
        self.q = randn(total, heads_kv * group, dim, seed=seed, scale=2.0, **like)
        self.k = randn(total, heads_kv, dim, seed=seed + 1, **like)
        self.v = randn(total, heads_kv, dim_v, seed=seed + 2, **like)
        gates = (total, heads_kv * group, 3) if gate_heads else (total, 3)
        self.gates = randn(*gates, seed=seed + 3, **like)
        shapes = {"mean": None, "linear": (heads_kv, length * dim, dim)}
        shape = shapes.get(self.kind, (heads_kv, length))
        shape_v = (heads_kv, length * dim_v, dim_v) if self.kind == "linear" else shape
        scale = (length * dim) ** -0.5 if self.kind == "linear" else length**-0.5
        self.weight_k = None if shape is None else randn(*shape, seed=seed + 4, scale=scale, **like)
        self.weight_v = (
            None if shape is None else randn(*shape_v, seed=seed + 5, scale=scale, **like)
        )
        self.pos_emb = randn(heads_kv, length, dim, seed=seed + 6, **like) if pos_emb else None

    def _pages(self, count, size, heads, dim):
        inner = (heads, size) if self.layout == "HND" else (size, heads)
        shape = (count, *inner, dim)
        return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)

    def _make_caches(self, heads_kv, dim, dim_v, rope, raw_size, spare, seed):
        batch, longest = len(self.lens), max(self.lens, default=1)
        width = max(-(-longest // self.page_size), 1)
        windows = longest // self.options["kernel_stride"]
        cmp_width = max(-(-windows // self.cmp_page_size), 1)
        pages, cmp_pages = batch * width + spare, batch * cmp_width + spare
        self.k_cache = self._pages(pages, self.page_size, heads_kv, dim)
        self.v_cache = self._pages(pages, self.page_size, heads_kv, dim_v)
        self.k_cmp_cache = self._pages(cmp_pages, self.cmp_page_size, heads_kv, dim)
        self.v_cmp_cache = self._pages(cmp_pages, self.cmp_page_size, heads_kv, dim_v)
        self.table = scattered_tables(batch, width, pages, seed, self.device)
        self.cmp_table = scattered_tables(batch, cmp_width, cmp_pages, seed + 1, self.device)
        self.k_raw_cache, self.cos, self.sin = None, None, None
        if rope:
            raw_size = self.page_size if raw_size is None else raw_size
            self.k_raw_cache = self._pages(pages, raw_size, heads_kv, dim)
            positions = width * self.page_size
            self.cos, self.sin = rope_tables(positions, dim, self.dtype, self.device)

    def rows_of(self, starts, counts):
        """Rows of the packed inputs: counts[b] tokens of sequence b from starts[b] on."""
        offsets = itertools.accumulate(self.lens, initial=0)
        walk = zip(offsets, starts, counts)
        return torch.cat([self.tokens[o + s : o + s + n] for o, s, n in walk])

    def lengths(self, starts, counts, **extra):
        """The arguments that say where the new tokens are."""
        return {
            "cache_seqlens": torch.tensor(starts, dtype=torch.int32, device=self.device),
            "cu_seqlens_q": cu_seqlens(counts, self.device),
            "max_seqlen_q": max(max(counts), 1),
            **extra,
        }

    def queries(self, rows):
        """q of these rows, rotated by their positions."""
        if self.cos is None:
            return self.q[rows]
        positions = self.positions[rows]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        turn = (self.cos[positions].to(wide), self.sin[positions].to(wide))
        return rotate(self.q[rows].to(wide), *turn).to(self.dtype)

    def append_arguments(self, starts, counts):
        rows = self.rows_of(starts, counts)
        names = ("kernel_size", "kernel_stride")
        return {
            "k": self.k[rows],
            "v": self.v[rows],
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "block_table": self.table,
            "k_cmp_cache": self.k_cmp_cache,
            "v_cmp_cache": self.v_cmp_cache,
            "cmp_block_table": self.cmp_table,
            "k_raw_cache": self.k_raw_cache,
            "rope_cos": self.cos,
            "rope_sin": self.sin,
            "kind": self.kind,
            "weight_k": self.weight_k,
            "weight_v": self.weight_v,
            "pos_emb": self.pos_emb,
            "layout": self.layout,
            **{name: self.options[name] for name in names},
            **self.lengths(starts, counts),
        }

    def append(self, starts, counts, **changes):
        return fsattn.append_kv(**(self.append_arguments(starts, counts) | changes))

    def attention_arguments(self, starts, counts):
        rows = self.rows_of(starts, counts)
        return {
            "q": self.queries(rows),
            "gates": self.gates[rows],
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "block_table": self.table,
            "k_cmp_cache": self.k_cmp_cache,
            "v_cmp_cache": self.v_cmp_cache,
            "cmp_block_table": self.cmp_table,
            "layout": self.layout,
            **self.lengths(starts, counts),
            **self.options,
        }

    def attend(self, starts, counts, **changes):
        """(o, topk_idx) of the new tokens."""
        arguments = self.attention_arguments(starts, counts) | changes
        return fsattn.paged_native_sparse_attention(**arguments, return_topk_idx=True)

    def advance(self, counts):
        """Appends and attends to the next tokens; counts: of all sequences, or one for all."""
        counts = [counts] * len(self.lens) if isinstance(counts, int) else list(counts)
        counts = [min(n, end - at) for n, end, at in zip(counts, self.lens, self.at)]
        self.append(self.at, counts)
        rows = self.rows_of(self.at, counts)
        self.o[rows], self.ids[:, rows] = self.attend(self.at, counts)
        self.at = [at + n for at, n in zip(self.at, counts)]

    def run(self, counts):
        """advance() until every sequence is complete, through `counts` again and again."""
        step = 0
        while self.at != self.lens:
            self.advance(counts[step % len(counts)])
            step += 1
        return self

    def packed(self, cache, table, page_size, lens):
        """The first lens[b] rows of every sequence, as the tables find them."""
        cache = cache.transpose(1, 2) if self.layout == "HND" else cache
        rows = [cache[row.long()].flatten(0, 1)[:n] for row, n in zip(table, lens)]
        return torch.cat(rows)

    def num_windows(self, lens=None):
        sizes = (self.options["kernel_size"], self.options["kernel_stride"])
        return [reference.compressed_length(n, *sizes) for n in (lens or self.at)]

    def stored(self):
        """k, v, k_cmp, v_cmp of all stored tokens, packed."""
        return self.stored_at(self.at)

    def stored_at(self, lens):
        """Those of the first lens[b] tokens of every sequence."""
        windows = self.num_windows(lens)
        return [
            self.packed(self.k_cache, self.table, self.page_size, lens),
            self.packed(self.v_cache, self.table, self.page_size, lens),
            self.packed(self.k_cmp_cache, self.cmp_table, self.cmp_page_size, windows),
            self.packed(self.v_cmp_cache, self.cmp_table, self.cmp_page_size, windows),
        ]

    def truth_of_stored(self, dtype):
        """What must be stored, computed in dtype (float64: exactly)."""
        k, v, weight_k, weight_v, pos_emb, cos, sin = convert(
            [self.k, self.v, self.weight_k, self.weight_v, self.pos_emb, self.cos, self.sin], dtype
        )
        cu = cu_seqlens(self.lens)
        sizes = {name: self.options[name] for name in ("kernel_size", "kernel_stride")}
        options = {"kind": self.kind, **sizes}
        k_cmp, cu_cmp = reference.compress_kv(k, cu, weight=weight_k, pos_emb=pos_emb, **options)
        v_cmp, _ = reference.compress_kv(v, cu, weight=weight_v, **options)
        k_cmp, v_cmp = k_cmp[: cu_cmp[-1]], v_cmp[: cu_cmp[-1]]
        if cos is not None:
            at = torch.cat([torch.arange(n) for n in self.lens])
            k = rotate(k, cos[at], sin[at])
            stride = self.options["kernel_stride"]
            windows = [torch.arange(n) * stride for n in self.num_windows()]
            k_cmp = rotate(k_cmp, cos[torch.cat(windows)], sin[torch.cat(windows)])
        return [k, v, k_cmp, v_cmp]

    def check_stored(self):
        truth, same = self.truth_of_stored(torch.float64), self.truth_of_stored(self.dtype)
        for name, a, b, c in zip(("k", "v", "k_cmp", "v_cmp"), self.stored(), truth, same):
            check(f"stored {name}", a, b, c)

    def check_outputs(self):
        """Over what is stored: the selection up to near ties, o for the selection found."""
        cu = cu_seqlens(self.lens)
        cus = (cu, cu, cu_seqlens(self.num_windows()))
        q = self.queries(torch.arange(len(self.q), device=self.device))
        ids = self.ids.cpu()
        select = {
            x: self.options[x] for x in self.options if x not in ("window_size", "activation")
        }
        keys = convert([q, self.stored()[2]], torch.float64)
        truth_ids, tables = reference.select_blocks(*keys, *cus, **select)
        close = CLOSE[self.options.get("score_dtype", "fp32")]
        for (start, end), table in zip(zip(cu[:-1], cu[1:]), tables):
            for t in range(int(start), int(end)):
                for head in range(ids.shape[0]):
                    row = table[head, t - int(start)]
                    check_row(f"[{head}, {t}]", ids[head, t], truth_ids[head, t], row, close)

        def forward(dtype):
            inputs = convert([q, *self.stored(), self.gates], dtype)
            return reference.native_sparse_attention(*inputs, *cus, topk_idx=ids, **self.options)[0]

        check("o", self.o, forward(torch.float64), forward(self.dtype))

    def check(self):
        assert self.at == self.lens
        self.check_stored()
        self.check_outputs()
        return self


PAGED_OPERATORS = [
    "append_kv",
    "paged_native_sparse_attention_out",
    "paged_selected_attention_out",
]


def operator_samples():
    """Arguments for every operator of torch.ops.fsattn over a paged cache, by name."""
    case = PagedCase([64], rope=True, raw_size=32, kind="linear", dtype=torch.float32)
    names = ("k_cache", "v_cache", "k_cmp_cache", "v_cmp_cache", "k_raw_cache")
    for name in names:
        getattr(case, name).zero_()  # opcheck compares, and NaN differs from itself
    cu, start = cu_seqlens([64]), torch.zeros(1, dtype=torch.int32)
    cache = (case.k_cache, case.v_cache, case.table)
    cmp = (case.k_cmp_cache, case.v_cmp_cache, case.cmp_table)
    append = (*cache, *cmp, case.k_raw_cache, case.cos, case.sin)
    weights = (case.weight_k, case.weight_v, None)
    out, lse = torch.zeros_like(case.q), torch.zeros(4, 64)
    ids = torch.zeros(2, 64, 4, dtype=torch.int32)
    config = (32, 16, 32, 4, 1, 2, 50, 0.0, 0, 0, 0, False, 1 << 30)
    bounds = (64, 64, 0)
    samples = (
        (case.k, case.v, cu, start, *append, *weights, *bounds, 32, 16, 3),
        (case.q, case.gates, cu, start, *cache, *cmp, *bounds, *config, out, ids.clone()),
        (case.q, ids, cu, start, *cache, *bounds, 32, 0.0, False, 1 << 30, out, lse),
    )
    return dict(zip(PAGED_OPERATORS, samples))
