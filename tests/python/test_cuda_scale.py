"""Large inputs on a GPU: long sequences, tensors beyond 2^31 elements, memory of a forward pass."""

import gc

import pytest
import reference
import torch
from cuda_support import (
    CALLS,
    DEVICE,
    GIB,
    NEEDS_CUDA,
    WINDOWS,
    Sizes,
    forward_backward,
    make_douts,
    whole,
)
from reference.attention import compressed_mask, masked_attention, selected_mask, window_mask
from support import assert_same_bits, check

pytestmark = [*NEEDS_CUDA, pytest.mark.alone]

LONG = Sizes([300_000], topk=16)
SCALE = LONG.dim**-0.5


@pytest.fixture(autouse=True)
def free_memory():
    """The large tensors of one test must be gone when the next one starts."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _sampled_rows(count=20):
    """Queries around the edges of windows and blocks, and random ones."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(0, LONG.total, (count,), generator=generator)
    edges = torch.tensor([0, 1, 31, 32, 63, 64, 511, 513, LONG.total - 64, LONG.total - 1])
    return torch.cat([edges, drawn]).unique().to(DEVICE)


def _compress(x):
    """compress_kv of one sequence by the mean."""
    return x.unfold(0, WINDOWS["kernel_size"], WINDOWS["kernel_stride"]).mean(-1)


def _masks(op, rows, num_keys, ids):
    with torch.device(DEVICE):
        if op == "compressed_attention":
            return compressed_mask(rows, num_keys, *WINDOWS.values())
        if op == "selected_attention":
            return selected_mask(ids[:, rows], rows, num_keys, LONG.block_size)
        return window_mask(rows, num_keys, LONG.window_size)


def _definition(op, rows, ids, q, k, v, gates=None):
    """Outputs of the sampled queries by the reference formulas, in the dtype of the inputs."""
    if op != "native_sparse_attention":
        masks = _masks(op, rows, k.shape[0], ids)
        return masked_attention(q[rows], k, v, masks, SCALE)
    branches = [_definition("compressed_attention", rows, ids, q, _compress(k), _compress(v))[0]]
    branches += [_definition(b, rows, ids, q, k, v)[0] for b in ATTENTION_OF_TOKENS]
    return (reference.gate(*branches, gates[rows]),)


ATTENTION_OF_TOKENS = ["selected_attention", "window_attention"]


def _sparse_douts(outputs, rows, names):
    """Gradients that are zero but for the sampled queries: the definition then needs only those."""
    douts = []
    for o, dense, name in zip(outputs, make_douts(outputs), names, strict=True):
        dout = torch.zeros_like(o)
        where = (slice(None), rows) if name == "h" else (rows,)
        dout[where] = dense[where]
        douts.append(dout)
    return douts


def _sampled(call, outputs, rows):
    return [o[:, rows] if of == "h" else o[rows] for o, of in zip(outputs, call.of_outputs)]


