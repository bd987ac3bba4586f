"""The differentiable operators as one table, so that a test can be written once for all of them.

A Case holds the inputs that get gradients and two functions over them: `ours` calls the library,
`ref` the definition in tests/reference.
"""

from dataclasses import dataclass, field, replace

import reference
import torch
from support import (
    assert_same_bits,
    check,
    convert,
    cu_seqlens,
    randn,
    random_topk_idx,
    restride,
    run_with_grads,
)

import fsattn


@dataclass
class Shape:
    """Sizes of one call, named as in the contract."""

    lens_q: list = field(default_factory=lambda: [70, 33, 0, 1])
    lens_k: list | None = None
    heads_kv: int = 2
    group: int = 2
    dim: int = 32
    dim_v: int = 32
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 16
    topk: int = 3
    window_size: int = 20
    q_offset: list | None = None
    softmax_scale: float | None = None
    kind: str = "mean"
    with_pos_emb: bool = True
    gate_per_head: bool = True
    activation: str | None = "sigmoid"
    scale: float = 1.0

    def __post_init__(self):
        self.lens_k = self.lens_q if self.lens_k is None else self.lens_k

    @property
    def heads_q(self):
        return self.heads_kv * self.group

    def cu(self, device="cpu"):
        """cu_seqlens_q, cu_seqlens_k."""
        return cu_seqlens(self.lens_q, device), cu_seqlens(self.lens_k, device)

    def cu_cmp(self, device="cpu"):
        cu = reference.compressed_cu_seqlens(self.cu()[1], self.kernel_size, self.kernel_stride)
        return torch.tensor(cu, dtype=torch.int32, device=device)

    def offset(self, device="cpu"):
        if self.q_offset is None:
            return None
        return torch.tensor(self.q_offset, dtype=torch.int32, device=device)

    def variant(self, **changes):
        """A copy with some sizes changed; new lens_q without lens_k means both."""
        if "lens_q" in changes:
            changes.setdefault("lens_k", None)
        return replace(self, **changes)

    def of_sequence(self, b):
        """The shape of sequence b alone."""
        offset = None if self.q_offset is None else [self.q_offset[b]]
        return replace(self, lens_q=[self.lens_q[b]], lens_k=[self.lens_k[b]], q_offset=offset)


@dataclass
class Case:
    """One call. `pack` names the layout of every input: q, k, cmp, or None if it is not packed."""

    names: list
    inputs: list
    outputs: list
    ours: callable
    ref: callable
    pack: list
    out_pack: list

    def douts(self, dtype, device, seed=77, with_lse=True):
        """Random gradients of the outputs, in their dtypes; None for lse without with_lse."""
        douts = []
        for i, out in enumerate(self.ref(*convert(self.inputs, torch.float64))):
            is_lse = self.outputs[i] == "lse"
            if is_lse and not with_lse:
                douts.append(None)
                continue
            kind = lse_dtype(dtype) if is_lse else dtype
            douts.append(randn(*out.shape, dtype=kind, device=device, seed=seed + i))
        return douts

    def truth(self, douts, dtype=torch.float64):
        """Outputs and gradients of the reference, computed in dtype on the CPU."""
        cast = [None if d is None else d.cpu().to(dtype) for d in douts]
        return run_with_grads(self.ref, convert(self.inputs, dtype), cast)

    def found(self, douts):
        """Outputs and gradients of the library."""
        return run_with_grads(self.ours, self.inputs, douts)


