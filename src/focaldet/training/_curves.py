"""``curves.png``: the losses, the AP and the learning rate of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from focaldet._atomic import atomic_write
from focaldet._checks import existing_file
from focaldet.training._metrics_file import MetricsFile, read_metrics

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes

__all__ = ["Curves", "draw_curves"]

_FEW = 20  # points; so few are marked, because a line through one point would be invisible
_MOST = 1e30  # larger numbers, infinity and NaN cannot be drawn
_EPOCH_LOSSES = ("train/loss_epoch", "val/loss")


class Curves(pl.Callback):
    """Draw the curves of a run after each epoch.

    Args:
        metrics: Metrics of the run.
        path: Path of the picture to write.
    """

    def __init__(self, metrics: MetricsFile, path: str | os.PathLike[str]) -> None:
        self.metrics = metrics
        self.path = Path(path)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the previous epochs."""
        del module
        if trainer.current_epoch and trainer.is_global_zero:
            self.metrics.save()
            draw_curves(self.metrics.path, self.path)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw all epochs."""
        del module
        if trainer.is_global_zero:
            self.metrics.save()
            draw_curves(self.metrics.path, self.path)


def draw_curves(metrics: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw the losses, the AP and the learning rate of a run.

    Args:
        metrics: Path of the run's ``metrics.csv``.
        path: Path of the picture to write; its suffix determines the format.

    Raises:
        FileNotFoundError: If ``metrics`` does not exist.
        TrainingError: If it is damaged.
    """
    from matplotlib.figure import Figure

    rows = [
        {name: value for name, value in row.items() if abs(value) < _MOST}
        for row in read_metrics(existing_file("metrics", metrics))
    ]
    figure = Figure(figsize=(11, 3.6))
    # Fixed margins, because a layout that measures all labels takes as long as drawing.
    figure.subplots_adjust(left=0.045, right=0.975, bottom=0.14, top=0.9, wspace=0.19)
    losses, ap, rate = figure.subplots(1, 3)
    _plot(losses, rows, {"train/loss": "training, per update"}, color="0.75", linewidth=0.8)
    _plot(losses, rows, {"train/loss_epoch": "training, per epoch"}, color="C0", marker=".")
    _plot(losses, rows, {"val/loss": "validation"}, color="C1", marker=".")
    losses.set(title="loss", xlabel="update")
    named = {f"val/{name}": name for name in ("AP50", "AP", "AP75")}
    _plot(ap, rows, named, marker=".")
    ap.set(title="validation AP", xlabel="update")
    _plot(rate, rows, {"train/lr": "learning rate"})
    rate.set(title="learning rate", xlabel="update")
    for axes in (losses, ap, rate):
        axes.set_xlim(0, max([row["step"] for row in rows] or [0]) + 1)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes, place in ((losses, "upper right"), (ap, "lower right")):
        if axes.lines:
            axes.legend(frameon=False, loc=place)
    steps = sorted(row["train/loss"] for row in rows if "train/loss" in row)
    epochs = [row[name] for row in rows for name in _EPOCH_LOSSES if name in row]
    if steps:  # the first losses would flatten the rest of the curve
        losses.set_ylim(0, 1.1 * max([steps[len(steps) * 9 // 10], *epochs]))
    path = Path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=110)


def _plot(
    axes: Axes, rows: Sequence[dict[str, float]], named: dict[str, str], **style: Any
) -> None:
    for column, label in named.items():
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            few = {"marker": "."} if len(points) < _FEW else {}
            axes.plot(*zip(*points, strict=True), label=label, **{**few, **style})
