"""What the tests of test_cuda_*.py share: large inputs made on the GPU, and calls over them."""

from dataclasses import dataclass, field

import torch
from support import DEVICES, assert_same_bits, cu_seqlens

import fsattn

DEVICE = "cuda"
NEEDS_CUDA = list(DEVICES[1].marks)
GIB = 2**30
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}


def device_randn(*shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    """Normal numbers, drawn on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device=DEVICE) * scale


@dataclass
class Sizes:
    """A packed batch; queries and keys have the same lengths."""

    lens: list
    heads_q: int = 4
    heads_kv: int = 2
    dim: int = 64
    block_size: int = 64
    topk: int = 4
    window_size: int = 512
    dtype: torch.dtype = torch.bfloat16

    @property
    def total(self):
        return sum(self.lens)

    def cu(self):
        return cu_seqlens(self.lens, DEVICE)

    def cu_cmp(self):
        return cu_seqlens([max(0, (n - 32) // 16 + 1) for n in self.lens], DEVICE)

    def longest(self):
        return {"max_seqlen_q": max(self.lens), "max_seqlen_k": max(self.lens)}

    def blocks(self):
        return {"block_size": self.block_size, "topk": self.topk}

    def random(self, heads, seed, tokens=None):
        tokens = self.total if tokens is None else tokens
        return device_randn(tokens, heads, self.dim, dtype=self.dtype, seed=seed)

    def positions(self):
        """Position of every token in its own sequence."""
        return torch.cat([torch.arange(n, device=DEVICE) for n in self.lens])

    def causal_ids(self, seed=0):
        """Random blocks up to the query's own, [Hkv, total, topk]; repeats are possible."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        shape = (self.heads_kv, self.total, self.topk)
        uniform = torch.rand(shape, generator=generator, device=DEVICE)
        num_blocks = self.positions() // self.block_size + 1
        return (uniform * num_blocks[None, :, None]).int()


@dataclass
class Call:
    """run(*inputs) -> tuple of outputs; inputs get gradients unless is_ranking.

    of: names of the rows that inputs and outputs have: q (tokens), cmp (windows), h (tokens, second
    axis).
    """

    inputs: list
    run: callable
    of_inputs: list
    of_outputs: list
    is_ranking: bool = False
    extras: dict = field(default_factory=dict)


def _compress(s, seed):
    def run(x):
        return (fsattn.compress_kv(x, s.cu(), max(s.lens), **WINDOWS)[0],)

    return Call([s.random(s.heads_kv, seed)], run, ["q"], ["cmp"])


def _compressed_inputs(s, seed):
    rows = s.total // 16
    kv = [s.random(s.heads_kv, seed + i, rows) for i in (1, 2)]
    return [s.random(s.heads_q, seed), *kv], (s.cu(), s.cu(), s.cu_cmp())


def _compressed(s, seed):
    inputs, cus = _compressed_inputs(s, seed)

    def run(q, k, v):
        return fsattn.compressed_attention(q, k, v, *cus, return_lse=True, **s.longest(), **WINDOWS)

    return Call(inputs, run, ["q", "cmp", "cmp"], ["q", "h"])


def _select(s, seed):
    inputs, cus = _compressed_inputs(s, seed)

    def run(q, k, v):
        _, lse = fsattn.compressed_attention(
            q, k, v, *cus, return_lse=True, **s.longest(), **WINDOWS
        )
        return (
            fsattn.select_blocks(
                q, k, lse, *cus, local_blocks=1, **s.longest(), **WINDOWS, **s.blocks()
            ),
        )

    return Call(inputs, run, ["q", "cmp", "cmp"], ["h"], is_ranking=True)


def _qkv(s, seed):
    return [s.random(h, seed + i) for i, h in enumerate((s.heads_q, s.heads_kv, s.heads_kv))]


def _selected(s, seed, topk_idx=None):
    topk_idx = s.causal_ids(seed) if topk_idx is None else topk_idx

    def run(q, k, v):
        return fsattn.selected_attention(
            q, k, v, topk_idx, s.cu(), s.cu(), block_size=s.block_size, return_lse=True,
            **s.longest(),
        )  # fmt: skip

    return Call(_qkv(s, seed), run, ["q"] * 3, ["q", "h"], extras={"topk_idx": topk_idx})


def _window(s, seed):
    def run(q, k, v):
        return fsattn.window_attention(
            q, k, v, s.cu(), s.cu(), window_size=s.window_size, return_lse=True, **s.longest()
        )

    return Call(_qkv(s, seed), run, ["q"] * 3, ["q", "h"])


def _gate(s, seed):
    inputs = [s.random(s.heads_q, seed + i) for i in range(3)]
    inputs.append(device_randn(s.total, s.heads_q, 3, dtype=s.dtype, seed=seed + 3))
    return Call(inputs, lambda *x: (fsattn.gate(*x),), ["q"] * 4, ["q"])


def whole(s, q, k, v, gates, **options):
    """Compression of keys and values by the mean, then native_sparse_attention."""
    cu = s.cu()
    k_cmp, cu_cmp = fsattn.compress_kv(k, cu, max(s.lens), **WINDOWS)
    v_cmp, _ = fsattn.compress_kv(v, cu, max(s.lens), **WINDOWS)
    return fsattn.native_sparse_attention(
        q, k, v, k_cmp, v_cmp, gates, cu, cu, cu_cmp, local_blocks=1, window_size=s.window_size,
        **s.longest(), **WINDOWS, **s.blocks(), **options,
    )  # fmt: skip


def _whole(s, seed):
    gates = device_randn(s.total, s.heads_q, 3, dtype=s.dtype, seed=seed + 3)
    return Call([*_qkv(s, seed), gates], lambda *x: (whole(s, *x),), ["q"] * 4, ["q"])


CALLS = {
    "compress_kv": _compress,
    "compressed_attention": _compressed,
    "select_blocks": _select,
    "selected_attention": _selected,
    "window_attention": _window,
    "gate": _gate,
    "native_sparse_attention": _whole,
}


def make_douts(outputs, seed=70):
    """Random gradients of the outputs; none for a row of lse that is -inf."""
    douts = [device_randn(*o.shape, dtype=o.dtype, seed=seed + i) for i, o in enumerate(outputs)]
    return [torch.where(o.isfinite(), d, 0) for o, d in zip(outputs, douts, strict=True)]


def forward_backward(call, douts=None):
    """(outputs, gradients of the inputs); no gradients of a ranking."""
    if call.is_ranking:
        return list(call.run(*call.inputs)), []
    leaves = [x.detach().requires_grad_() for x in call.inputs]
    outputs = call.run(*leaves)
    with torch.no_grad():
        douts = make_douts(outputs) if douts is None else douts
    gradients = torch.autograd.grad(outputs, leaves, douts)
    return [o.detach() for o in outputs], list(gradients)


def assert_same_results(name, found, want):
    """Equal bits of every output and every gradient."""
    for kind, mine, theirs in zip(("output", "gradient"), found, want, strict=True):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert_same_bits(f"{name}, {kind} {i}", a, b)
