"""How calls run on a GPU: the same bits every time, under compile, in graphs, on several streams."""

import copy

import pytest
import torch
from cases import OPERATORS, Shape
from cuda_support import (
    CALLS,
    DEVICE,
    NEEDS_CUDA,
    WINDOWS,
    Sizes,
    assert_same_results,
    device_randn,
    forward_backward,
    make_douts,
)
from support import assert_same_bits, check

import fsattn

pytestmark = NEEDS_CUDA

# Enough work that thread blocks of a whole GPU run side by side, in varying order.
BUSY = Sizes([6000, 1, 2191], heads_q=16, heads_kv=4, dim=128, topk=8)


def _with_douts(op, sizes, seed=0):
    call = CALLS[op](sizes, seed)
    if call.is_ranking:
        return call, None
    with torch.no_grad():
        return call, make_douts(call.run(*call.inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("op", CALLS)
def test_runs_are_equal(op, dtype):
    """The same bits again and again, also while another stream keeps the GPU busy."""
    call, douts = _with_douts(op, Sizes(**{**vars(BUSY), "dtype": dtype}))
    want = forward_backward(call, douts)
    assert_same_results(op, forward_backward(call, douts), want)
    noise, side = device_randn(2048, 2048), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(100):
            noise = noise @ noise * 1e-3
    found = forward_backward(call, douts)
    torch.cuda.synchronize()
    assert_same_results(op, found, want)


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", CALLS)
def test_deterministic_algorithms_change_nothing(op, request):
    """No error, no warning, the same bits; PyTorch fills new memory with NaN in this mode."""
    call, douts = _with_douts(op, BUSY)
    want = forward_backward(call, douts)
    request.getfixturevalue("deterministic_algorithms")
    assert_same_results(op, forward_backward(call, douts), want)


@pytest.mark.parametrize("op", CALLS)
def test_two_streams_at_once(op):
    """Calls that overlap on two streams give what they give one after the other."""
    calls = [_with_douts(op, BUSY, seed) for seed in (1, 11)]
    want = [forward_backward(*c) for c in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    found = [[], []]
    for _ in range(3):
        for i, (stream, pair) in enumerate(zip(streams, calls, strict=True)):
            with torch.cuda.stream(stream):
                found[i].append(forward_backward(*pair))
    torch.cuda.synchronize()
    for results, expected in zip(found, want, strict=True):
        for result in results:
            assert_same_results(op, result, expected)


@pytest.mark.parametrize("cap", [0, 2**20, 2**26])
def test_workspace_cap(cap):
    """Under a cap the work goes in pieces: the forward keeps its bits, sums of gradients their value."""
    call, douts = _with_douts("selected_attention", BUSY)
    want = forward_backward(call, douts)
    ids, longest = call.extras["topk_idx"], BUSY.longest()
    call.run = lambda q, k, v: fsattn.selected_attention(
        q, k, v, ids, BUSY.cu(), BUSY.cu(), block_size=64, return_lse=True, workspace_cap=cap,
        **longest,
    )  # fmt: skip
    found = forward_backward(call, douts)
    for name, a, b in zip(("o", "lse"), found[0], want[0], strict=True):
        assert_same_bits(name, a, b)
    for name, a, b in zip("qkv", found[1], want[1], strict=True):
        error = float((a.float() - b.float()).abs().max())
        assert error <= 2 * torch.finfo(a.dtype).eps * float(b.abs().max()), f"d{name}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("op", CALLS)
def test_the_device_of_the_tensors_counts(op, current):
    """Whatever GPU is current, the work runs on the one of the tensors and is right."""
    sizes = Sizes([700, 90])
    call, douts = _with_douts(op, sizes)
    want = forward_backward(call, douts)
    with torch.cuda.device(1 - current):
        other, _ = _with_douts(op, sizes)
    with torch.cuda.device(current):
        moved = None if douts is None else [d.to(f"cuda:{1 - current}") for d in douts]
        found = forward_backward(other, moved)
    moved_back = [[x.to(DEVICE) for x in part] for part in found]
    assert_same_results(op, moved_back, want)


@pytest.mark.parametrize("op", OPERATORS)
def test_compile_every_operator(op):
    """One graph, forward and backward, with the bits of eager execution."""
    shape = Shape(lens_q=[150, 70], dim=64, dim_v=64, block_size=64)
    case = OPERATORS[op](shape, torch.bfloat16, DEVICE)
    douts = case.douts(torch.bfloat16, DEVICE)
    want = case.found(douts)
    case.ours = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    assert_same_results(op, case.found(douts), want)


def _whole_inputs():
    shapes = [(2, 300, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64), (2, 300, 4, 3)]
    return [device_randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def _whole(q, k, v, gates):
    k_cmp, _ = fsattn.compress_kv(k, **WINDOWS)
    v_cmp, _ = fsattn.compress_kv(v, **WINDOWS)
    return fsattn.native_sparse_attention(q, k, v, k_cmp, v_cmp, gates, topk=4)


def _gradients(function, inputs, dout):
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach()], list(torch.autograd.grad(output, leaves, dout))


def test_compile_the_whole_operator():
    """Inductor, one graph, forward and backward: the bits of eager execution."""
    pytest.importorskip("triton")
    inputs, dout = _whole_inputs(), device_randn(2, 300, 4, 64, seed=9)
    want = _gradients(_whole, inputs, dout)
    found = _gradients(torch.compile(_whole, fullgraph=True), inputs, dout)
    assert_same_results("compiled", found, want)


def test_the_whole_operator_in_a_graph():
    """With the second stream of the backward, which is made while this stream is captured."""
    shapes = [(2, 700, 4, 128), (2, 700, 2, 128), (2, 700, 2, 128), (2, 700, 4, 3)]
    inputs = [device_randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    dout = device_randn(2, 700, 4, 128, seed=9)
    want = _gradients(_whole, inputs, dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        found = _gradients(_whole, inputs, dout)
    for _ in range(2):
        for x in (*found[0], *found[1]):
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_results("replayed", found, want)
    assert_same_results("eager again", _gradients(_whole, inputs, dout), want)


def test_the_whole_operator_without_gradients():
    """Nobody reads o_sel then, and o takes its place: the same bits."""
    inputs = _whole_inputs()
    with torch.no_grad():
        found = _whole(*inputs)
    inputs[0].requires_grad_()
    assert_same_bits("o", found, _whole(*inputs).detach())


def test_logits_and_ready_gates_have_the_same_gradients():
    """Gates of logits become a factor of P in the backward, ready ones of the output gradients."""
    inputs, dout = _whole_inputs(), device_randn(2, 300, 4, 64, seed=9)
    k_cmp, v_cmp = (fsattn.compress_kv(x, **WINDOWS)[0] for x in inputs[1:3])

    def whole(activation):
        def call(q, k, v, gates):
            g = gates if activation else torch.sigmoid(gates.float()).to(gates.dtype)
            return fsattn.native_sparse_attention(
                q, k, v, k_cmp, v_cmp, g, topk=4, activation=activation
            )

        return call

    logits, ready = (
        _gradients(whole(activation), inputs, dout) for activation in ("sigmoid", None)
    )
    for mine, theirs in zip(logits[1], ready[1], strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 2**-6  # roundings of bfloat16, one of them the gates' own


def _module(**options):
    torch.manual_seed(0)
    rope = fsattn.RopeConfig(head_dim=64, max_position_embeddings=1024)
    layer = fsattn.NativeSparseAttention(128, 4, 2, 64, rope_config=rope, topk=4, **options)
    return layer.to(DEVICE, torch.bfloat16)


def _step(layer, x, dout, *arguments, **options):
    """Output and gradients of the input and of every parameter."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, *arguments, **options)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dout)
    return [y.detach()], list(gradients)


def test_compile_the_module():
    """Inductor, one graph. It fuses and rounds the layers around the operators in its own way, so
    that its results are as far from float64 as those of eager execution, not equal to them."""
    pytest.importorskip("triton")
    layer, cu = _module(), torch.tensor([0, 200, 201, 500], dtype=torch.int32, device=DEVICE)
    x, dout = device_randn(500, 128, seed=1), device_randn(500, 128, seed=2)
    # A selection decided once: a rounding more or less may exchange blocks of equal rank.
    _, ids = layer(x, cu, return_topk_idx=True)
    eager = _step(layer, x, dout, cu, topk_idx=ids)
    found = _step(torch.compile(layer, fullgraph=True), x, dout, cu, topk_idx=ids)
    exact = copy.deepcopy(layer).cpu().double()
    truth = _step(exact, x.cpu().double(), dout.cpu().double(), cu.cpu(), topk_idx=ids.cpu())
    names = ["y", "dx", *(name for name, _ in layer.named_parameters())]
    tensors = ([*outputs, *gradients] for outputs, gradients in (found, truth, eager))
    for name, *triple in zip(names, *tensors, strict=True):
        check(name, *triple)


@pytest.mark.parametrize("shared_kv", [True, False])
def test_a_training_step_in_a_graph(shared_kv):
    """Forward, backward and an update, captured once and replayed with new inputs."""
    eager, captured = (_module(shared_kv=shared_kv) for _ in range(2))
    cu = torch.tensor([0, 200, 201, 500], dtype=torch.int32, device=DEVICE)
    batches = [(device_randn(500, 128, seed=s), device_randn(500, 128, seed=s + 1)) for s in (1, 5)]
    x, dout = (torch.zeros_like(b) for b in batches[0])

    def train(layer, x, dout):
        y, (dx, *gradients) = _step(layer, x, dout, cu)
        with torch.no_grad():
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        return y[0], dx

    saved = [p.detach().clone() for p in captured.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(captured, x, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train(captured, x, dout)
    with torch.no_grad():
        for parameter, value in zip(captured.parameters(), saved, strict=True):
            parameter.copy_(value)
    for batch in batches:
        want = train(eager, *batch)
        x.copy_(batch[0])
        dout.copy_(batch[1])
        graph.replay()
        torch.cuda.synchronize()
        for name, mine, theirs in zip(("y", "dx"), results, want, strict=True):
            assert_same_bits(name, mine, theirs)
    for mine, theirs in zip(captured.parameters(), eager.parameters(), strict=True):
        assert_same_bits("parameter", mine.detach(), theirs.detach())
