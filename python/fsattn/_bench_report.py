"""What a run leaves: JSON lines, a table on the screen, plots."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

_COLUMNS = (
    "config", "tokens", "operator", "pass", "by", "selection",
    "ms", "CPU ms", "TFLOP/s", "floor", "extra MiB", "workspace MiB", "over dense",
)  # fmt: skip
_MIB = 2**20


def write_line(path: Path, record: dict) -> None:
    """Appends one record; written at once, so that an interrupted run keeps what it measured."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    value /= scale
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _time(record: dict) -> str:
    if record["error"] is not None:
        return record["error"][:40]
    return "skipped" if record["skipped"] is not None else _number(record["ms"])


def _dense_times(records: list[dict]) -> dict[tuple, float]:
    """The fastest dense attention of each shape and pass."""
    times: dict[tuple, float] = {}
    for record in records:
        if record["operator"] == "dense" and record["ms"] is not None:
            key = (record["config"], record["tokens"], record["dtype"], record["pass"])
            times[key] = min(record["ms"], times.get(key, float("inf")))
    return times


def speedup_over_dense(record: dict, records: list[dict]) -> float | None:
    """How many times faster the whole layer is than dense attention; None where one is missing."""
    key = (record["config"], record["tokens"], record["dtype"], record["pass"])
    dense = _dense_times(records).get(key)
    if record["operator"] != "whole" or dense is None or record["ms"] is None:
        return None
    return dense / record["ms"]


def table(records: list[dict]) -> str:
    """All records as Markdown, ready for a document."""
    rows = [_COLUMNS]
    for r in records:
        share = None if r["floor_share"] is None else 100 * r["floor_share"]
        speedup = speedup_over_dense(r, records)
        rows.append((
            r["config"], str(r["tokens"]), r["operator"], r["pass"], r["implementation"],
            r["selection"] or "-", _time(r), _number(r["ms_cpu"]), _number(r["gflops"] or None, 1e3),
            "-" if share is None else f"{_number(share)} %",
            _number(r["peak_extra_bytes"], _MIB), _number(r["workspace_bytes"], _MIB),
            "-" if speedup is None else f"{_number(speedup)} x",
        ))  # fmt: skip
    return markdown(rows)


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _series(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Name of a line in a plot -> its (tokens, ms), ascending."""
    series = defaultdict(list)
    for r in records:
        if r["ms"] is not None:
            selection = f", {r['selection']}" if r["selection"] else ""
            series[f"{r['operator']} ({r['implementation']}{selection})"].append(
                (r["tokens"], r["ms"])
            )
    return {name: sorted(points) for name, points in series.items()}


def _plot_latency(axes, records: list[dict]) -> None:
    dense_styles = iter(["-", "--", ":"])
    for i, (name, points) in enumerate(_series(records).items()):
        # Twenty colours; the lines that matter most stand out.
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else ":"}
        if name.startswith("dense"):
            style = {"color": "black", "linestyle": next(dense_styles, "-."), "linewidth": 2.5}
        elif name.startswith("whole"):
            style = {"color": "red", "linewidth": 2.5}
        axes.plot(*zip(*points), marker="o", markersize=3, label=name, **style)
    axes.set(yscale="log", xlabel="tokens", ylabel="ms")
    axes.set_xscale("log", base=2)
    if axes.lines:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)


def _plot_speedup(axes, records: list[dict]) -> None:
    for name in sorted({r["pass"] for r in records}):
        points = [
            (r["tokens"], speedup_over_dense(r, records))
            for r in records
            if r["pass"] == name and speedup_over_dense(r, records) is not None
        ]
        if points:
            axes.plot(*zip(*sorted(points)), "-o", label=name, markersize=3)
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.set(xlabel="tokens", ylabel="times faster than dense")
    axes.set_xscale("log", base=2)
    if axes.lines[1:]:
        axes.legend()


def write_plots(records: list[dict], folder: Path) -> list[Path]:
    """One PNG a configuration: latency of each pass against length, and speed-up over dense.

    Nothing is written where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for config in sorted({r["config"] for r in records}):
        mine = [r for r in records if r["config"] == config]
        passes = sorted({r["pass"] for r in mine}, reverse=True)
        figure, axes = pyplot.subplots(1, len(passes) + 1, figsize=(5 * len(passes) + 5, 6))
        for axis, name in zip(axes, passes):
            _plot_latency(axis, [r for r in mine if r["pass"] == name])
            axis.set_title(f"{config}, {name}")
        _plot_speedup(axes[-1], mine)
        axes[-1].set_title("whole layer over dense attention")
        figure.suptitle(f"{mine[0]['device']}, {mine[0]['dtype']}, {mine[0]['date'][:10]}")
        figure.tight_layout()
        paths.append(folder / f"bench_{config}_{mine[0]['dtype']}.png")
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths
