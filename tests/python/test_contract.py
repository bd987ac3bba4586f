"""The promises of the library, and which test fails when one of them is broken.

Promise                               Test
------------------------------------  ------------------------------------------------------------
Exact selection                       test_properties: test_arbitrary_block_ids, test_random_shapes
Safe softmax, finite where exact is   test_finite_*, test_gradients_of_huge_logits_are_finite;
                                      test_cuda_edges: test_logits_*; test_checklist: test_6_*;
                                      test_properties: test_random_large_logits
fp16 partials are not rounded to bf16 test_fp16_keeps_its_precision
Error at most twice PyTorch's         test_operators: test_against_definition, test_compress_kinds
Statistics fp32, fp64 for fp64        cases.check_case in every comparison; test_lse_is_natural
Same bits in two runs                 test_operators: test_two_runs_give_the_same_bits
Same bits for any number of threads   test_threads_give_the_same_bits
No influence of batch neighbours      test_operators: test_a_batch_equals_a_loop_over_its_sequences;
                                      test_select_blocks: test_select_batch_equals_loop_and_repeats;
                                      test_neighbours_with_nan_and_inf
Inputs are not written                test_inputs_stay_as_they_are
Strides honoured, dO as well          test_operators: test_strides, test_expanded_output_gradient;
                                      test_properties: test_random_strides
One call equals its parts             test_native_equals_its_parts
Workspace: formula, user-set cap      test_memory
Linear memory                         test_memory
No synchronisation, no allocation     test_contract_cuda (needs a GPU)
Current stream, CUDA graphs           test_contract_cuda (needs a GPU)
torch.compile(fullgraph=True)         test_compile_fullgraph, test_torch_integration
torch.library.opcheck                 test_torch_integration
torch.utils.checkpoint                test_checkpoint, test_torch_integration
Bad input: type, name, rule, value    test_bad_calls
Which kernel ran can be asked         test_explain_*, test_log_plan
Published modules and checkpoints     test_module, test_module_golden
Published configurations              test_configurations

Rule of the operators                 Test
------------------------------------  ------------------------------------------------------------
Head dims, groups, blocks, topk       test_operators: test_head_dims, test_group_sizes,
                                      test_block_sizes, test_topk_limits
Positions, q_offset                   test_operators: test_prefix_cache, test_query_offset,
                                      test_more_queries_than_keys
Sequences of 0 and 1, any batch       test_operators: LENGTHS; test_large_batch_of_tiny_sequences;
                                      test_torch_integration: test_empty
More than 2^31 elements               test_cuda_scale; test_checklist: test_8_*
A row that sees no key                test_selected_attention: test_empty_rows;
                                      test_checklist: test_2_*
Compression, rows behind the last     test_operators: test_compress_kinds; test_checklist: test_1_*
Selection: weights, ties, forced      test_checklist: test_3_*, test_4_*; test_select_blocks
A row of topk_idx is a set            test_selected_attention
The block index                       test_select_blocks: test_block_index*;
                                      test_selected_attention: test_block_index_passed_in
A window of w + 1 keys                test_checklist: test_7_*
Gates                                 test_operators: test_against_definition; test_torch_integration
The paged cache                       test_paged*; test_checklist: test_10_*
Gradients: subsets, layouts, twice    test_operators: test_partial_gradients;
                                      test_torch_integration: test_gradients_arrive_in_any_layout,
                                      test_backward_twice
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import ATTENTIONS, OPERATORS, Shape, nsa_case, selected_case, window_case
from support import DEVICES, assert_same_bits, check, cu_seqlens, device_types, randn
from torch.utils.checkpoint import checkpoint

import fsattn

SMALL = Shape(lens_q=[70, 33], dim=16, dim_v=16)


def _one_call_each(device="cpu", dtype=torch.bfloat16):
    return {op: make(SMALL, dtype, device) for op, make in OPERATORS.items()}


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("op", ATTENTIONS)
def test_lse_is_natural(op, device, dtype):
    """One visible key: o is its value, lse is scale * q.k in natural units, exactly 8 here."""
    shape = Shape(lens_q=[16], kernel_size=16, dim=16, dim_v=16, window_size=0, group=1)
    case = OPERATORS[op](shape, dtype, device)
    q, k, v = (torch.ones_like(x) for x in case.inputs)
    k *= 2
    o, lse = case.ours(q, k, v)
    seen = {"window_attention": 1, "compressed_attention": 1}.get(op)
    row = -1
    if seen is None:
        ids = torch.zeros(2, 16, 3, dtype=torch.int32)
        o, lse = selected_case(shape, dtype, device, topk_idx=ids).ours(q, k, v)
        row = 0
    assert (o[row] == 1).all()
    assert lse[0, row].item() == pytest.approx(8.0, abs=1e-5)


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("op", ATTENTIONS)
def test_finite_for_the_largest_values(op, device, dtype):
    """Equal values at the edge of the dtype: their average is that value, not infinity."""
    case = OPERATORS[op](SMALL.variant(lens_q=[90], window_size=80), dtype, device)
    q, k, v = case.inputs
    top = torch.finfo(dtype).max
    o, lse = case.ours(q, k, torch.full_like(v, top))
    assert (lse > -torch.inf).any()
    assert o.isfinite().all()
    # Sums of top overflow in PyTorch: as exact as its average of ones.
    ones = torch.ones_like(v)
    truth = case.ref(*[x.cpu().double() for x in (q, k, ones)])[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same = case.ref(*[x.cpu().to(wide) for x in (q, k, ones)])[0].to(dtype)
    check("o / top", (o.double() / top).to(dtype), truth, same)


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("op", ATTENTIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_for_the_largest_logits(op, sign, device, dtype):
    """Logits of one sign at the edge of what fp32 (fp16: the inputs) can hold."""
    shape = SMALL.variant(lens_q=[90], window_size=80, softmax_scale=1.0)
    case = OPERATORS[op](shape, dtype, device)
    q, k, v = case.inputs
    # Powers of two: every product and sum is exact, so all logits are equal.
    big = 2.0**15 if dtype == torch.float16 else 2.0**60
    q, k = torch.full_like(q, big), torch.full_like(k, sign * big)
    o, lse = case.ours(q, k, v)
    seen = (lse > -torch.inf).T
    assert o.isfinite().all() and lse.T[seen].isfinite().all()
    truth = case.ref(*[x.cpu().double() for x in (q, k, v)])[0]
    same = case.ref(*[x.cpu().float() for x in (q, k, v)])[0].to(dtype)
    check("o", o, truth, same)


@pytest.mark.parametrize(("device", "dtype"), device_types())
@pytest.mark.parametrize("op", ATTENTIONS)
def test_gradients_of_huge_logits_are_finite(op, device, dtype):
    """At 1e9 a unit in the last place of fp32 is worth 64: exp(logit - lse) of the backward may not
    come out as e^64 where the forward has added up the logit in another order."""
    shape = Shape(lens_q=[200], dim=128, dim_v=128, kernel_size=16, topk=6, window_size=150)
    case = OPERATORS[op](shape, dtype, device)
    for i in (0, 1):
        case.inputs[i] = (case.inputs[i].double() * 14_000).clamp(-60_000, 60_000).to(dtype)
    do, dlse = case.douts(dtype, device)
    outs, grads = case.found([do, dlse / 8])
    assert float(outs[1].max()) > 2e8
    truth = case.truth([do, dlse / 8])[1]
    for name, found, exact in zip(case.names, grads, truth, strict=True):
        assert found.isfinite().all(), f"d{name}: {int((~found.isfinite()).sum())} not finite"
        # P may be 0 or 1 by mistake, so a gradient is a sum of other terms, but of such ones.
        assert float(found.abs().max()) <= 3 * float(exact.abs().max()), f"d{name}"


@pytest.mark.parametrize("device", [DEVICES[1], "cpu"])
def test_fp16_keeps_its_precision(device):
    """fp16 has 3 bits more than bf16; partial results rounded through bf16 would lose them."""
    shape = Shape(lens_q=[200], dim=64, dim_v=64, topk=6)
    case = selected_case(shape, torch.float16, device)
    outs, grads = case.found(case.douts(torch.float16, device))
    true_outs, true_grads = case.truth(case.douts(torch.float16, device))
    pairs = [("o", outs[0], true_outs[0]), *zip(case.names, grads, true_grads, strict=True)]
    for name, found, truth in pairs:
        error = (found.cpu().double() - truth).square().mean().sqrt()
        # One rounding to bf16 of every value gives 2^-9 / sqrt(3) of the values' rms.
        assert error < 2.0**-9 / 3**0.5 / 2 * truth.square().mean().sqrt(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_neighbours_with_nan_and_inf(op, poison, device):
    """A broken sequence breaks itself only."""
    shape = SMALL.variant(lens_q=[48, 64, 48])
    case = OPERATORS[op](shape, torch.bfloat16, device)
    douts = case.douts(torch.bfloat16, device)
    clean_outs, clean_grads = case.found(douts)
    cmp = shape.cu_cmp().tolist()
    for i, pack in enumerate(case.pack):
        a, b = (cmp[1], cmp[2]) if pack == "cmp" else (48, 112)
        case.inputs[i] = case.inputs[i].clone()
        case.inputs[i][a:b] = poison
    outs, grads = case.found(douts)
    for rows in (slice(0, 48), slice(112, 160)):
        assert_same_bits("o", outs[0][rows], clean_outs[0][rows])
        assert_same_bits("lse", outs[1][:, rows], clean_outs[1][:, rows])
    for name, pack, a, b in zip(case.names, case.pack, grads, clean_grads, strict=True):
        ends = (cmp[1], cmp[2]) if pack == "cmp" else (48, 112)
        assert_same_bits(f"d{name}", a[: ends[0]], b[: ends[0]])
        assert_same_bits(f"d{name}", a[ends[1] :], b[ends[1] :])


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention"])
def test_keys_that_nobody_sees_do_not_matter(op):
    """NaN in keys and values behind every mask never reaches a result. Not so on CUDA, where the
    hidden values of a tile are multiplied by P = 0."""
    shape = SMALL.variant(lens_q=[20], lens_k=[80], q_offset=[20], window_size=3, block_size=16)
    ids = torch.zeros(2, 20, 2, dtype=torch.int32)
    ids[..., 1] = 3  # the block behind every query
    if op == "selected_attention":
        case = selected_case(shape, torch.bfloat16, topk_idx=ids)
        hidden = slice(16, None)
    else:
        case = OPERATORS[op](shape, torch.bfloat16)
        hidden = slice(40, None) if op == "window_attention" else slice(1, None)
    clean = case.found(case.douts(torch.bfloat16, "cpu"))
    for i in (1, 2):
        case.inputs[i] = case.inputs[i].clone()
        case.inputs[i][hidden] = math.nan
    dirty = case.found(case.douts(torch.bfloat16, "cpu"))
    for a, b in zip(clean[0], dirty[0], strict=True):
        assert_same_bits("output", a, b)
    for name, a, b in zip(case.names, clean[1], dirty[1], strict=True):
        assert_same_bits(f"d{name}", a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_stay_as_they_are(device):
    for op, case in _one_call_each(device).items():
        before = [x.clone() for x in case.inputs]
        douts = case.douts(torch.bfloat16, device)
        kept = [x.clone() for x in douts]
        case.found(douts)
        for a, b in zip([*before, *kept], [*case.inputs, *douts], strict=True):
            assert_same_bits(op, a, b)


@pytest.mark.parametrize(("device", "dtype"), device_types([torch.float64, torch.bfloat16]))
def test_native_equals_its_parts(device, dtype):
    """native_sparse_attention against the single operators of the library."""
    shape = Shape(lens_q=[150, 33], dim=32, dim_v=16, block_size=16, topk=4)
    case = nsa_case(shape, dtype, device)
    q, k, v, k_cmp, v_cmp, gates = case.inputs
    cu_q, cu_k = shape.cu(device)
    cus = (cu_q, cu_k, shape.cu_cmp(device))
    sizes = {"kernel_size": 32, "kernel_stride": 16}
    o_cmp, lse = fsattn.compressed_attention(q, k_cmp, v_cmp, *cus, return_lse=True, **sizes)
    rule = {"block_size": 16, "topk": 4, "init_blocks": 1, "local_blocks": 1}
    ids = fsattn.select_blocks(q, k_cmp, lse, *cus, **sizes, **rule)
    o_sel = fsattn.selected_attention(q, k, v, ids, cu_q, cu_k, block_size=16)
    o_win = fsattn.window_attention(q, k, v, cu_q, cu_k, window_size=shape.window_size)
    parts = fsattn.gate(o_cmp, o_sel, o_win, gates)
    (one,) = case.ours(*case.inputs)
    eps = torch.finfo(dtype).eps
    assert (one - parts).abs().max() <= 2 * eps * parts.abs().max()


_THREADS = """
import hashlib, os, sys
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:{threads}]))
sys.path[:0] = {path!r}
import torch
torch.set_num_threads({threads})
from cases import OPERATORS, Shape
shape = Shape(lens_q=[300, 0, 129, 1], dim=32, dim_v=32, group=4)
for op, make in OPERATORS.items():
    for dtype in (torch.float32, torch.bfloat16):
        case = make(shape, dtype)
        outs, grads = case.found(case.douts(dtype, "cpu"))
        for name, x in zip([*case.outputs, *case.names], [*outs, *grads], strict=True):
            bits = x.contiguous().view(torch.uint8).numpy().tobytes()
            print(op, dtype, name, hashlib.sha256(bits).hexdigest())
