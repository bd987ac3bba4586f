"""What holds for every operator: right in every dtype, for every stride, head count and head dim,
deterministic, and independent of the neighbours in the batch."""

import pytest
import torch
from cases import ATTENTIONS, OPERATORS, Shape, check_case, compress_case
from support import (
    DEVICES,
    STRIDE_STYLES,
    assert_same_bits,
    device_types,
    grads_of,
    random_topk_idx,
    restride,
)

import fsattn

# Lengths around every edge of blocks, windows and strides, and the lengths 0 and 1.
LENGTHS = [130, 0, 1, 47, 48, 31]
TYPICAL = Shape(lens_q=LENGTHS, group=4, dim=64, dim_v=64, block_size=32, topk=3, window_size=33)


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("op", OPERATORS)
def test_against_definition(op, device, dtype):
    check_case(OPERATORS[op](TYPICAL, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("kind", ["weighted", "softmax", "linear"])
@pytest.mark.parametrize("with_pos_emb", [False, True])
def test_compress_kinds(kind, with_pos_emb, device, dtype):
    shape = TYPICAL.variant(kind=kind, with_pos_emb=with_pos_emb, dim=32)
    check_case(compress_case(shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("op", ATTENTIONS)
def test_prefix_cache(op, device, dtype):
    """Fewer queries than keys: bottom-right alignment; also no query at all, and one."""
    shape = TYPICAL.variant(lens_q=[5, 1, 0, 33], lens_k=[90, 65, 70, 33])
    check_case(OPERATORS[op](shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("op", [*ATTENTIONS, "native_sparse_attention"])
def test_more_queries_than_keys(op, device, dtype):
    """Queries before the first key (negative positions) see nothing."""
    shape = TYPICAL.variant(lens_q=[70, 40], lens_k=[50, 0])
    outs, _ = check_case(OPERATORS[op](shape, dtype, device), dtype, device)
    assert (outs[0][:20] == 0).all() and (outs[0][70:] == 0).all()


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("op", [*ATTENTIONS, "native_sparse_attention"])
def test_query_offset(op, device, dtype):
    """Offsets per sequence: the default, further left (partly negative), behind the last key."""
    shape = TYPICAL.variant(lens_q=[40, 40, 40], lens_k=[100, 64, 70], q_offset=[60, -10, 55])
    check_case(OPERATORS[op](shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("dims", [(8, 8), (24, 40), (96, 96), (192, 128), (256, 256), (72, 8)])
@pytest.mark.parametrize("op", ATTENTIONS)
def test_head_dims(op, dims, device, dtype):
    shape = TYPICAL.variant(lens_q=[70, 33], dim=dims[0], dim_v=dims[1], group=2)
    check_case(OPERATORS[op](shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("group", [1, 2, 3, 7, 12, 16, 33, 64])
@pytest.mark.parametrize("op", ["gate", *ATTENTIONS, "native_sparse_attention"])
def test_group_sizes(op, group, device, dtype):
    shape = TYPICAL.variant(lens_q=[50, 3], dim=16, dim_v=16, group=group, kernel_size=16)
    check_case(OPERATORS[op](shape.variant(kernel_stride=8), dtype, device), dtype, device)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
def test_block_sizes(block_size, device, dtype):
    shape = TYPICAL.variant(lens_q=[300, 17], block_size=block_size, topk=2, dim=16, dim_v=16)
    check_case(OPERATORS["selected_attention"](shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("topk", [1, 128])
@pytest.mark.parametrize("op", ["selected_attention", "native_sparse_attention"])
def test_topk_limits(op, topk, device, dtype):
    shape = TYPICAL.variant(topk=topk, block_size=16, dim=16, dim_v=16, group=2)
    if op == "native_sparse_attention" and topk == 1:
        pytest.skip("one initial and one local block are forced: topk is at least 2")
    check_case(OPERATORS[op](shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("scale", [0.0625, 1.0, 3.0])
@pytest.mark.parametrize("op", [*ATTENTIONS, "native_sparse_attention"])
def test_softmax_scale(op, scale, device, dtype):
    shape = TYPICAL.variant(softmax_scale=scale, dim=16, dim_v=16, group=2)
    check_case(OPERATORS[op](shape, dtype, device), dtype, device)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
@pytest.mark.parametrize("op", ATTENTIONS)
def test_no_gradient_at_lse(op, device, dtype):
    check_case(OPERATORS[op](TYPICAL, dtype, device), dtype, device, with_lse=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPERATORS)
def test_two_runs_give_the_same_bits(op, device):
    case = OPERATORS[op](TYPICAL, torch.bfloat16, device)
    douts = case.douts(torch.bfloat16, device)
    first, second = case.found(douts), case.found(douts)
    for name, a, b in zip(case.outputs, first[0], second[0], strict=True):
        assert_same_bits(name, a, b)
    for name, a, b in zip(case.names, first[1], second[1], strict=True):
        assert_same_bits(f"d{name}", a, b)


def _restrided(tensors, style):
    return [restride(x, style) if x.ndim == 3 else x for x in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("style", [s for s in STRIDE_STYLES if s != "contiguous"])
@pytest.mark.parametrize("op", OPERATORS)
def test_strides(op, style, device):
    """The same bits from every layout of the inputs and of dO; padding (NaN) is never read."""
    shape = TYPICAL.variant(kind="linear", dim=16, dim_v=16)
    case = OPERATORS[op](shape, torch.bfloat16, device)
    douts = case.douts(torch.bfloat16, device)
    dense = case.found(douts)
    keep = {i: x for i, x in enumerate(case.inputs) if case.names[i] in ("gates", "weight")}
    case.inputs = [keep.get(i, x) for i, x in enumerate(_restrided(case.inputs, style))]
    strided = case.found(_restrided(douts, style))
    for name, a, b in zip(case.outputs, dense[0], strided[0], strict=True):
        assert_same_bits(name, a, b)
    for name, a, b in zip(case.names, dense[1], strided[1], strict=True):
        assert_same_bits(f"d{name}", a.contiguous(), b.contiguous())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPERATORS)
def test_expanded_output_gradient(op, device):
    """o.sum().backward() hands over a dO whose strides are all zero."""
    case = OPERATORS[op](TYPICAL.variant(dim=16, dim_v=16), torch.bfloat16, device)
    ones = [
        torch.ones_like(x) if x is not None else None for x in case.douts(torch.bfloat16, device)
    ]
    expanded = [x.flatten()[:1].as_strided(x.shape, [0] * x.ndim) for x in ones]
    for name, a, b in zip(case.names, case.found(ones)[1], case.found(expanded)[1], strict=True):
        assert_same_bits(f"d{name}", a, b)


def _sequence_inputs(case, shape, b):
    """Slices of every packed input and output that belong to sequence b."""

    def span(lengths):
        return slice(sum(lengths[:b]), sum(lengths[: b + 1]))

    cmp = shape.cu_cmp().tolist()
    rows = shape.lens_k[b] // shape.kernel_stride
    spans = {"q": span(shape.lens_q), "k": span(shape.lens_k), None: slice(None)}
    spans["cmp"] = slice(cmp[b], cmp[b + 1])
    inputs = []
    for x, pack in zip(case.inputs, case.pack, strict=True):
        part = x[spans[pack]]
        if pack == "cmp":
            part = torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])
        inputs.append(part)
    return inputs, spans


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [x for x in OPERATORS if x != "gate"])
def test_a_batch_equals_a_loop_over_its_sequences(op, device):
    """Bit for bit, forward and backward: no sequence feels its neighbours."""
    shape = TYPICAL.variant(dim=16, dim_v=16, group=2)
    dtype = torch.bfloat16
    topk_idx = None
    if op == "selected_attention":
        topk_idx = random_topk_idx(2, shape.lens_q, shape.lens_k, shape.block_size, shape.topk)
    extra = {} if topk_idx is None else {"topk_idx": topk_idx}
    batch = OPERATORS[op](shape, dtype, device, **extra)
    douts = batch.douts(dtype, device)
    outs, grads = batch.found(douts)
    for b in range(len(shape.lens_q)):
        inputs, spans = _sequence_inputs(batch, shape, b)
        if topk_idx is not None:
            extra = {"topk_idx": topk_idx[:, spans["q"]].contiguous()}
        alone = OPERATORS[op](shape.of_sequence(b), dtype, device, **extra)
        alone.inputs = inputs
        sliced = []
        for x, pack in zip(douts, batch.out_pack, strict=True):
            part = x[:, spans["q"]] if pack == "lse" else x[spans[pack]]
            if pack == "cmp":
                behind = shape.lens_k[b] // shape.kernel_stride - part.shape[0]
                part = torch.cat([part, part.new_zeros(behind, *part.shape[1:])])
            sliced.append(part)
        outs_b, grads_b = alone.found(sliced)
        for name, pack, whole, part in zip(
            batch.outputs, batch.out_pack, outs, outs_b, strict=True
        ):
            want = whole[:, spans["q"]] if pack == "lse" else whole[spans[pack]]
            assert_same_bits(f"{name} of sequence {b}", part[: len(want)], want)
        for name, pack, whole, part in zip(batch.names, batch.pack, grads, grads_b, strict=True):
            if pack is not None:
                want = whole[spans[pack]]
                assert_same_bits(f"d{name} of sequence {b}", part[: len(want)], want)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32]))
@pytest.mark.parametrize("op", OPERATORS)
def test_partial_gradients(op, device, dtype):
    """Asking for one gradient gives the same one as asking for all."""
    case = OPERATORS[op](TYPICAL.variant(dim=16, dim_v=16), dtype, device)
    douts = case.douts(dtype, device)
    _, grads = case.found(douts)
    for i, name in enumerate(case.names):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(case.inputs)]
        (grad,) = grads_of(case.ours(*leaves), [leaves[i]], douts)
        assert_same_bits(f"d{name}", grad, grads[i])


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float32]))
@pytest.mark.parametrize("op", ATTENTIONS)
def test_default_head_scale(op, device, dtype):
    """softmax_scale defaults to D^-0.5."""
    shape = TYPICAL.variant(dim=16, dim_v=16)
    a = OPERATORS[op](shape, dtype, device)
    b = OPERATORS[op](shape.variant(softmax_scale=0.25), dtype, device)
    assert_same_bits("o", a.ours(*a.inputs)[0], b.ours(*b.inputs)[0])


def test_version():
    assert fsattn.__version__ == "0.1.0"
