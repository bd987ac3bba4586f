"""Other implementations, measured in the same run on the same inputs.

PyTorch's own attention is always there. What else can be imported is measured too, on CUDA:
flash_attn (dense) and the selected attention of FSA (fsa, nsa_ref) and of
native-sparse-attention-triton (native_sparse_attention).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import _bench_counts as counts
from ._bench_cases import Case, Problem
from ._bench_selection import Selection, make_selection, selected_pairs

SelectedFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor, None], Tensor]

# implementation -> (module, function); all take (q, k, v, topk_idx, block_size, cu_seqlens, scale).
_SELECTED = {
    "fsa": ("fsa.ops", "FSA_topk_sparse_attention"),
    "nsa_ref": ("nsa_ref.ops", "topk_sparse_attention"),
    "nsa_triton": ("native_sparse_attention.ops", "topk_sparse_attention"),
}


def _import_function(module: str, name: str) -> Callable | None:
    # A peer that is there but broken (another Triton, another PyTorch) must not end the run.
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def _dense_work(problem: Problem) -> Callable[[bool], counts.Work]:
    size = problem.dtype.itemsize
    return lambda backward: counts.dense(problem.config, size, backward, problem.tokens)


def _torch_dense(problem: Problem) -> Case:
    """scaled_dot_product_attention, causal, [B, H, T, D]."""
    config = problem.config
    q, k, v = problem.q(), problem.k(), problem.v()
    # The fused CPU kernel knows no groups: it gets the repeated heads for free, outside the clock.
    repeats = config.heads_q // config.heads_kv if problem.device.type == "cpu" else 1
    q, k, v = (
        x.repeat_interleave(repeats if x is not q else 1, dim=2).transpose(1, 2).contiguous()
        for x in (q, k, v)
    )
    is_grouped = q.shape[1] != k.shape[1]

    def forward() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=is_grouped
        )

    return Case("dense", "torch sdpa", forward, [q, k, v], _dense_work(problem))


def _flash_dense(problem: Problem) -> Case | None:
    function = _import_function("flash_attn", "flash_attn_func")
    is_supported = problem.dtype in (torch.float16, torch.bfloat16)
    if function is None or not is_supported or problem.config.head_dim != problem.config.head_dim_v:
        return None
    q, k, v = problem.q(), problem.k(), problem.v()
    return Case(
        "dense",
        "flash_attn",
        lambda: function(q, k, v, causal=True),
        [q, k, v],
        _dense_work(problem),
    )


def _selected(
    problem: Problem, selection: Selection, name: str, function: SelectedFunction
) -> Case:
    config = problem.config
    q, k, v = (x.squeeze(0) for x in (problem.q(), problem.k(), problem.v()))
    topk_idx = make_selection(selection, config, problem.tokens, problem.seed, problem.device)
    cu_seqlens = torch.tensor([0, problem.tokens], dtype=torch.int32, device=problem.device)
    pairs = selected_pairs(topk_idx, config.block_size)

    def forward() -> Tensor:
        return function(q, k, v, topk_idx, config.block_size, cu_seqlens, None)

    def work(backward: bool) -> counts.Work:
        return counts.selected(config, q.element_size(), backward, problem.tokens, pairs)

    return Case("selected", name, forward, [q, k, v], work, selection.name)


def make_peer_cases(
    problem: Problem, operator: str, selections: list[Selection], max_dense: int
) -> Iterator[Case]:
    """The peers' cases of one operator; dense attention up to `max_dense` tokens."""
    is_cuda = problem.device.type == "cuda"
    if operator == "dense" and problem.tokens <= max_dense:
        yield _torch_dense(problem)
        flash = _flash_dense(problem) if is_cuda else None
        if flash is not None:
            yield flash
    if operator == "selected" and is_cuda and problem.config.head_dim == problem.config.head_dim_v:
        for name, (module, attribute) in _SELECTED.items():
            function = _import_function(module, attribute)
            for selection in selections if function is not None else ():
                yield _selected(problem, selection, name, function)