"""


def _bits_with_threads(threads):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    script = _THREADS.format(threads=threads, path=sys.path[:])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPU cores")
def test_threads_give_the_same_bits():
    """One core and one thread against all of them, in processes of their own."""
    one, many = _bits_with_threads(1), _bits_with_threads(len(os.sched_getaffinity(0)))
    assert len(one) > 50 and one == many


@pytest.mark.parametrize("op", OPERATORS)
def test_checkpoint(op):
    """Recomputation in the backward gives the same bits."""
    case = OPERATORS[op](SMALL, torch.float32)
    douts = case.douts(torch.float32, "cpu")
    plain = case.found(douts)
    direct = case.ours
    case.ours = lambda *tensors: checkpoint(direct, *tensors, use_reentrant=False)
    again = case.found(douts)
    for a, b in zip([*plain[0], *plain[1]], [*again[0], *again[1]], strict=True):
        assert_same_bits(op, a, b)


@pytest.mark.parametrize("op", OPERATORS)
def test_compile_fullgraph(op):
    """One graph without a break, forward and backward, and the same bits."""
    case = OPERATORS[op](SMALL, torch.float32)
    douts = case.douts(torch.float32, "cpu")
    plain = case.found(douts)
    torch._dynamo.reset()
    case.ours = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    again = case.found(douts)
    for a, b in zip([*plain[0], *plain[1]], [*again[0], *again[1]], strict=True):
        assert_same_bits(op, a, b)


def test_gradcheck():
    """Analytical against numerical gradients, without any reference."""
    shape = Shape(lens_q=[34, 5], dim=8, dim_v=8, heads_kv=1, group=2, block_size=16, topk=2)
    for op in ATTENTIONS:
        case = OPERATORS[op](shape, torch.float64)
        leaves = [x.requires_grad_() for x in case.inputs]

        def finite(*tensors, call=case.ours):
            o, lse = call(*tensors)
            return o, torch.where(lse == -torch.inf, 0.0, lse)

        assert torch.autograd.gradcheck(finite, leaves, fast_mode=True)


def test_explain_names_the_plan():
    """The plan of a call: which backend and algorithm, and the workspace in bytes."""
    case = window_case(SMALL, torch.float32)
    cu_q, cu_k = SMALL.cu()
    text = fsattn.explain(fsattn.window_attention, *case.inputs, cu_q, cu_k, window_size=5)
    assert "cpu" in text.lower() and "workspace" in text.lower() and "window" in text.lower()


def test_explain_of_the_build():
    text = fsattn.explain()
    assert fsattn.__version__ in text and "cpu" in text.lower()


def test_explain_refuses_what_the_call_refuses():
    case = window_case(SMALL, torch.float32)
    cu_q, cu_k = SMALL.cu()
    with pytest.raises(ValueError, match=r"window_size.*-5"):
        fsattn.explain(fsattn.window_attention, *case.inputs, cu_q, cu_k, window_size=-5)


def test_log_plan(capfd):
    """FSATTN_LOG=plan prints the plan of every new problem once; without it nothing is printed."""
    lines = (
        "import torch, fsattn",
        "x = torch.randn(40, 2, 16); cu = torch.tensor([0, 40], dtype=torch.int32)",
        "for _ in range(3): fsattn.window_attention(x, x, x, cu, cu, window_size=5)",
    )
    script = f"import sys; sys.path[:0] = {sys.path!r}\n" + "\n".join(lines)
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "FSATTN_LOG": "plan"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert (done.stdout + done.stderr).count("fsattn: window_attention") == 1
    if "FSATTN_LOG" not in os.environ:
        capfd.readouterr()
        exec("\n".join(lines), {})
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("device", "dtype", "batch"),
    [
        ("cpu", torch.float32, 1000),
        # More sequences than a grid has CTAs in its second dimension.
        pytest.param("cuda", torch.bfloat16, 70_000, marks=DEVICES[1].marks),
    ],
)
def test_large_batch_of_tiny_sequences(device, dtype, batch):
    """Sequences of 0 to 3 tokens, of which the definition computes the first thousand."""
    lengths = [(7 * i) % 4 for i in range(batch)]
    few = Shape(lens_q=lengths[:1000], dim=8, dim_v=8, heads_kv=1, group=1, topk=1)
    many = few.variant(lens_q=lengths)
    ids = torch.zeros(1, sum(lengths), 1, dtype=torch.int32)
    case = selected_case(many, dtype, device, topk_idx=ids)
    start = selected_case(few, dtype, topk_idx=ids[:, : sum(few.lens_q)])
    start.inputs = [x[: sum(few.lens_q)].cpu() for x in case.inputs]
    leaves = [x.requires_grad_() for x in case.inputs]
    o, lse = case.ours(*leaves)
    grads = torch.autograd.grad(o.float().square().sum() + lse.sum(), leaves)
    assert all(x.isfinite().all() for x in (o, lse, *grads))
    truth, same, stats = (
        start.ref(*[x.to(kind) for x in start.inputs])
        for kind in (torch.float64, dtype, torch.float32)
    )
    rows = slice(0, sum(few.lens_q))
    check("o", o[rows], truth[0], same[0])
    check("lse", lse[:, rows], truth[1], stats[1])


def test_tensors_may_end_before_the_page_ends():
    """One token in a tensor of one row; a sanitizer sees a read beyond it."""
    x, cu = randn(1, 1, 8, dtype=torch.float32), cu_seqlens([1])
    o = fsattn.window_attention(x, x, x, cu, cu, window_size=100)
    assert_same_bits("o", o, x)
