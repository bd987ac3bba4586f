"""The layers: parameters, initialisation, data flow, gradients and errors."""

import itertools
import math

import pytest
import torch
from reference import compress_kv, native_sparse_attention
from support import DEVICES, assert_same_bits, cu_seqlens, randn

import fsattn
from fsattn.rope import RotaryEmbedding

SMALL = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "window_size": 12,
}
LENGTHS = [100, 0, 1, 7, 30]
KINDS = ["mean", "weighted", "softmax", "linear"]


def flash(dtype=torch.float64, *, hidden=24, hq=4, hkv=2, head_dim=16, **options):
    torch.manual_seed(0)
    return fsattn.FlashSparseAttention(
        hidden, hq, hkv, head_dim, 8, 4, 16, 4, 1, 2, 12, fsattn.RopeConfig(head_dim=head_dim),
        **options,
    ).to(dtype)  # fmt: skip


def general(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {**SMALL, "rope_config": fsattn.RopeConfig(head_dim=16), **options}
    return fsattn.NativeSparseAttention(24, 4, 2, 16, **options).to(dtype)


def batch(module, lengths=LENGTHS, dtype=torch.float64):
    cu = cu_seqlens(lengths)
    return randn(int(cu[-1]), module.hidden_size, dtype=dtype, seed=1), cu


# --- parameters and initialisation ---------------------------------------------------------------


def test_parameters_are_those_of_the_published_module():
    module = fsattn.FlashSparseAttention(
        96, 4, 2, 64, 32, 16, 64, 16, 1, 2, 512, fsattn.RopeConfig(head_dim=64)
    )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert list(shapes.items()) == [
        ("compress_key", (2, 32 * 64, 64)),
        ("compress_value", (2, 32 * 64, 64)),
        ("intra_block_pe", (2, 32, 64)),
        ("proj_q.weight", (256, 96)),
        ("proj_k.weight", (128, 96)),
        ("proj_v.weight", (128, 96)),
        ("proj_o.weight", (96, 256)),
        ("gate.0.weight", (3, 96)),
    ]
    assert list(module.state_dict()) == list(shapes)


def test_a_seed_gives_the_parameters_of_the_published_module():
    """The linear layers draw their default values first; then everything is drawn again."""
    torch.manual_seed(7)
    found = fsattn.FlashSparseAttention(
        24, 4, 2, 16, 8, 4, 16, 3, 1, 2, 12, fsattn.RopeConfig(head_dim=16)
    )
    torch.manual_seed(7)
    for out_features, in_features in [(64, 24), (32, 24), (32, 24), (24, 64), (3, 24)]:
        torch.nn.Linear(in_features, out_features, bias=False)
    for parameter in found.parameters():
        expected = torch.nn.init.xavier_uniform_(torch.empty(parameter.shape))
        assert_same_bits("parameter", parameter.detach(), expected)


def test_branches_of_separate_projections_are_drawn_like_single_ones():
    module = general(shared_kv=False)
    bound = math.sqrt(6 / (24 + 32))
    for part in module.proj_k.weight.detach().chunk(3):
        assert 0.9 * bound < part.abs().max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_the_compression(kind):
    module = general(compress=kind, head_dim_v=8)
    shapes = {
        "mean": (None, None),
        "weighted": ((2, 8), (2, 8)),
        "softmax": ((2, 8), (2, 8)),
        "linear": ((2, 128, 16), (2, 64, 8)),
    }[kind]
    weights = (module.compress_key, module.compress_value)
    assert tuple(None if w is None else tuple(w.shape) for w in weights) == shapes


# --- rotary embedding ----------------------------------------------------------------------------


def test_rotation_turns_pairs_of_the_two_halves_by_position_times_frequency():
    config = fsattn.RopeConfig(head_dim=8, rope_theta=100.0, rope_scaling=None)
    lengths, start, stride = [3, 0, 5], 2, 4
    x = randn(8, 2, 8)
    found = RotaryEmbedding(config).double()(x, cu_seqlens(lengths), start, stride)
    position = torch.tensor([i for n in lengths for i in range(n)]) * stride + start
    frequency = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(
        1j * position[:, None, None] * frequency
    )
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # inv_freq is rounded to fp32


def test_tables_are_rounded_to_the_dtype_of_x_and_the_rotation_is_not():
    rope = RotaryEmbedding(fsattn.RopeConfig(head_dim=8))
    cu, x = cu_seqlens([50]), randn(50, 1, 8, dtype=torch.bfloat16)
    cos, sin = rope.tables(cu, 50, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    x0, x1 = x.double().chunk(2, -1)
    exact = torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1)
    # One rounding: half a unit of the 8-bit significand; fp32 adds a little more.
    assert ((rope(x, cu).double() - exact).abs() <= exact.abs() * 2.01**-8 + 1e-6).all()


def test_llama3_frequencies():
    config = fsattn.RopeConfig()
    found = RotaryEmbedding(config).inv_freq
    for i, value in enumerate(found.tolist()):
        f = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected = f
        elif wavelength > 8192:
            expected = f / 8
        else:
            s = (8192 / wavelength - 1) / 3
            expected = (1 - s) * f / 8 + s * f
        assert value == pytest.approx(expected, rel=1e-5)


def test_linear_scaling_divides_the_frequencies():
    plain = RotaryEmbedding(fsattn.RopeConfig(head_dim=32, rope_scaling=None))
    config = fsattn.RopeConfig(head_dim=32, rope_scaling={"type": "linear", "factor": 4.0})
    torch.testing.assert_close(RotaryEmbedding(config).inv_freq * 4, plain.inv_freq)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_follow_the_module(dtype):
    module = flash(torch.float32)
    exact = module.rope.inv_freq.clone()
    assert "rope.inv_freq" not in module.state_dict()
    assert_same_bits("inv_freq", module.to(dtype).rope.inv_freq, exact.to(dtype))


# --- data flow -----------------------------------------------------------------------------------


def reference_forward(module, x, cu):
    """Section by section as the contract has it, with one K/V projection per branch if asked."""
    hq, hkv, d = module.num_q_heads, module.num_kv_heads, module.head_dim

    def heads(weight, n, dim):
        return (x @ weight.T).view(len(x), n, dim)

    def branch(weight, i, dim):
        return heads(weight if module.shared_kv else weight.chunk(3)[i], hkv, dim)

    def rotated(y, cu_y, stride=1):
        return y if module.rope is None else module.rope(y, torch.as_tensor(cu_y), 0, stride)

    dv = module.head_dim_v
    windows = {"kernel_size": module.kernel_size, "kernel_stride": module.kernel_stride}
    how = dict(kind=module.compress, **windows)
    k = [branch(module.proj_k.weight, i, d) for i in range(3)]
    v = [branch(module.proj_v.weight, i, dv) for i in range(3)]
    k_cmp, cu_cmp = compress_kv(
        k[0], cu, weight=module.compress_key, pos_emb=module.intra_block_pe, **how
    )
    v_cmp, _ = compress_kv(v[0], cu, weight=module.compress_value, **how)
    q = rotated(heads(module.proj_q.weight, hq, d), cu)
    k = [rotated(part, cu) for part in k]
    k_cmp = rotated(k_cmp, cu_cmp, module.kernel_stride)
    gates = (x @ module.gate[0].weight.T).view(len(x), -1, 3)
    ones = torch.eye(3, dtype=x.dtype).expand(len(x), 3, 3)
    o, topk_idx = 0, None
    # One branch at a time: a gate of one for it and of zero for the others.
    for i in range(3):
        part, topk_idx = native_sparse_attention(
            q, k[i], v[i], k_cmp, v_cmp, ones[:, i], cu, cu, cu_cmp, **windows,
            block_size=module.block_size, topk=module.topk, window_size=module.window_size,
            init_blocks=module.init_blocks, local_blocks=module.local_blocks, activation=None,
            group_reduce=module.group_reduce, softmax_scale=module.softmax_scale,
            topk_idx=topk_idx,
        )  # fmt: skip
        o = o + torch.sigmoid(gates[..., i : i + 1]) * part
    return o.reshape(len(x), -1) @ module.proj_o.weight.T, topk_idx


CHOICES = {
    "published": {"gate_per_head": False},
    "paper": {"shared_kv": False, "head_dim_v": 8},
    "no_rope": {"rope_config": None, "softmax_scale": 0.3},
    "max": {"group_reduce": "max", "local_blocks": 1, "init_blocks": 2},
    "mean": {"compress": "mean"},
    "weighted": {"compress": "weighted", "gate_per_head": False},
    "softmax": {"compress": "softmax"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_forward_and_backward_equal_the_definition(choice):
    module = general(**CHOICES[choice])
    x, cu = batch(module)
    dy = randn(*x.shape, seed=2)
    results = []
    for forward in (
        lambda x: module(x, cu, return_topk_idx=True),
        lambda x: reference_forward(module, x, cu),
    ):
        leaf = x.clone().requires_grad_()
        y, topk_idx = forward(leaf)
        module.zero_grad()
        y.backward(dy)
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        results.append((y.detach(), topk_idx, leaf.grad, grads))
    (y, idx, dx, grads), (y_ref, idx_ref, dx_ref, grads_ref) = results
    assert torch.equal(idx, idx_ref)
    torch.testing.assert_close(y, y_ref, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dx, dx_ref, rtol=1e-9, atol=1e-10)
    assert grads.keys() == grads_ref.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_ref[name], rtol=1e-9, atol=1e-10, msg=name)


def test_the_published_module_is_a_choice_of_the_general_one():
    published, same = flash(), general(gate_per_head=False)
    same.load_state_dict(published.state_dict())
    x, cu = batch(published)
    assert_same_bits("y", published(x, cu), same(x, cu))


def test_gradcheck():
    module = flash(hidden=6, hq=2, hkv=1, head_dim=8)
    x, cu = batch(module, [21, 9])
    _, topk_idx = module(x, cu, return_topk_idx=True)
    names, values = zip(*module.named_parameters())
    leaves = [v.detach().clone().requires_grad_() for v in (x, *values)]

    def forward(x, *parameters):
        call = dict(zip(names, parameters))
        return torch.func.functional_call(module, call, (x, cu), {"topk_idx": topk_idx})

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)


def test_a_sequence_does_not_see_its_neighbours():
    module = flash()
    x, cu = batch(module)
    together = module(x, cu)
    ends = cu.tolist()
    for start, end in itertools.pairwise(ends):
        alone = module(x[start:end], cu_seqlens([end - start]))
        torch.testing.assert_close(together[start:end], alone, rtol=1e-11, atol=1e-12)


def test_a_token_does_not_see_later_ones():
    module = flash()
    x, cu = batch(module, [64])
    changed = x.clone()
    changed[40:] += 1.0
    before, after = module(x, cu), module(changed, cu)
    torch.testing.assert_close(before[:40], after[:40], rtol=1e-11, atol=1e-12)
    assert (before[40:] - after[40:]).abs().amax(1).min() > 1e-3


def test_the_own_selection_given_back_changes_nothing_and_another_does():
    module = flash()
    x, cu = batch(module, [120])
    y, topk_idx = module(x, cu, return_topk_idx=True)
    assert_same_bits("y", y, module(x, cu, topk_idx=topk_idx))
    nothing = torch.full_like(topk_idx, -1)
    assert (module(x, cu, topk_idx=nothing) - y).abs().max() > 1e-3


def test_bounds_and_index_type_of_the_lengths_change_nothing():
    module = flash()
    x, cu = batch(module)
    y = module(x, cu)
    assert_same_bits("max_seqlen", y, module(x, cu, max(LENGTHS)))
    assert_same_bits("int64", y, module(x, cu.long()))


def test_selection_of_the_published_code_can_be_asked_for():
    x, cu = batch(flash(), [200])
    published = flash(group_reduce="first_head", score_dtype="bf16")
    _, by_first_head = published(x, cu, return_topk_idx=True)
    _, by_sum = flash()(x, cu, return_topk_idx=True)
    assert (by_first_head != by_sum).any()


# --- dtypes, autocast, checkpointing, compilation --------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    module, exact = flash(dtype), flash(dtype).double()
    x, cu = batch(module, dtype=dtype)
    y, topk_idx = module(x, cu, return_topk_idx=True)
    y.backward(torch.ones_like(y))
    expected = exact(x.double(), cu, topk_idx=topk_idx)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 6 * torch.finfo(dtype).eps * expected.norm()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


def test_autocast_computes_in_bf16_with_fp32_parameters():
    module = flash(torch.float32)
    x, cu = batch(module, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, cu)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


def test_checkpointing_gives_the_same_gradients():
    module = flash(torch.float32)
    x, cu = batch(module, dtype=torch.float32)
    grads = []
    for checkpointed in (False, True):
        module.zero_grad()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(module, x, cu, use_reentrant=False)
        else:
            y = module(x, cu)
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    for plain, again in zip(*grads):
        assert_same_bits("gradient", plain, again)


def test_compiles_without_a_graph_break():
    module = flash(torch.float32)
    x, cu = batch(module, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cu), module(x, cu))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_cuda_equals_the_definition_and_never_waits(device):
    module = flash(torch.bfloat16).to(device)
    exact = flash(torch.bfloat16).double()
    x, cu = batch(module, dtype=torch.bfloat16)
    x_device, cu_device = x.to(device).requires_grad_(), cu.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, topk_idx = module(x_device, cu_device, return_topk_idx=True)
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    leaf = x.double().requires_grad_()
    expected = exact(leaf, cu, topk_idx=topk_idx.cpu())
    expected.backward(torch.ones_like(expected))
    pairs = [(y, expected), (x_device.grad, leaf.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(module.parameters(), exact.parameters())]
    for found, truth in pairs:
        assert (found.cpu().double() - truth).norm() < 1e-2 * truth.norm()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compress": "median"}, "compress: must be one of .*found 'median'"),
        (
            {"rope_config": fsattn.RopeConfig(head_dim=64)},
            "head_dim must be .*16, found 64",
        ),
        (
            {"rope_config": fsattn.RopeConfig(head_dim=16, rope_scaling={"rope_type": "linear"})},
            "needs the keys factor, missing factor",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        general(**options)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of num_kv_heads, found 4 and 3"):
        fsattn.NativeSparseAttention(24, 4, 3, 16)


def test_unknown_rope_type_is_declined():
    config = fsattn.RopeConfig(head_dim=16, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(NotImplementedError, match="default, linear, llama3, found 'yarn'"):
        general(rope_config=config)


@pytest.mark.parametrize("shape", [(2, 5, 24), (5, 23)])
def test_shape_of_x(shape):
    with pytest.raises(ValueError, match=r"x: shape must be \[total, 24\], found"):
        flash()(torch.zeros(shape, dtype=torch.float64), cu_seqlens([5]))


@pytest.mark.parametrize(
    ("cu", "found"), [([0, 5], "list"), (torch.tensor([0.0, 5.0]), "torch.float32")]
)
def test_type_of_cu_seqlens(cu, found):
    with pytest.raises(TypeError, match=f"cu_seqlens: .*int64, found {found}"):
        flash()(torch.zeros(5, 24, dtype=torch.float64), cu)
