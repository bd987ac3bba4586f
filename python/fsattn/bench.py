"""python -m fsattn bench: time and memory of the operators, against dense attention.

`bench decode` measures decoding over a paged cache instead and has options of its own.
docs/benchmarks.md explains what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, _bench_decode, _library, explain
from ._bench_cases import OPERATORS, Case, Problem, make_cases
from ._bench_configs import CONFIGS, PUBLISHED
from ._bench_measure import Effort, Rates, measure, measure_rates
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
    add(
        "--configs", nargs="+", choices=[*CONFIGS, "all"],
        help="default: small; on CUDA llama; all: every published shape",
    )  # fmt: skip
    add("--lengths", nargs="+", type=int, help="tokens of the one sequence")
    add("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    add("--passes", nargs="+", choices=["fwd", "bwd"], default=["fwd", "bwd"])
    add("--dtype", choices=list(_DTYPES), help="default: fp32; on CUDA bf16")
    add("--persistence", nargs="+", type=float, default=[0.0, 0.8], help="0 is a random selection")
    add("--zipf", nargs="+", type=float, default=[0.0], help="popularity exponents, 0 is uniform")
    add("--max-dense", type=int, help="longest sequence for dense attention; default on CPUs 16384")
    add("--warmups", type=int, default=2)
    add("--runs", type=int, default=10, help="the median of these is reported")
    add("--seconds", type=float, help="of a case; skipped if one run must take longer. 20, CUDA 3")
    add("--budget", type=float, default=float("inf"), help="seconds after which no case starts")
    add("--threads", type=int, help="CPU threads, default: all")
    add("--seed", type=int, default=0)
    add("--note", default="", help="text for every line, such as the commit")
    add("--out", type=Path, default=Path("bench_out"), help="folder for JSON lines and plots")
    return parser


def _fill_defaults(options: argparse.Namespace) -> None:
    is_cuda = torch.device(options.device).type == "cuda"
    options.configs = options.configs or (["llama"] if is_cuda else ["small"])
    if "all" in options.configs:
        options.configs = list(PUBLISHED)
    options.lengths = options.lengths or ([8192, 32768, 65536] if is_cuda else [4096, 16384])
    options.dtype = options.dtype or ("bf16" if is_cuda else "fp32")
    options.max_dense = options.max_dense or (2**31 if is_cuda else 16384)
    options.seconds = options.seconds or (3.0 if is_cuda else 20.0)
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _environment(device: torch.device, note: str) -> dict:
    """What every line repeats, so that a line stands on its own."""
    return {
        "device": _device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "fsattn": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "note": note,
    }


def _runnable(case: Case, pass_name: str) -> Callable[[], object]:
    """The pass alone; for a backward the forward has been run, and its graph is kept."""
    if pass_name == "bwd":
        output = case.forward()
        gradient = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, case.inputs, gradient, retain_graph=True)

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
    plan = [line for line in lines if bool(re.search(r"\bbwd\b", line)) == (pass_name == "bwd")]
    sizes = [int(size) for line in plan for size in re.findall(r"workspace (\d+) bytes", line)]
    return max(sizes, default=0), "\n".join(plan)


def _measure(case: Case, pass_name: str, device: torch.device, effort: Effort) -> dict:
    for x in case.inputs:
        x.requires_grad_(pass_name == "bwd")
    workspace, plan = _workspace(case, pass_name)
    found = measure(_runnable(case, pass_name), device, effort)
    return {
        "ms": found.median,
        "ms_fastest": found.fastest,
        "ms_cpu": found.cpu,
        "runs": found.runs,
        "peak_extra_bytes": found.peak,
        "workspace_bytes": workspace,
        "plan": plan,
    }


# What a record that failed or was skipped lacks.
_MEASURED = (
    "ms", "ms_fastest", "ms_cpu", "runs", "peak_extra_bytes", "workspace_bytes", "plan",
    "flops", "bytes", "gflops", "floor_ms", "floor_share",
)  # fmt: skip
# No kernel for the case; whatever else a library reports.
_FAILURES = (NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Limits:
    """What bounds the run: the effort of a case, and the time after which none starts."""

    effort: Effort
    deadline: float
    max_dense: int

    def reason_to_skip(self, problem: Problem, operator: str) -> str | None:
        if time.monotonic() > self.deadline:
            return "the budget of the run is spent"
        if operator == "dense" and problem.tokens > self.max_dense:
            return f"longer than --max-dense {self.max_dense}"
        return None


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
        "skipped": None,
        "error": None,
    }


def _failure(error: Exception) -> dict:
    """The fields of a record that say what went wrong. Too little memory is no failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"skipped": "out of memory"}
    return {"error": f"{type(error).__name__}: {error}"[:300]}


