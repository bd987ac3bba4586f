"""selected_attention: rows are sets, bad ids are never followed, the index is optional, out=."""

import pytest
import reference
import torch
from cases import Shape, check_case, selected_case
from support import (
    DEVICES,
    INT_MAX,
    INT_MIN,
    assert_same_bits,
    check,
    convert,
    cu_seqlens,
    device_types,
    randn,
    random_topk_idx,
)

import fsattn

SHAPE = Shape(lens_q=[70, 0, 40, 1], dim=16, dim_v=24, group=3, block_size=16, topk=4)
IDS = random_topk_idx(2, SHAPE.lens_q, SHAPE.lens_k, 16, 4, seed=5, wild=False)


def _run(topk_idx, device="cpu", dtype=torch.bfloat16, shape=SHAPE):
    case = selected_case(shape, dtype, device, topk_idx=topk_idx)
    outs, grads = case.found(case.douts(dtype, device))
    return [*outs, *grads]


def _assert_equal_runs(a, b):
    for name, x, y in zip(["o", "lse", "dq", "dk", "dv"], a, b, strict=True):
        assert_same_bits(name, x, y)


def _first_occurrences(topk_idx):
    """Repeated ids replaced by -1."""
    rows = topk_idx.clone()
    for slot in range(1, rows.shape[-1]):
        repeated = (rows[..., :slot] == rows[..., slot : slot + 1]).any(-1)
        rows[..., slot][repeated] = -1
    return rows


@pytest.mark.parametrize("device", DEVICES)
def test_order_does_not_matter(device):
    """A row is a set: any order gives the definition's result."""
    unique = _first_occurrences(IDS)
    for rows in (unique, unique.flip(-1), unique.sort(-1).values, unique.roll(1, -1)):
        case = selected_case(SHAPE, torch.bfloat16, device, topk_idx=rows)
        check_case(case, torch.bfloat16, device)


