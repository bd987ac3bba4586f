"""The operators as citizens of PyTorch: opcheck, gradcheck, compile, checkpoint, vmap, strides."""

import warnings
from dataclasses import replace

import pytest
import torch
from cases import OPERATORS, Shape
from paged_support import PAGED_OPERATORS
from support import (
    DEVICES,
    assert_same_bits,
    cu_seqlens,
    device_types,
    randn,
    random_topk_idx,
)
from torch.utils.checkpoint import checkpoint

import fsattn

TINY = Shape(
    lens_q=[9, 0, 6],
    dim=8,
    dim_v=8,
    kernel_size=4,
    kernel_stride=2,
    topk=2,
    window_size=3,
)
LENS = [40, 0, 23]
TOTAL = sum(LENS)


def operator_samples(requires_grad):
    """Arguments for every operator of torch.ops.fsattn, by name."""
    ops = torch.ops.fsattn
    cu = cu_seqlens(LENS)
    like = {"dtype": torch.float32}

    def leaf(*shape, seed):
        return randn(*shape, seed=seed, **like).requires_grad_(requires_grad)

    q, k, v = leaf(TOTAL, 4, 16, seed=1), leaf(TOTAL, 2, 16, seed=2), leaf(TOTAL, 2, 8, seed=3)
    sizes = (16, 8)
    weight, pos_emb = leaf(2, 16, seed=4), leaf(2, 16, 16, seed=5)
    compress = (cu, weight, pos_emb, 40, *sizes, 1)
    with torch.no_grad():
        k_cmp, cu_cmp = ops.compress_kv_fwd(k, *compress)
        v_cmp, _ = ops.compress_kv_fwd(v, cu, None, None, 40, *sizes, 0)
    k_cmp, v_cmp = (x.detach().requires_grad_(requires_grad) for x in (k_cmp, v_cmp))
    compressed = (cu, cu, cu_cmp, None, 40, 40, *sizes)
    rows = random_topk_idx(2, LENS, LENS, 16, 3)
    blocks = (cu, cu, None, 40, 40)
    selected = (rows, None, None, *blocks, 16, 0.0, 1 << 20)
    logits = leaf(TOTAL, 4, 3, seed=6)
    native = (q, k, v, k_cmp, v_cmp, logits)
    native_tail = (16, 3, 1, 2, 8, 0.0, 0, 0, 0, 1 << 20)
    samples = {
        "compress_kv_fwd": (k, *compress),
        "compressed_attention_fwd": (q, k_cmp, v_cmp, *compressed, 0.0),
        "selected_attention_fwd": (q, k, v, *selected),
        "window_attention_fwd": (q, k, v, *blocks, 8, 0.0),
        "gate_fwd": (*(leaf(TOTAL, 4, 8, seed=i) for i in (7, 8, 9)), logits, 0),
        "native_sparse_attention_fwd": (*native, None, *compressed, *native_tail),
        "build_block_index": (rows, *blocks, TOTAL, 16),
    }
    if requires_grad:
        return samples
    dout = randn(TOTAL, 4, 8, seed=10, **like)
    o, lse = ops.compressed_attention_fwd(*samples["compressed_attention_fwd"])
    samples["select_blocks"] = (q, k_cmp, lse, *compressed, 16, 3, 1, 2, 0.0, 0, 0)
    samples["compress_kv_bwd"] = (torch.randn_like(k_cmp), k, cu, cu_cmp, *compress[1:])
    samples["compressed_attention_bwd"] = (
        *(dout, torch.randn_like(lse), q, k_cmp, v_cmp, o, lse),
        *(*compressed, 0.0),
    )
    for name in ("selected_attention", "window_attention"):
        args = samples[f"{name}_fwd"]
        o, lse = getattr(ops, f"{name}_fwd")(*args)
        samples[f"{name}_bwd"] = (dout, None, q, k, v, o, lse, *args[3:])
    samples["selected_attention_fwd_out"] = (q, k, v, *selected, torch.empty_like(o), lse.clone())
    samples["gate_bwd"] = (dout, *samples["gate_fwd"])
    _, found, *branches = ops.native_sparse_attention_fwd(*samples["native_sparse_attention_fwd"])
    samples["native_sparse_attention_bwd"] = (
        *(dout, *native, found, *branches, *compressed),
        *(16, 3, 8, 0.0, 0, 1 << 20),
    )
    return samples


