"""The experiment of the paper's Table 1 on blood cells (BCCD): which loss finds the most?

It compares cross-entropy, alpha-balanced cross-entropy and the focal loss with gamma 0.5, 1, 2 and
5, each with the alpha that the paper found best for it. Everything else is equal: the recipe of
`accuracy`, with vertical flips. It prints a table, which --json also writes to a file for
docs/figures/draw_losses_bccd.py.

    python -m tests.benchmarks.losses_bccd bccd=coco/trainval.json,coco/test.json,voc/JPEGImages \
        --weights FEATURES.pth [--seeds 0]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path

import torch

from tests.benchmarks.accuracy import Variant, job_of
from tests.benchmarks.trainings import Data, Network, run_all, summary

# gamma, alpha, the paper's AP on COCO with ResNet-50 at 600 pixels (Tables 1a and 1b)
LOSSES: dict[str, tuple[float, float | None, float]] = {
    "cross entropy": (0.0, None, 30.2),
    "balanced cross entropy": (0.0, 0.75, 31.1),
    "focal, gamma 0.5": (0.5, 0.5, 32.9),
    "focal, gamma 1": (1.0, 0.25, 33.7),
    "focal, gamma 2": (2.0, 0.25, 34.0),
    "focal, gamma 5": (5.0, 0.25, 32.2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="NAME=TRAIN.json,TEST.json,PHOTOS")
    add("--weights", type=Path, required=True, help="file of MobileNetV2's weights")
    add("--epochs", type=int, default=10, help="default: 10")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--processes", type=int, default=1, help="trainings at once (default: 1)")
    add("--output", type=Path, default=Path("losses-results"),
        help="folder of the results (default: losses-results)")  # fmt: skip
    add("--json", type=Path, help="file to write the table to as well")
    options = parser.parse_args()

    data = Data.parse(options.data)
    train_table, _ = data.read()
    rounds = list(itertools.product(options.seeds, LOSSES))
    jobs = []
    for seed, name in rounds:
        gamma, alpha, _ = LOSSES[name]
        job = job_of(
            f"gamma{gamma:g}-alpha{alpha}",
            Variant(config={"focal_gamma": gamma, "focal_alpha": alpha}),
            data=data,
            table=train_table,
            network=Network(weights=options.weights),
            min_size=240,
            epochs=options.epochs,
            seed=seed,
            output=options.output,
            vertical_flip=True,  # blood cells have no upright direction
        )
        jobs.append(job)
    print(
        f"torch {torch.__version__}, {options.epochs} epochs, seeds {options.seeds}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    stats: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    for (seed, name), record in zip(rounds, run_all(jobs, options.processes), strict=True):
        if record is None:
            raise SystemExit("A training is missing; run this again when it is free.")
        stats[name].append(record["stats"])
        print(f"{name:23s} seed {seed}  {summary(record)}", flush=True)
    table = []
    print(f"{'loss':23s} alpha   AP    AP50  AP75   paper's AP")
    for name, (gamma, alpha, paper) in LOSSES.items():
        means = [statistics.mean(run[i] for run in stats[name]) for i in range(3)]
        each = [run[0] for run in stats[name]]
        table.append({"loss": name, "gamma": gamma, "alpha": alpha, "ap": each, "paper": paper})
        numbers = "  ".join(f"{100 * value:4.1f}" for value in means)
        print(f"{name:23s} {'-' if alpha is None else alpha:5}  {numbers}  {paper:8.1f}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
