"""Draw the figures of docs/tutorials that no run of a detector draws: ``python docs/figures/draw_tutorials.py``.

The times are those of the tables in docs/export.md. ``--png`` also writes PNG files for a quick look.
"""

from __future__ import annotations

import re
import sys

import draw_explained as style
from draw_focal_loss import HERE
from matplotlib import pyplot as plt

NETWORKS = {"MobileNetV2": style.BLUE, "ResNet-18": style.ORANGE}
ROWS = (
    "PyTorch",
    "PyTorch, optimised",
    "onnxruntime",
    "onnxruntime, INT8",
    "OpenVINO",
    "OpenVINO, INT8",
)
LABELS = {
    "torchvision": ("(background)", "cat", "dog"),
    "keras-retinanet": ("cat", "dog", ""),
    "Detectron2": ("cat", "dog", ""),
    "MMDetection 2, 3": ("cat", "dog", ""),
    "DeepForest": ("cat", "dog", ""),
    "focaldet": ("cat", "dog", ""),
}


def times_of(page: str, network: str) -> dict[str, int]:
    """Read the milliseconds of a network from the tables of a page.

    >>> times_of(
    ...     "| tiny | AP | CPU time |\\n|---|---|---|\\n| PyTorch | 58.5 | 1,340 ms |\\n", "tiny"
    ... )
    {'PyTorch': 1340}
    """
    table = page.split(f"| {network} | AP |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| ([^|]+?) \|.*\| ([\d,]+) ms", table, re.MULTILINE)
    return {name: int(time.replace(",", "")) for name, time in rows}


def save(figure: plt.Figure, name: str) -> None:
    """Write a drawing without a background, for light and dark pages."""
    path = HERE / "tutorials" / f"{name}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    if "--png" in sys.argv:
        figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def draw_times() -> None:
    """Draw the CPU time of a photo by network, runtime and precision."""
    page = (HERE.parent / "export.md").read_text(encoding="utf-8")
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    height = 0.38
    for index, (network, colour) in enumerate(NETWORKS.items()):
        times = times_of(page, network)
        places = [row + (index - 0.5) * height for row in range(len(ROWS))]
        bars = axis.barh(places, [times[row] for row in ROWS], height, color=colour, label=network)
        axis.bar_label(bars, fmt="{:.0f} ms", padding=4, color=style.INK)
    axis.set_yticks(range(len(ROWS)), ROWS)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.tick_params(length=0)
    axis.margins(x=0.12)
    axis.legend(frameon=False, loc="lower right")
    save(figure, "times")


def draw_labels() -> None:
    """Draw which label each class has in each project."""
    figure, axis = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    for row, (_, names) in enumerate(LABELS.items()):
        for label, name in enumerate(names):
            if not name:
                continue
            colour = {"cat": style.BLUE, "dog": style.ORANGE}.get(name, style.INK)
            axis.add_patch(
                plt.Rectangle((label + 0.05, row + 0.1), 0.9, 0.8, color=colour, alpha=0.35, lw=0)
            )
            axis.text(label + 0.5, row + 0.5, name, ha="center", va="center", color=style.INK)
    axis.set_xlim(0, 3)
    axis.set_ylim(len(LABELS), 0)
    axis.set_xticks([0.5, 1.5, 2.5], ["label 0", "label 1", "label 2"])
    axis.set_yticks([row + 0.5 for row in range(len(LABELS))], LABELS)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    save(figure, "labels")


if __name__ == "__main__":
    draw_times()
    draw_labels()
