"""python -m fsattn bench decode: one attention layer that decodes over a paged cache.

A case is a batch of sequences of one length, each with a few new tokens. The calls run from a CUDA
graph, on a cold L2. Dense attention reads the same number of keys: PyTorch's from contiguous memory,
which is its best case, flash_attn and FlashInfer from pages where they can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._bench_configs import CONFIGS, PUBLISHED, Config
from ._bench_measure import Effort, Rates, measure, measure_in_turn, measure_rates
from ._bench_report import markdown, write_line
from ._blocks import compress_kv
from ._native import native_sparse_attention
from ._paged import append_kv, paged_native_sparse_attention, paged_selected_attention

_MEMORY_SHARE = 0.8  # of the device, for the cache of a case
_CMP_PAGE = 64


@dataclass(frozen=True)
class Shape:
    """What is decoded: `batch` sequences of `context` tokens, `new` of them new."""

    config: Config
    batch: int
    context: int
    new: int
    dtype: torch.dtype
    device: torch.device

    @property
    def page_size(self) -> int:
        return max(64, self.config.block_size)

    @property
    def windows(self) -> int:
        c = self.config
        if not c.has_compression or self.context < c.kernel_size:
            return 0
        return (self.context - c.kernel_size) // c.kernel_stride + 1

    def row_bytes(self) -> int:
        """Of one token of the cache, K and V, all heads."""
        c = self.config
        return c.heads_kv * (c.head_dim + c.head_dim_v) * self.dtype.itemsize

    def cache_bytes(self) -> int:
        return self.batch * (self.context + self.windows) * self.row_bytes()

    def dense_bytes(self) -> int:
        return self.batch * self.context * self.row_bytes()

    def sparse_bytes(self) -> int:
        """What a query must read at least: all compressed tokens; selected blocks and the window,
        which share the local blocks; and each of several new tokens its own blocks."""
        c = self.config
        local = c.local_blocks * c.block_size if c.has_compression else 0
        window = max(c.window_size + 1, local) if c.has_compression else 0
        far = max(c.topk * c.block_size - local, 0) * self.new
        tokens = min(far + window, self.context) + self.windows
        return self.batch * tokens * self.row_bytes()


class Cache:
    """Random keys, values and compressed tokens of a shape, in scattered pages."""

    def __init__(self, shape: Shape, seed: int):
        c = shape.config
        self.shape, like = shape, {"dtype": shape.dtype, "device": shape.device}
        self._generator = torch.Generator(shape.device).manual_seed(seed)
        width = -(-shape.context // shape.page_size)
        cmp_width = max(-(-shape.windows // _CMP_PAGE), 1)
        self.table = self._table(width)
        self.cmp_table = self._table(cmp_width)
        pages = (shape.batch * width, c.heads_kv, shape.page_size)
        self.k, self.v = self._random(*pages, c.head_dim), self._random(*pages, c.head_dim_v)
        pages = (shape.batch * cmp_width, c.heads_kv, _CMP_PAGE)
        self.k_cmp, self.v_cmp = (
            self._random(*pages, c.head_dim),
            self._random(*pages, c.head_dim_v),
        )
        total = shape.batch * shape.new
        self.q = self._random(total, c.heads_q, c.head_dim)
        self.gates = self._random(total, c.heads_q, 3)
        self.new_k = self._random(total, c.heads_kv, c.head_dim)
        self.new_v = self._random(total, c.heads_kv, c.head_dim_v)
        self.seqlens = torch.full(
            (shape.batch,), shape.context - shape.new, dtype=torch.int32, device=shape.device
        )
        self.longest = shape.context
        self.cu = torch.arange(shape.batch + 1, dtype=torch.int32, device=shape.device) * shape.new
        self.out = torch.empty((total, c.heads_q, c.head_dim_v), **like)
        self.topk_idx = None if c.has_compression else self._selection()

    def _random(self, *sizes: int) -> Tensor:
        like = {"dtype": self.shape.dtype, "device": self.shape.device}
        return torch.randn(*sizes, generator=self._generator, **like)

    def _table(self, width: int) -> Tensor:
        pages = torch.randperm(
            self.shape.batch * width, generator=self._generator, device=self.shape.device
        )
        return pages.to(torch.int32).reshape(self.shape.batch, width)

    def _selection(self) -> Tensor:
        """Distinct random blocks, the last one among them."""
        shape, c = self.shape, self.shape.config
        blocks = -(-shape.context // c.block_size)
        rows = (c.heads_kv, shape.batch * shape.new)
        topk = min(c.topk, blocks)
        ids = torch.full((*rows, c.topk), -1, dtype=torch.int32, device=shape.device)
        score = torch.rand((*rows, blocks), generator=self._generator, device=shape.device)
        score[..., -1] = 2.0
        ids[..., :topk] = score.topk(topk).indices.sort().values.to(torch.int32)
        return ids

    def _lengths(self) -> dict:
        bounds = {"max_seqlen_q": self.shape.new, "max_seqlen_k": self.longest}
        return {"cache_seqlens": self.seqlens, "cu_seqlens_q": self.cu, **bounds}

    def move_to(
        self, start: int, seqlens: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        """The new tokens stand at `start` from now on, of which `seqlens` is full; q, k, v and gates
        are theirs."""
        self.longest = start + self.shape.new
        self.seqlens = seqlens
        self.q, self.new_k, self.new_v, self.gates = inputs

    def attend(self) -> Tensor:
        c, cache = self.shape.config, (self.k, self.v, self.table)
        options = {"layout": "HND", "out": self.out, "block_size": c.block_size}
        if self.topk_idx is not None:
            return paged_selected_attention(
                self.q, self.topk_idx, *cache, **self._lengths(), **options
            )
        return paged_native_sparse_attention(
            *(self.q, self.gates, *cache, self.k_cmp, self.v_cmp, self.cmp_table),
            **self._lengths(),
            **options,
            kernel_size=c.kernel_size,
            kernel_stride=c.kernel_stride,
            topk=c.topk,
            init_blocks=c.init_blocks,
            local_blocks=c.local_blocks,
            window_size=c.window_size,
        )

    def append(self) -> None:
        c, cmp = self.shape.config, {}
        if c.has_compression:
            names = ("k_cmp_cache", "v_cmp_cache", "cmp_block_table")
            cmp = dict(zip(names, (self.k_cmp, self.v_cmp, self.cmp_table)))
            cmp |= {"kernel_size": c.kernel_size, "kernel_stride": c.kernel_stride}
        append_kv(
            *(self.new_k, self.new_v, self.k, self.v, self.table),
            **self._lengths(),
            **cmp,
            layout="HND",
        )

    def step(self) -> Tensor:
        self.append()
        return self.attend()


def _contiguous(shape: Shape, cache: Cache) -> tuple[Tensor, Tensor]:
    """k and v as [B, Hkv, T, dim]."""
    pages = (x.unflatten(0, (shape.batch, -1)).transpose(1, 2) for x in (cache.k, cache.v))
    k, v = (x.flatten(2, 3)[:, :, : shape.context] for x in pages)
    return k, v


def _torch_grouped(shape: Shape, cache: Cache) -> Callable[[], Tensor]:
    """scaled_dot_product_attention; the heads of a group are queries of their KV head.

    New tokens see each other, which costs nothing more: several of them are as many queries.
    """
    k, v = _contiguous(shape, cache)
    q = cache.q.view(shape.batch, shape.new, shape.config.heads_kv, -1, shape.config.head_dim)
    q = q.transpose(1, 2).flatten(2, 3).contiguous()
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _torch_gqa(shape: Shape, cache: Cache, backend: object = None) -> Callable[[], Tensor]:
    """The same with enable_gqa, by `backend`; by PyTorch's own choice if None."""
    k, v = _contiguous(shape, cache)
    q = cache.q.view(shape.batch, shape.new, *cache.q.shape[1:]).transpose(1, 2)

    def forward() -> Tensor:
        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return forward


