"""select_blocks and build_block_index against the definition."""

import pytest
import reference
import torch
from selection import Selection
from support import DEVICES, cu_seqlens, device_types, random_topk_idx

import fsattn

BOTH = device_types([torch.float32])


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("group_reduce", ["sum", "max", "first_head"])
def test_group_reduce(group_reduce, device, dtype):
    Selection([700, 0, 65, 1], dtype=dtype, device=device, group_reduce=group_reduce).check()


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32, torch.bfloat16]))
def test_score_dtype_bf16(device, dtype):
    Selection([700, 90], dtype=dtype, device=device, score_dtype="bf16").check()


def test_group_reduce_matters():
    """The three modes differ on the same inputs, so none of them can be another one in disguise."""
    modes = {
        m: Selection([900], group=4, group_reduce=m).found() for m in ("sum", "max", "first_head")
    }
    assert not torch.equal(modes["sum"], modes["max"])
    assert not torch.equal(modes["sum"], modes["first_head"])
    assert not torch.equal(modes["max"], modes["first_head"])


@pytest.mark.parametrize(("device", "dtype"), BOTH)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 16, 64])
def test_groups(group, device, dtype):
    Selection([400], group=group, heads_kv=2, device=device, dtype=dtype).check()


@pytest.mark.parametrize(
    ("init", "local"), [(0, 0), (0, 1), (1, 0), (2, 2), (4, 1), (1, 3), (8, 0)]
)
@pytest.mark.parametrize(("device", "dtype"), BOTH)
def test_forced_blocks(init, local, device, dtype):
    forced = {"init_blocks": init, "local_blocks": local}
    found, _ = Selection([520, 66], topk=8, device=device, dtype=dtype, **forced).check()
    for t in range(520):
        forced = {b for b in range(t // 64 + 1) if b < init or b > t // 64 - local}
        assert forced <= set(found[0, t].tolist())


@pytest.mark.parametrize(("device", "dtype"), BOTH)
@pytest.mark.parametrize("topk", [1, 2, 16, 127, 128])
def test_topk(topk, device, dtype):
    """Also more than the sequence has blocks: all of them, then -1."""
    few = {"init_blocks": 1, "local_blocks": 0} if topk == 1 else {"local_blocks": 1}
    shape = {"block_size": 16, "kernel_size": 16, "kernel_stride": 8}
    found, _ = Selection([500], topk=topk, device=device, dtype=dtype, **few, **shape).check()
    count = (found[0] >= 0).sum(1)
    assert torch.equal(count, (torch.arange(500) // 16 + 1).clamp(max=topk))


@pytest.mark.parametrize(("device", "dtype"), BOTH)
@pytest.mark.parametrize("offset", [None, [300, -20], [0, 600]])
def test_query_offset(offset, device, dtype):
    """Chunks of a longer sequence, negative positions and positions behind the last key."""
    Selection([90, 50], [390, 200], q_offset=offset, device=device, dtype=dtype).check()


def test_chunks_equal_the_whole():
    """The selection of a chunk of queries is that part of the selection of all of them."""
    whole = Selection([600])
    want = whole.found()
    for start, end in [(0, 1), (100, 301), (599, 600)]:
        part = Selection([end - start], [600], q_offset=[start])
        part.q, part.k_cmp = whole.q[start:end], whole.k_cmp
        assert torch.equal(part.found(), want[:, start:end])


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_index(device):
    """Equal keys give every inner block the same score; the lowest ones win."""
    case = Selection([1000], dtype=torch.bfloat16, device=device, topk=6)
    case.k_cmp = torch.zeros_like(case.k_cmp)
    found = case.found()
    # At t = 999 block 15 and 14 are local and 0 is initial; 1, 2, 3 are the lowest of the rest.
    assert found[0, 999].tolist() == [0, 1, 2, 3, 14, 15]
    assert found[1, 640].tolist() == [0, 1, 2, 3, 9, 10]


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_scores_tie_where_fp32_scores_do_not(device):
    """Scores less than 0.1 % apart: fp32 ranks them; in bf16 they tie and the lowest wins."""
    picks = {}
    for score_dtype in ("fp32", "bf16"):
        case = Selection(
            [1024],
            dtype=torch.float16,
            device=device,
            topk=4,
            heads_kv=1,
            group=1,
            score_dtype=score_dtype,
        )
        # Logit of window i: a slow slope, so that later blocks win by a hair.
        case.q = torch.zeros_like(case.q)
        case.q[:, 0, 0] = 4.0
        case.k_cmp = torch.zeros_like(case.k_cmp)
        windows = torch.arange(case.k_cmp.shape[0], device=device)
        case.k_cmp[:, 0, 0] = (windows * 2.0**-16).to(torch.float16)
        picks[score_dtype] = case.check()[0][0, 1023].tolist()
    assert picks["fp32"] == [0, 13, 14, 15]
    assert picks["bf16"] == [0, 1, 14, 15]


def test_lse_is_what_normalises():
    """Heads are weighted by exp(s - lse): a head with lse shifted far up has no say."""
    case = Selection([800], heads_kv=1, group=2)
    cus = (case.cu_q, case.cu_k, case.cu_cmp)
    sizes = {"kernel_size": 32, "kernel_stride": 16}
    _, lse = fsattn.compressed_attention(
        case.q, case.k_cmp, case.k_cmp, *cus, return_lse=True, **sizes
    )
    lse[1] += 60
    ids = fsattn.select_blocks(case.q, case.k_cmp, lse, *cus, **case.options)
    first = Selection([800], heads_kv=1, group=2, group_reduce="first_head").found()
    assert (ids != first).float().mean() < 0.001


def test_select_is_not_differentiable():
    case = Selection([100])
    case.q.requires_grad_()
    assert not case.found().requires_grad


def test_select_batch_equals_loop_and_repeats():
    lengths = [300, 0, 65, 31]
    whole = Selection(lengths, dtype=torch.bfloat16)
    want = whole.found()
    assert torch.equal(want, whole.found())
    for b, length in enumerate(lengths):
        part = Selection([length], dtype=torch.bfloat16)
        part.q = whole.q[whole.cu_q[b] : whole.cu_q[b + 1]]
        keys = whole.k_cmp[whole.cu_cmp[b] : whole.cu_cmp[b + 1]]
        rows = length // 16 - keys.shape[0]
        part.k_cmp = torch.cat([keys, keys.new_zeros(rows, *keys.shape[1:])])
        assert torch.equal(part.found(), want[:, whole.cu_q[b] : whole.cu_q[b + 1]])


def _check_index(ids, cu_q, cu_k, block_size, device="cpu"):
    total = {} if device == "cpu" else {"total_k": int(cu_k[-1])}  # CUDA lengths are not read
    index = fsattn.build_block_index(
        ids.to(device), cu_q.to(device), cu_k.to(device), block_size=block_size, **total
    )
    start, entry = index.start, index.entry
    assert start.dtype == entry.dtype == torch.int32
    starts, entries = reference.build_block_index(ids, cu_q, cu_k, block_size=block_size)
    start, entry = start.cpu(), entry.cpu()
    assert entry.shape == (ids.shape[0], ids.shape[1] * ids.shape[2])
    for head in range(ids.shape[0]):
        slots = len(starts[head])
        assert start[head, :slots].tolist() == starts[head]
        assert (start[head, slots:] == starts[head][-1]).all(), "slots behind the last are empty"
        assert entry[head, : starts[head][-1]].tolist() == entries[head]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("wild", [False, True])
def test_block_index(block_size, wild, device):
    lens = [300, 0, 1, 70, 16, 129]
    ids = random_topk_idx(3, lens, lens, block_size, 5, seed=1, wild=wild)
    _check_index(ids, cu_seqlens(lens), cu_seqlens(lens), block_size, device)


@pytest.mark.parametrize("device", DEVICES)
def test_block_index_of_chunks(device):
    """Fewer queries than keys: the positions are bottom-right aligned."""
    lens_q, lens_k = [3, 0, 40], [200, 50, 60]
    ids = random_topk_idx(2, lens_q, lens_k, 16, 7, seed=2)
    _check_index(ids, cu_seqlens(lens_q), cu_seqlens(lens_k), 16, device)


@pytest.mark.parametrize("device", DEVICES)
def test_block_index_of_strided_ids(device):
    ids = random_topk_idx(2, [90], [90], 16, 4, seed=3).to(device)
    cu = cu_seqlens([90], device)
    strided = ids.transpose(0, 1).contiguous().transpose(0, 1)
    a, b = (fsattn.build_block_index(x, cu, cu, block_size=16) for x in (ids, strided))
    assert torch.equal(a.start, b.start)
    for head in range(2):
        used = int(a.start[head, -1])
        assert used > 0 and torch.equal(a.entry[head, :used], b.entry[head, :used])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", [[], [0, 0]])
def test_nothing_to_select_from(lens, device):
    """No sequence, and empty ones only: an empty selection and its empty index."""
    cu, cu_cmp = cu_seqlens(lens, device), cu_seqlens(lens, device)
    q = torch.empty(0, 4, 16, dtype=torch.bfloat16, device=device)
    lse = torch.empty(4, 0, device=device)
    sizes = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64}
    ids = fsattn.select_blocks(q, q[:, :2], lse, cu, cu, cu_cmp, topk=5, **sizes)
    assert ids.shape == (2, 0, 5) and ids.device == q.device
    index = fsattn.build_block_index(ids, cu, cu, block_size=64)
    assert not index.start.any() and index.entry.shape == (2, 0)
