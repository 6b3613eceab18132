"""Speed and memory of matching, compared with torchvision's ``box_iou`` and ``Matcher``.

Both sides match the same boxes to the 201,600 anchors of an 800x1344 image, alternating in one
process, and must agree on every anchor. Ours is timed with and without the construction of the
``AnchorGrid``, which a batch shares; torchvision's includes concatenating the levels, which it does for
each image. The output is medians of process CPU time and of wall time, their ratios, and the peak
memory of each side in its own process. The exit status is 1 if a ratio or the memory misses its target.

    python -m tests.benchmarks.matching [--threads 2]    # a minute or two, 8 GB
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torchvision
from torchvision.models.detection._utils import Matcher as PeerMatcher
from torchvision.ops import box_iou

from focaldet import AnchorGenerator
from focaldet.anchor_grid import AnchorGrid
from focaldet.matching import Matcher
from tests.benchmarks.memory import printed_by, resident_peak

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LEVELS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
MIB_ASKED = 100.0


class Case(NamedTuple):
    boxes: int
    asked: float
    repeats: int


CASES = [Case(1, 1.0, 31), Case(20, 1.0, 15), Case(200, 10.0, 7), Case(1000, 16.0, 3)]


def draw(count: int) -> Tensor:
    """Return boxes inside the image with log-uniform sides from 8 to 600 pixels."""
    generator = torch.Generator().manual_seed(0)
    side = 8 * torch.exp(torch.rand(count, 1, generator=generator) * torch.tensor(75.0).log())
    shape = torch.exp(torch.randn(count, 1, generator=generator) * 0.3)
    size = torch.cat((side * shape, side / shape), dim=1)
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([1333.0, 800]) - size)
    boxes = torch.cat((corners, corners + size), dim=1)
    return boxes.clamp(min=0).minimum(torch.tensor([1333.0, 800, 1333, 800]))


def ours(boxes: Tensor, levels: list[Tensor]) -> Tensor:
    return Matcher()(boxes, AnchorGrid(levels, LEVELS))


def theirs(boxes: Tensor, levels: list[Tensor]) -> Tensor:
    matcher = PeerMatcher(0.5, 0.4, allow_low_quality_matches=True)
    matched_idxs: Tensor = matcher(box_iou(boxes, torch.cat(levels)))
    return matched_idxs


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def compare(case: Case, levels: list[Tensor]) -> bool:
    boxes, grid = draw(case.boxes), AnchorGrid(levels, LEVELS)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(boxes, levels),
        "grid given": lambda: Matcher()(boxes, grid),
        "torchvision": lambda: theirs(boxes, levels),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    found: dict[str, Tensor] = {}
    for repeat in range(case.repeats + 1):
        for name, side in sides.items():
            found[name], *spent = timed(side)
            if repeat:
                times[name].append((spent[0], spent[1]))
    agree = all(torch.equal(match, found["torchvision"]) for match in found.values())
    cpu, wall = (
        {name: statistics.median(spent[i] for spent in times[name]) for name in sides}
        for i in (0, 1)
    )
    ratio = cpu["torchvision"] / cpu["ours"]
    verdict = ("ok" if ratio >= case.asked else "SHORT") if agree else "DISAGREES"
    for clock, medians in (("CPU", cpu), ("wall", wall)):
        print(
            f"{case.boxes:5} boxes  {clock:4}  "
            + "".join(f"{name} {medians[name]:8.2f} ms   " for name in sides)
            + f"ratio {medians['torchvision'] / medians['ours']:6.1f}"
            + (f"   target {case.asked:4.1f}   {verdict}" if clock == "CPU" else ""),
            flush=True,
        )
    return verdict == "ok"


def mebibytes(side: str, count: int) -> float:
    """Return the peak resident memory beyond boxes and anchors, including the grid."""
    levels, boxes = AnchorGenerator(mode="torchvision", offset=0)(LEVELS, (800, 1344)), draw(count)
    match = ours if side == "ours" else theirs
    match(boxes[:2], [level[: h * w * 9] for level, (h, w) in zip(levels, LEVELS, strict=True)])
    return resident_peak(lambda: match(boxes, levels))


def compare_memory(count: int, threads: int) -> bool:
    arguments = ["--boxes", str(count), "--threads", str(threads)]
    [ours], [theirs] = (
        printed_by("tests.benchmarks.matching", [*arguments, f"--memory-of={side}"])
        for side in ("ours", "torchvision")
    )
    good = ours <= MIB_ASKED
    print(
        f"{count:5} boxes  peak  ours {ours:8.1f} MiB  torchvision {theirs:8.1f} MiB   "
        f"at most {MIB_ASKED:.0f}   {'ok' if good else 'SHORT'}",
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=["ours", "torchvision"], help=argparse.SUPPRESS)
    parser.add_argument("--boxes", type=int, default=1000, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(mebibytes(arguments.memory_of, arguments.boxes))
        return 0
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}, "
        "201,600 anchors"
    )
    levels = AnchorGenerator(mode="torchvision", offset=0)(LEVELS, (800, 1344))
    good = [compare(case, levels) for case in CASES]
    good += [compare_memory(count, arguments.threads) for count in (20, 1000)]
    print(f"{sum(good)} of {len(good)} cases reach their target")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