def _torch_cudnn(shape: Shape, cache: Cache) -> Callable[[], Tensor]:
    if shape.device.type != "cuda":
        raise NotImplementedError("cuDNN is for CUDA")
    return _torch_gqa(shape, cache, SDPBackend.CUDNN_ATTENTION)


def _flash_attn_dense(shape: Shape, cache: Cache) -> Callable[[], Tensor]:
    module = importlib.import_module("flash_attn")
    k, v = cache.k.transpose(1, 2).contiguous(), cache.v.transpose(1, 2).contiguous()
    q = cache.q.view(shape.batch, shape.new, *cache.q.shape[1:])
    lengths = cache.seqlens + shape.new
    return lambda: module.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, block_table=cache.table, causal=True
    )


def _flashinfer_dense(shape: Shape, cache: Cache) -> Callable[[], Tensor]:
    module = importlib.import_module("flashinfer")
    if shape.new != 1:
        raise NotImplementedError("one new token a sequence")
    c, width = shape.config, cache.table.shape[1]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=shape.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    pointers = torch.arange(shape.batch + 1, dtype=torch.int32, device=shape.device) * width
    last = torch.full_like(cache.seqlens, (shape.context - 1) % shape.page_size + 1)
    heads = (c.heads_q, c.heads_kv, c.head_dim, shape.page_size)
    wrapper.plan(
        *(pointers, cache.table.flatten(), last, *heads),
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    return lambda: wrapper.run(cache.q, (cache.k, cache.v))


_DENSE = {
    "torch": _torch_grouped,
    "torch gqa": _torch_gqa,
    "torch cudnn": _torch_cudnn,
    "flash_attn": _flash_attn_dense,
    "flashinfer": _flashinfer_dense,
}


def _graphed(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The replay of function() captured in a CUDA graph; function itself on the CPU."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _cases(shape: Shape, seed: int) -> Iterator[tuple[str, str, int, Callable[[], object]]]:
    """(operator, implementation, bytes it must read, call)."""
    cache = Cache(shape, seed)
    yield "decode", "fsattn", shape.sparse_bytes(), cache.attend
    yield "append", "fsattn", shape.batch * shape.new * shape.row_bytes(), cache.append
    yield "append + decode", "fsattn", shape.sparse_bytes(), cache.step
    for name, make in _DENSE.items():
        # A peer that is missing, broken or without this shape must not end the run.
        try:
            call = make(shape, cache)
        except Exception:
            continue
        yield "dense decode", name, shape.dense_bytes(), call


def _prefill_cases(shape: Shape, seed: int) -> dict[str, Callable[[], object]]:
    """A prompt of `context` tokens in chunks of `new` over the pages, and in one forward pass."""
    cache, c = Cache(shape, seed), shape.config
    total, cu = shape.batch * shape.context, torch.arange(shape.batch + 1, dtype=torch.int32)
    cu = (cu * shape.context).to(shape.device)
    sizes = [(c.heads_q, c.head_dim), (c.heads_kv, c.head_dim), (c.heads_kv, c.head_dim_v)]
    q, k, v, gates = (
        torch.randn(total, *size, dtype=shape.dtype, device=shape.device)
        for size in [*sizes, (c.heads_q, 3)]
    )
    # The same tokens both times: what they select decides how long it takes.
    parts = [x.unflatten(0, (shape.batch, -1)).split(shape.new, 1) for x in (q, k, v, gates)]
    chunks = [[x.flatten(0, 1) for x in chunk] for chunk in zip(*parts)]
    # Lengths are there before, like `cu`.
    starts = [torch.full_like(cache.seqlens, i * shape.new) for i in range(len(chunks))]

    def in_chunks() -> None:
        for i, chunk in enumerate(chunks):
            cache.move_to(i * shape.new, starts[i], chunk)
            cache.step()

    windows = {"kernel_size": c.kernel_size, "kernel_stride": c.kernel_stride}
    bounds = {"max_seqlen_q": shape.context, "max_seqlen_k": shape.context}

    @torch.no_grad()
    def at_once() -> Tensor:
        k_cmp, cu_cmp = compress_kv(k, cu, shape.context, **windows)
        v_cmp, _ = compress_kv(v, cu, shape.context, **windows)
        return native_sparse_attention(
            *(q, k, v, k_cmp, v_cmp, gates, cu, cu, cu_cmp),
            **bounds,
            **windows,
            block_size=c.block_size,
            topk=c.topk,
            init_blocks=c.init_blocks,
            local_blocks=c.local_blocks,
            window_size=c.window_size,
        )

    return {"prefill in chunks": in_chunks, "prefill at once": at_once}


def _fits(shape: Shape) -> bool:
    # PyTorch's dense attention reads a contiguous copy of the cache.
    if shape.device.type != "cuda":
        return shape.cache_bytes() < 2**31
    total = torch.cuda.get_device_properties(shape.device).total_memory
    return 2 * shape.cache_bytes() < _MEMORY_SHARE * total


def _measure(
    shape: Shape, rates: Rates, effort: Effort, seed: int, is_prefill: bool
) -> Iterator[dict]:
    identity = {
        "config": shape.config.name,
        "batch": shape.batch,
        "tokens": shape.context,
        "new": shape.new,
        "dtype": str(shape.dtype).removeprefix("torch."),
        **dict.fromkeys(("operator", "implementation", "us", "floor_us", "bytes")),
        **dict.fromkeys(("skipped", "error")),
    }
    if not _fits(shape):
        need = 2 * shape.cache_bytes() / 2**30
        yield {**identity, "skipped": f"needs {need:.0f} GiB"}
        return
    if is_prefill:
        yield from _measure_prefill(shape, effort, seed, identity)
        return
    for operator, implementation, size, call in _cases(shape, seed):
        record = {**identity, "operator": operator, "implementation": implementation}
        try:
            found = measure(_graphed(call, shape.device), shape.device, effort)
            record.update(us=1e3 * found.median)
            if size is not None:
                record.update(floor_us=1e6 * size / rates.bytes, bytes=size)
        except (RuntimeError, NotImplementedError) as error:
            record["error"] = f"{type(error).__name__}: {error}"[:300]
        yield record


def _measure_prefill(shape: Shape, effort: Effort, seed: int, identity: dict) -> Iterator[dict]:
    """Without a graph: a prompt is computed once, and its lengths are known to the host."""
    cases = _prefill_cases(shape, seed)
    records = [{**identity, "operator": name, "implementation": "fsattn"} for name in cases]
    try:
        found = measure_in_turn(list(cases.values()), shape.device, effort)
        for record, measured in zip(records, found):
            record.update(us=1e3 * measured.median)
    except (RuntimeError, NotImplementedError) as error:
        for record in records:
            record["error"] = f"{type(error).__name__}: {error}"[:300]
    yield from records


def _table(records: list[dict]) -> str:
    rows = [(
        "config", "batch", "context", "new", "operator", "by", "us", "floor us", "of floor",
        "over dense",
    )]  # fmt: skip
    dense = {}
    for r in records:
        if r["operator"] == "dense decode" and r["us"] is not None:
            key = (r["config"], r["batch"], r["tokens"])
            dense[key] = min(r["us"], dense.get(key, float("inf")))
    for r in records:
        key = (r["config"], r["batch"], r["tokens"])
        what = (r["config"], str(r["batch"]), str(r["tokens"]), str(r["new"]))
        if r["us"] is None:
            rows.append((*what, r["operator"] or "-", r["skipped"] or r["error"][:60], *"----"))
            continue
        floor = ("-", "-")
        if r["floor_us"] is not None:
            floor = (f"{r['floor_us']:.1f}", f"{100 * r['floor_us'] / r['us']:.0f} %")
        is_decode = key in dense and r["operator"] in ("decode", "append + decode")
        speedup = f"{dense[key] / r['us']:.2f} x" if is_decode else "-"
        rows.append((
            *what, r["operator"], r["implementation"], f"{r['us']:.1f}", *floor, speedup,
        ))  # fmt: skip
    return markdown(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fsattn bench decode", description=__doc__)
    is_cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if is_cuda else "cpu")
    add("--configs", nargs="+", choices=[*CONFIGS, "all"])
    add("--batches", nargs="+", type=int, help="default: 1 2 4 ... 128; on CPUs 1 4")
    add("--contexts", nargs="+", type=int, help="default: 8K 16K ... 1M; on CPUs 4K")
    add("--new", type=int, default=1, help="new tokens of each sequence")
    add("--chunk", type=int, help="prefill each context in chunks of so many tokens instead")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="default: fp32; on CUDA bf16")
    add("--runs", type=int, default=20, help="the median of these is reported")
    add("--seconds", type=float, default=3.0, help="of a case")
    add("--budget", type=float, default=float("inf"), help="seconds after which no case starts")
    add("--seed", type=int, default=0)
    add("--note", default="")
    add("--out", type=Path, default=Path("bench_out"), help="folder for the JSON lines")
    return parser


def _fill_defaults(options: argparse.Namespace) -> None:
    is_cuda = torch.device(options.device).type == "cuda"
    options.configs = options.configs or (["llama", "nsa"] if is_cuda else ["small"])
    if "all" in options.configs:
        options.configs = list(PUBLISHED)
    options.batches = options.batches or ([2**i for i in range(8)] if is_cuda else [1, 4])
    options.contexts = options.contexts or ([8192 << i for i in range(8)] if is_cuda else [4096])
    options.dtype = options.dtype or ("bf16" if is_cuda else "fp32")


def main(argv: list[str], environment: Callable[[torch.device, str], dict]) -> int:
    """Measures what the arguments name; returns 1 if an operator of this library failed."""
    parser = _parser()
    options = parser.parse_args(argv)
    _fill_defaults(options)
    if options.chunk is not None and any(n % options.chunk for n in options.contexts):
        parser.error("--chunk: must divide the contexts")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    lines, records, deadline = options.out / "decode.jsonl", [], time.monotonic() + options.budget
    rates = measure_rates(device, dtype)
    where = {**environment(device, options.note), "rate_gbytes": rates.bytes / 1e9}
    print(f"{where['device']}: a copy reaches {rates.bytes / 1e9:.0f} GB/s")
    is_prefill = options.chunk is not None
    new = options.chunk if is_prefill else options.new
    effort = Effort(warmups=3, runs=options.runs, seconds=options.seconds)
    for name in options.configs:
        for batch in options.batches:
            for context in options.contexts:
                if time.monotonic() > deadline:
                    continue
                shape = Shape(CONFIGS[name], batch, context, new, dtype, device)
                for record in _measure(shape, rates, effort, options.seed, is_prefill):
                    records.append({**record, **where})
                    write_line(lines, records[-1])
                    print(".", end="", flush=True)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    print("\n" + _table(records) + f"\nwrote {lines}")
    failed = [r for r in records if r["error"] and r["implementation"] == "fsattn"]
    for r in failed:
        print(f"{r['config']} {r['batch']} {r['tokens']}: {r['error']}", file=sys.stderr)
    return 1 if failed else 0
