"""Time and memory of one call, and the rates of the device that a floor is made from."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

# Enough for 5 ms of host time; a call that takes longer to issue is not the device's matter.
_MAX_FILLS = 200


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of the measured runs (median, fastest), how many there were, and memory.

    cpu: on the CPU the processor time of all threads together, which tells on a busy machine what
    the wall clock cannot; on CUDA the time until the call returns to the host. The median again.
    peak: bytes that a call takes at its peak beyond what is there before it, its results included.
    On CUDA what the allocator handed out; on the CPU the growth of the resident set, None where the
    system does not tell.
    """

    median: float
    fastest: float
    cpu: float
    runs: int
    peak: int | None


@dataclass(frozen=True)
class Effort:
    """How often a call runs: `runs` times, fewer when that takes over `seconds`.

    A call that takes over `seconds` on its own runs once and never again.
    """

    warmups: int
    runs: int
    seconds: float

    def affordable_runs(self, one_run: float) -> int:
        return max(1, min(self.runs, int(self.seconds / max(one_run, 1e-9))))


@dataclass(frozen=True)
class _Run:
    """One run: milliseconds, and cpu of Measurement."""

    ms: float
    cpu: float


def _run_on_cpu(function: Callable[[], object]) -> _Run:
    begin, used = time.perf_counter(), time.process_time()
    function()
    cpu = 1e3 * (time.process_time() - used)
    return _Run(1e3 * (time.perf_counter() - begin), cpu)


class _CudaClock:
    """Times calls by events, each on a cold L2 and with the work queued before it starts.

    Between two runs a buffer of twice the L2 is overwritten, as other layers of a network would do.
    It is overwritten until the host has issued the call: what counts is the time of the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._other_data = torch.empty(2 * max(l2, 2**26), dtype=torch.uint8, device=device)
        self._fill_ms = 1.0
        self._overwrite(2)
        self._fill_ms = max(self._time(lambda: self._overwrite(8), 1).ms / 8, 1e-3)

    def _overwrite(self, times: int) -> None:
        for _ in range(times):
            self._other_data.zero_()

    def _time(self, function: Callable[[], object], fills: int) -> _Run:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._overwrite(fills)
        begin.record()
        issued = time.perf_counter()
        function()
        issued = time.perf_counter() - issued
        end.record()
        torch.cuda.synchronize(self._device)
        return _Run(begin.elapsed_time(end), 1e3 * issued)

    def run(self, function: Callable[[], object], issue_ms: float) -> _Run:
        """One run of a call that the host takes about `issue_ms` to issue."""
        return self._time(function, min(2 + int(1.2 * issue_ms / self._fill_ms), _MAX_FILLS))


def _runner(device: torch.device) -> Callable[[Callable[[], object], float], _Run]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _CudaClock(device).run
    return lambda function, _issue_ms: _run_on_cpu(function)


def _is_set_up(first: _Run, device: torch.device) -> bool:
    """Whether a first run was mostly the host's time: a library that compiles or loads kernels."""
    return device.type == "cuda" and first.cpu > 0.5 * first.ms


def measure(function: Callable[[], object], device: torch.device, effort: Effort) -> Measurement:
    """Runs function(): once for its memory, warm-ups, then timed runs as the effort affords."""
    run = _runner(device)
    seen: list[_Run] = []
    peak = _peak_of(lambda: seen.append(run(function, 0.0)), device)
    first = seen[0]
    if first.ms > 1e3 * effort.seconds and not _is_set_up(first, device):
        return Measurement(first.ms, first.ms, first.cpu, 1, peak)
    last = run(function, first.cpu)
    for _ in range(effort.warmups - 1 if last.ms * effort.warmups < 1e3 * effort.seconds else 0):
        last = run(function, last.cpu)
    runs = [run(function, last.cpu) for _ in range(effort.affordable_runs(last.ms / 1e3))]
    times, cpu = [r.ms for r in runs], statistics.median(r.cpu for r in runs)
    # Again: the first run also loads kernels and starts threads, which need memory of their own.
    peak = _peak_of(function, device)
    return Measurement(statistics.median(times), min(times), cpu, len(runs), peak)


def measure_in_turn(
    functions: list[Callable[[], object]], device: torch.device, effort: Effort
) -> list[Measurement]:
    """measure() of each, with their runs in turn: times to be compared see the same clocks."""
    alone = [measure(function, device, replace(effort, runs=1)) for function in functions]
    run, count = _runner(device), min(effort.affordable_runs(m.median / 1e3) for m in alone)
    rounds = [[run(f, m.cpu) for f, m in zip(functions, alone)] for _ in range(count)]
    found = []
    for seen, one in zip(zip(*rounds), alone):
        times, cpu = [r.ms for r in seen], statistics.median(r.cpu for r in seen)
        found.append(Measurement(statistics.median(times), min(times), cpu, count, one.peak))
    return found


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def _return_free_memory() -> None:
    # Freed memory that the allocator holds back would hide the growth of the next call.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Sets VmHWM back to what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _cpu_peak_growth(function: Callable[[], object]) -> int | None:
    _return_free_memory()
    before = _status_bytes("VmRSS")
    is_reset = _reset_peak()
    result = function()
    peak = _status_bytes("VmHWM")
    del result
    return max(peak - before, 0) if is_reset and None not in (before, peak) else None


def _peak_of(function: Callable[[], object], device: torch.device) -> int | None:
    """Measurement.peak of one run."""
    if device.type == "cpu":
        return _cpu_peak_growth(function)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    growth = torch.cuda.max_memory_allocated(device) - before
    del result
    return growth


@dataclass(frozen=True)
class Rates:
    """What this device reaches in a large matrix product (FLOP/s) and a large copy (bytes/s)."""

    flops: float
    bytes: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured with PyTorch in this process, so that clocks and threads are those of the run.

    The CPU backend computes 16-bit inputs in fp32, so the product is measured in fp32 there.
    """
    if device.type == "cpu" and dtype != torch.float64:
        dtype = torch.float32
    effort = Effort(warmups=1, runs=5, seconds=5.0)
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    product = measure(lambda: a @ b, device, effort)
    length = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = measure(lambda: target.copy_(source), device, effort)
    return Rates(2e3 * size**3 / product.fastest, 2e3 * length / copy.fastest)
