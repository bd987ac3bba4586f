"""Inputs that break kernels on a GPU: popular blocks, tiny sequences, huge logits, dirty memory."""

import gc

import pytest
import torch
from cases import OPERATORS, Shape, check_case
from cuda_support import (
    CALLS,
    DEVICE,
    NEEDS_CUDA,
    WINDOWS,
    Sizes,
    assert_same_results,
    device_randn,
    forward_backward,
    make_douts,
)
from reference.attention import (
    compressed_mask,
    masked_attention,
    selected_mask,
    window_mask,
)
from support import CUDA_TYPES, assert_same_bits, check, name_of

import fsattn

pytestmark = NEEDS_CUDA
TYPES = pytest.mark.parametrize("dtype", CUDA_TYPES, ids=name_of)


def _masked(call, mask, dtype, douts):
    leaves = [x.detach().to(dtype).requires_grad_() for x in call.inputs]
    outputs = masked_attention(*leaves, mask, leaves[0].shape[-1] ** -0.5)
    gradients = torch.autograd.grad(outputs, leaves, [d.to(dtype) for d in douts])
    return [o.detach() for o in outputs], gradients


@TYPES
def test_a_block_that_all_select_and_blocks_that_none_selects(dtype):
    """Block 0 has every query, blocks in between have none: their gradients are zero."""
    sizes = Sizes([3000], heads_q=4, heads_kv=1, topk=3, dtype=dtype)
    own = sizes.positions() // sizes.block_size
    ids = torch.stack([torch.zeros_like(own), own, torch.full_like(own, -1)], 1)[None].int()
    # Only queries of the first and the last blocks have their own one: the rest is never selected.
    is_lonely = (own > 3) & (own < 40)
    ids[0, is_lonely, 1] = -1
    call = CALLS["selected_attention"](sizes, 1, topk_idx=ids)
    with torch.no_grad():
        douts = make_douts(call.run(*call.inputs))
    outputs, gradients = forward_backward(call, douts)
    with torch.device(DEVICE):
        mask = selected_mask(ids, sizes.positions(), sizes.total, sizes.block_size)
    truth, true_gradients = _masked(call, mask, torch.float64, douts)
    same, same_gradients = _masked(call, mask, dtype, douts)
    lse = _masked(call, mask, torch.float32, douts)[0][1]
    for i, triple in enumerate(zip(outputs, truth, (same[0], lse), strict=True)):
        check(f"output {i}", *triple)
    for name, *triple in zip("qkv", gradients, true_gradients, same_gradients, strict=True):
        check(f"d{name}", *triple)
    for gradient in gradients[1:]:
        assert not gradient[4 * sizes.block_size : 40 * sizes.block_size].any()


MIXED = [1, 300, 2, 3, 131, 6, 7, 11, 1, 64, 65]


@TYPES
@pytest.mark.parametrize("op", OPERATORS)
def test_tiny_sequences_among_long_ones(op, dtype):
    shape = Shape(lens_q=MIXED, dim=64, dim_v=64, block_size=64, topk=2, window_size=40)
    check_case(OPERATORS[op](shape, dtype, DEVICE), dtype, DEVICE)


@TYPES
@pytest.mark.parametrize("op", CALLS)
def test_tiny_sequences_get_their_own_bits(op, dtype):
    """Each sequence as if it were alone; compressed rows lie elsewhere, so only those of tokens."""
    sizes = Sizes([1, 2, 3, 6, 7, 11, 200], dtype=dtype, topk=2)
    others = Sizes([700, 1, *sizes.lens, 90], dtype=dtype, topk=2)
    alone, packed = (CALLS[op](s, 3) for s in (sizes, others))
    tokens, windows = slice(701, 701 + sizes.total), slice(42, 42 + 11)
    for mine, all_of_them, of in zip(alone.inputs, packed.inputs, alone.of_inputs, strict=True):
        of_packed = windows if of == "cmp" else tokens
        all_of_them[of_packed] = mine[: of_packed.stop - of_packed.start]
    if "topk_idx" in alone.extras:
        packed.extras["topk_idx"][:, tokens] = alone.extras["topk_idx"]
    with torch.no_grad():
        douts, more = (
            make_douts(c.run(*c.inputs)) if not c.is_ranking else None for c in (alone, packed)
        )
    for d, m, of in zip(douts or [], more or [], alone.of_outputs, strict=False):
        if of == "cmp":
            m[windows] = d[:11]
        else:
            m[(slice(None), tokens) if of == "h" else tokens] = d
    want, found = forward_backward(alone, douts), forward_backward(packed, more)
    names = [alone.of_outputs, alone.of_inputs]
    for kind, mine, theirs in zip(names, found, want, strict=True):
        for of, a, b in zip(kind, mine, theirs, strict=False):
            a = a[windows] if of == "cmp" else a[:, tokens] if of == "h" else a[tokens]
            assert_same_bits(f"{op}, {of}", a, b[:11] if of == "cmp" else b)


def _softmax_operators():
    return [op for op in OPERATORS if op not in ("compress_kv", "gate")]


@TYPES
@pytest.mark.parametrize("op", _softmax_operators())
def test_logits_beyond_the_range_of_exp(op, dtype):
    """Logits of about +-100 and more: exp overflows fp16 at 11 and fp32 at 88."""
    shape = Shape(lens_q=[150, 70], dim=64, dim_v=64, block_size=64, topk=2, scale=6.0)
    check_case(OPERATORS[op](shape, dtype, DEVICE), dtype, DEVICE)


LARGEST = {torch.bfloat16: (10_000, torch.inf), torch.float16: (14_000, 60_000)}


