"""Wrong calls over a paged cache: what is wrong, the exception, and what the message must say."""

import math

import pytest
import torch
from paged_support import PagedCase
from support import DEVICES, randn

import fsattn

F32 = torch.float32


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_case(device="cpu", dtype=F32):
    """40 and 25 of 100 and 70 tokens are stored; pages of 64 and 16."""
    options = {"rope": True, "raw_size": 32, "kind": "weighted", "pos_emb": True}
    case = PagedCase([100, 70], dtype=dtype, device=device, **options)
    case.append([0, 0], [40, 25])
    case.at = [40, 25]
    return case


def valid_call(op, case=None):
    """Keyword arguments of a call that adds 5 and 1 tokens."""
    case = make_case() if case is None else case
    starts, counts = [40, 25], [5, 1]
    if op == "append_kv":
        return case.append_arguments(starts, counts)
    if op == "paged_native_sparse_attention":
        case.append(starts, counts)
        return case.attention_arguments(starts, counts)
    case.append(starts, counts)
    return {
        "q": case.q[case.rows_of(starts, counts)],
        "topk_idx": torch.zeros(2, 6, 3, dtype=torch.int32, device=case.device),
        "k_cache": case.k_cache,
        "v_cache": case.v_cache,
        "block_table": case.table,
        "block_size": 32,
        **case.lengths(starts, counts),
    }


ADD, NSA, SEL = "append_kv", "paged_native_sparse_attention", "paged_selected_attention"
PAGES = (8, 64, 2, 16)