NAMES = sorted(operator_samples(False))
DIFFERENTIABLE = [f"{name}_fwd" for name in OPERATORS]


def test_every_operator_has_a_sample():
    registered = {
        schema.name.removeprefix("fsattn::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fsattn::")
    }
    assert registered == set(NAMES) | set(PAGED_OPERATORS)  # those: test_paged.py


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    """Schema, shapes of the fake kernel, autograd registration, tracing with symbolic sizes."""
    torch.library.opcheck(getattr(torch.ops.fsattn, name).default, operator_samples(False)[name])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name):
    args = operator_samples(True)[name]
    torch.library.opcheck(getattr(torch.ops.fsattn, name).default, args)


GRADCHECKS = {
    **{op: (op, {}) for op in OPERATORS},
    **{f"compress_kv {k}": ("compress_kv", {"kind": k}) for k in ("weighted", "softmax", "linear")},
    "gate of values, one a token": ("gate", {"gate_per_head": False, "activation": None}),
    "nsa, one gate a token": ("native_sparse_attention", {"gate_per_head": False}),
}


@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck(case):
    """fp64, every input and every output, lse with its -inf rows left out."""
    op, changes = GRADCHECKS[case]
    built = OPERATORS[op](replace(TINY, **changes), torch.float64)
    seen = [x.isfinite() for x in built.ours(*built.inputs)]

    def finite(*inputs):
        # A row without keys has lse = -inf, whose differences are not numbers.
        return tuple(o[keep] for o, keep in zip(built.ours(*inputs), seen, strict=True))

    leaves = [x.detach().requires_grad_() for x in built.inputs]
    assert torch.autograd.gradcheck(finite, leaves, fast_mode=True, atol=1e-6, rtol=1e-4)


def test_gradcheck_of_lse_through_offsets_and_scale():
    shape = replace(TINY, lens_q=[4, 3], lens_k=[9, 6], q_offset=[2, 3], softmax_scale=0.7)
    for op in ("window_attention", "selected_attention"):
        built = OPERATORS[op](shape, torch.float64)
        leaves = [x.detach().requires_grad_() for x in built.inputs]
        keep = built.ours(*built.inputs)[1].isfinite()
        run = built.ours
        assert torch.autograd.gradcheck(
            lambda *x, r=run, m=keep: r(*x)[1][m], leaves, fast_mode=True
        )


@pytest.mark.parametrize("op", OPERATORS)
def test_compile_fullgraph(op):
    """One graph, forward and backward, with the bits of eager execution."""
    built = OPERATORS[op](replace(TINY, dim=16, dim_v=16), torch.float32)
    douts = built.douts(torch.float32, "cpu")
    want_outs, want_grads = built.found(douts)
    built.ours = torch.compile(built.ours, fullgraph=True, backend="aot_eager")
    outs, grads = built.found(douts)
    for name, a, b in zip(built.outputs, outs, want_outs, strict=True):
        assert_same_bits(name, a, b)
    for name, a, b in zip(built.names, grads, want_grads, strict=True):
        assert_same_bits(f"d{name}", a, b)


def test_compile_with_changing_lengths():
    """A second and third length, by then symbolic, do not break the graph."""

    def step(q, k, v, cu):
        o, lse = fsattn.window_attention(q * 2, k, v, cu, window_size=8, return_lse=True)
        return o.sin(), lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for total in (40, 57, 64):
        q = randn(total, 4, 16, dtype=torch.float32).requires_grad_()
        k, v = (randn(total, 2, 16, dtype=torch.float32, seed=s) for s in (1, 2))
        cu = cu_seqlens([total - 10, 10])
        (want,) = torch.autograd.grad(step(q, k, v, cu)[0].sum(), [q])
        (grad,) = torch.autograd.grad(compiled(q, k, v, cu)[0].sum(), [q])
        assert_same_bits("dq", grad, want)