def _mask(op, sizes, call):
    """[Hkv or 1, queries, keys] of one sequence."""
    positions = sizes.positions()
    with torch.device(DEVICE):
        if op == "compressed_attention":
            return compressed_mask(positions, call.inputs[1].shape[0], *WINDOWS.values())
        if op == "selected_attention":
            ids = call.extras["topk_idx"]
            return selected_mask(ids, positions, sizes.total, sizes.block_size)
        return window_mask(positions, sizes.total, sizes.window_size)


def _has_clear_winner(q, k, mask):
    """[queries, heads]: the best logit leads by more than what fp32 sums of its size resolve."""
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    mask = mask.expand(k.shape[1], -1, -1).repeat_interleave(group, 0)
    best, second = torch.where(mask, s, -torch.inf).topk(2, -1).values.unbind(-1)
    return (best - second > 1e-5 * best.abs()).T


@TYPES
@pytest.mark.parametrize("dim", [64, 128])
def test_logits_near_the_largest_number(dtype, dim):
    """Logits of 1e9: the best key takes it all; nothing overflows, gradients are finite.

    A unit in the last place of such a logit is worth 64, so P of the backward, from a logit that
    was added up in another order, may be anything from 0 to 1, but no more. All of dlse at once
    would be too much for dK in fp16, rightly.
    """
    scale, largest = LARGEST[dtype]
    sizes = Sizes([400], dim=dim, dtype=dtype)
    for op in ("window_attention", "selected_attention", "compressed_attention"):
        call = CALLS[op](sizes, 5)
        call.inputs[:2] = [(x * scale).clamp(-largest, largest) for x in call.inputs[:2]]
        assert all(bool(x.isfinite().all()) for x in call.inputs)
        with torch.no_grad():
            do, dlse = make_douts(call.run(*call.inputs))
        (o, lse), gradients = forward_backward(call, [do, dlse / 8])
        for name, x in zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True):
            assert bool(x.isfinite().all()), f"{op}: {name} is not finite"
        q, k, v = (x.double() for x in call.inputs)
        mask = _mask(op, sizes, call)
        truth, true_lse = masked_attention(q, k, v, mask, dim**-0.5)
        assert torch.equal(lse.isfinite(), true_lse.isfinite()) and float(true_lse.max()) > 2e8
        torch.testing.assert_close(
            lse.double(), true_lse, rtol=0, atol=1e-6 * float(true_lse.max())
        )
        clear = _has_clear_winner(q, k, mask)
        assert float(clear.float().mean()) > 0.9
        rounding = torch.finfo(dtype).eps * float(v.abs().max())
        error = torch.where(clear, (o.double() - truth).abs().amax(-1), 0)
        assert float(error.max()) <= rounding, op


# NaN as bf16, as fp16 and as fp32; as int32 far behind every block.
_POISON = 0x7FFF7FFF


def _poison_free_memory():
    """Fills what the caching allocator will hand out next."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Rests of segments that are in use, each of which fits best for a tensor of its size.
    segments = torch.cuda.memory_snapshot()
    sizes = [
        (block["size"], segment["segment_type"])
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    small = [min(size, 2**20) for size, kind in sizes if kind == "small"]
    # A fresh large segment, which is split as needed, and fresh ones for small tensors.
    wanted = [size for size, kind in sizes if kind == "large"] + small + [2**28] + [2**20] * 32
    held = [torch.full((n // 4,), _POISON, dtype=torch.int32, device=DEVICE) for n in wanted]
    torch.cuda.synchronize()
    del held


@TYPES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("op", CALLS)
def test_every_element_is_written(op, dim, dtype):
    """Outputs and workspace come from memory full of NaN; the results do not change."""
    sizes = Sizes([500, 1, 77, 0, 300], dim=dim, dtype=dtype)
    call = CALLS[op](sizes, 2)
    douts = None
    if not call.is_ranking:
        with torch.no_grad():
            douts = make_douts(call.run(*call.inputs))
    want = forward_backward(call, douts)
    for _ in range(2):
        _poison_free_memory()
        probe = torch.empty(64, 64, device=DEVICE)
        assert probe.isnan().all(), "the poison is not where tensors are made"
        del probe
        found = forward_backward(call, douts)
        assert_same_results(op, found, want)
        assert not any(x.isnan().any() for x in [*found[0], *found[1]] if x.is_floating_point())


def test_build_block_index_writes_every_start():
    """Entries behind the last one used are free; starts and used entries are not."""
    sizes = Sizes([500, 1, 77, 0, 300])
    ids = sizes.causal_ids()
    args = (ids, sizes.cu(), sizes.cu())
    options = {"block_size": sizes.block_size, **sizes.longest()}
    want = fsattn.build_block_index(*args, **options)
    _poison_free_memory()
    found = fsattn.build_block_index(*args, **options)
    assert torch.equal(found.start, want.start)
    for head, used in enumerate(want.start[:, -1].tolist()):
        assert torch.equal(found.entry[head, :used], want.entry[head, :used])


@TYPES
def test_no_visible_key_at_all(dtype):
    """A selection of nothing: o = 0, lse = -inf, zero gradients, from dirty memory."""
    sizes = Sizes([200, 33], dtype=dtype)
    ids = torch.full((sizes.heads_kv, sizes.total, 4), -1, dtype=torch.int32, device=DEVICE)
    call = CALLS["selected_attention"](sizes, 2, topk_idx=ids)
    douts = [device_randn(sizes.total, 4, 64, dtype=dtype), torch.zeros(4, sizes.total).to(DEVICE)]
    _poison_free_memory()
    (o, lse), gradients = forward_backward(call, douts)
    assert not o.any() and bool((lse == -torch.inf).all())
    assert not any(x.any() for x in gradients)