def _record(case: Case, pass_name: str, problem: Problem, rates: Rates, effort: Effort) -> dict:
    record = _identity(problem, case.operator, pass_name, case.implementation)
    record.update(selection=case.selection, **case.notes)
    work = case.work(pass_name == "bwd")
    floor = work.floor_seconds(rates.flops, rates.bytes)
    if floor > effort.seconds:
        record["skipped"] = f"one run takes at least {floor:.1f} s"
        return record
    try:
        record.update(_measure(case, pass_name, problem.device, effort))
    except _FAILURES as error:
        record.update(_failure(error))
        return record
    seconds = record["ms"] / 1e3
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
    yield from make_peer_cases(problem, operator, selections)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _operator_records(
    options: argparse.Namespace, problem: Problem, operator: str, rates: Rates, limits: _Limits
) -> Iterator[dict]:
    unnamed = _identity(problem, operator, "fwd", "fsattn" if operator != "dense" else "any")
    cases = _cases(options, problem, operator)
    while True:
        # Asked before the inputs are made, which takes time too.
        reason = limits.reason_to_skip(problem, operator)
        if reason is not None:
            yield dict(unnamed, skipped=reason)
            return
        try:
            case = next(cases, None)
        except _FAILURES as error:  # an operator that makes the inputs failed
            yield dict(unnamed, **_failure(error))
            return
        if case is None:
            return
        for pass_name in options.passes if case.has_backward else ["fwd"]:
            yield _record(case, pass_name, problem, rates, limits.effort)
        # Before the next case makes its inputs: two cases may not fit.
        del case
        _free_memory(problem.device)


def _run(options: argparse.Namespace, lines: Path) -> list[dict]:
    limits = _Limits(
        Effort(options.warmups, options.runs, options.seconds),
        time.monotonic() + options.budget,
        options.max_dense,
    )
    device, dtype = torch.device(options.device), _DTYPES[options.dtype]
    environment = _environment(device, options.note)
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
                for record in _operator_records(options, problem, operator, rates, limits):
                    records.append({**record, **environment})
                    write_line(lines, records[-1])
                    print(".", end="", flush=True)
    print()
    return records


def main(argv: list[str]) -> int:
    """Measures what the arguments name; returns 1 if an operator of this library failed."""
    if argv and argv[0] == "decode":
        return _bench_decode.main(argv[1:], _environment)
    options = _parser().parse_args(argv)
    _fill_defaults(options)
    options.out.mkdir(parents=True, exist_ok=True)
    print(_library.describe_build())
    lines = options.out / "bench.jsonl"
    records = _run(options, lines)
    print(table(records))
    for path in [lines, *write_plots(records, options.out)]:
        print(f"wrote {path}")
    for r in records:
        problem = r["error"] or (r["skipped"] and f"skipped, {r['skipped']}")
        if problem:
            case = f"{r['config']} {r['tokens']} {r['operator']} {r['pass']} {r['implementation']}"
            print(f"{case}: {problem}", file=sys.stderr)
    failed = [r for r in records if r["error"] is not None]
    return 1 if any(r["implementation"] == "fsattn" for r in failed) else 0
