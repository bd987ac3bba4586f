"""The random properties of test_properties.py on a GPU, in 16 bits, and its wrong calls."""

import pytest
import reference
import torch
from cases import ATTENTIONS, OPERATORS, check_case, check_strides, compress_case, selected_case
from cuda_support import DEVICE, NEEDS_CUDA
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selection import random_selection
from support import CUDA_TYPES, STRIDE_STYLES, cu_seqlens
from test_bad_calls import BAD, label, valid_call
from test_properties import COMMON, block_lists, shapes

import fsattn

pytestmark = NEEDS_CUDA
few = settings(max_examples=25, **COMMON)
TYPES = st.sampled_from(CUDA_TYPES)
SEEDS = st.integers(0, 999)


def _has_yardstick(shape):
    """Whether dk_cmp can be judged by PyTorch's error in it: with one window it is a difference of
    equal terms, rounding alone, and the largest error among few numbers is luck."""
    windows = [
        (n - shape.kernel_size) // shape.kernel_stride + 1
        for n in shape.lens_k
        if n >= shape.kernel_size
    ]
    return max(windows, default=0) > 1 and sum(windows) * shape.heads_kv * shape.dim >= 64


@pytest.mark.parametrize("op", [*ATTENTIONS, "native_sparse_attention", "gate"])
def test_random_shapes(op):
    @few
    @given(shapes(), TYPES, SEEDS)
    def run(shape, dtype, seed):
        assume(op != "native_sparse_attention" or _has_yardstick(shape))
        check_case(OPERATORS[op](shape, dtype, DEVICE, seed=seed), dtype, DEVICE, seed=seed)

    run()


@few
@given(shapes(chunked=False), TYPES, SEEDS)
def test_random_compression(shape, dtype, seed):
    if shape.kind == "linear":
        shape.dim = min(shape.dim, 40)
    check_case(compress_case(shape, dtype, DEVICE, seed=seed), dtype, DEVICE, seed=seed)


@few
@given(
    shapes(),
    st.sampled_from(["sum", "max", "first_head"]),
    st.sampled_from(["fp32", "bf16"]),
    TYPES,
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_random_selection(shape, group_reduce, score_dtype, dtype, init, local):
    random_selection(shape, dtype, init, local, group_reduce, score_dtype, DEVICE).check()


@few
@given(block_lists(), TYPES)
def test_arbitrary_block_ids(example, dtype):
    shape, topk_idx = example
    check_case(selected_case(shape, dtype, DEVICE, topk_idx=topk_idx), dtype, DEVICE)


@few
@given(block_lists(), st.sampled_from([16, 64]))
def test_arbitrary_block_ids_in_the_index(example, block_size):
    shape, topk_idx = example
    cu, cu_here = (cu_seqlens(shape.lens_q, d) for d in (DEVICE, "cpu"))
    found = fsattn.build_block_index(topk_idx.to(DEVICE), cu, cu, block_size=block_size)
    start, entry = found.start.cpu(), found.entry.cpu()
    starts, entries = reference.build_block_index(topk_idx, cu_here, cu_here, block_size=block_size)
    for head in range(shape.heads_kv):
        assert start[head, : len(starts[head])].tolist() == starts[head]
        assert entry[head, : len(entries[head])].tolist() == entries[head]


@pytest.mark.parametrize("op", [*ATTENTIONS, "compress_kv", "gate"])
def test_random_strides(op):
    """Any mixture of layouts of inputs and dO gives the bits of contiguous tensors."""

    @few
    @given(shapes(), TYPES, st.lists(st.sampled_from(STRIDE_STYLES), min_size=8, max_size=8))
    def run(shape, dtype, styles):
        case = OPERATORS[op](shape, dtype, DEVICE)
        douts = case.douts(dtype, DEVICE)
        check_strides(op, case, douts, styles)

    run()


def _to_device(name, value):
    """A 16-bit tensor on the GPU; statistics, lengths and wrong devices stay what they are."""
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return value
    is_data = value.dtype == torch.float32 and name not in ("lse", "q_offset")
    return value.to(DEVICE, torch.bfloat16 if is_data and "cu_" not in name else value.dtype)


def _call(op, changes):
    arguments = {name: _to_device(name, x) for name, x in {**valid_call(op), **changes}.items()}
    return getattr(fsattn, op)(**arguments)


def _needs_the_lengths(row):
    """What is wrong stands in cu_seqlens, which the host does not read on CUDA."""
    op, changes, *_ = row
    (name, value), valid = next(iter(changes.items())), valid_call(op)
    if name.startswith("max_seqlen"):
        return 0 <= value < 2**31
    is_length = isinstance(value, torch.Tensor) and name.startswith("cu_seqlens")
    return is_length and value.dtype == torch.int32 and value.shape == valid[name].shape


def _is_bf16(row):
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in row[1].values())


SEEN_BY_THE_HOST = [row for row in BAD if not _needs_the_lengths(row) and not _is_bf16(row)]


@pytest.mark.parametrize("row", SEEN_BY_THE_HOST, ids=[label(row) for row in SEEN_BY_THE_HOST])
def test_bad_call(row):
    op, changes, exception, pattern = row
    # A head_dim that is no multiple of 8 shows in the alignment of the rows first.
    with pytest.raises(exception, match=f"({pattern})|rows must be 16-byte aligned") as caught:
        _call(op, changes)
    assert type(caught.value) is exception
