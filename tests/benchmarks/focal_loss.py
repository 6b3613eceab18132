"""Speed and memory of the focal loss compared with torchvision, alternating in one process.

For each case it prints the median process CPU time of loss and gradient with one thread, the ratio
of the medians and the required ratio. The exit status is 1 if a ratio is too low. Both sides get
class indices: for torchvision, the time includes building a one-hot target and, unless noted
otherwise, removing ignored rows. CPU time of one thread is the least affected by a busy machine.

    python -m tests.benchmarks.focal_loss           # half a minute
    python -m tests.benchmarks.focal_loss --full    # minutes, 4 GB
    python -m tests.benchmarks.focal_loss --formula # ten minutes, 4 GB: kernels compared with autograd

Half of the advantage in large cases is due to page faults: glibc returns every block above 32 MiB
to the system, and torchvision allocates about thirty of them. MALLOC_MMAP_THRESHOLD_=4294967296 and
MALLOC_TRIM_THRESHOLD_=4294967296 keep these blocks, so a lower ratio is required with them. State
these settings with any ratio.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from focaldet.losses import _sigmoid, sigmoid_focal_loss, sigmoid_focal_loss_maps
from tests.benchmarks.memory import allocated, printed_by, resident_peak

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Loss = Callable[[Tensor, Tensor], Tensor]

IGNORE = -100
TUNED = "MALLOC_MMAP_THRESHOLD_" in os.environ
LEVELS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # of 800 x 1333
IMAGES, ANCHORS, CLASSES = 2, 9, 80


class Case(NamedTuple):
    """A case and its required ratio, with the default allocator and with one that keeps blocks."""

    name: str
    rows: int
    classes: int
    asked: float
    asked_tuned: float | None = None
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = {}  # noqa: RUF012 (read only)
    ready: bool = False  # torchvision's target is built in advance, and nothing is ignored
    soft: bool = False
    repeats: int = 5


QUICK = [
    Case("40000 x 80", 40_000, 80, 4.5, repeats=15),
    Case("40000 x 80 bfloat16", 40_000, 80, 3.2, dtype=torch.bfloat16, repeats=15),
    Case("8000 x 365", 8_000, 365, 4.5, repeats=15),
    Case("386000 x 1", 386_000, 1, 4.0, repeats=15),
    Case("40000 x 1", 40_000, 1, 3.0, repeats=51),  # dominated by the fixed cost of a call
    Case("16 x 80, target ready", 16, 80, 1.0, repeats=1001, ready=True),
    Case("200 x 80, target ready", 200, 80, 1.0, repeats=501, ready=True),
]
FULL = [
    Case("386000 x 80", 386_000, 80, 15.0, 5.0),
    Case("386000 x 80, gamma 1.5", 386_000, 80, 13.0, options={"gamma": 1.5}),
    Case("386000 x 80 bfloat16", 386_000, 80, 11.0, dtype=torch.bfloat16),
    Case("386000 x 80, in place", 386_000, 80, 30.0, options={"inplace_gradient": True}),
    Case("386000 x 80, soft targets", 386_000, 80, 10.0, soft=True),
]


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """Draw logits as of a head in training; 6 rows in 10,000 are positive, twice as many ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, case.classes, generator=generator).mul_(1.3).sub_(5.5)
    if case.soft:
        return x, torch.rand(x.shape, generator=generator).pow_(8)
    targets = torch.full((case.rows,), -1)
    few = max(case.rows * 6 // 10_000, 1)
    if not case.ready:
        targets[torch.randperm(case.rows, generator=generator)[: 2 * few]] = IGNORE
    positive = torch.randperm(case.rows, generator=generator)[:few]
    targets[positive] = torch.randint(case.classes, (few,), generator=generator)
    x[positive, targets[positive]] += 6.5
    return x.to(case.dtype), targets


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    target = torch.zeros_like(like)
    positive = targets >= 0
    target[positive, targets[positive]] = 1
    return target


def careful(x: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """Compute torchvision's loss as a careful user would."""
    keep = targets != IGNORE
    x, targets = x[keep], targets[keep]
    loss: Tensor = torchvision_loss(x, one_hot(targets, x), 0.25, gamma, "sum")
    return loss / (targets >= 0).sum()


def seconds(loss: Loss, x: Tensor, targets: Tensor, *, leaf: bool) -> tuple[float, float]:
    """Return the CPU seconds of loss and gradient, and the loss."""
    x = x.detach().requires_grad_()
    logits = x if leaf else x.clone()  # whose backward passes the gradient on unchanged
    start = time.process_time()
    value = loss(logits, targets)
    torch.autograd.backward(value)
    return time.process_time() - start, value.item()


def sides(case: Case, x: Tensor, targets: Tensor) -> tuple[Loss, Loss]:
    gamma = case.options.get("gamma", 2.0)
    if case.soft:
        return (
            lambda a, b: sigmoid_focal_loss(a, b, reduction="sum"),
            lambda a, b: torchvision_loss(a, b, 0.25, 2.0, "sum"),
        )
    if case.ready:
        target, count = one_hot(targets, x), (targets >= 0).sum()
        theirs: Loss = lambda a, _: torchvision_loss(a, target, 0.25, 2.0, "sum") / count  # noqa: E731
    else:
        theirs = lambda a, b: careful(a, b, gamma)  # noqa: E731
    return (
        lambda a, b: sigmoid_focal_loss(
            a, b, reduction="sum", normalizer="num_pos", **case.options
        ),
        theirs,
    )


def compare(case: Case) -> bool:
    x, targets = draw(case)
    ours, theirs = sides(case, x, targets)
    leaf = not case.options.get("inplace_gradient", False)
    times: tuple[list[float], list[float]] = ([], [])
    values = [0.0, 0.0]
    for repeat in range(case.repeats + 1):
        for side in (0, 1) if repeat % 2 else (1, 0):
            spent, values[side] = seconds((ours, theirs)[side], x, targets, leaf=leaf or side == 1)
            if repeat:
                times[side].append(spent)
    tolerance = (
        1e-5 if case.dtype == torch.float32 else 2e-2
    )  # torchvision is that inaccurate in bfloat16
    agree = abs(values[0] - values[1]) <= tolerance * abs(values[1])
    asked = case.asked_tuned if TUNED and case.asked_tuned else case.asked
    return report(case.name, *times, asked, agree=agree)


def report(name: str, ours: list[float], theirs: list[float], asked: float, *, agree: bool) -> bool:
    a, b = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    verdict = ("ok" if b / a >= asked else "SHORT") if agree else "DISAGREES"
    print(
        f"{name:32} ours {a:9.3f} ms   torchvision {b:9.3f} ms   ratio {b / a:5.1f}   "
        f"required {asked:4.1f}   {verdict}",
        flush=True,
    )
    return verdict == "ok"


def compare_maps(layout: torch.memory_format, repeats: int = 5) -> bool:
    """Compare the loss of a head's maps with permuting, concatenating and torchvision's loss."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(IMAGES, ANCHORS * CLASSES, h, w, generator=generator).mul_(1.3).sub_(5.5)
        for h, w in LEVELS
    ]
    maps = [m.contiguous(memory_format=layout) for m in maps]
    targets = torch.full((IMAGES, sum(h * w * ANCHORS for h, w in LEVELS)), -1)
    pick = torch.randperm(targets.numel(), generator=generator)[:800]
    targets.view(-1)[pick[:500]] = IGNORE
    targets.view(-1)[pick[500:]] = torch.randint(CLASSES, (300,), generator=generator)

    def ours(ms: list[Tensor]) -> Tensor:
        return sigmoid_focal_loss_maps(
            ms, targets, num_classes=CLASSES, reduction="sum", normalizer="num_pos"
        )

    def theirs(ms: list[Tensor]) -> Tensor:
        rows = [
            m.view(IMAGES, ANCHORS, CLASSES, *m.shape[2:])
            .permute(0, 3, 4, 1, 2)
            .reshape(IMAGES, -1, CLASSES)
            for m in ms
        ]
        return careful(torch.cat(rows, 1).flatten(0, 1), targets.flatten())

    times: tuple[list[float], list[float]] = ([], [])
    values = [0.0, 0.0]
    for repeat in range(repeats + 1):
        for side in (0, 1) if repeat % 2 else (1, 0):
            leaves = [m.detach().requires_grad_() for m in maps]
            start = time.process_time()
            loss = (ours, theirs)[side](leaves)
            torch.autograd.backward(loss)
            if repeat:
                times[side].append(time.process_time() - start)
            values[side] = loss.item()
    agree = abs(values[0] - values[1]) <= 1e-5 * values[1]
    name = "channels_last" if layout == torch.channels_last else "NCHW"
    return report(f"five maps, {name}", *times, 15.0, agree=agree)


def through_bce(x: Tensor, targets: Tensor, _: object) -> Tensor:
    """Compute the loss from torch's binary cross-entropy; its gradient is NaN for gamma below 1."""
    x = x.float()
    if targets.is_floating_point():
        t = targets.float()
    else:
        x = x.masked_fill((targets == IGNORE)[:, None], -1e4)
        t = (targets[:, None] == torch.arange(x.shape[1])).float()
    p = torch.sigmoid(x)
    error = p + t - 2 * p * t
    losses = error**2 * F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return (losses * (0.25 * t + 0.75 * (1 - t))).sum()


# What `sigmoid_focal_loss` uses after its checks of arguments
PATHS: dict[str, dict[str, Any]] = {
    "kernel": {"kernels_apply": _sigmoid.kernels_apply},
    "formula": {"kernels_apply": lambda *_: False},
    "through BCE": {"kernels_apply": lambda *_: False, "_formula": through_bce},
}


def compare_formulas() -> None:
    """Print time and allocated memory of the kernels and of two formulas with autograd."""
    sizes = ((16, 80, 301), (512, 80, 101), (40_000, 1, 101), (386_000, 80, 3))
    for (rows, classes, repeats), dtype in itertools.product(
        sizes, (torch.float32, torch.bfloat16)
    ):
        x, few = draw(Case("", rows, classes, 0, dtype=dtype))
        many = few.where(torch.rand(rows) < 0.5, torch.randint(classes, (rows,)))
        soft = torch.rand(x.shape).pow_(8).to(dtype)
        for kind, targets in (("few", few), ("many", many), ("soft", soft)):
            times, peaks = time_paths(x, targets, repeats)
            print(f"{rows:6} x {classes:2} {str(dtype)[6:]:8} {kind:5}", end="")
            for name in PATHS:
                print(f"  {name} {times[name]:8.2f} ms {peaks[name]:7.2f} MiB", end="")
            print(flush=True)


def time_paths(
    x: Tensor, targets: Tensor, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median milliseconds and the allocated MiB of each path, gradient included."""
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    peaks: dict[str, float] = {}

    def once() -> float:
        loss = lambda a, b: sigmoid_focal_loss(a, b, reduction="sum")  # noqa: E731
        return 1e3 * seconds(loss, x, targets, leaf=True)[0]

    for repeat in range(repeats):
        for name in PATHS if repeat % 2 else reversed(PATHS):
            with patch.multiple(_sigmoid, **PATHS[name]):
                if repeat == 0:
                    peaks[name] = allocated(once)
                times[name].append(once())
    return {name: statistics.median(spent) for name, spent in times.items()}, peaks


def mebibytes(which: str) -> float:
    """Return the peak resident memory in addition to logits and gradient; needs a new process."""
    x, targets = draw(Case("", 386_000, 80, 0))
    loss = careful if which == "torchvision" else sides(Case("", 1, 1, 0), x, targets)[0]
    seconds(loss, x[:64], targets[:64].clamp(min=0), leaf=True)
    x.requires_grad_()
    peak = resident_peak(lambda: torch.autograd.backward(loss(x, targets)))
    return peak - x.numel() * 4 / 2**20


def compare_memory() -> bool:
    [ours], [theirs] = (
        printed_by("tests.benchmarks.focal_loss", [f"--memory-of={which}"])
        for which in ("focaldet", "torchvision")
    )
    good = ours <= 8
    print(
        f"{'386000 x 80, beyond gradient':32} ours {ours:9.1f} MiB  torchvision {theirs:9.1f} "
        f"MiB                  at most 8   {'ok' if good else 'SHORT'}"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--full", action="store_true", help="also run the large cases")
    parser.add_argument("--formula", action="store_true", help="compare kernels with autograd")
    parser.add_argument("--memory-of", choices=["focaldet", "torchvision"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(mebibytes(arguments.memory_of))
        return 0
    if arguments.formula:
        compare_formulas()
        return 0
    allocator = "keeping blocks" if TUNED else "default"
    print(
        f"torch {torch.__version__}, one thread, load {os.getloadavg()[0]:.1f}, glibc {allocator}"
    )
    if TUNED:
        good = [compare(case) for case in FULL if case.asked_tuned]
    else:
        good = [compare(case) for case in QUICK + (FULL if arguments.full else [])]
        if arguments.full:
            good += [compare_maps(torch.contiguous_format), compare_maps(torch.channels_last)]
        good.append(compare_memory())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{sum(good)} of {len(good)} cases reach the required ratio; peak {peak:.1f} GB")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