# (operator, changed arguments, exception, pattern)
BAD = [
    # Python types, dtypes, devices
    (ADD, {"k": [1.0]}, TypeError, r"k: .*list"),
    (ADD, {"block_table": None}, TypeError, r"block_table: .*None"),
    (ADD, {"rope_cos": 1}, TypeError, r"rope_cos: .*int"),
    (ADD, {"kernel_size": 32.0}, TypeError, r"kernel_size: .*float"),
    (NSA, {"k_cmp_cache": None}, TypeError, r"k_cmp_cache: .*None"),
    (NSA, {"topk": "4"}, TypeError, r"topk: .*str"),
    (NSA, {"out": 3}, TypeError, r"out: .*int"),
    (SEL, {"block_size": None}, TypeError, r"block_size: .*None"),
    (ADD, {"v": randn(6, 2, 16).half()}, TypeError, r"v: dtype .*float16"),
    (ADD, {"k_cache": torch.zeros(PAGES).half()}, TypeError, r"k_cache: dtype .*float16"),
    (ADD, {"cache_seqlens": torch.tensor([40, 25])}, TypeError, r"cache_seqlens: .*int64"),
    (ADD, {"block_table": torch.zeros(2, 2)}, TypeError, r"block_table: .*float32"),
    (ADD, {"weight_k": randn(2, 32)}, TypeError, r"weight_k: dtype .*float64"),
    (NSA, {"v_cmp_cache": torch.zeros(PAGES).double()}, TypeError, r"v_cmp_cache: .*float64"),
    (NSA, {"k_cache": torch.zeros(PAGES, device="meta")}, TypeError, r"k_cache: .*meta"),
    (SEL, {"topk_idx": torch.zeros(2, 6, 3)}, TypeError, r"topk_idx: .*float32"),
    # shapes
    (ADD, {"v": torch.zeros(5, 2, 16)}, ValueError, r"v: shape .*\[5, 2, 16\]"),
    (ADD, {"k_cache": torch.zeros(8, 64, 16)}, ValueError, r"k_cache: must have 4 dimensions"),
    (ADD, {"k_cache": torch.zeros(8, 64, 3, 16)}, ValueError, r"k_cache: shape .*3, 16\]"),
    (ADD, {"v_cache": torch.zeros(6, 64, 2, 16)}, ValueError, r"v_cache: shape .*\[6"),
    (ADD, {"k_cache": torch.zeros(8, 24, 2, 16)}, ValueError, r"k_cache: page_size .*16, found 24"),
    (ADD, {"block_table": _int32([0, 1])}, ValueError, r"block_table: .*row .*2\), found 1"),
    (ADD, {"block_table": _int32(0, 1)}, ValueError, r"block_table: .*2 dimensions"),
    (ADD, {"cache_seqlens": _int32(40)}, ValueError, r"cache_seqlens: shape .*\[1\]"),
    (ADD, {"cu_seqlens_q": _int32(0, 6)}, ValueError, r"cache_seqlens: shape .*\[2\]"),
    (ADD, {"cu_seqlens_q": _int32(0, 5, 7)}, ValueError, r"cu_seqlens_q: must end .*6\), found 7"),
    (ADD, {"cu_seqlens_q": None}, ValueError, r"cu_seqlens_q: must be given"),
    (ADD, {"weight_v": None}, ValueError, r"weight_v: must be given"),
    (ADD, {"weight_k": torch.zeros(2, 31)}, ValueError, r"weight_k: shape .*\[2, 31\]"),
    (ADD, {"pos_emb": torch.zeros(2, 31, 16)}, ValueError, r"pos_emb: shape .*31"),
    (ADD, {"v_cmp_cache": None}, ValueError, r"v_cmp_cache: must be given"),
    (ADD, {"cmp_block_table": None}, ValueError, r"cmp_block_table: must be given"),
    (ADD, {"rope_sin": None}, ValueError, r"rope_sin: must be given together with rope_cos"),
    (ADD, {"rope_cos": torch.zeros(128, 9)}, ValueError, r"rope_cos: shape .*\[128, 9\]"),
    (ADD, {"rope_cos": torch.zeros(44, 8), "rope_sin": torch.zeros(44, 8)}, ValueError,
     r"rope_cos: .*max_seqlen_k \(45\), found 44"),
    (ADD, {"k_raw_cache": None}, ValueError, r"k_raw_cache: must be given"),
    (ADD, {"k_raw_cache": torch.zeros(7, 16, 2, 16)}, ValueError, r"k_raw_cache: .*found 16"),
    (ADD, {"rope_cos": None, "rope_sin": None}, ValueError, r"k_raw_cache: must be absent"),
    (NSA, {"q": torch.zeros(6, 4, 24)}, ValueError, r"q: head_dim .*k_cache \(16\), found 24"),
    (NSA, {"q": torch.zeros(6, 5, 16)}, ValueError, r"q: .*multiple of that of k_cache.*5"),
    (NSA, {"gates": torch.zeros(6, 4, 2)}, ValueError, r"gates: shape"),
    (NSA, {"out": torch.zeros(6, 4, 24)}, ValueError, r"out: shape .*24\]"),
    (NSA, {"k_cmp_cache": torch.zeros(8, 16, 2, 24)}, ValueError, r"k_cmp_cache: shape"),
    (SEL, {"topk_idx": torch.zeros(2, 5, 3, dtype=torch.int32)}, ValueError, r"topk_idx: shape"),
    (SEL, {"topk_idx": torch.zeros(6, 3, dtype=torch.int32)}, ValueError, r"topk_idx: .*2"),
    # values
    (ADD, {"layout": "HDN"}, ValueError, r"layout: must be one of 'NHD', 'HND', found 'HDN'"),
    (ADD, {"kind": "median"}, ValueError, r"kind: .*median"),
    (ADD, {"kernel_stride": 5}, ValueError, r"kernel_size: .*\(5\), found 32"),
    (ADD, {"max_seqlen_q": 4}, ValueError, r"max_seqlen_q: .*\(5\), found 4"),
    (ADD, {"max_seqlen_k": 44}, ValueError, r"max_seqlen_k: .*\(45\), found 44"),
    (ADD, {"cache_seqlens": _int32(40, -1)}, ValueError, r"cache_seqlens: .*negative, found -1"),
    (ADD, {"cache_seqlens": _int32(124, 25)}, ValueError, r"block_table: the cache is full"),
    (ADD, {"block_table": _int32([0, 1], [99, 1])}, ValueError,
     r"block_table: page ids .*found 99 for page 0 of sequence 1"),
    (ADD, {"block_table": _int32([-1, 1], [2, 1])}, ValueError, r"block_table: .*found -1"),
    (ADD, {"cmp_block_table": _int32([63], [0])}, ValueError, r"cmp_block_table: .*found 63"),
    (NSA, {"block_table": _int32([77, 1], [2, 1])}, ValueError, r"block_table: .*found 77"),
    (NSA, {"cmp_block_table": _int32([77], [2])}, ValueError, r"cmp_block_table: .*found 77"),
    (NSA, {"block_table": torch.zeros(2, 0, dtype=torch.int32)}, ValueError, r"cache is full"),
    (NSA, {"block_size": 48}, ValueError, r"block_size: .*48"),
    (NSA, {"block_size": 128}, ValueError, r"k_cache: page_size .*block_size \(128\), found 64"),
    (NSA, {"topk": 2}, ValueError, r"topk: .*init_blocks \+ local_blocks"),
    (NSA, {"topk": 129}, ValueError, r"topk: .*129"),
    (NSA, {"window_size": -1}, ValueError, r"window_size: .*-1"),
    (NSA, {"softmax_scale": math.nan}, ValueError, r"softmax_scale: .*nan"),
    (NSA, {"group_reduce": "mean"}, ValueError, r"group_reduce: .*mean"),
    (NSA, {"activation": "relu"}, ValueError, r"activation: .*relu"),
    (NSA, {"workspace_cap": -1}, ValueError, r"workspace_cap: .*-1"),
    (SEL, {"block_size": 0}, ValueError, r"block_size: .*0"),
    (SEL, {"cache_seqlens": _int32(40, 2**30)}, ValueError, r"block_table: the cache is full"),
]  # fmt: skip