def test_order_does_not_matter_fp64():
    unique = _first_occurrences(IDS)
    want = _run(unique, dtype=torch.float64)
    for rows in (unique.flip(-1), unique.sort(-1).values):
        for a, b in zip(want, _run(rows, dtype=torch.float64), strict=True):
            check("run", a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_count_once(device):
    _assert_equal_runs(_run(IDS, device), _run(_first_occurrences(IDS), device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [-1, -2, INT_MIN, 5, 6, 1000, INT_MAX, INT_MAX // 16 + 1])
def test_ids_outside_count_as_minus_one(bad, device):
    """70 keys are 5 blocks: id 5 is the first outside, also where another sequence follows."""
    clean = _first_occurrences(IDS)
    clean[..., 1] = -1
    dirty = clean.clone()
    dirty[..., 1] = bad
    _assert_equal_runs(_run(dirty, device), _run(clean, device))


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_after_the_query_are_empty(device):
    clean = _first_occurrences(IDS)
    positions = torch.cat([torch.arange(n) for n in SHAPE.lens_q])
    clean[clean > (positions // 16)[None, :, None]] = -1
    _assert_equal_runs(_run(clean, device), _run(_first_occurrences(IDS), device))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_rows(device):
    """No visible key: o = 0, lse = -inf, zero gradients, no NaN anywhere."""
    ids = IDS.clone()
    ids[:, 10:20] = -1
    ids[:, 20] = INT_MAX
    ids[:, 70] = 1  # after the first query of the second sequence
    o, lse, dq, dk, dv = _run(ids, device)
    for row in [*range(10, 21), 70]:
        assert (o[row] == 0).all() and (lse[:, row] == -torch.inf).all() and (dq[row] == 0).all()
    assert all(x.isfinite().all() for x in (o, dq, dk, dv))
    o, lse, dq, dk, dv = _run(torch.full_like(ids, -1), device)
    assert all((x == 0).all() for x in (o, dq, dk, dv)) and (lse == -torch.inf).all()


@pytest.mark.parametrize(("device", "dtype"), device_types())
def test_hot_block(device, dtype):
    """Every query wants block 0, and nothing else or one block more."""
    ids = torch.full((2, 200, 2), -1, dtype=torch.int32)
    ids[..., 0] = 0
    ids[:, ::3, 1] = 7
    shape = SHAPE.variant(lens_q=[200], topk=2, dim=64, dim_v=64)
    check_case(selected_case(shape, dtype, device, topk_idx=ids), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_block_index_passed_in(device):
    """The same bits with the caller's block index, forward and backward."""
    ids = random_topk_idx(2, SHAPE.lens_q, SHAPE.lens_k, 16, 4, seed=9).to(device)
    cu_q, cu_k = SHAPE.cu(device)
    index = fsattn.build_block_index(ids, cu_q, cu_k, block_size=16)
    results = []
    for block_index in (None, index):
        case = selected_case(SHAPE, torch.bfloat16, device, topk_idx=ids.cpu())

        def ours(q, k, v, given=block_index):
            return fsattn.selected_attention(
                q, k, v, ids, cu_q, cu_k, block_size=16, block_index=given, return_lse=True
            )

        case.ours = ours
        outs, grads = case.found(case.douts(torch.bfloat16, device))
        results.append([*outs, *grads])
    _assert_equal_runs(*results)


@pytest.mark.parametrize("device", DEVICES)
def test_out_is_written_completely(device):
    """out= holds NaN before; rows without a key become 0 too."""
    ids = IDS.clone()
    ids[:, 5:9] = -1
    case = selected_case(SHAPE, torch.bfloat16, device, topk_idx=ids)
    q, k, v = case.inputs
    want = case.ours(q, k, v)[0]
    out = torch.full_like(want, float("nan"))
    cu_q, cu_k = SHAPE.cu(device)
    back = fsattn.selected_attention(q, k, v, ids.to(device), cu_q, cu_k, block_size=16, out=out)
    assert back.data_ptr() == out.data_ptr()
    assert_same_bits("out", out, want)


def test_return_lse_false_returns_o_alone():
    case = selected_case(SHAPE, torch.float32, topk_idx=IDS)
    o = fsattn.selected_attention(*case.inputs, IDS, *SHAPE.cu(), block_size=16)
    assert isinstance(o, torch.Tensor)
    assert_same_bits("o", o, case.ours(*case.inputs)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_batched_layout(device):
    """[B, T, H, D] is the packed call with equal lengths; topk_idx and lse get a leading B."""
    batch, tokens = 3, 40
    shape = SHAPE.variant(lens_q=[tokens] * batch)
    ids = random_topk_idx(2, shape.lens_q, shape.lens_k, 16, 4, seed=3)
    case = selected_case(shape, torch.bfloat16, device, topk_idx=ids)
    want_o, want_lse = case.ours(*case.inputs)
    four = [x.unflatten(0, (batch, tokens)) for x in case.inputs]
    ids4 = ids.unflatten(1, (batch, tokens)).transpose(0, 1).contiguous().to(device)
    o, lse = fsattn.selected_attention(*four, ids4, block_size=16, return_lse=True)
    assert_same_bits("o", o, want_o.unflatten(0, (batch, tokens)))
    assert_same_bits(
        "lse", lse, want_lse.unflatten(1, (batch, tokens)).transpose(0, 1).contiguous()
    )


@pytest.mark.parametrize("device", DEVICES)
def test_strided_topk_idx(device):
    """topk_idx as a transposed and sliced view."""
    wide = torch.full((IDS.shape[1], 2, 9), 3, dtype=torch.int32, device=device)
    view = wide[:, :, 2:6].transpose(0, 1)
    view.copy_(IDS)
    case = selected_case(SHAPE, torch.bfloat16, device, topk_idx=IDS)
    results = [
        fsattn.selected_attention(*case.inputs, ids, *SHAPE.cu(device), block_size=16)
        for ids in (view, view.contiguous())
    ]
    assert_same_bits("o", *results)


@pytest.mark.parametrize("device", DEVICES)
def test_too_long_max_seqlen_changes_nothing(device):
    """max_seqlen is an upper bound."""
    case = selected_case(SHAPE, torch.bfloat16, device, topk_idx=IDS)
    ids, cus = IDS.to(device), SHAPE.cu(device)
    a, b = (
        fsattn.selected_attention(*case.inputs, ids, *cus, n, n, block_size=16) for n in (70, 111)
    )
    assert_same_bits("o", a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_equals_the_last_row(dtype, device):
    """One query against a cache is the last row of the whole sequence."""
    shape = SHAPE.variant(lens_q=[70])
    ids = random_topk_idx(2, [70], [70], 16, 4, seed=2, wild=False)
    case = selected_case(shape, dtype, device, topk_idx=ids)
    q, k, v = case.inputs
    o = case.ours(q, k, v)[0]
    cu_q, cu_k = cu_seqlens([1], device), cu_seqlens([70], device)
    last = fsattn.selected_attention(
        q[-1:], k, v, ids[:, -1:].to(device), cu_q, cu_k, block_size=16
    )
    truth, same = (
        reference.selected_attention(*convert(case.inputs, t), ids, [0, 70], [0, 70], block_size=16)
        for t in (torch.float64, dtype)
    )
    check("decode", last, truth[0][-1:], same[0][-1:], unit=truth[0].abs().max())
    check("prefill", o, truth[0], same[0])


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_at_all(device):
    """An empty batch and empty sequences only."""
    q, k, v = (
        randn(0, *x, dtype=torch.bfloat16, device=device) for x in ((2, 16), (1, 16), (1, 8))
    )
    ids = torch.zeros(1, 0, 2, dtype=torch.int32, device=device)
    for cu in ([0], [0, 0, 0]):
        cu = torch.tensor(cu, dtype=torch.int32, device=device)
        o, lse = fsattn.selected_attention(q, k, v, ids, cu, cu, block_size=16, return_lse=True)
        assert o.shape == (0, 2, 8) and lse.shape == (2, 0)