def _definition_gradients(op, call, dtype, rows, ids, douts):
    """(outputs, gradients) of the sampled queries, computed in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in call.inputs]
    outputs = _definition(op, rows, ids, *leaves)
    used = [d.to(o.dtype) for o, d in zip(outputs, _sampled(call, douts, rows), strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, used)
    return [o.detach() for o in outputs], gradients


def _checked_rows(rows, length):
    """Rows of a gradient to compare: those of the sampled queries and many others."""
    generator = torch.Generator().manual_seed(6)
    others = torch.randint(0, length, (3000,), generator=generator).to(DEVICE)
    return torch.cat([rows[rows < length], others]).unique()


@pytest.mark.parametrize(
    "op",
    [
        "compressed_attention",
        "selected_attention",
        "window_attention",
        "native_sparse_attention",
    ],
)
def test_300k_tokens(op):
    """Sampled queries, and the gradients that flow from them, against the float64 formulas."""
    rows, call = _sampled_rows(), CALLS[op](LONG, seed=3)
    ids = call.extras.get("topk_idx")
    if op == "native_sparse_attention":
        ids = whole(LONG, *call.inputs, return_topk_idx=True)[1]
    with torch.no_grad():
        douts = _sparse_douts(call.run(*call.inputs), rows, call.of_outputs)
    outputs, gradients = forward_backward(call, douts)
    truth, true_gradients = _definition_gradients(op, call, torch.float64, rows, ids, douts)
    same, same_gradients = _definition_gradients(op, call, LONG.dtype, rows, ids, douts)
    statistics, _ = _definition_gradients(op, call, torch.float32, rows, ids, douts)
    same = [s if of == "h" else x for x, s, of in zip(same, statistics, call.of_outputs)]
    for i, triple in enumerate(zip(_sampled(call, outputs, rows), truth, same, strict=True)):
        check(f"{op}, output {i}", *triple)
    for i, triple in enumerate(zip(gradients, true_gradients, same_gradients, strict=True)):
        at = _checked_rows(rows, triple[0].shape[0])
        check(f"{op}, gradient {i}", *(x[at] for x in triple))
    elsewhere = torch.ones(LONG.total, dtype=torch.bool, device=DEVICE)
    elsewhere[rows] = False
    assert not gradients[0][elsewhere].any(), "dq of queries whose dO is zero"


def _block_scores(q, k_cmp, rows, num_blocks):
    """[Hkv, rows, blocks] by definition: a block's windows are 4 b - 1 .. 4 b + 3."""
    with torch.device(DEVICE):
        mask = compressed_mask(rows, k_cmp.shape[0], *WINDOWS.values())[0]
    group = q.shape[1] // k_cmp.shape[1]
    s = torch.einsum("qhd,khd->hqk", q[rows].double(), k_cmp.double().repeat_interleave(group, 1))
    p = torch.where(mask, torch.softmax(torch.where(mask, s * SCALE, -torch.inf), -1), 0.0)
    p = p.nan_to_num().unflatten(0, (-1, group)).sum(1)
    first = LONG.block_size // WINDOWS["kernel_stride"]
    span = range(first - 1, 2 * first)
    weights = [reference.overlap_weight(i, 1, *WINDOWS.values(), LONG.block_size) for i in span]
    behind = first * num_blocks + len(span) - first - 1 - p.shape[-1]
    windows = torch.nn.functional.pad(p, (1, behind)).unfold(-1, len(span), first)
    return windows @ torch.tensor(weights, dtype=torch.float64, device=DEVICE)


def test_select_blocks_of_300k_tokens():
    """Sampled rows: forced blocks, and no block left out that scores better than one taken."""
    call, rows = CALLS["select_blocks"](LONG, seed=4), _sampled_rows()
    (ids,) = call.run(*call.inputs)
    num_blocks = -(-LONG.total // LONG.block_size)
    scores = _block_scores(*call.inputs[:2], rows, num_blocks)
    own = rows // LONG.block_size
    for head in range(LONG.heads_kv):
        for i, t in enumerate(rows.tolist()):
            row = ids[head, t]
            count = min(LONG.topk, int(own[i]) + 1)
            taken = row[:count].long()
            assert bool((row[count:] == -1).all()) and bool((taken[1:] > taken[:-1]).all())
            assert taken[0] == 0 and taken[-1] == own[i]
            left = scores[head, i, : own[i] + 1].clone()
            left[taken] = -1.0
            ranked = scores[head, i, taken[1:-1]]
            # Scores closer than the fp32 statistics that they are made of may swap.
            if ranked.numel():
                assert float(left.max()) <= float(ranked.min()) * (1 + 2e-5), (head, t)


# 66 sequences of 8000 tokens; 32 heads of 128 numbers: the last sequence lies across 2^31.
HUGE = Sizes([8000] * 66, heads_q=32, heads_kv=32, dim=128)


def _part_of(call, sizes, name, sequence):
    """Rows of one sequence in a tensor of the whole batch."""
    cu = (sizes.cu_cmp() if name == "cmp" else sizes.cu()).tolist()
    rows = slice(cu[sequence], cu[sequence + 1])
    return (slice(None), rows) if name == "h" else rows


def _alone(op, call, sizes, douts, sequence):
    """Outputs and gradients of one sequence, computed without the others."""
    single = Sizes(**{**vars(sizes), "lens": [sizes.lens[sequence]]})

    def slices(tensors, names):
        return [
            x[_part_of(call, sizes, of, sequence)] for x, of in zip(tensors, names, strict=True)
        ]

    extras = {}
    if "topk_idx" in call.extras:
        extras["topk_idx"] = call.extras["topk_idx"][_part_of(call, sizes, "h", sequence)]
    alone = CALLS[op](single, 0, **extras)
    alone.inputs = slices(call.inputs, call.of_inputs)
    if douts is not None:
        douts = slices(douts, call.of_outputs)
        if op == "compress_kv":  # as many rows as the bound of the output, the last ones unused
            douts = [
                torch.nn.functional.pad(d, (0, 0, 0, 0, 0, 8000 // 16 - len(d))) for d in douts
            ]
    return forward_backward(alone, douts)


def _has_memory(gib):
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] >= gib * GIB


@pytest.mark.parametrize("op", CALLS)
def test_more_than_2_to_the_31_elements(op):
    """The first, a middle and the last sequence get the bits that they get alone."""
    sizes = HUGE
    if op == "native_sparse_attention":
        sizes = Sizes(**{**vars(HUGE), "heads_kv": 8})
    if not _has_memory(110 if op == "native_sparse_attention" else 60):
        pytest.skip("the GPU has too little free memory")
    call = CALLS[op](sizes, seed=1)
    assert call.inputs[0].numel() > 2**31
    douts = None
    if not call.is_ranking:
        with torch.no_grad():
            douts = make_douts(call.run(*call.inputs))
    outputs, gradients = forward_backward(call, douts)
    for sequence in (0, 32, 65):
        want = _alone(op, call, sizes, douts, sequence)
        pairs = [
            *zip(outputs, want[0], call.of_outputs, strict=True),
            *zip(gradients, want[1], call.of_inputs[: len(gradients)], strict=True),
        ]
        for i, (mine, theirs, of) in enumerate(pairs):
            part = mine[_part_of(call, sizes, of, sequence)]
            # Alone, compress_kv has rows behind its last window.
            theirs = theirs[: part.shape[0]] if of == "cmp" else theirs
            assert_same_bits(f"{op}, sequence {sequence}, tensor {i}", part, theirs)


def test_memory_of_a_forward_of_128k_tokens():
    """At most 1 GiB beyond the results and what is kept for the backward."""
    tokens = 131072
    if not _has_memory(20):
        pytest.skip("the GPU has too little free memory")
    sizes = Sizes([tokens], heads_q=32, heads_kv=8, dim=128, topk=16)
    call = CALLS["native_sparse_attention"](sizes, seed=2)
    leaves = [x.requires_grad_() for x in call.inputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    (o,) = call.run(*leaves)
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    assert o.requires_grad and o.numel() == tokens * 32 * 128
    assert beyond <= GIB, f"{beyond / GIB:.3f} GiB"


def test_a_million_tokens():
    """Forward and backward of the whole operator: finite results, none of them zero throughout."""
    if not _has_memory(40):
        pytest.skip("the GPU has too little free memory")
    sizes = Sizes([2**20], heads_q=4, heads_kv=1, dim=128, topk=16)
    call = CALLS["native_sparse_attention"](sizes, seed=6)
    outputs, gradients = forward_backward(call)
    assert all(bool(x.isfinite().all()) for x in [*outputs, *gradients])
    assert all(bool(x.any()) for x in gradients)
