"""Time and memory of one call, and the rates of the device that a floor is made from."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the measured runs: median, fastest, and how many there were.

    cpu is the processor time of all threads together, the median again; None on CUDA. It tells on a
    busy machine what the wall clock cannot.
    """

    median: float
    fastest: float
    cpu: float | None
    runs: int


@dataclass(frozen=True)
class Effort:
    """How often a call runs: `runs` times, fewer (never none) when that takes over `seconds`."""

    warmups: int
    runs: int
    seconds: float

    def affordable_runs(self, one_run: float) -> int:
        return max(1, min(self.runs, int(self.seconds / max(one_run, 1e-9))))


def _seconds_of(function: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _cpu_times(function: Callable[[], object], runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each run by the clock and of processor time."""
    clock, processor = [], []
    for _ in range(runs):
        begin, used = time.perf_counter(), time.process_time()
        function()
        processor.append(1e3 * (time.process_time() - used))
        clock.append(1e3 * (time.perf_counter() - begin))
    return clock, processor


def _cuda_times(function: Callable[[], object], runs: int, device: torch.device) -> list[float]:
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in marks:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in marks]


def measure_time(function: Callable[[], object], device: torch.device, effort: Effort) -> Timing:
    """Runs function(): warm-ups, then as many timed runs as the effort affords."""
    one_run = _seconds_of(function, device)
    if one_run * (effort.warmups + 1) < effort.seconds:
        for _ in range(effort.warmups):
            one_run = _seconds_of(function, device)
    runs = effort.affordable_runs(one_run)
    if device.type == "cuda":
        times = _cuda_times(function, runs, device)
        return Timing(statistics.median(times), min(times), None, runs)
    times, processor = _cpu_times(function, runs)
    return Timing(statistics.median(times), min(times), statistics.median(processor), runs)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _return_free_memory() -> None:
    # Freed memory that the allocator holds back would hide the growth of the next call.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cpu_peak_growth(function: Callable[[], object]) -> int | None:
    _return_free_memory()
    try:
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
        result = function()
        growth = _status_bytes("VmHWM") - before
    except OSError:
        return None
    del result
    return max(growth, 0)


def measure_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call takes at its peak beyond what is there before it, its results included.

    On CUDA what the allocator handed out; on the CPU the growth of the resident set, None where the
    system does not tell.
    """
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
    product = measure_time(lambda: a @ b, device, effort)
    length = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = measure_time(lambda: target.copy_(source), device, effort)
    return Rates(2e3 * size**3 / product.fastest, 2e3 * length / copy.fastest)