def test_compile_with_inductor():
    """The default backend, forward and backward."""
    built = OPERATORS["selected_attention"](replace(TINY, dim=16, dim_v=16), torch.float32)
    douts = built.douts(torch.float32, "cpu")
    want = built.found(douts)
    built.ours = torch.compile(built.ours, fullgraph=True)
    for a, b in zip(built.found(douts), want, strict=True):
        for found, eager in zip(a, b, strict=True):
            assert_same_bits("compiled", found, eager)


def test_compile_the_whole_call():
    """Compression, selection with its data-dependent blocks, and every branch in one graph."""
    q, k, v = (randn(2, 48, h, 16, dtype=torch.float32, seed=h) for h in (4, 2, 1))
    v = v.expand(2, 48, 2, 16).contiguous().requires_grad_()
    gates = randn(2, 48, 3, dtype=torch.float32)
    sizes = {"kernel_size": 16, "kernel_stride": 8}

    def layer(q, k, v):
        k_cmp, _ = fsattn.compress_kv(k, **sizes)
        v_cmp, _ = fsattn.compress_kv(v, **sizes)
        return fsattn.native_sparse_attention(
            q, k, v, k_cmp, v_cmp, gates, **sizes, block_size=16, topk=3, window_size=9
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits("o", compiled(q, k, v).detach(), layer(q, k, v).detach())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_checkpoint(op, reentrant):
    built = OPERATORS[op](TINY, torch.float32)
    douts = built.douts(torch.float32, "cpu")
    _, want = built.found(douts)
    leaves = [x.detach().requires_grad_() for x in built.inputs]
    outs = checkpoint(built.ours, *leaves, use_reentrant=reentrant)
    torch.autograd.backward(outs, douts)
    for name, x, b in zip(built.names, leaves, want, strict=True):
        assert_same_bits(f"d{name}", x.grad, b)


@pytest.mark.parametrize("op", OPERATORS)
def test_vmap_is_refused(op):
    built = OPERATORS[op](TINY, torch.float32)
    stacked = [torch.stack([x, x]) for x in built.inputs]
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(built.ours)(*stacked)


@pytest.mark.parametrize("op", OPERATORS)
def test_second_derivatives_are_refused(op):
    built = OPERATORS[op](TINY, torch.float64)
    leaves = [x.detach().requires_grad_() for x in built.inputs]
    out = built.ours(*leaves)[0].square().sum()
    grads = torch.autograd.grad(out, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        sum(g.sum() for g in grads).backward()


@pytest.mark.parametrize("op", OPERATORS)
def test_nothing_is_saved_without_gradients(op):
    built = OPERATORS[op](TINY, torch.float32)
    saved = []

    def pack(x):
        saved.append(x)
        return x

    leaves = [x.detach().requires_grad_() for x in built.inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.no_grad():
            outs = built.ours(*leaves)
        assert not saved and all(o.grad_fn is None for o in outs)
        built.ours(*built.inputs)
        assert not saved
        built.ours(*leaves)
        assert saved


@pytest.mark.parametrize("op", OPERATORS)
def test_cpu_autocast_changes_nothing(op):
    built = OPERATORS[op](TINY, torch.float32)
    want = built.ours(*built.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = built.ours(*built.inputs)
    for name, a, b in zip(built.outputs, found, want, strict=True):
        assert_same_bits(name, a, b)


def _layouts(dout):
    """The same gradient as a transposed view, a misaligned slice and, if constant, expanded."""
    flipped = dout.transpose(0, -1).contiguous().transpose(0, -1)
    wide = dout.new_full((*dout.shape[:-1], dout.shape[-1] + 3), float("nan"))
    slice_ = wide[..., 1:-2]
    slice_.copy_(dout)
    return {"transposed": flipped, "misaligned slice": slice_}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPERATORS)
def test_gradients_arrive_in_any_layout(op, device):
    """Autograd chooses the strides of dO: every layout gives the same bits."""
    built = OPERATORS[op](TINY, torch.bfloat16, device)
    douts = built.douts(torch.bfloat16, device)
    _, want = built.found(douts)
    for layout in ("transposed", "misaligned slice"):
        _, found = built.found([_layouts(d)[layout] for d in douts])
        for name, a, b in zip(built.names, found, want, strict=True):
            assert_same_bits(f"d{name} of a {layout} gradient", a, b)
    _, ones = built.found([torch.ones_like(d) for d in douts])
    _, expanded = built.found([d.new_ones(()).expand(d.shape) for d in douts])
    for name, a, b in zip(built.names, expanded, ones, strict=True):
        assert_same_bits(f"d{name} of an expanded gradient", a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPERATORS)
def test_backward_twice(op, device):
    """What the forward saved survives a backward: the second one gives the same bits."""
    built = OPERATORS[op](TINY, torch.bfloat16, device)
    leaves = [x.detach().requires_grad_() for x in built.inputs]
    outs, douts = built.ours(*leaves), built.douts(torch.bfloat16, device)
    first = torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    for name, a, b in zip(
        built.names, first, torch.autograd.grad(outs, leaves, douts), strict=True
    ):
        assert_same_bits(f"d{name}", a, b)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32]))
