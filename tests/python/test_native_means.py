"""native_sparse_attention without k_cmp and v_cmp: the means of k and v, gradients included."""

import pytest
import reference
import torch
from cases import Case, Shape, check_case
from support import DEVICES, assert_same_bits, convert, device_types, randn

import fsattn

SHAPES = {
    "small": Shape(),
    "other_keys": Shape(lens_q=[40, 9, 5], lens_k=[70, 48, 31], q_offset=[30, 39, 40]),
    # Those of the Hopper kernels, where selected attention adds the gradients of all branches.
    "large": Shape(lens_q=[300, 65, 0, 1], dim=128, dim_v=128, group=4, block_size=64, topk=4),
    "ready_gates": Shape(lens_q=[200], dim=128, dim_v=128, block_size=64, topk=4, activation=None),
    "small_blocks": Shape(lens_q=[200, 90], dim=128, dim_v=128, block_size=32, topk=4),
    "narrow": Shape(lens_q=[200, 90], dim=96, dim_v=80, block_size=64, topk=4),
}


def _case(s, dtype, device, seed=0):
    like = {"dtype": dtype, "device": device}
    total_q, total_k = sum(s.lens_q), sum(s.lens_k)
    inputs = [
        randn(total_q, s.heads_q, s.dim, seed=seed, **like),
        randn(total_k, s.heads_kv, s.dim, seed=seed + 1, **like),
        randn(total_k, s.heads_kv, s.dim_v, seed=seed + 2, **like),
        randn(total_q, s.heads_q, 3, seed=seed + 3, **like),
    ]
    windows = {"kernel_size": s.kernel_size, "kernel_stride": s.kernel_stride}
    options = {
        "block_size": s.block_size,
        "topk": s.topk,
        "window_size": s.window_size,
        "activation": s.activation,
        "local_blocks": 1,
        **windows,
    }

    def ref(q, k, v, gates, topk_idx=None):
        cu_q, cu_k = s.cu()
        k_cmp, cu_cmp = reference.compress_kv(k, cu_k, **windows)
        v_cmp, _ = reference.compress_kv(v, cu_k, **windows)
        return reference.native_sparse_attention(
            *(q, k, v, k_cmp, v_cmp, gates, cu_q, cu_k, cu_cmp),
            topk_idx=topk_idx,
            q_offset=s.q_offset,
            **options,
        )

    # Means that are rounded may rank blocks otherwise: both get the selection of the definition.
    topk_idx = ref(*convert(inputs, torch.float64))[1]

    def ours(q, k, v, gates):
        given = {"topk_idx": topk_idx.to(device), "q_offset": s.offset(device)}
        return (
            fsattn.native_sparse_attention(
                q, k, v, None, None, gates, *s.cu(device), **given, **options
            ),
        )

    names, pack = ["q", "k", "v", "gates"], ["q", "k", "k", "q"]
    return Case(names, inputs, ["o"], ours, lambda *x: ref(*x, topk_idx)[:1], pack, ["q"])


@pytest.mark.parametrize("device,dtype", device_types())
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(shape, device, dtype):
    check_case(_case(SHAPES[shape], dtype, device), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_batched_is_the_composition(device):
    """[B, T, H, D] tensors: the same output bits as with the means of compress_kv."""
    like = {"dtype": torch.bfloat16, "device": device}
    q, k, v = (randn(2, 100, heads, 32, seed=heads, **like) for heads in (4, 2, 2))
    gates = randn(2, 100, 4, 3, seed=5, **like)
    windows = {"kernel_size": 32, "kernel_stride": 16}
    options = {"block_size": 16, "topk": 3, "window_size": 20, **windows}
    found = fsattn.native_sparse_attention(q, k, v, None, None, gates, **options)
    means = [fsattn.compress_kv(x, **windows)[0] for x in (k, v)]
    assert_same_bits("o", found, fsattn.native_sparse_attention(q, k, v, *means, gates, **options))


def test_half_of_the_means_is_refused():
    x = torch.randn(64, 1, 8)
    cu = torch.tensor([0, 64], dtype=torch.int32)
    gates = torch.randn(64, 3)
    for means in ([x[:4], None], [None, x[:4]]):
        with pytest.raises(TypeError, match=r"[kv]_cmp: must be a torch\.Tensor"):
            fsattn.native_sparse_attention(x, x, x, *means, gates, cu, cu, cu)
    with pytest.raises(ValueError, match="cu_seqlens_cmp: must not be given without k_cmp"):
        fsattn.native_sparse_attention(x, x, x, None, None, gates, cu, cu, cu)
