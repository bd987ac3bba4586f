"""The conformance checklist, line by line (numbers as in the specification's list).

1   compressed lengths; batches without any window   test_1_*
2   visible windows V(t); zero gradient before l - 1 test_2_*
3   weights from windows to blocks                   test_3_*
4   top-k form, ties, forced blocks                  test_4_*, test_select_blocks.py
5   group sizes and group modes                      test_5_*, test_select_blocks.py
6   selected attention                               test_6_*, test_selected_attention.py
7   window of min(t, w) + 1 keys                     test_7_*
8   offsets beyond 2^31                              test_8_*
9   the module, checkpoints, inv_freq                test_module*.py
10  decoding is the last row of a prefill            test_10_*
"""

import pytest
import reference
import torch
from cases import OPERATORS, Shape, check_case, nsa_case, selected_case
from selection import Selection
from support import DEVICES, check, convert, cu_seqlens, device_types, randn, random_topk_idx

import fsattn

SIZES = {"kernel_size": 32, "kernel_stride": 16}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("length", "count"),
    [
        (0, 0),
        (1, 0),
        (31, 0),
        (32, 1),
        (47, 1),
        (48, 2),
        (63, 2),
        (64, 3),
        (65, 3),
        (1000, 61),
        (4096, 255),
    ],
)
def test_1_compressed_length(length, count, device):
    x = randn(length, 2, 8, dtype=torch.bfloat16, device=device)
    x_cmp, cu = fsattn.compress_kv(x, cu_seqlens([length], device), **SIZES)
    assert cu.dtype == torch.int32 and cu.device == x.device and cu.tolist() == [0, count]
    assert x_cmp.shape == (length // 16, 2, 8) and (x_cmp[count:] == 0).all()
    if count:
        assert (x_cmp[:count] != 0).any()


def test_1_compressed_cu_seqlens_of_a_batch():
    lens = [0, 1, 31, 32, 47, 48, 63, 64, 65, 1000]
    x_cmp, cu = fsattn.compress_kv(randn(sum(lens), 1, 8), cu_seqlens(lens), **SIZES)
    assert cu.tolist() == [0, 0, 0, 0, 1, 2, 4, 6, 9, 12, 73]
    assert x_cmp.shape[0] == sum(lens) // 16 and (x_cmp[73:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_1_no_window_in_the_whole_batch(device):
    """All sequences shorter than l: o = 0, lse = -inf, selection {0 .. qb}."""
    lens = [31, 0, 7, 1]
    shape = Shape(lens_q=lens, block_size=16)
    case = OPERATORS["compressed_attention"](shape, torch.bfloat16, device)
    (o, lse), grads = case.found(case.douts(torch.bfloat16, device))
    assert (o == 0).all() and (lse == -torch.inf).all()
    assert all((g == 0).all() for g in grads)
    found, _ = Selection(lens, dtype=torch.bfloat16, device=device, block_size=16).check()
    assert found[0, 0].tolist() == [0, -1, -1, -1] and found[0, 30].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("device", DEVICES)
def test_2_visible_windows(device):
    """With equal keys exp(lse) counts what a query sees."""
    length = 200
    q = randn(length, 2, 8, dtype=torch.bfloat16, device=device)
    keys = torch.zeros(length // 16, 1, 8, dtype=torch.bfloat16, device=device)
    cu, cu_cmp = cu_seqlens([length], device), cu_seqlens([11], device)
    _, lse = fsattn.compressed_attention(q, keys, keys, cu, cu, cu_cmp, return_lse=True, **SIZES)
    seen = lse.exp().round().long().cpu()
    expected = [0 if t < 31 else (t - 31) // 16 + 1 for t in range(length)]
    assert seen[0].tolist() == expected and seen[1].tolist() == expected
    table = {30: 0, 31: 1, 46: 1, 47: 2, 63: 3, 64: 3, 127: 7}
    assert {t: int(seen[0, t]) for t in table} == table


@pytest.mark.parametrize(("device", "dtype"), device_types())
def test_2_no_gradient_before_the_first_window(device, dtype):
    shape = Shape(lens_q=[100, 40])
    case = OPERATORS["compressed_attention"](shape, dtype, device)
    (o, lse), (dq, _, _) = case.found(case.douts(dtype, device))
    for start in (0, 100):
        early = slice(start, start + 31)
        assert (o[early] == 0).all() and (dq[early] == 0).all()
        assert (lse[:, early] == -torch.inf).all()
        assert (dq[start + 32] != 0).any()


@pytest.mark.parametrize(
    ("kernel_size", "kernel_stride", "block_size"),
    [
        (32, 16, 64),
        (32, 16, 128),
        (64, 16, 64),
        (16, 16, 64),
        (32, 32, 64),
        (128, 32, 128),
        (32, 8, 64),
    ],
)
def test_3_weights_are_shared_tokens_over_stride(kernel_size, kernel_stride, block_size):
    """The weight of one window in each block decides the order of the blocks that it touches."""
    case = Selection(
        [block_size * 6 + 5],
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        topk=3,
        init_blocks=0,
        local_blocks=1,
        scale=4.0,
        seed=3,
    )
    case.check()
    # The table of the definition is the sum over tokens shared by window i and block b.
    for i in range(3 * block_size // kernel_stride):
        window = set(range(i * kernel_stride, i * kernel_stride + kernel_size))
        for b in range(4):
            shared = len(window & set(range(b * block_size, (b + 1) * block_size)))
            weight = reference.overlap_weight(i, b, kernel_size, kernel_stride, block_size)
            assert weight == shared / kernel_stride


@pytest.mark.parametrize("device", DEVICES)
def test_3_one_window_decides(device):
    """One window with all the mass: its blocks rank by the overlap 1 : 1 or 2 : 0."""
    for window, best in [(7, [1, 2]), (8, [2]), (3, [0, 1]), (11, [2, 3])]:
        case = Selection(
            [512],
            dtype=torch.bfloat16,
            device=device,
            topk=3,
            init_blocks=0,
            local_blocks=1,
            group=1,
        )
        case.q = torch.full_like(case.q, 4.0)
        case.k_cmp = torch.zeros_like(case.k_cmp)
        case.k_cmp[window] = 8.0
        row = case.check()[0][0, 511].tolist()
        assert set(best) <= set(row) and row[-1] == 7


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
def test_4_form_of_the_selection(device, dtype):
    """Mixed lengths, topk above the number of blocks: ascending, block 0 and qb present."""
    lens = [300, 1, 64, 65, 0, 33]
    found, _ = Selection(lens, dtype=dtype, device=device, topk=7).check()
    positions = torch.cat([torch.arange(n) for n in lens])
    assert (found[:, :, 0] == 0).all()
    assert (found == (positions // 64)[None, :, None]).any(-1).all()
    assert torch.equal((found >= 0).sum(-1)[0], (positions // 64 + 1).clamp(max=7))


@pytest.mark.parametrize("device", DEVICES)
def test_4_more_initial_blocks_than_there_are(device):
    """init_blocks = 2 at t < S: block 1 lies after the query and is not selected."""
    found, _ = Selection([130], dtype=torch.bfloat16, device=device, init_blocks=2, topk=4).check()
    assert found[0, 5].tolist() == [0, -1, -1, -1]
    assert found[0, 64].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("mode", ["sum", "first_head"])
def test_5_groups(group, mode):
    Selection([300], group=group, group_reduce=mode, heads_kv=2).check()


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
@pytest.mark.parametrize("size", [300.0, 1e4])
def test_6_large_logits(op, size, device, dtype):
    """Logits up to 1e4 stay finite, forward and backward."""
    _check_large(op, size, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
@pytest.mark.parametrize("size", [12.0, 60.0, 1e4])
def test_6_fp16_logit_gaps(op, size, device):
    """Gaps above 11 overflow a softmax that takes its reference elsewhere than from the row."""
    _check_large(op, size, device, torch.float16)


def _check_large(op, size, device, dtype):
    """o and lse as fp32 arithmetic on the same inputs gives them, rounded to dtype; all finite."""
    shape = Shape(lens_q=[80, 37], dim=64, dim_v=64, window_size=40)
    case = OPERATORS[op](shape, dtype, device)
    # The largest |q.k| / 8 of this case is near 4; scale q and k so that it becomes `size`.
    for i in (0, 1):
        case.inputs[i] = (case.inputs[i].float() * (size / 4) ** 0.5).to(dtype)
    q, k = (x.double().cpu() for x in case.inputs[:2])
    assert (
        torch.einsum("qhd,khd->hqk", q[:, :2], k[:, :1].expand(-1, 2, -1)) / 8
    ).abs().max() > size / 3
    douts = case.douts(dtype, device)
    outs, grads = case.found(douts)
    true_outs, true_grads = case.truth(douts)
    same_outs, same_grads = case.truth(douts, torch.float32)
    for name, *triple in zip(
        [*case.outputs, "dq", "dk", "dv"],
        [*outs, *grads],
        [*true_outs, *true_grads],
        [*same_outs, *same_grads],
        strict=True,
    ):
        found, truth, same = triple
        assert torch.equal(found.cpu().isinf(), truth.isinf()), f"{name} must be finite"
        assert not found.isnan().any()
        if name in ("o", "lse"):
            # A logit of this size is rounded by eps * size, which moves o by as much of v.
            slack = torch.finfo(torch.float32).eps * size * case.inputs[2].abs().max().item()
            same = same if name == "lse" else same.to(dtype)
            check(name, found, truth, same, slack=slack if name == "o" else 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_6_short_sequences(device):
    """The lengths that published kernels leave unwritten."""
    shape = Shape(lens_q=[1, 2, 3, 6, 7, 11], dim=64, dim_v=64, topk=2)
    ids = random_topk_idx(2, shape.lens_q, shape.lens_k, 16, 2, wild=False)
    check_case(selected_case(shape, torch.bfloat16, device, topk_idx=ids), torch.bfloat16, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32, torch.float16]))
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_6_head_dims(dim, device, dtype):
    shape = Shape(lens_q=[90], dim=dim, dim_v=dim, block_size=32)
    check_case(selected_case(shape, dtype, device), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_6_first_token_without_block_zero(device):
    """Token 0 selects nothing, and a first token with a huge logit is no reference for others."""
    shape = Shape(lens_q=[64], dim=64, dim_v=64, topk=2)
    ids = random_topk_idx(2, [64], [64], 16, 2, wild=False)
    ids[:, 0] = -1
    case = selected_case(shape, torch.float16, device, topk_idx=ids)
    case.inputs[0][0] *= 40
    check_case(case, torch.float16, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 1, 15, 16, 31, 512, 2**31 - 1])
def test_7_window_has_w_plus_one_keys(window, device):
    """With equal keys exp(lse) counts the keys: min(t, w) + 1."""
    length = 70
    q = randn(length, 2, 8, dtype=torch.bfloat16, device=device)
    keys = torch.zeros(length, 1, 8, dtype=torch.bfloat16, device=device)
    cu = cu_seqlens([length], device)
    _, lse = fsattn.window_attention(q, keys, keys, cu, cu, window_size=window, return_lse=True)
    expected = [min(t, window) + 1 for t in range(length)]
    assert lse.exp().round().long()[1].tolist() == expected


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("window", [0, 1, 16, 63, 64, 1000])
def test_7_window_sizes(window, device, dtype):
    shape = Shape(lens_q=[130, 1], window_size=window)
    check_case(OPERATORS["window_attention"](shape, dtype, device), dtype, device)


@pytest.mark.alone
@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skip(reason="needs 8 GiB and minutes on a CPU")),
        DEVICES[1],
    ],
)
@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
def test_8_more_than_2_to_31_elements(op, device):
    """Queries whose element offset exceeds 2^31 get the result of the same queries alone."""
    tokens, heads, dim = 280_000, 64, 128
    assert tokens * heads * dim > 2**31
    tail = 512
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(tokens, heads, dim, device=device, dtype=torch.bfloat16, generator=generator)
    k = torch.randn(tokens, 4, dim, device=device, dtype=torch.bfloat16, generator=generator)
    ids = torch.randint(0, tokens // 64, (4, tokens, 4), device=device, dtype=torch.int32)
    cu, cu_tail = cu_seqlens([tokens], device), cu_seqlens([tail], device)

    def call(queries, cu_q, rows):
        if op == "window_attention":
            return fsattn.window_attention(queries, k, k, cu_q, cu, window_size=64)
        if op == "selected_attention":
            return fsattn.selected_attention(queries, k, k, ids[:, rows], cu_q, cu, block_size=64)
        cmp, cu_cmp = fsattn.compress_kv(k, cu, **SIZES)
        return fsattn.compressed_attention(queries, cmp, cmp, cu_q, cu, cu_cmp, **SIZES)

    whole = call(q, cu, slice(None))[-tail:]
    part = call(q[-tail:], cu_tail, slice(-tail, None))
    difference = (whole.float() - part.float()).abs().max().item()
    assert difference <= 2**-8 * part.float().abs().max().item()


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("length", [31, 32, 48, 64, 65, 80, 129, 193])
def test_10_decode_is_the_last_row_of_a_prefill(length, device, dtype):
    """One query over L keys, for L around window and block boundaries."""
    shape = Shape(lens_q=[length], block_size=64, topk=3, dim=16, dim_v=16, window_size=40)
    whole = nsa_case(shape, dtype, device)
    step = nsa_case(shape.variant(lens_q=[1], lens_k=[length]), dtype, device)
    queries = {"q", "gates"}
    step.inputs = [
        x[-1:] if name in queries else x for name, x in zip(whole.names, whole.inputs, strict=True)
    ]
    found = step.ours(*step.inputs)[0]
    truth = whole.ref(*convert(whole.inputs, torch.float64))[0]
    same = whole.ref(*convert(whole.inputs, dtype))[0]
    check("decode", found, truth[-1:], same[-1:], unit=truth.abs().max())
    check("prefill", whole.ours(*whole.inputs)[0], truth, same)
