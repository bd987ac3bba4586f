"""What is measured: for each operator its inputs, its call and its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import _bench_counts as counts
from . import functional
from ._bench_configs import Config
from ._bench_selection import Selection, make_selection, selected_pairs

OPERATORS = (
    "compress",
    "compress_linear",
    "compressed",
    "select",
    "index",
    "selected",
    "window",
    "gate",
    "whole",
    "dense",
)
# What needs no compressed keys; all that a layer with its own indexer has.
_WITHOUT_COMPRESSION = ("index", "selected", "whole", "dense")


@dataclass(frozen=True)
class Problem:
    """One sequence of `tokens` random tokens."""

    config: Config
    tokens: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    def random(self, *shape: int) -> Tensor:
        rng = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(*shape, generator=rng, device=self.device, dtype=self.dtype)

    def q(self) -> Tensor:
        return self.random(1, self.tokens, self.config.heads_q, self.config.head_dim)

    def k(self) -> Tensor:
        return self.random(1, self.tokens, self.config.heads_kv, self.config.head_dim)

    def v(self) -> Tensor:
        # Another seed than k, whose values it would repeat where D = Dv.
        return replace(self, seed=self.seed + 1).random(
            1, self.tokens, self.config.heads_kv, self.config.head_dim_v
        )

    def branch(self) -> Tensor:
        return self.random(1, self.tokens, self.config.heads_q, self.config.head_dim_v)

    def gates(self) -> Tensor:
        return self.random(1, self.tokens, self.config.heads_q, 3)

    @property
    def windows(self) -> dict[str, int]:
        return {
            "kernel_size": self.config.kernel_size,
            "kernel_stride": self.config.kernel_stride,
        }

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "block_size": self.config.block_size,
            "topk": self.config.topk,
            "init_blocks": self.config.init_blocks,
            "local_blocks": self.config.local_blocks,
        }


@dataclass(frozen=True)
class Case:
    """One implementation of one operator; `inputs` get gradients through what forward() returns."""

    operator: str
    implementation: str
    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    work: Callable[[bool], counts.Work]
    selection: str = ""
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def has_backward(self) -> bool:
        return bool(self.inputs)


def _compress(problem: Problem, kind: str) -> Case:
    config, x = problem.config, problem.k()
    options = dict(problem.windows, kind=kind)
    inputs = [x]
    if kind == "linear":
        depth = config.kernel_size * config.head_dim
        weight = problem.random(config.heads_kv, depth, config.head_dim) * depth**-0.5
        options["weight"] = weight
        inputs.append(weight)

    def forward() -> Tensor:
        return functional.compress_kv(x, **options)[0]

    def work(backward: bool) -> counts.Work:
        return counts.compress(config, x.element_size(), backward, problem.tokens, kind)

    name = "compress" if kind == "mean" else f"compress_{kind}"
    return Case(name, "fsattn", forward, inputs, work)


def _compressed_keys(problem: Problem) -> tuple[Tensor, Tensor]:
    k_cmp, _ = functional.compress_kv(problem.k(), **problem.windows)
    v_cmp, _ = functional.compress_kv(problem.v(), **problem.windows)
    return k_cmp, v_cmp


def _compressed(problem: Problem) -> Case:
    q = problem.q()
    k_cmp, v_cmp = _compressed_keys(problem)

    def forward() -> Tensor:
        return functional.compressed_attention(q, k_cmp, v_cmp, **problem.windows)

    def work(backward: bool) -> counts.Work:
        return counts.compressed(problem.config, q.element_size(), backward, problem.tokens)

    return Case("compressed", "fsattn", forward, [q, k_cmp, v_cmp], work)


def _select(problem: Problem) -> Case:
    q = problem.q()
    k_cmp, v_cmp = _compressed_keys(problem)
    _, lse = functional.compressed_attention(q, k_cmp, v_cmp, return_lse=True, **problem.windows)

    def forward() -> Tensor:
        return functional.select_blocks(q, k_cmp, lse, **problem.windows, **problem.blocks)

    def work(_: bool) -> counts.Work:
        return counts.select(problem.config, q.element_size(), problem.tokens)

    return Case("select", "fsattn", forward, [], work)


def _selection_tensor(problem: Problem, selection: Selection) -> Tensor:
    return make_selection(
        selection, problem.config, problem.tokens, problem.seed, problem.device
    ).unsqueeze(0)


def _index(problem: Problem, selection: Selection) -> Case:
    topk_idx = _selection_tensor(problem, selection)

    def forward() -> Tensor:
        return functional.build_block_index(topk_idx, block_size=problem.config.block_size)[0]

    def work(_: bool) -> counts.Work:
        return counts.index(problem.config, problem.tokens)

    return Case("index", "fsattn", forward, [], work, selection.name)


def _selected(problem: Problem, selection: Selection) -> Case:
    config, (q, k, v) = problem.config, (problem.q(), problem.k(), problem.v())
    topk_idx = _selection_tensor(problem, selection)
    pairs = selected_pairs(topk_idx[0], config.block_size)

    def forward() -> Tensor:
        return functional.selected_attention(q, k, v, topk_idx, block_size=config.block_size)

    def work(backward: bool) -> counts.Work:
        return counts.selected(config, q.element_size(), backward, problem.tokens, pairs)

    notes = {"keys_per_query": pairs / max(problem.tokens, 1)}
    return Case("selected", "fsattn", forward, [q, k, v], work, selection.name, notes)


def _window(problem: Problem) -> Case:
    q, k, v = problem.q(), problem.k(), problem.v()

    def forward() -> Tensor:
        return functional.window_attention(q, k, v, window_size=problem.config.window_size)

    def work(backward: bool) -> counts.Work:
        return counts.window(problem.config, q.element_size(), backward, problem.tokens)

    return Case("window", "fsattn", forward, [q, k, v], work)


def _gate(problem: Problem) -> Case:
    branches = [problem.branch() for _ in range(3)]
    gates = problem.gates()

    def forward() -> Tensor:
        return functional.gate(*branches, gates)

    def work(backward: bool) -> counts.Work:
        return counts.gate(problem.config, gates.element_size(), backward, problem.tokens)

    return Case("gate", "fsattn", forward, [*branches, gates], work)


def _whole(problem: Problem) -> Case:
    """Compression of k and v by the mean and native_sparse_attention."""
    config = problem.config
    q, k, v, gates = problem.q(), problem.k(), problem.v(), problem.gates()

    def forward() -> Tensor:
        return functional.native_sparse_attention(
            q, k, v, None, None, gates,
            window_size=config.window_size, **problem.windows, **problem.blocks,
        )  # fmt: skip

    def work(backward: bool) -> counts.Work:
        return counts.whole(config, q.element_size(), backward, problem.tokens)

    return Case("whole", "fsattn", forward, [q, k, v, gates], work)


def _whole_with_indexer(problem: Problem, selection: Selection) -> Case:
    case = _selected(problem, selection)
    return Case("whole", "fsattn", case.forward, case.inputs, case.work, selection.name, case.notes)


def make_cases(problem: Problem, operator: str, selections: list[Selection]) -> Iterator[Case]:
    """The cases of one operator of this library; several where selections matter.

    None for an operator that the configuration does not have.
    """
    has_compression = problem.config.has_compression
    if not has_compression and operator not in _WITHOUT_COMPRESSION:
        return
    if operator in ("compress", "compress_linear"):
        yield _compress(problem, "linear" if operator.endswith("linear") else "mean")
    elif operator in ("index", "selected"):
        make = _index if operator == "index" else _selected
        yield from (make(problem, selection) for selection in selections)
    elif operator == "whole" and not has_compression:
        yield from (_whole_with_indexer(problem, selection) for selection in selections)
    else:
        makers = {
            "compressed": _compressed,
            "select": _select,
            "window": _window,
            "gate": _gate,
            "whole": _whole,
        }
        if operator in makers:
            yield makers[operator](problem)
