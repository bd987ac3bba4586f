"""The Python surface: [B, T, H, D] tensors, optional results, unusual but valid arguments."""

import pytest
import torch
from cases import OPERATORS, Shape, nsa_case, selected_case, window_case
from support import (
    DEVICES,
    assert_same_bits,
    cu_seqlens,
    device_types,
    randn,
    random_topk_idx,
)

import fsattn

BATCH, TOKENS = 3, 70
SHAPE = Shape(lens_q=[TOKENS] * BATCH, dim=16, dim_v=24, group=3)
SIZES = {"kernel_size": 32, "kernel_stride": 16}
WINDOWS = 3  # (70 - 32) // 16 + 1


def _four(x, rows=TOKENS):
    return x.unflatten(0, (BATCH, rows))


def _four_cmp(x):
    """The windows of every sequence, [B, C, H, D], from packed rows without gaps."""
    return x[: BATCH * WINDOWS].unflatten(0, (BATCH, WINDOWS))


def _four_heads(x):
    """[H, B * T, ...] -> [B, H, T, ...]."""
    return x.unflatten(1, (BATCH, TOKENS)).transpose(0, 1).contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_batched_compress_kv(device):
    x = randn(BATCH * TOKENS, 2, 16, dtype=torch.bfloat16, device=device)
    pos_emb = randn(2, 32, 16, dtype=torch.bfloat16, device=device, seed=1)
    packed, cu = fsattn.compress_kv(x, SHAPE.cu(device)[0], pos_emb=pos_emb, **SIZES)
    batched, cu4 = fsattn.compress_kv(_four(x), pos_emb=pos_emb, **SIZES)
    assert torch.equal(cu, cu4)
    assert_same_bits("x_cmp", batched.contiguous(), _four_cmp(packed).contiguous())


@pytest.mark.parametrize("device", DEVICES)
def test_batched_attention(device):
    """compressed_attention, select_blocks, window_attention and build_block_index."""
    case = OPERATORS["compressed_attention"](SHAPE, torch.bfloat16, device)
    q, k_cmp, v_cmp = case.inputs
    o, lse = case.ours(q, k_cmp, v_cmp)
    four = (_four(q), _four_cmp(k_cmp), _four_cmp(v_cmp))
    o4, lse4 = fsattn.compressed_attention(*four, return_lse=True, max_seqlen_k=TOKENS, **SIZES)
    assert_same_bits("o", o4, _four(o))
    assert_same_bits("lse", lse4, _four_heads(lse))

    rule = {"block_size": 16, "topk": 3, "local_blocks": 1}
    cus = (*SHAPE.cu(device), SHAPE.cu_cmp(device))
    ids = fsattn.select_blocks(q, k_cmp, lse, *cus, **SIZES, **rule)
    ids4 = fsattn.select_blocks(*four[:2], lse4, max_seqlen_k=TOKENS, **SIZES, **rule)
    assert_same_bits("topk_idx", ids4, _four_heads(ids))

    index = fsattn.build_block_index(ids, *SHAPE.cu(device), block_size=16)
    index4 = fsattn.build_block_index(ids4, block_size=16)
    assert torch.equal(index.start, index4.start)

    case = window_case(SHAPE, torch.bfloat16, device)
    o, lse = case.ours(*case.inputs)
    four = [_four(x) for x in case.inputs]
    o4, lse4 = fsattn.window_attention(*four, window_size=SHAPE.window_size, return_lse=True)
    assert_same_bits("o", o4, _four(o))
    assert_same_bits("lse", lse4, _four_heads(lse))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["gate", "native_sparse_attention"])
def test_batched_gate_and_native(op, device):
    """Gradients too: they come back in the layout of the inputs."""
    case = OPERATORS[op](SHAPE, torch.bfloat16, device)
    douts = case.douts(torch.bfloat16, device)
    outs, grads = case.found(douts)
    case.inputs = [
        _four_cmp(x) if pack == "cmp" else _four(x)
        for x, pack in zip(case.inputs, case.pack, strict=True)
    ]
    options = {"block_size": 16, "topk": 3, "local_blocks": 1, "window_size": SHAPE.window_size}

    def ours(*tensors):
        if op == "gate":
            return (fsattn.gate(*tensors),)
        return (fsattn.native_sparse_attention(*tensors, **SIZES, **options),)

    case.ours = ours
    outs4, grads4 = case.found([_four(x) for x in douts])
    assert_same_bits("o", outs4[0], _four(outs[0]))
    for name, pack, a, b in zip(case.names, case.pack, grads4, grads, strict=True):
        want = _four_cmp(b) if pack == "cmp" else _four(b)
        assert_same_bits(f"d{name}", a.contiguous(), want.contiguous())


