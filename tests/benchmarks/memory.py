"""Measurement of memory in benchmarks, for which each side runs in its own process."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Memory(NamedTuple):
    """Peaks in MiB above the memory in use before."""

    allocated: float  # by tensors of torch; the same in every run
    resident: (
        float  # by the process, including oneDNN's scratch memory and what the allocator keeps
    )


def printed_by(module: str, arguments: Sequence[str]) -> list[float]:
    """Run ``module`` in a new process and return the numbers on the last line of its output."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(number) for number in result.stdout.splitlines()[-1].split()]


def compare_memory(name: str, module: str, arguments: Sequence[str], asked: float) -> bool:
    """Run ``module --memory-of`` for each side and print the :class:`Memory` of both in a row.

    Returns whether the ratio of allocated memory is at most ``asked``.
    """
    ours, theirs = (
        Memory(*printed_by(module, [*arguments, f"--memory-of={side}"]))
        for side in ("ours", "torchvision")
    )
    ratio = ours.allocated / theirs.allocated
    print(
        f"{name:34s} allocated {ours.allocated:5.0f} / {theirs.allocated:5.0f} MiB {ratio:5.2f}x   "
        f"resident {ours.resident:5.0f} / {theirs.resident:5.0f} MiB "
        f"{ours.resident / theirs.resident:5.2f}x   "
        f"required at most {asked:.2f}x {'ok' if ratio <= asked else 'SHORT'}",
        flush=True,
    )
    return ratio <= asked


def memory_of_calls(function: Callable[[], object], runs: int = 5) -> Memory:
    """Measure several runs, after a first one that loads kernels; resident memory is a median."""
    function()
    peaks = []
    for _ in range(runs):
        ctypes.CDLL(None).malloc_trim(0)
        peaks.append(resident_peak(function))
    return Memory(allocated(function), statistics.median(peaks))


def resident_peak(function: Callable[[], object]) -> float:
    """Return the increase of resident memory during a call at its peak, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def allocated(function: Callable[[], object]) -> float:
    """Return the peak of memory that torch's tensors allocate during a call, in MiB."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event.start_ns())
    return float(max(accumulate(event.nbytes() for event in events))) / 2**20
