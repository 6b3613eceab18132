"""Draw the figure of docs/accuracy.md: ``python docs/figures/draw_losses_bccd.py``.

The numbers are read from losses_bccd.json in the same folder, which ``python -m
tests.benchmarks.losses_bccd --json`` writes. ``--png`` also writes a PNG file, for a quick look.
"""

from __future__ import annotations

import json
import statistics

import draw_focal_loss as style
from matplotlib import pyplot as plt

ROWS = json.loads((style.HERE / "losses_bccd.json").read_text())
OURS, PAPER = "#0072b2", "#d55e00"


def main() -> None:
    """Draw the AP of each loss on blood cells and in the paper, each on its own axis."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    other = axis.twinx()
    places = range(len(ROWS))
    means = [100 * statistics.mean(row["ap"]) for row in ROWS]
    axis.plot(places, means, color=OURS, marker="o")
    for place, row in zip(places, ROWS, strict=True):
        if len(row["ap"]) > 1:
            axis.plot([place] * len(row["ap"]), [100 * ap for ap in row["ap"]], "_", color=OURS)
    other.plot(places, [row["paper"] for row in ROWS], color=PAPER, marker="s")
    axis.set_xticks(places, [_name(row) for row in ROWS])
    for side, color, text in ((axis, OURS, "AP, blood cells"), (other, PAPER, "AP, COCO (paper)")):
        side.set_ylabel(text, color=color)
        side.tick_params(axis="y", labelcolor=color)
    other.spines["right"].set_visible(True)
    style.save(figure, "losses_bccd")


def _name(row: dict[str, float | None]) -> str:
    alpha = "" if row["alpha"] is None else f"\n{style.ALPHA} {row['alpha']}"
    return f"{style.GAMMA} {row['gamma']:g}{alpha}"


if __name__ == "__main__":
    main()
