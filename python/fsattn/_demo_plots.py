"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._demo_train import smoothed

if TYPE_CHECKING:
    from torch import Tensor

    from ._demo_model import Shape

SPARSE, DENSE = "#c2410c", "#1d4ed8"
# What a square of the selection picture means, from "cannot be seen" on.
MEANINGS = [
    "in the future",
    "not chosen",
    "always: first block",
    "always: own and the one before",
    "chosen",
]
COLORS = ["#ffffff", "#e7e5e4", "#a8a29e", "#57534e", "#ea580c"]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_losses(
    path: Path,
    losses: dict[str, list[float]],
    held_out: dict[str, float],
    subtitle: str,
) -> None:
    """Raw and smoothed training loss of both models and their held-out loss."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8.5, 5), dpi=150, layout="constrained")
    for name, color in (("dense", DENSE), ("sparse", SPARSE)):
        steps = range(1, len(losses[name]) + 1)
        axes.plot(steps, losses[name], color=color, alpha=0.22, linewidth=0.8)
        label = f"{name}: held-out loss {held_out[name]:.3f}"
        axes.plot(steps, smoothed(losses[name]), color=color, linewidth=2, label=label)
        axes.axhline(held_out[name], color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss, nats per byte")
    lowest = min(min(values) for values in losses.values())
    axes.set_ylim(lowest - 0.1, max(values[0] for values in losses.values()) * 1.02)
    axes.set_xlim(0, max(len(values) for values in losses.values()) + 1)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=11)
    axes.set_title(
        f"Sparse and dense attention, same seed and data\n{subtitle}",
        loc="left",
        fontsize=11,
    )
    axes.text(
        0.99, 0.72, "thin: every step    thick: average    dashed: held-out",
        transform=axes.transAxes, ha="right", fontsize=9, color="#57534e",
    )  # fmt: skip
    figure.savefig(path)
    pyplot.close(figure)


def selection_map(topk_idx: np.ndarray, queries: np.ndarray, shape: Shape) -> np.ndarray:
    """topk_idx [T, topk] of one head -> index into MEANINGS [queries, blocks]."""
    blocks = np.arange(-(-topk_idx.shape[0] // shape.block_size))
    own = queries[:, None] // shape.block_size
    chosen = (topk_idx[queries][:, :, None] == blocks).any(1)
    result = np.where(blocks > own, 0, np.where(chosen, 4, 1))
    result[chosen & (blocks[None] == 0)] = 2
    result[chosen & (blocks > own - 2) & (blocks <= own)] = 3
    return result


def plot_selections(path: Path, selections: list[Tensor], shape: Shape) -> None:
    """One panel a layer and KV head: the blocks (columns) that the last query of each block chose."""
    pyplot = _pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    heads, length, _ = selections[0].shape
    queries = np.arange(shape.block_size - 1, length, shape.block_size)
    figure, grid = pyplot.subplots(
        heads, len(selections), figsize=(3 * len(selections) + 0.6, 3 * heads + 1.3), dpi=150,
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for layer, topk_idx in enumerate(selections):
        for head in range(heads):
            axes = grid[head][layer]
            squares = selection_map(topk_idx[head].cpu().numpy(), queries, shape)
            edges = np.arange(squares.shape[1] + 1) * shape.block_size
            axes.pcolormesh(
                edges, edges, squares, cmap=ListedColormap(COLORS), vmin=-0.5, vmax=4.5,
                edgecolors="white", linewidth=0.4,
            )  # fmt: skip
            axes.set_aspect("equal")
            axes.set_title(f"layer {layer}, KV head {head}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xticks(range(0, length + 1, length // 4))
            axes.set_yticks(range(0, length + 1, length // 4))
            axes.tick_params(labelsize=8)
    grid[0][0].invert_yaxis()
    for axes in grid[-1]:
        axes.set_xlabel("position of the keys", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("position of the query", fontsize=9)
    figure.suptitle(
        f"Which {shape.topk} blocks of {shape.block_size} keys a query attends to: "
        "the last query of every block of a held-out text",
        fontsize=12 if len(selections) > 2 else 9,
    )
    handles = [
        Patch(facecolor=color, label=meaning, edgecolor="#d6d3d1", linewidth=0.5)
        for color, meaning in zip(COLORS[1:], MEANINGS[1:], strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)