@pytest.mark.parametrize("op", [ADD, NSA, SEL])
def test_the_unchanged_call_is_valid(op):
    getattr(fsattn, op)(**valid_call(op))


@pytest.mark.parametrize(
    "row", BAD, ids=[f"{r[0]}-{'-'.join(r[1])}-{i}" for i, r in enumerate(BAD)]
)
def test_bad_call(row):
    op, changes, exception, pattern = row
    with pytest.raises(exception, match=pattern) as caught:
        getattr(fsattn, op)(**{**valid_call(op), **changes})
    assert type(caught.value) is exception


def test_entries_behind_the_last_page_are_not_looked_at():
    case = make_case()
    case.table[1, 1] = -5
    case.cmp_table[1, 0] = 10**6  # 26 tokens have no window
    for op in (ADD, NSA, SEL):
        getattr(fsattn, op)(**valid_call(op, case))


def test_outputs_may_not_overlap():
    case = make_case()
    with pytest.raises(ValueError, match="v_cache: must not start where another output does"):
        fsattn.append_kv(**(valid_call(ADD, case) | {"v_cache": case.k_cache}))
    arguments = valid_call(NSA, case)
    with pytest.raises(ValueError, match="out: memory .* may not overlap .* q"):
        fsattn.paged_native_sparse_attention(**arguments, out=arguments["q"])


def test_batched_needs_one_token_axis():
    case = PagedCase([64, 64], dtype=F32)
    case.append([0, 0], [64, 64])
    arguments = case.attention_arguments([60, 60], [4, 4])
    del arguments["cu_seqlens_q"]
    arguments |= {x: arguments[x].unflatten(0, (2, 4)) for x in ("q", "gates")}
    out = torch.empty(4, 2, 4, 16).transpose(0, 1)
    with pytest.raises(ValueError, match="out: batch and token strides"):
        fsattn.paged_native_sparse_attention(**arguments, out=out)
    with pytest.raises(ValueError, match="cu_seqlens_q: must not be given with a batched q"):
        fsattn.paged_native_sparse_attention(**arguments, cu_seqlens_q=_int32(0, 4, 8))


@pytest.mark.parametrize("device", [DEVICES[1]])
@pytest.mark.parametrize("argument", ["block_table", "cache_seqlens", "v_cmp_cache", "gates"])
def test_mixed_devices(argument, device):
    arguments = valid_call(NSA, make_case(device, torch.bfloat16))
    arguments[argument] = arguments[argument].cpu()
    with pytest.raises(TypeError, match=rf"{argument}: .*cpu"):
        fsattn.paged_native_sparse_attention(**arguments)
