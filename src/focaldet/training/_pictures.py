"""Pictures of a run: its curves, and what it finds in the validation images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont

from focaldet._atomic import atomic_write
from focaldet.training._metrics import MetricsFile, read_metrics
from focaldet.visualization import draw_boxes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

    from focaldet.datasets import DetectionDataset
    from focaldet.detections import Detections

__all__ = ["Curves", "Pictures", "draw_curves"]

_WIDEST = 640  # pixels of one image in a sheet
_GAP, _HEADER = 8, 26  # pixels
_FEW = 20  # points that are marked, or a curve of one would not be seen
_EPOCH_LOSSES = ("train/loss_epoch", "val/loss")


class Pictures(pl.Callback):
    """Draw a sheet after each validation: ground truth on the left, detections on the right.

    Args:
        folder: sheets are written as ``epoch_001.png``.
        data: the validation data; its first images are shown.
        count: how many.
        score_threshold: detections must be surer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        data: DetectionDataset,
        *,
        count: int = 4,
        score_threshold: float = 0.3,
    ) -> None:
        self.folder = Path(folder)
        self.data = data
        self.count = count
        self.score_threshold = score_threshold
        self._shown: list[tuple[Image.Image, Image.Image]] = []

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Begin a new sheet."""
        self._shown = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Draw a batch's images, until there are enough."""
        del module
        if outputs is None or not trainer.is_global_zero:
            return
        missing = self.count - len(self._shown)
        for image, target, found in list(zip(*batch, outputs["detections"], strict=True))[:missing]:
            truth = _smaller(image.cpu(), target["boxes"].cpu(), target["labels"].cpu())
            names = [self.data.class_names[label] for label in truth[2].tolist()]
            kept = found.to("cpu").filter(score_threshold=self.score_threshold)
            picture, boxes, labels = _smaller(image.cpu(), kept.boxes.float(), kept.labels)
            texts = _texts(kept)
            self._shown.append(
                (
                    draw_boxes(truth[0], truth[1], truth[2], texts=names),
                    draw_boxes(picture, boxes.flip(0), labels.flip(0), texts=texts[::-1]),
                )
            )

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Write the sheet."""
        if not self._shown or module.stopping:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch_{trainer.current_epoch + 1:03d}.png"
        heads = ("ground truth", f"detections, score > {self.score_threshold:g}")
        _save(_sheet(self._shown, heads), path)


class Curves(pl.Callback):
    """Draw ``curves.png`` from ``metrics.csv`` after each epoch.

    Args:
        metrics: of the run.
        path: the picture.
    """

    def __init__(self, metrics: MetricsFile, path: str | os.PathLike[str]) -> None:
        self.metrics = metrics
        self.path = Path(path)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the epochs before."""
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
    """Draw losses, AP and learning rate of a run.

    Args:
        metrics: its ``metrics.csv``.
        path: the picture; its suffix says the format.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(Path(metrics))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, ap, rate = figure.subplots(1, 3)
    _plot(losses, rows, {"train/loss": "training, each row"}, color="0.75", linewidth=0.8)
    _plot(losses, rows, {"train/loss_epoch": "training, epoch"}, color="C0", marker=".")
    _plot(losses, rows, {"val/loss": "validation"}, color="C1", marker=".")
    losses.set(title="loss", xlabel="update")
    named = {f"val/{name}": name for name in ("AP50", "AP", "AP75")}
    _plot(ap, rows, named, marker=".")
    ap.set(title="validation AP", xlabel="update")
    _plot(rate, rows, {"train/lr": "learning rate"})
    rate.set(title="learning rate", xlabel="update")
    for axes in (losses, ap, rate):
        axes.set_xlim(0, max([row["step"] for row in rows] or [0]) + 1)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (losses, ap):
        if axes.lines:
            axes.legend(frameon=False)
    steps = sorted(row["train/loss"] for row in rows if "train/loss" in row)
    epochs = [row[name] for row in rows for name in _EPOCH_LOSSES if name in row]
    if steps:  # the first ones would squash the rest
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


def _texts(found: Detections) -> list[str]:
    scores = found.scores.tolist()
    return [f"{name} {score:.2f}" for name, score in zip(found.label_names, scores, strict=True)]


def _smaller(image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring an image and its boxes to a width that a sheet has room for."""
    image = image[:3] if len(image) >= 3 else image[:1]  # of other channels, the first are shown
    scale = min(1.0, _WIDEST / image.shape[2])
    if scale < 1:
        image = torch.nn.functional.interpolate(
            image[None], scale_factor=scale, mode="bilinear", antialias=True
        )[0].clamp(0, 1)
    return image, boxes * scale, labels


def _sheet(pairs: Sequence[tuple[Image.Image, Image.Image]], heads: tuple[str, str]) -> Image.Image:
    width = max(left.width for left, _ in pairs)
    height = _HEADER + sum(left.height + _GAP for left, _ in pairs)
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, head in enumerate(heads):
        draw.text((_GAP + column * (width + _GAP), 5), head, fill="black", font=font)
    y = _HEADER
    for left, right in pairs:
        sheet.paste(left, (_GAP, y))
        sheet.paste(right, (width + 2 * _GAP, y))
        y += left.height + _GAP
    return sheet


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
