"""The operators over a paged cache against one full forward by the definition."""

import random

import pytest
import reference
import torch
from paged_support import PAGED_OPERATORS, PagedCase, operator_samples, scattered_tables
from support import (
    DEVICES,
    assert_same_bits,
    check,
    convert,
    cu_seqlens,
    device_types,
    random_topk_idx,
)

import fsattn

FLOATS = device_types([torch.float64, torch.float32, torch.bfloat16])


@pytest.mark.parametrize(("device", "dtype"), FLOATS)
def test_token_by_token(device, dtype):
    """Lengths that cross every border of windows, strides, blocks and pages."""
    PagedCase([150], rope=True, raw_size=32, pos_emb=True, dtype=dtype, device=device).run(
        [1]
    ).check()


@pytest.mark.parametrize("kind", ["mean", "weighted", "softmax", "linear"])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
def test_ragged_batch(kind, rope, device, dtype):
    """Some sequences grow by many tokens, some by one, some by none, one is empty throughout."""
    counts = [[70, 1, 0, 0, 3], [1, 0, 0, 40, 8], [0, 1, 0, 1, 1], [17, 64, 0, 5, 1]]
    case = PagedCase(
        [200, 131, 0, 77, 64],
        kind=kind,
        rope=rope,
        pos_emb=kind != "linear",
        layout="HND",
        dtype=dtype,
        device=device,
    )
    case.run(counts).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "HND", "group": 1, "heads_kv": 3},
        {"group": 5, "gate_heads": False, "activation": None},
        {"group": 16, "heads_kv": 1, "dim": 64, "group_reduce": "max"},
        {"group_reduce": "first_head", "score_dtype": "bf16"},
        {"dim": 24, "dim_v": 40, "softmax_scale": 0.3},
        {"page_size": 32, "cmp_page_size": 32, "block_size": 16, "rope": True},
        {"page_size": 128, "block_size": 128, "topk": 3, "cmp_page_size": 64},
        {"topk": 128, "block_size": 16},
        {"kernel_size": 16, "kernel_stride": 16, "block_size": 16, "window_size": 0},
        {"kernel_size": 64, "kernel_stride": 16, "block_size": 64, "rope": True, "raw_size": 64},
        {"page_size": 16, "block_size": 16, "rope": True},
        {"init_blocks": 0, "local_blocks": 0, "topk": 1},
        {"window_size": 2**31 - 1},
    ],
    ids=str,
)
def test_options(options, device):
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    case = PagedCase([170, 99], dtype=dtype, device=device, **options)
    case.run([[90, 31], [2, 1], [1, 8], [1, 1], [1, 1], [8, 2], 16]).check()


def random_case(seed, device):
    """Any valid combination of sizes and options, and how the tokens come."""
    rng = random.Random(seed)
    stride = rng.choice([8, 16])
    block = rng.choice([16, 32, 64])
    page = block * rng.choice([1, 2, 3])
    kernel = stride * rng.choice([1, 2, 3])
    divisors = [n for n in range(kernel, page) if page % n == 0]
    topk = rng.choice([1, 2, 5, 16])
    options = {
        "heads_kv": rng.choice([1, 2, 3]),
        "group": rng.choice([1, 2, 3, 4, 7, 8]),
        "dim": rng.choice([16, 32, 72, 128]),
        "dim_v": rng.choice([None, 16, 64]),
        "page_size": page,
        "cmp_page_size": rng.choice([16, 32, 48]),
        "layout": rng.choice(["NHD", "HND"]),
        "kind": rng.choice(["mean", "weighted", "softmax", "linear"]),
        "pos_emb": rng.random() < 0.5,
        "rope": rng.random() < 0.7,
        "raw_size": rng.choice([None, *divisors]),
        "kernel_size": kernel,
        "kernel_stride": stride,
        "block_size": block,
        "topk": topk,
        "init_blocks": rng.choice([0, 1]) if topk > 1 else 0,
        "local_blocks": rng.choice([0, 1]),
        "window_size": rng.choice([0, 7, 64, 500]),
        "group_reduce": rng.choice(["sum", "max", "first_head"]),
        "gate_heads": rng.random() < 0.5,
    }
    lens = [rng.choice([0, 1, rng.randint(2, 260)]) for _ in range(rng.randint(1, 5))]
    dtype = torch.float64 if device == "cpu" else rng.choice([torch.bfloat16, torch.float16])
    case = PagedCase(lens, dtype=dtype, device=device, seed=seed, **options)
    sizes = [0, 1, 1, 2, 8, 9, 40, 130]
    return case, [[rng.choice(sizes) for _ in lens] for _ in range(20)] + [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(16))
