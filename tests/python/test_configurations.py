"""The published configurations, with their heads, dims, blocks and topk, against the definition."""

import pytest
import torch
from cases import Shape, check_case, nsa_case, selected_case
from selection import random_selection
from support import DEVICES

from fsattn._bench_configs import CONFIGS, PUBLISHED

QUERIES = [9, 3]
# One type each: the definition takes seconds for the longest of them.
TYPES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=DEVICES[1].marks),
]


def _shape(config):
    """A few queries over more blocks than are selected, and a short sequence."""
    return Shape(
        lens_q=QUERIES,
        lens_k=[(config.topk + 3) * config.block_size + 41, 70],
        heads_kv=config.heads_kv,
        group=config.heads_q // config.heads_kv,
        dim=config.head_dim,
        dim_v=config.head_dim_v,
        kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride,
        block_size=config.block_size,
        topk=config.topk,
        window_size=config.window_size,
    )


@pytest.mark.parametrize(("device", "dtype"), TYPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_and_backward(name, device, dtype):
    """The whole operator, or the selected branch alone where the selection comes from outside."""
    shape = _shape(CONFIGS[name])
    if CONFIGS[name].has_compression:
        case = nsa_case(shape, dtype, device, brings_selection=True)
    else:
        case = selected_case(shape, dtype, device)
    check_case(case, dtype, device)


@pytest.mark.parametrize(("device", "dtype"), TYPES)
@pytest.mark.parametrize("name", [name for name in PUBLISHED if CONFIGS[name].has_compression])
def test_selection(name, device, dtype):
    config = CONFIGS[name]
    selection = random_selection(
        _shape(config), dtype, config.init_blocks, config.local_blocks, "sum", "fp32", device
    )
    selection.check()