def lse_dtype(dtype):
    """Statistics are fp32, for fp64 inputs fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _qkv(s, dtype, device, seed, rows_k):
    return [
        randn(
            sum(s.lens_q), s.heads_q, s.dim, dtype=dtype, device=device, seed=seed, scale=s.scale
        ),
        randn(rows_k, s.heads_kv, s.dim, dtype=dtype, device=device, seed=seed + 1, scale=s.scale),
        randn(rows_k, s.heads_kv, s.dim_v, dtype=dtype, device=device, seed=seed + 2),
    ]


def _options(s, device):
    ours = {"softmax_scale": s.softmax_scale, "q_offset": s.offset(device)}
    ref = {"softmax_scale": s.softmax_scale, "q_offset": s.q_offset}
    return ours, ref


ATTENTION = {"names": ["q", "k", "v"], "outputs": ["o", "lse"], "out_pack": ["q", "lse"]}


def selected_case(s, dtype, device="cpu", seed=0, topk_idx=None):
    """selected_attention over random, wild block lists."""
    cu_q, cu_k = s.cu(device)
    if topk_idx is None:
        topk_idx = random_topk_idx(s.heads_kv, s.lens_q, s.lens_k, s.block_size, s.topk, seed)
    on_device = topk_idx.to(device)
    mine, theirs = _options(s, device)

    def ours(q, k, v):
        return fsattn.selected_attention(
            q, k, v, on_device, cu_q, cu_k, block_size=s.block_size, return_lse=True, **mine
        )

    def ref(q, k, v):
        return reference.selected_attention(
            q, k, v, topk_idx, *s.cu(), block_size=s.block_size, **theirs
        )

    inputs = _qkv(s, dtype, device, seed, sum(s.lens_k))
    return Case(inputs=inputs, ours=ours, ref=ref, pack=["q", "k", "k"], **ATTENTION)


def window_case(s, dtype, device="cpu", seed=0):
    """window_attention."""
    cu_q, cu_k = s.cu(device)
    mine, theirs = _options(s, device)

    def ours(q, k, v):
        return fsattn.window_attention(
            q, k, v, cu_q, cu_k, window_size=s.window_size, return_lse=True, **mine
        )

    def ref(q, k, v):
        return reference.window_attention(q, k, v, *s.cu(), window_size=s.window_size, **theirs)

    inputs = _qkv(s, dtype, device, seed, sum(s.lens_k))
    return Case(inputs=inputs, ours=ours, ref=ref, pack=["q", "k", "k"], **ATTENTION)


def compressed_case(s, dtype, device="cpu", seed=0):
    """compressed_attention over random compressed keys; rows behind the last sequence exist."""
    cu_q, cu_k = s.cu(device)
    cu_cmp = s.cu_cmp(device)
    sizes = {"kernel_size": s.kernel_size, "kernel_stride": s.kernel_stride}
    mine, theirs = _options(s, device)

    def ours(q, k, v):
        return fsattn.compressed_attention(
            q, k, v, cu_q, cu_k, cu_cmp, return_lse=True, **sizes, **mine
        )

    def ref(q, k, v):
        return reference.compressed_attention(q, k, v, *s.cu(), s.cu_cmp(), **sizes, **theirs)

    inputs = _qkv(s, dtype, device, seed, sum(s.lens_k) // s.kernel_stride)
    return Case(inputs=inputs, ours=ours, ref=ref, pack=["q", "cmp", "cmp"], **ATTENTION)


def compress_case(s, dtype, device="cpu", seed=0):
    """compress_kv of kind s.kind."""
    cu_k = s.cu(device)[1]
    sizes = {"kernel_size": s.kernel_size, "kernel_stride": s.kernel_stride, "kind": s.kind}
    like = {"dtype": dtype, "device": device}
    inputs = [randn(sum(s.lens_k), s.heads_kv, s.dim, seed=seed, **like)]
    names, pack = ["x"], ["k"]
    if s.kind != "mean":
        linear = s.kind == "linear"
        shape = [s.kernel_size * s.dim, s.dim] if linear else [s.kernel_size]
        size = (s.kernel_size * s.dim) ** -0.5 if linear else 1.0
        inputs.append(randn(s.heads_kv, *shape, seed=seed + 1, scale=size, **like))
        names.append("weight")
        pack.append(None)
    if s.with_pos_emb:
        inputs.append(randn(s.heads_kv, s.kernel_size, s.dim, seed=seed + 2, **like))
        names.append("pos_emb")
        pack.append(None)

    def ours(*tensors):
        optional = dict(zip(names[1:], tensors[1:], strict=True))
        return (fsattn.compress_kv(tensors[0], cu_k, **sizes, **optional)[0],)

    def ref(*tensors):
        optional = dict(zip(names[1:], tensors[1:], strict=True))
        return (reference.compress_kv(tensors[0], s.cu()[1], **sizes, **optional)[0],)

    return Case(names, inputs, ["x_cmp"], ours, ref, pack, ["cmp"])


def gate_case(s, dtype, device="cpu", seed=0):
    """gate of three random branches."""
    tokens, heads = sum(s.lens_q), s.heads_q
    like = {"dtype": dtype, "device": device}
    inputs = [randn(tokens, heads, s.dim_v, seed=seed + i, **like) for i in range(3)]
    shape = [tokens, heads, 3] if s.gate_per_head else [tokens, 3]
    inputs.append(randn(*shape, seed=seed + 3, **like))

    def ours(*tensors):
        return (fsattn.gate(*tensors, activation=s.activation),)

    def ref(*tensors):
        return (reference.gate(*tensors, activation=s.activation),)

    names = ["o_cmp", "o_sel", "o_win", "gates"]
    return Case(names, inputs, ["o"], ours, ref, ["q"] * 4, ["q"])


def nsa_case(s, dtype, device="cpu", seed=0, brings_selection=False):
    """native_sparse_attention with its own selection, or with that of the definition."""
    cu_q, cu_k = s.cu(device)
    cu_cmp = s.cu_cmp(device)
    like = {"dtype": dtype, "device": device}
    inputs = _qkv(s, dtype, device, seed, sum(s.lens_k))
    rows = sum(s.lens_k) // s.kernel_stride
    inputs.append(randn(rows, s.heads_kv, s.dim, seed=seed + 3, scale=s.scale, **like))
    inputs.append(randn(rows, s.heads_kv, s.dim_v, seed=seed + 4, **like))
    shape = [sum(s.lens_q), s.heads_q, 3] if s.gate_per_head else [sum(s.lens_q), 3]
    inputs.append(randn(*shape, seed=seed + 5, **like))
    options = {
        "kernel_size": s.kernel_size,
        "kernel_stride": s.kernel_stride,
        "block_size": s.block_size,
        "topk": s.topk,
        "window_size": s.window_size,
        "init_blocks": 1,
        "local_blocks": 1,
        "activation": s.activation,
    }
    mine, theirs = _options(s, device)
    # The definition ranks in fp64; its selection is the truth for every dtype of the inputs.
    topk_idx = reference.native_sparse_attention(
        *convert(inputs, torch.float64), *s.cu(), s.cu_cmp(), **options, **theirs
    )[1]

    given = topk_idx.to(device) if brings_selection else None

    def ours(*tensors):
        cus = (cu_q, cu_k, cu_cmp)
        return (fsattn.native_sparse_attention(*tensors, *cus, topk_idx=given, **options, **mine),)

    def ref(*tensors):
        return reference.native_sparse_attention(
            *tensors, *s.cu(), s.cu_cmp(), topk_idx=topk_idx, **options, **theirs
        )[:1]

    names = ["q", "k", "v", "k_cmp", "v_cmp", "gates"]
    return Case(names, inputs, ["o"], ours, ref, ["q", "k", "k", "cmp", "cmp", "q"], ["q"])


OPERATORS = {
    "compress_kv": compress_case,
    "compressed_attention": compressed_case,
    "selected_attention": selected_case,
    "window_attention": window_case,
    "gate": gate_case,
    "native_sparse_attention": nsa_case,
}
ATTENTIONS = ["compressed_attention", "selected_attention", "window_attention"]


def _gradient_units(case, douts):
    """Size of the terms in dq and dk: dS = P * (dP - delta) is a difference that is zero for a row
    with one key, and whose terms, computed in fp32, have the size of dP = dO . v."""
    if "k" not in case.names or douts[0].dtype == torch.float64:
        return [None] * len(case.names)
    q, k, v = (x.detach().cpu().float() for x in case.inputs[:3])
    if not (q.numel() and k.numel()):
        return [None] * len(case.names)
    rms = [float(x.cpu().float().square().mean().sqrt()) for x in (douts[0], v)]
    size = 2 * rms[0] * rms[1] * (v.shape[-1] / q.shape[-1]) ** 0.5  # dP and delta
    of_k = size * float(q.abs().max())
    units = {"q": size * float(k.abs().max()), "k": of_k, "k_cmp": of_k}
    return [units.get(name) for name in case.names]


def check_case(case, dtype, device, with_lse=True, seed=77):
    """Forward and backward of the library against the definition, by the rule of support.check."""
    douts = case.douts(dtype, device, seed, with_lse)
    outs, grads = case.found(douts)
    true_outs, true_grads = case.truth(douts)
    same_outs, same_grads = true_outs, true_grads
    if dtype != torch.float64:
        same_outs, same_grads = case.truth(douts, dtype)
    # Statistics are fp32 whatever the inputs are.
    statistics = same_outs
    if dtype in (torch.bfloat16, torch.float16):
        statistics = case.ref(*convert(case.inputs, torch.float32))
    for name, *quad in zip(case.outputs, outs, true_outs, same_outs, statistics, strict=True):
        found, truth, same, statistic = quad
        is_lse = name == "lse"
        assert found.dtype == (lse_dtype(dtype) if is_lse else dtype), f"{name}: {found.dtype}"
        check(name, found, truth, statistic if is_lse else same)
    units = _gradient_units(case, douts)
    for name, unit, *triple in zip(case.names, units, grads, true_grads, same_grads, strict=True):
        slack = 0.0 if unit is None else 8 * torch.finfo(torch.float32).eps * unit
        check(f"d{name}", *triple, slack=slack)
    return outs, grads


def check_strides(name, case, douts, styles):
    """Inputs and dO restrided in eight `styles`, the last for dO, give the bits of contiguous ones."""
    dense = case.found(douts)
    keep = {"gates", "weight"}
    case.inputs = [
        x if key in keep or x.ndim != 3 else restride(x, style)
        for key, x, style in zip(case.names, case.inputs, styles, strict=False)
    ]
    douts = [restride(x, styles[7]) if x.ndim == 3 else x for x in douts]
    strided = case.found(douts)
    for a, b in zip([*dense[0], *dense[1]], [*strided[0], *strided[1]], strict=True):
        assert_same_bits(name, a, b.contiguous())
