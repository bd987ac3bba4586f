"""Random shapes, lengths, offsets, block lists and strides against the definition, mostly in fp64.

fp64 finds every wrong index, because nothing hides behind rounding; the rounding itself is tested
at fixed shapes in test_operators.py. Examples are the same in every run.
"""

import pytest
import reference
import torch
from cases import (
    ATTENTIONS,
    OPERATORS,
    Shape,
    check_case,
    check_strides,
    compress_case,
    selected_case,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selection import random_selection
from support import (
    INT_MAX,
    INT_MIN,
    STRIDE_STYLES,
    cu_seqlens,
)

import fsattn

COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
few = settings(max_examples=40, **COMMON)
some = settings(max_examples=120, **COMMON)

LENGTHS = st.sampled_from([0, 1, 2, 3, 6, 7, 11, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 90])
DIMS = st.sampled_from([8, 16, 24, 32, 40, 64, 72, 128, 192, 256])
GROUPS = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 64])
WINDOWS = st.sampled_from([(32, 16), (16, 16), (16, 8), (32, 8), (64, 16), (16, 4), (32, 32)])


@st.composite
def shapes(draw, chunked=True):
    """A Shape of at most about 2^17 query numbers."""
    batch = draw(st.integers(1, 4))
    lens_k = draw(st.lists(LENGTHS, min_size=batch, max_size=batch))
    lens_q, offset = list(lens_k), None
    if chunked and draw(st.booleans()):
        lens_q = draw(st.lists(LENGTHS, min_size=batch, max_size=batch))
        if draw(st.booleans()):
            offset = draw(st.lists(st.integers(-40, 120), min_size=batch, max_size=batch))
    dim, dim_v, group = draw(DIMS), draw(DIMS), draw(GROUPS)
    heads_kv = draw(st.integers(1, 3))
    if sum(lens_q) * group * heads_kv * dim > 2**17:
        dim, heads_kv, group = 8, 1, min(group, 5)
    kernel_size, kernel_stride = draw(WINDOWS)
    blocks = [s for s in (16, 32, 64, 128, 256) if s % kernel_stride == 0]
    return Shape(
        lens_q=lens_q,
        lens_k=lens_k,
        heads_kv=heads_kv,
        group=group,
        dim=dim,
        dim_v=dim_v,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=draw(st.sampled_from(blocks)),
        topk=draw(st.integers(2, 9)),
        window_size=draw(st.sampled_from([0, 1, 7, 16, 40, 1000])),
        q_offset=offset,
        softmax_scale=draw(st.sampled_from([None, 0.3])),
        kind=draw(st.sampled_from(["mean", "weighted", "softmax", "linear"])),
        with_pos_emb=draw(st.booleans()),
        gate_per_head=draw(st.booleans()),
        activation=draw(st.sampled_from(["sigmoid", None])),
    )


@pytest.mark.parametrize("op", [*ATTENTIONS, "native_sparse_attention", "gate"])
def test_random_shapes(op):
    @few
    @given(shapes(), st.integers(0, 999))
    def run(shape, seed):
        check_case(OPERATORS[op](shape, torch.float64, seed=seed), torch.float64, "cpu", seed=seed)

    run()


@few
@given(shapes(chunked=False), st.integers(0, 999))
def test_random_compression(shape, seed):
    if shape.kind == "linear":
        shape.dim = min(shape.dim, 40)
    check_case(compress_case(shape, torch.float64, seed=seed), torch.float64, "cpu", seed=seed)


@few
@given(
    shapes(),
    st.sampled_from(["sum", "max", "first_head"]),
    st.sampled_from(["fp32", "bf16"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_random_selection(shape, group_reduce, score_dtype, dtype, init, local):
    random_selection(shape, dtype, init, local, group_reduce, score_dtype).check()


BLOCK_IDS = st.one_of(
    st.integers(-3, 8),
    st.sampled_from([INT_MIN, INT_MAX, INT_MIN + 1, 2**27, 2**28 - 1, 100]),
)


@st.composite
def block_lists(draw):
    """A small Shape and completely arbitrary rows of block ids for it."""
    lens = draw(st.lists(st.sampled_from([0, 1, 5, 16, 17, 40]), min_size=1, max_size=3))
    topk, heads_kv = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    rows = st.lists(BLOCK_IDS, min_size=topk, max_size=topk)
    count = heads_kv * sum(lens)
    ids = draw(st.lists(rows, min_size=min(count, 6), max_size=6))
    table = [ids[(7 * i + i // 5) % len(ids)] for i in range(count)]
    topk_idx = torch.tensor(table, dtype=torch.int32).reshape(heads_kv, sum(lens), topk)
    shape = Shape(lens_q=lens, heads_kv=heads_kv, dim=8, dim_v=16, topk=topk)
    shape.group = draw(st.sampled_from([1, 2, 5]))
    return shape, topk_idx


@some
@given(block_lists())
def test_arbitrary_block_ids(example):
    shape, topk_idx = example
    check_case(selected_case(shape, torch.float64, topk_idx=topk_idx), torch.float64, "cpu")


@some
@given(block_lists())
def test_arbitrary_block_ids_in_the_index(example):
    shape, topk_idx = example
    cu = cu_seqlens(shape.lens_q)
    index = fsattn.build_block_index(topk_idx, cu, cu, block_size=16)
    start, entry = index.start, index.entry
    starts, entries = reference.build_block_index(topk_idx, cu, cu, block_size=16)
    for head in range(shape.heads_kv):
        assert start[head, : len(starts[head])].tolist() == starts[head]
        assert entry[head, : len(entries[head])].tolist() == entries[head]


@pytest.mark.parametrize("op", [*ATTENTIONS, "compress_kv", "gate"])
def test_random_strides(op):
    """Any mixture of layouts of inputs and dO gives the bits of contiguous tensors."""

    @few
    @given(shapes(), st.lists(st.sampled_from(STRIDE_STYLES), min_size=8, max_size=8))
    def run(shape, styles):
        shape.dim, shape.dim_v = min(shape.dim, 40), min(shape.dim_v, 40)
        case = OPERATORS[op](shape, torch.float32)
        douts = case.douts(torch.float32, "cpu")
        check_strides(op, case, douts, styles)

    run()


@pytest.mark.parametrize("op", ATTENTIONS)
def test_random_large_logits(op):
    """Logits of any size: never NaN or infinite, and the definition's result in fp64."""

    @few
    @given(shapes(), st.sampled_from([1.0, 30.0, 1000.0]))
    def run(shape, scale):
        shape.dim, shape.scale = min(shape.dim, 64), scale**0.5
        check_case(OPERATORS[op](shape, torch.float64), torch.float64, "cpu")
        outs, grads = (case := OPERATORS[op](shape, torch.float16)).found(
            case.douts(torch.float16, "cpu")
        )
        assert outs[0].isfinite().all() and not outs[1].isnan().any()
        assert not any(g.isnan().any() for g in grads)

    run()