@pytest.mark.parametrize("device", DEVICES)
def test_native_returns_its_selection_and_lse(device):
    """return_topk_idx and return_lse agree with the single operators; topk_idx= replaces them."""
    case = nsa_case(SHAPE, torch.bfloat16, device)
    q, k, v, k_cmp, v_cmp, _ = case.inputs
    cus = (*SHAPE.cu(device), SHAPE.cu_cmp(device))
    rule = {"block_size": 16, "topk": 3, "local_blocks": 1}
    window = {"window_size": SHAPE.window_size}
    o, ids, lses = fsattn.native_sparse_attention(
        *case.inputs, *cus, **SIZES, **rule, **window, return_topk_idx=True, return_lse=True
    )
    _, lse_cmp = fsattn.compressed_attention(q, k_cmp, v_cmp, *cus, return_lse=True, **SIZES)
    _, lse_win = fsattn.window_attention(q, k, v, *cus[:2], return_lse=True, **window)
    _, lse_sel = fsattn.selected_attention(q, k, v, ids, *cus[:2], block_size=16, return_lse=True)
    for name, a, b in zip(("cmp", "sel", "win"), lses, (lse_cmp, lse_sel, lse_win), strict=True):
        assert (a - b)[b > -torch.inf].abs().max() < 1e-5, name
    assert torch.equal(ids, fsattn.select_blocks(q, k_cmp, lse_cmp, *cus, **SIZES, **rule))
    given = {**rule, "topk": 1, "local_blocks": 0}
    again = fsattn.native_sparse_attention(
        *case.inputs, *cus, **SIZES, **given, **window, topk_idx=ids
    )
    assert_same_bits("o", again, o)


def test_second_sequence_of_keys_defaults_to_the_first():
    """cu_seqlens_k defaults to cu_seqlens_q when there are as many keys as queries."""
    case = window_case(SHAPE, torch.float32)
    cu = SHAPE.cu()[0]
    short = fsattn.window_attention(*case.inputs, cu, window_size=SHAPE.window_size)
    assert_same_bits("o", short, case.ours(*case.inputs)[0])


def test_strided_cu_seqlens():
    """cu_seqlens as every second element of a longer tensor: refused or right, never misread."""
    case = window_case(SHAPE, torch.float32)
    cu = SHAPE.cu()[0]
    strided = torch.stack([cu, torch.full_like(cu, 7)], 1)[:, 0]
    want = case.ours(*case.inputs)[0]
    try:
        o = fsattn.window_attention(*case.inputs, strided, strided, window_size=SHAPE.window_size)
    except ValueError as error:
        assert "cu_seqlens_q" in str(error)
    else:
        assert_same_bits("o", o, want)


def test_strided_out():
    """out= with gaps between its rows: the gaps stay as they were."""
    ids = random_topk_idx(2, SHAPE.lens_q, SHAPE.lens_k, 16, 3)
    case = selected_case(SHAPE, torch.float32, topk_idx=ids)
    want = case.ours(*case.inputs)[0]
    buffer = torch.full((want.shape[0], want.shape[1], 40), float("nan"))
    out = buffer[:, :, 8:32]
    fsattn.selected_attention(*case.inputs, ids, *SHAPE.cu(), block_size=16, out=out)
    assert_same_bits("out", out.contiguous(), want)
    assert buffer[:, :, :8].isnan().all() and buffer[:, :, 32:].isnan().all()


def test_double_backward_is_refused():
    """Second derivatives are not implemented: an error, never a silent zero."""
    case = window_case(Shape(lens_q=[20], dim=8, dim_v=8), torch.float64)
    q, k, v = (x.requires_grad_() for x in case.inputs)
    o, _ = case.ours(q, k, v)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(dq.square().sum(), k)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32]))
@pytest.mark.parametrize("cap", [0, 1, 2**12, 2**40])
def test_workspace_cap_changes_no_bits(cap, device, dtype):
    """Any cap is either served with the same bits or refused by name."""
    ids = random_topk_idx(2, SHAPE.lens_q, SHAPE.lens_k, 16, 3).to(device)
    case = selected_case(SHAPE, dtype, device, topk_idx=ids)
    want = case.ours(*case.inputs)[0]
    try:
        o = fsattn.selected_attention(
            *case.inputs, ids, *SHAPE.cu(device), block_size=16, workspace_cap=cap
        )
    except (ValueError, NotImplementedError) as error:
        assert "workspace_cap" in str(error) and str(cap) in str(error)
    else:
        assert_same_bits("o", o, want)


def test_no_grad_and_inference_mode():
    case = window_case(SHAPE, torch.float32)
    want = case.ours(*case.inputs)[0]
    for x in case.inputs:
        x.requires_grad_()
    with torch.no_grad():
        assert not case.ours(*case.inputs)[0].requires_grad
    with torch.inference_mode():
        assert_same_bits("o", case.ours(*case.inputs)[0], want)


def test_a_single_cu_seqlens_serves_many_calls():
    """Nothing is cached by the identity of a tensor: new contents give a new result."""
    x = randn(40, 1, 8, dtype=torch.float32)
    cu = cu_seqlens([40])
    cu2 = cu_seqlens([20, 20])
    one = fsattn.window_attention(x, x, x, cu, cu, window_size=40)
    two = fsattn.window_attention(x, x, x, cu2, cu2, window_size=40)
    same = torch.tensor([0, 20, 40], dtype=torch.int32)
    pair = fsattn.window_attention(x, x, x, same, same, window_size=40)
    assert_same_bits("o", two, pair)
    assert_same_bits("o", two[:20], one[:20])
    assert not torch.equal(two[20:], one[20:])
    same[1] = 30
    moved = fsattn.window_attention(x, x, x, same, same, window_size=40)
    assert_same_bits("o", moved[20:30], one[20:30])
