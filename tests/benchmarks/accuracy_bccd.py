"""Accuracy on real photos: RetinaNet of focaldet compared with torchvision's on blood cells (BCCD).

Three contestants train on the same 292 photos at 320x240, with the same ImageNet MobileNetV2, FPN
width, batch size, number of steps, frozen stages and seeds. They are evaluated on 72 other photos:

- torchvision: the class RetinaNet with its defaults, AdamW and the paper's step schedule;
- focaldet: RetinaNetConfig with its defaults, everything else the same;
- recommended: focaldet with a modern recipe, for the same number of epochs.

Each training runs in its own process and takes about 15 minutes on one core.

    python -m tests.benchmarks.accuracy_bccd BCCD --weights FEATURES.pth [--seeds 0 1]

BCCD contains "coco/{trainval,test}.json" and "voc/JPEGImages"; FEATURES.pth is a state dict of
``torchvision.models.mobilenet_v2().features``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision

from tests.benchmarks.bccd import FPN_CHANNELS, HEIGHT, WIDTH, Job, Recipe, recommended, run_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.benchmarks.bccd import Outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of BCCD")
    parser.add_argument("--weights", type=Path, required=True, help="file of MobileNetV2 features")
    parser.add_argument("--epochs", type=int, default=25, help="default: 25")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--processes", type=int, default=1, help="parallel trainings (default: 1)")
    options = parser.parse_args()

    plain = Recipe(epochs=options.epochs)
    contestants: dict[str, tuple[Recipe, dict[str, Any] | None]] = {
        "torchvision": (plain, None),
        "focaldet": (plain, {}),
        "recommended": recommended(options.epochs),
    }
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, one thread per training, "
        f"{options.processes} in parallel, load {os.getloadavg()[0]:.1f}; {WIDTH}x{HEIGHT}, "
        f"{options.epochs} epochs, batch size {plain.batch_size}, {FPN_CHANNELS} FPN channels"
    )
    rounds = list(itertools.product(options.seeds, contestants))
    jobs = [
        Job(
            folder=options.data,
            weights=options.weights,
            seed=seed,
            recipe=contestants[name][0],
            changes=contestants[name][1],
        )
        for seed, name in rounds
    ]
    found: dict[str, list[Outcome]] = {name: [] for name in contestants}
    for (seed, name), outcome in zip(rounds, run_all(jobs, options.processes), strict=True):
        found[name].append(outcome)
        print(f"{name:12s} seed {seed}  {line([outcome])}", flush=True)
    for name, outcomes in found.items():
        print(f"{name:12s} mean    {line(outcomes)}")


def line(outcomes: Sequence[Outcome]) -> str:
    """Format the mean AP, the median CPU time and the maximum memory."""
    ap, ap50, ap75 = (statistics.mean(o.result.stats[i] for o in outcomes) for i in range(3))
    step = statistics.median(o.step for o in outcomes)
    peak = max(o.peak for o in outcomes)
    return (
        f"AP {ap:.3f}  AP50 {ap50:.3f}  AP75 {ap75:.3f}  {step:.3f} s CPU per step  {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