@pytest.mark.parametrize("op", OPERATORS)
def test_empty(op, device, dtype):
    """No sequence at all, and only empty ones: empty results and empty gradients."""
    for lens in ([], [0, 0]):
        brought = op == "selected_attention"
        extra = {"topk_idx": torch.empty(2, 0, 2, dtype=torch.int32)} if brought else {}
        built = OPERATORS[op](replace(TINY, lens_q=lens, lens_k=lens), dtype, device, **extra)
        leaves = [x.detach().requires_grad_() for x in built.inputs]
        outs = built.ours(*leaves)
        assert all(o.numel() == 0 for o in outs)
        sum(o.sum() for o in outs).backward()
        assert all(x.grad is not None and not x.grad.any() for x in leaves)


def test_integer_results_carry_no_gradient():
    """Selection and index of leaves that require gradients: no graph and no warning."""
    q = randn(40, 4, 16, dtype=torch.float32).requires_grad_()
    k = randn(40, 2, 16, dtype=torch.float32).requires_grad_()
    cu = cu_seqlens([40])
    sizes = {"kernel_size": 16, "kernel_stride": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k_cmp, cu_cmp = fsattn.compress_kv(k, cu, **sizes)
        _, lse = fsattn.compressed_attention(
            q, k_cmp, k_cmp, cu, cu, cu_cmp, **sizes, return_lse=True
        )
        rows = fsattn.select_blocks(q, k_cmp, lse, cu, cu, cu_cmp, **sizes, block_size=16, topk=3)
        index = fsattn.build_block_index(rows, cu, cu, block_size=16)
    assert not any(x.requires_grad for x in (rows, cu_cmp, *index))


def test_native_lse_is_detached():
    """The fused call has no backward for lse, so what it returns says so."""
    built = OPERATORS["native_sparse_attention"](TINY, torch.float32)
    leaves = [x.detach().requires_grad_() for x in built.inputs]
    cu, cu_cmp = TINY.cu()[0], TINY.cu_cmp()
    o, lses = fsattn.native_sparse_attention(
        *leaves, cu, cu, cu_cmp, kernel_size=4, kernel_stride=2, block_size=16, topk=3,
        window_size=3, return_lse=True,
    )  # fmt: skip
    assert o.requires_grad and not any(lse.requires_grad for lse in lses)


def test_batched_call_after_inference_mode():
    """What a batched call keeps for the next one of its shape may not be an inference tensor."""
    q, k = (randn(2, 20, heads, 16, seed=heads, dtype=torch.float32) for heads in (4, 2))
    with torch.inference_mode():
        expected = fsattn.window_attention(q, k, k, window_size=3)
    leaf = q.requires_grad_()
    o = fsattn.window_attention(leaf, k, k, window_size=3)
    o.sum().backward()
    assert torch.equal(o, expected) and leaf.grad.any()


def test_derivative_of_a_function_transform():
    """torch.func does not go through the Functions of eager calls; it is refused as PyTorch does."""
    q, k = (randn(20, heads, 16, seed=heads, dtype=torch.float32) for heads in (4, 2))
    cu = cu_seqlens([20])
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: fsattn.window_attention(x, k, k, cu, window_size=3).sum())(q)
