"""Other implementations, measured in the same run on the same inputs.

PyTorch's own attention is always there, on CUDA its cuDNN and its FlashAttention backend. What else
can be imported is measured too, on CUDA: flash_attn (dense) and the selected attention of FSA (fsa,
nsa_ref) and of native-sparse-attention-triton (native_sparse_attention).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def _dense_inputs(problem: Problem, repeats: int) -> list[Tensor]:
    """q, k, v as [1, H, T, D]; every key head `repeats` times."""
    q, k, v = problem.q(), problem.k(), problem.v()
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    return [x.transpose(1, 2).contiguous() for x in (q, k, v)]


def _torch_dense(problem: Problem, name: str, repeats: int, backend: object) -> Case:
    """scaled_dot_product_attention, causal, by `backend`; by PyTorch's own choice if None."""
    q, k, v = _dense_inputs(problem, repeats)
    is_grouped = q.shape[1] != k.shape[1]

    def forward() -> Tensor:
        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=is_grouped
            )

    return Case("dense", name, forward, [q, k, v], _dense_work(problem))


def _can_use(problem: Problem, check: Callable, repeats: int) -> bool:
    """Whether a backend of PyTorch serves the heads and dims of the problem, with gradients."""
    few = replace(problem, tokens=min(problem.tokens, 128))
    q, k, v = (x.requires_grad_() for x in _dense_inputs(few, repeats))
    is_grouped = q.shape[1] != k.shape[1]
    return check(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, is_grouped), False)


def _cuda_dense(problem: Problem) -> Iterator[Case]:
    """PyTorch's cuDNN and FlashAttention backends, each where it serves the shape.

    A backend that knows no groups gets the repeated key heads for free, outside the clock.
    """
    group = problem.config.heads_q // problem.config.heads_kv
    backends = {
        "torch cuDNN": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
        "torch flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
    }
    for name, (backend, check) in backends.items():
        for repeats in sorted({1, group}):
            if _can_use(problem, check, repeats):
                repeated = "" if repeats == 1 else ", repeated heads"
                yield _torch_dense(problem, name + repeated, repeats, backend)
                break


def _cpu_dense(problem: Problem) -> Case:
    # The fused CPU kernel knows no groups: it gets the repeated heads for free, outside the clock.
    return _torch_dense(
        problem, "torch sdpa", problem.config.heads_q // problem.config.heads_kv, None
    )


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


def make_peer_cases(problem: Problem, operator: str, selections: list[Selection]) -> Iterator[Case]:
    """The peers' cases of one operator."""
    is_cuda = problem.device.type == "cuda"
    if operator == "dense" and not is_cuda:
        yield _cpu_dense(problem)
    if operator == "dense" and is_cuda:
        yield from _cuda_dense(problem)
        flash = _flash_dense(problem)
        if flash is not None:
            yield flash
    if operator == "selected" and is_cuda and problem.config.head_dim == problem.config.head_dim_v:
        for name, (module, attribute) in _SELECTED.items():
            function = _import_function(module, attribute)
            for selection in selections if function is not None else ():
                yield _selected(problem, selection, name, function)
