"""python -m fsattn bench: time and memory of the operators, against dense attention.

docs/benchmarks.md explains what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, _library, explain
from ._bench_cases import OPERATORS, Case, Problem, make_cases
from ._bench_configs import CONFIGS
from ._bench_measure import Effort, Rates, measure_memory, measure_rates, measure_time
from ._bench_peers import make_peer_cases
from ._bench_report import table, write_line, write_plots
from ._bench_selection import Selection

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fsattn bench", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--configs", nargs="+", choices=list(CONFIGS), help="default: small; on CUDA llama")
    add("--lengths", nargs="+", type=int, help="tokens of the one sequence")
    add("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    add("--passes", nargs="+", choices=["fwd", "bwd"], default=["fwd", "bwd"])
    add("--dtype", choices=list(_DTYPES), help="default: fp32; on CUDA bf16")
    add("--persistence", nargs="+", type=float, default=[0.0, 0.8], help="0 is a random selection")
    add("--zipf", nargs="+", type=float, default=[0.0], help="popularity exponents, 0 is uniform")
    add("--max-dense", type=int, help="longest sequence for dense attention")
    add("--warmups", type=int, default=2)
    add("--runs", type=int, default=10, help="the median of these is reported")
    add("--seconds", type=float, default=20.0, help="fewer runs when they would take longer")
    add("--threads", type=int, help="CPU threads, default: all")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("bench_out"), help="folder for JSON lines and plots")
    return parser


def _fill_defaults(options: argparse.Namespace) -> None:
    is_cuda = torch.device(options.device).type == "cuda"
    options.configs = options.configs or (["llama"] if is_cuda else ["small"])
    options.lengths = options.lengths or ([8192, 32768, 65536] if is_cuda else [4096, 16384])
    options.dtype = options.dtype or ("bf16" if is_cuda else "fp32")
    options.max_dense = options.max_dense or (131072 if is_cuda else 16384)
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _environment(device: torch.device) -> dict:
    """What every line repeats, so that a line stands on its own."""
    return {
        "device": _device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "fsattn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _backward(case: Case) -> Callable[[], object]:
    """The backward pass alone; the forward has been run for it."""
    inputs = [x.detach().requires_grad_() if not x.requires_grad else x for x in case.inputs]
    output = case.forward()
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def _runnable(case: Case, pass_name: str) -> Callable[[], object]:
    if pass_name == "bwd":
        for x in case.inputs:
            x.requires_grad_()
        return _backward(case)

    def forward() -> Tensor:
        with torch.no_grad():
            return case.forward()

    return forward


def _workspace(case: Case, pass_name: str) -> tuple[int | None, str | None]:
    """The largest workspace of the pass and the library's plan, as it describes itself."""
    if case.implementation != "fsattn":
        return None, None
    # The inputs are named, so that the plan of their gradients is part of the text.
    lines = explain(lambda *_: case.forward(), *case.inputs).splitlines()
    plan = [line for line in lines if re.search(r"\bbwd\b", line) or pass_name == "fwd"]
    sizes = [int(size) for line in plan for size in re.findall(r"workspace (\d+) bytes", line)]
    return max(sizes, default=0), "\n".join(plan)


def _measure(case: Case, pass_name: str, device: torch.device, effort: Effort) -> dict:
    # Planned before the run: afterwards the inputs ask for gradients.
    if pass_name == "bwd":
        for x in case.inputs:
            x.requires_grad_()
    workspace, plan = _workspace(case, pass_name)
    function = _runnable(case, pass_name)
    timing = measure_time(function, device, effort)
    memory = measure_memory(function, device)
    return {
        "ms": timing.median,
        "ms_fastest": timing.fastest,
        "ms_cpu": timing.cpu,
        "runs": timing.runs,
        "peak_extra_bytes": memory,
        "workspace_bytes": workspace,
        "plan": plan,
    }


