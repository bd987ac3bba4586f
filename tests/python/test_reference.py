"""The reference itself against numbers worked out by hand."""

import math

import pytest
import reference
import torch
from reference.attention import compressed_mask, masked_attention, window_mask
from support import grads_of

ARGS = {"kernel_size": 32, "kernel_stride": 16}


@pytest.mark.parametrize(
    ("length", "count"), [(0, 0), (31, 0), (32, 1), (47, 1), (48, 2), (64, 3), (65536, 4095)]
)
def test_compressed_length(length, count):
    assert reference.compressed_length(length, 32, 16) == count


def test_compress_mean_of_counting_tokens():
    x = torch.arange(5.0).reshape(5, 1, 1)  # windows 0..3 and 1..4 do not fit d = 2; 0..3 only
    y, cu = reference.compress_kv(x, [0, 5], kernel_size=4, kernel_stride=2)
    assert cu == [0, 1]
    assert y.shape == (2, 1, 1) and y[0].item() == 1.5 and y[1].item() == 0


def test_compress_kinds_by_hand():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], dtype=torch.float64)
    pe = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    sizes = {"kernel_size": 2, "kernel_stride": 2}
    weight = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    y, _ = reference.compress_kv(x, [0, 2], kind="weighted", weight=weight, pos_emb=pe, **sizes)
    assert y.flatten().tolist() == [2 * 2 + 3 * 3, 2 * 2 + 3 * 5]
    half = torch.zeros(1, 2, dtype=torch.float64)
    y, _ = reference.compress_kv(x, [0, 2], kind="softmax", weight=half, pos_emb=pe, **sizes)
    assert y.flatten().tolist() == [2.5, 3.5]
    # Rows token-major: output 0 picks dim 1 of token 0, output 1 picks dim 0 of token 1.
    linear = torch.zeros(1, 4, 2, dtype=torch.float64)
    linear[0, 1, 0] = linear[0, 2, 1] = 1
    y, _ = reference.compress_kv(x, [0, 2], kind="linear", weight=linear, **sizes)
    assert y.flatten().tolist() == [2, 3]


def test_masked_attention_by_hand():
    q = torch.tensor([[[1.0]]], dtype=torch.float64)
    k = torch.tensor([[[0.0]], [[math.log(3.0)]], [[50.0]]], dtype=torch.float64)
    v = torch.tensor([[[1.0]], [[5.0]], [[1e9]]], dtype=torch.float64)
    o, lse = masked_attention(q, k, v, torch.tensor([[[True, True, False]]]), 1.0)
    assert o.item() == pytest.approx((1 + 3 * 5) / 4, rel=1e-12)
    assert lse.item() == pytest.approx(math.log(4.0), rel=1e-12)


@pytest.mark.parametrize("len_k", [0, 3])
def test_empty_row_has_zero_output_and_gradients(len_k):
    q, k, v = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (2, len_k, len_k))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.zeros(1, 2, len_k, dtype=torch.bool)
    mask[:, 1] = True
    outs = masked_attention(*leaves, mask, 0.5)
    assert (outs[0][0] == 0).all() and (outs[1][:, 0] == -torch.inf).all()
    grads = grads_of(outs, leaves, [torch.ones_like(x) for x in outs])
    assert (grads[0][0] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    assert len_k == 0 or (grads[1] != 0).any()


def test_window_and_compressed_masks():
    assert window_mask(torch.tensor([0, 5, 6]), 7, 2)[0].sum(1).tolist() == [1, 3, 3]
    positions = torch.tensor([30, 31, 46, 47, 63, 64, 127])
    assert compressed_mask(positions, 99, 32, 16)[0].sum(1).tolist() == [0, 1, 1, 2, 3, 3, 7]


def test_overlap_weights_of_the_paper():
    found = [reference.overlap_weight(i, 1, 32, 16, 64) for i in range(9)]
    assert found == [0, 0, 0, 1, 2, 2, 2, 1, 0]


def test_rank_blocks_by_hand():
    rule = {"block_size": 64, "init_blocks": 1, "local_blocks": 2}
    scores = [0.0, 5.0, 1.0, 5.0, 0.0, 0.0, 9.0]
    assert reference.rank_blocks(scores, 64 * 5 + 3, topk=4, **rule) == [0, 1, 4, 5]
    assert reference.rank_blocks(scores, 64 * 5 + 3, topk=5, **rule) == [0, 1, 3, 4, 5]
    assert reference.rank_blocks(scores, 64, topk=4, **rule) == [0, 1, -1, -1]
    assert reference.rank_blocks(scores, -1, topk=2, **rule) == [-1, -1]


def test_block_scores_by_hand():
    # Equal keys: at t = 79 four windows are visible, p = 1/4 each and head; two heads in the group.
    q = torch.ones(80, 2, 8, dtype=torch.float64)
    k = torch.zeros(4, 1, 8, dtype=torch.float64)
    cu = [0, 80]
    args = {**ARGS, "block_size": 64}
    for reduce, heads in [("sum", 2), ("max", 1), ("first_head", 1)]:
        (table,) = reference.block_scores(q, k, cu, cu, [0, 4], group_reduce=reduce, **args)
        # Block 0 holds windows 0, 1, 2 whole (weight 2) and half of window 3 (48..79).
        assert table[0, 79].tolist() == pytest.approx([heads * 7 / 4, heads * 1 / 4])
        assert (table[0, 30] == 0).all()


def test_build_block_index_by_hand():
    # Two sequences of 20 and 17 tokens, S = 16: slots 0, 1 and 20 / 16 + 1 = 2, 3.
    topk_idx = torch.full((1, 37, 2), -1, dtype=torch.int32)
    topk_idx[0, 16] = torch.tensor([1, 0])
    topk_idx[0, 17] = torch.tensor([0, 0])  # repeated: the first counts
    topk_idx[0, 3] = torch.tensor([1, 2])  # after the query, outside
    topk_idx[0, 36] = torch.tensor([-5, 1])
    starts, entries = reference.build_block_index(topk_idx, [0, 20, 37], [0, 20, 37], block_size=16)
    assert starts == [[0, 2, 3, 3, 4]]
    assert entries == [[33, 34, 32, 73]]


def test_gate_by_hand():
    ones = [torch.full((1, 1, 1), x) for x in (1.0, 10.0, 100.0)]
    o = reference.gate(*ones, torch.tensor([[1.0, 2.0, 3.0]]), activation=None)
    assert o.item() == 321
    assert reference.gate(*ones, torch.zeros(1, 1, 3)).item() == pytest.approx(55.5)