def test_random_cases(seed, device):
    case, counts = random_case(seed, device)
    case.run(counts).check()


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_any_size_store_the_same(device):
    """What is stored depends on the tokens alone, not on how they came."""
    options = {"rope": True, "raw_size": 32, "kind": "linear", "device": device}
    options["dtype"] = torch.bfloat16
    whole = PagedCase([190], **options).run([190])
    for counts in ([1], [7], [33, 1], [64, 63]):
        pieces = PagedCase([190], **options).run(counts)
        for name, a, b in zip(("k", "v", "k_cmp", "v_cmp"), pieces.stored(), whole.stored()):
            if device == "cpu" or name in ("k", "v"):
                assert_same_bits(name, a, b)
            else:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"kernel_size": 16, "raw_size": 32}], ids=str)
def test_taken_back_tokens(options, device):
    """Rejected tokens are overwritten by a later call with smaller cache_seqlens."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    case = PagedCase([140], rope=True, dtype=dtype, device=device, **options)
    case.advance(60)
    for start in range(60, 137, 4):
        good = case.k.clone()
        case.k[start:] = 100.0  # a draft that is refused
        case.append([start], [min(8, 140 - start)])
        case.k = good
        case.advance(4)
    case.run([1]).check()


@pytest.mark.parametrize("device", DEVICES)
def test_shared_pages(device):
    """Two sequences with the same first pages: the bits of sequences with pages of their own."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    own = PagedCase([128 + 40, 128 + 70], rope=True, raw_size=32, dtype=dtype, device=device)
    for x in (own.q, own.k, own.v, own.gates):
        x[168 : 168 + 128] = x[:128]
    shared = PagedCase([168, 198], rope=True, raw_size=32, dtype=dtype, device=device)
    shared.q, shared.k, shared.v, shared.gates = own.q, own.k, own.v, own.gates
    own.advance([128, 128])
    shared.advance([128, 0])
    shared.table[1, :2] = shared.table[0, :2]
    shared.o[168:296], shared.ids[:, 168:296] = shared.o[:128], shared.ids[:, :128]
    # 7 windows of the prefix are complete, in a page that both would append to.
    first, second = shared.cmp_table[:, 0].long()
    for cache in (shared.k_cmp_cache, shared.v_cmp_cache):
        cache[second] = cache[first]
    shared.at = [128, 128]
    own.run([5, 1])
    shared.run([5, 1])
    shared.check()
    assert_same_bits("o", own.o, shared.o)
    assert_same_bits("topk_idx", own.ids, shared.ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_strided_pages(layout, device):
    """K and V interleaved in one buffer, tables with a longer row, a sliced q."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    case = PagedCase([130, 100], layout=layout, dtype=dtype, device=device)
    both = torch.stack([case.k_cache, case.v_cache], 1)
    case.k_cache, case.v_cache = both[:, 0], both[:, 1]
    wide = torch.full((2, 40), -5, dtype=torch.int32, device=device)
    wide[:, : case.table.shape[1]] = case.table
    case.table = wide[:, : case.table.shape[1]]
    case.run([50, 1, 8]).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [1, 4, 30])
def test_batch_invariant(counts, device):
    """The bits of a sequence do not depend on its neighbours or on the bounds."""
    options = {"dtype": torch.bfloat16, "device": device, "heads_kv": 2, "group": 4, "dim": 64}
    case = PagedCase([400, 33, 190, 5, 260], **options)
    case.append([0] * 5, case.lens)
    starts = [max(n - counts, 0) for n in case.lens]
    news = [n - s for n, s in zip(case.lens, starts)]
    exact = {"batch_invariant": True, "max_seqlen_q": counts}
    o, ids = case.attend(starts, news, **exact, max_seqlen_k=400)
    tables = (case.table, case.cmp_table)
    at = cu_seqlens(news).tolist()
    for b in range(5):
        case.table, case.cmp_table = tables[0][b : b + 1], tables[1][b : b + 1]
        rows = slice(at[b], at[b + 1])
        offset = sum(case.lens[:b]) + starts[b]
        picked = torch.arange(offset, offset + news[b], device=device)
        alone, alone_ids = fsattn.paged_native_sparse_attention(
            case.queries(picked),
            case.gates[picked],
            *(case.k_cache, case.v_cache, case.table),
            *(case.k_cmp_cache, case.v_cmp_cache, case.cmp_table),
            torch.tensor([starts[b]], dtype=torch.int32, device=device),
            cu_seqlens([news[b]], device),
            **exact,
            max_seqlen_k=case.lens[b],
            return_topk_idx=True,
            **case.options,
        )
        assert_same_bits(f"o of {b}", alone, o[rows])
        assert_same_bits(f"topk_idx of {b}", alone_ids, ids[:, rows].contiguous())


@pytest.mark.parametrize(("device", "dtype"), FLOATS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [8, 3, 0, 1], [100, 40, 2, 0]])
def test_selected_attention(counts, layout, device, dtype):
    """The caller's topk_idx over scattered pages."""
    case = PagedCase([300, 90, 64, 1], dtype=dtype, device=device, layout=layout, group=3)
    case.append([0] * 4, case.lens)
    case.at = case.lens
    starts = [n - c for n, c in zip(case.lens, counts)]
    rows = case.rows_of(starts, counts)
    ids = random_topk_idx(2, counts, case.lens, 32, 5).to(device)
    o, lse = fsattn.paged_selected_attention(
        case.q[rows],
        ids,
        *(case.k_cache, case.v_cache, case.table),
        **case.lengths(starts, counts),
        block_size=32,
        layout=layout,
        return_lse=True,
    )

    def forward(dtype):
        inputs = convert([case.q[rows], case.k, case.v], dtype)
        cus = (cu_seqlens(counts), cu_seqlens(case.lens))
        return reference.selected_attention(*inputs, ids.cpu(), *cus, block_size=32)

    truth, same = forward(torch.float64), forward(dtype)
    check("o", o, truth[0], same[0])
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    check("lse", lse, truth[1], same[1].to(stats), unit=10.0)


@pytest.mark.parametrize("device", DEVICES)
def test_batched_tensors(device):
    """[B, T, ...] gives what packed tensors give; out is written."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = PagedCase([100, 100], dtype=dtype, device=device)
    case.append([0, 0], [100, 100])
    arguments = case.attention_arguments([98, 98], [2, 2])
    packed, ids = fsattn.paged_native_sparse_attention(**arguments, return_topk_idx=True)
    del arguments["cu_seqlens_q"], arguments["max_seqlen_q"]
    arguments |= {name: arguments[name].unflatten(0, (2, 2)) for name in ("q", "gates")}
    out = torch.full_like(packed.unflatten(0, (2, 2)), torch.nan)
    found, found_ids = fsattn.paged_native_sparse_attention(
        **arguments, return_topk_idx=True, out=out
    )
    assert found is out
    assert_same_bits("o", out, packed.unflatten(0, (2, 2)))
    assert torch.equal(found_ids, ids.unflatten(1, (2, 2)).transpose(0, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_without_compression(device):
    """append_kv alone, for models with their own indexer."""
    case = PagedCase([70, 30], dtype=torch.bfloat16, device=device)
    nothing = {name: None for name in ("k_cmp_cache", "v_cmp_cache", "cmp_block_table")}
    for start in (0, 1, 9):
        end = {0: 1, 1: 9, 9: 30}[start]
        case.append([start, start], [end - start] * 2, **nothing)
    stored = case.packed(case.k_cache, case.table, 64, [30, 30])
    assert_same_bits("k", stored, torch.cat([case.k[:30], case.k[70:100]]))
    assert case.k_cmp_cache.isnan().all()


@pytest.mark.parametrize("name", PAGED_OPERATORS)
def test_opcheck(name):
    """Schemas tell which arguments are written, and the fakes fit."""
    torch.library.opcheck(getattr(torch.ops.fsattn, name).default, operator_samples()[name])


def test_compile():
    """torch.compile(fullgraph=True) of a step, which writes to its arguments."""
    case = PagedCase([100, 70], rope=True, dtype=torch.float32)
    case.append([0, 0], [90, 60])
    append = case.append_arguments([90, 60], [1, 3]) | {"max_seqlen_k": 128}
    attend = case.attention_arguments([90, 60], [1, 3]) | {"max_seqlen_k": 128}

    def step(append, attend):
        fsattn.append_kv(**append)
        return fsattn.paged_native_sparse_attention(**attend, return_topk_idx=True)

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(append, attend)
    stored = [x.clone() for x in case.stored_at([91, 63])]
    case.append([90, 60], [1, 3], k=torch.zeros(4, 2, 16), v=torch.zeros(4, 2, 16))
    for name, a, b in zip(("o", "topk_idx"), found, step(append, attend)):
        assert_same_bits(name, a, b)
    for a, b in zip(stored, case.stored_at([91, 63])):
        assert_same_bits("stored", a, b)


def test_explain():
    case = PagedCase([100], dtype=torch.float32)
    text = fsattn.explain(case.append, [0], [100])
    assert "append_kv: cpu" in text and text.count("compress_kv fwd") == 2
    text = fsattn.explain(case.attend, [99], [1])
    assert "paged_native_sparse_attention: cpu" in text and "select_blocks" in text
    assert case.k_cache.isnan().all()


def test_tables_are_scattered():
    """What the tests above rely on."""
    table = scattered_tables(3, 4, 20, 0, "cpu").flatten().tolist()
    assert len(set(table)) == 12 and table != sorted(table)
