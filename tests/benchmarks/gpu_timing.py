"""Shared parts of the benchmarks of a GPU: settings, rows, time and memory."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROUNDS = 20
WARM_UP = 3  # calls that compile, choose algorithms and fill the allocator's cache
SECONDS_PER_ROW = 6.0


class Setting(NamedTuple):
    """Where and how much is measured."""

    device: torch.device
    small: bool

    @property
    def rounds(self) -> int:
        return 2 if self.small else ROUNDS

    @property
    def warm_up(self) -> int:
        return 1 if self.small else WARM_UP


class Row(NamedTuple):
    """One row of a table. ``measure`` returns its text."""

    name: str
    measure: Callable[[], str]


class Section(NamedTuple):
    """A table. Rows that have not begun after ``seconds`` are left out."""

    title: str
    seconds: float
    rows: Callable[[Setting], Iterator[Row]]


class Cost(NamedTuple):
    """The median time of a call, and its memory beyond what was allocated before."""

    milliseconds: float
    mebibytes: float  # nan on a CPU


def run_section(section: Section, setting: Setting) -> bool:
    """Print the rows of a section; return whether none failed."""
    print(section.title)
    end = math.inf if setting.small else time.monotonic() + section.seconds
    good = True
    for row in section.rows(setting):
        if time.monotonic() > end:
            text = f"left out: the section took more than {section.seconds:.0f} s"
        else:
            try:
                text = row.measure()
            except torch.OutOfMemoryError:
                text = "out of memory"
            except Exception as error:  # noqa: BLE001 - one row must not cost the others
                text = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                good = False
        print(f"{row.name:44s} {text}", flush=True)
        torch.cuda.empty_cache()
    return good


def measure(function: Callable[[], object], setting: Setting) -> Cost:
    """Measure time on the device, and memory, after calls that warm up."""
    for _ in range(setting.warm_up):
        function()
    if setting.device.type != "cuda":
        times = [timed(function, setting) for _ in range(setting.rounds)]
        return Cost(statistics.median(times), float("nan"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(setting.rounds):
        make: Any = torch.cuda.Event  # untyped
        first, last = make(enable_timing=True), make(enable_timing=True)
        first.record()
        function()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    peak = torch.cuda.max_memory_allocated() - before
    return Cost(statistics.median(times), peak / 2**20)


def timed(function: Callable[[], object], setting: Setting) -> float:
    """Return the milliseconds until the device has finished, including those of the host."""
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def compare(functions: Mapping[str, Callable[[], object]], setting: Setting) -> str:
    """Time functions in turn; return a row with their medians, relative to the first.

    A function that runs out of memory is left out from then on.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    failed: set[str] = set()
    end = time.monotonic() + SECONDS_PER_ROW
    for turn in range(setting.warm_up + setting.rounds):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            if name in failed:
                continue
            try:
                milliseconds = timed(functions[name], setting)
            except torch.OutOfMemoryError:
                failed.add(name)
            else:
                if turn >= setting.warm_up:
                    times[name].append(milliseconds)
            if name in failed:
                torch.cuda.empty_cache()  # here, because the error holds tensors
        if turn >= setting.warm_up and time.monotonic() > end:
            break
    medians = {
        name: math.nan if name in failed else statistics.median(row) for name, row in times.items()
    }
    first = next(iter(medians.values()))
    cells = []
    for index, (name, milliseconds) in enumerate(medians.items()):
        ratio = first / milliseconds
        known = index > 0 and not math.isnan(ratio)
        cell = f"{milliseconds:.2f} ms" + (f" ({ratio:.2f}x)" if known else "")
        cells.append(f"{name} {'out of memory' if name in failed else cell}")
    return "   ".join(cells)


@contextlib.contextmanager
def no_waits(setting: Setting) -> Iterator[None]:
    """Raise at any synchronisation with the GPU."""
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
