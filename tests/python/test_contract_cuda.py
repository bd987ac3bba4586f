"""Promises that only a GPU can break: no synchronisation, no hidden allocation, streams, graphs."""

import pytest
import torch
from cases import OPERATORS, Shape
from support import DEVICES, assert_same_bits, randn, random_topk_idx

import fsattn

pytestmark = pytest.mark.alone
CUDA = [DEVICES[1]]
SHAPE = Shape(lens_q=[300, 70], dim=64, dim_v=64, group=4, block_size=64, topk=4)


IDS = random_topk_idx(2, SHAPE.lens_q, SHAPE.lens_k, 64, 4)


def _case(op, device, seed=0):
    extra = {"topk_idx": IDS} if op == "selected_attention" else {}
    case = OPERATORS[op](SHAPE, torch.bfloat16, device, seed=seed, **extra)
    return case, case.douts(torch.bfloat16, device)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("op", OPERATORS)
def test_no_host_synchronisation(op, device):
    case, douts = _case(op, device)
    case.found(douts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.found(douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _bytes_of_others(run):
    """Device memory that five runs take beyond what PyTorch's allocator reserves."""
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    return free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("op", OPERATORS)
def test_every_byte_comes_from_the_callers_allocator(op, device):
    """Free device memory changes only by what PyTorch's allocator reserves.

    The number is that of the whole GPU. Measured three times: what a call takes every time shows
    in all of them, what another process takes meanwhile hardly does.
    """
    case, douts = _case(op, device)
    case.found(douts)
    assert min(_bytes_of_others(lambda: case.found(douts)) for _ in range(3)) <= 0


def _selection(device, seed):
    """Inputs of a selection and its index, and both as one call."""
    cu, cu_cmp = SHAPE.cu(device)[0], SHAPE.cu_cmp(device)
    q = randn(370, 8, 64, dtype=torch.bfloat16, device=device, seed=seed)
    k_cmp = randn(23, 2, 64, dtype=torch.bfloat16, device=device, seed=seed + 1)
    sizes = {"kernel_size": 32, "kernel_stride": 16}

    def run():
        _, lse = fsattn.compressed_attention(
            q, k_cmp, k_cmp, cu, cu, cu_cmp, return_lse=True, **sizes
        )
        ids = fsattn.select_blocks(q, k_cmp, lse, cu, cu, cu_cmp, block_size=64, topk=4, **sizes)
        return ids, *fsattn.build_block_index(ids, cu, cu, block_size=64)

    return [q, k_cmp], run


def _assert_same_selection(found, want):
    """Entries behind the last used one are free."""
    used = [slice(None, int(n)) for n in want[1][:, -1]]
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    for head, rows in enumerate(used):
        assert torch.equal(found[2][head, rows], want[2][head, rows])


@pytest.mark.parametrize("device", CUDA)
def test_selection_and_index_run_without_the_host(device):
    """Neither synchronises, and both can be captured and replayed with new inputs."""
    inputs, run = _selection(device, 0)
    others, run_others = _selection(device, 9)
    want = run_others()
    assert not torch.equal(run()[0], want[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for x, y in zip(inputs, others, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    _assert_same_selection(found, want)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("op", OPERATORS)
def test_current_stream(op, device):
    """Work on a side stream waits for what that stream did before, and for nothing else."""
    case, douts = _case(op, device)
    want = case.found(douts)
    side = torch.cuda.Stream()
    late = [x.clone() for x in case.inputs]
    for x in late:
        x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, case.inputs, strict=True):
            x.copy_(y)
        case.inputs = late
        found = case.found(douts)
    side.synchronize()
    for a, b in zip([*want[0], *want[1]], [*found[0], *found[1]], strict=True):
        assert_same_bits(op, a, b)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("op", OPERATORS)
def test_cuda_graph(op, device):
    """Captured once, replayed with new inputs: the bits of an ordinary call."""
    case, douts = _case(op, device)
    other, _ = _case(op, device, seed=50)
    want = other.found(douts)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            case.found(douts)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.found(douts)
    for x, y in zip(case.inputs, other.inputs, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([*want[0], *want[1]], [*found[0], *found[1]], strict=True):
        assert_same_bits(op, a, b)