# What a record that failed lacks.
_MEASURED = (
    "ms", "ms_fastest", "ms_cpu", "runs", "peak_extra_bytes", "workspace_bytes", "plan",
    "flops", "bytes", "gflops", "floor_ms", "floor_share",
)  # fmt: skip
# No kernel for the case, or no memory.
_FAILURES = (NotImplementedError, RuntimeError)


def _identity(problem: Problem, operator: str, pass_name: str, implementation: str) -> dict:
    return {
        "config": problem.config.name,
        "tokens": problem.tokens,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "operator": operator,
        "pass": pass_name,
        "implementation": implementation,
        "selection": "",
        **dict.fromkeys(_MEASURED),
        "error": None,
    }


def _record(case: Case, pass_name: str, problem: Problem, rates: Rates, effort: Effort) -> dict:
    record = _identity(problem, case.operator, pass_name, case.implementation)
    record.update(selection=case.selection, **case.notes)
    try:
        record.update(_measure(case, pass_name, problem.device, effort))
    except _FAILURES as error:
        record["error"] = f"{type(error).__name__}: {error}"[:300]
        return record
    work, seconds = case.work(pass_name == "bwd"), record["ms"] / 1e3
    floor = work.floor_seconds(rates.flops, rates.bytes)
    record.update(
        flops=work.flops,
        bytes=work.bytes,
        gflops=work.flops / seconds / 1e9,
        floor_ms=1e3 * floor,
        floor_share=floor / seconds,
    )
    return record


def _cases(options: argparse.Namespace, problem: Problem, operator: str) -> Iterator[Case]:
    selections = [Selection(p, z) for p in options.persistence for z in options.zipf]
    yield from make_cases(problem, operator, selections)
    yield from make_peer_cases(problem, operator, selections, options.max_dense)


def _operator_records(
    options: argparse.Namespace, problem: Problem, operator: str, rates: Rates
) -> Iterator[dict]:
    effort = Effort(options.warmups, options.runs, options.seconds)
    try:
        for case in _cases(options, problem, operator):
            for pass_name in options.passes if case.has_backward else ["fwd"]:
                yield _record(case, pass_name, problem, rates, effort)
    except _FAILURES as error:  # while the inputs were made: an operator before this one failed
        failed = _identity(problem, operator, "fwd", "fsattn")
        yield dict(failed, error=f"{type(error).__name__}: {error}"[:300])


def _run(options: argparse.Namespace, lines: Path) -> list[dict]:
    device, dtype = torch.device(options.device), _DTYPES[options.dtype]
    environment = _environment(device)
    rates = measure_rates(device, dtype)
    environment.update(rate_gflops=rates.flops / 1e9, rate_gbytes=rates.bytes / 1e9)
    print(
        f"{environment['device']}: a matrix product reaches {rates.flops / 1e9:.0f} GFLOP/s, "
        f"a copy {rates.bytes / 1e9:.1f} GB/s"
    )
    records = []
    for name in options.configs:
        for tokens in options.lengths:
            problem = Problem(CONFIGS[name], tokens, dtype, device, options.seed)
            for operator in options.operators:
                for record in _operator_records(options, problem, operator, rates):
                    records.append({**record, **environment})
                    write_line(lines, records[-1])
                    print(".", end="", flush=True)
    print()
    return records


def main(argv: list[str]) -> int:
    """Measures what the arguments name; returns 1 if an operator of this library failed."""
    options = _parser().parse_args(argv)
    _fill_defaults(options)
    options.out.mkdir(parents=True, exist_ok=True)
    print(_library.describe_build())
    lines = options.out / "bench.jsonl"
    records = _run(options, lines)
    print(table(records))
    for path in [lines, *write_plots(records, options.out)]:
        print(f"wrote {path}")
    failed = [r for r in records if r["error"] is not None]
    for r in failed:
        print(f"{r['config']} {r['operator']} {r['pass']}: {r['error']}", file=sys.stderr)
    return 1 if any(r["implementation"] == "fsattn" for r in failed) else 0
