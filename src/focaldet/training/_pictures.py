"""Pictures of validation images with ground truth and detections, drawn after each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont

from focaldet._atomic import atomic_write
from focaldet.boxes import as_xyxy
from focaldet.visualization import draw_boxes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.datasets import DetectionDataset
    from focaldet.detections import Detections

__all__ = ["Pictures"]

_MAX_WIDTH = 640  # pixels of one image in a sheet
_GAP, _HEADER, _LINE = 8, 26, 18  # pixels
_FEW = 5  # detections to draw if none scores above the threshold
_NOTE_COLOR = (176, 48, 0)


class _Pair(NamedTuple):
    """An image with its ground truth, with its detections, and what to write below the latter."""

    left: Image.Image
    right: Image.Image
    note: str


class Pictures(pl.Callback):
    """Draw validation images after each epoch: ground truth on the left, detections on the right.

    If no detection of an image scores above the threshold, the five with the highest scores are
    drawn, and a line below the image says so. In the first epochs this is the usual case.

    .. versionchanged:: 0.3.0
       The right half used to be empty in that case.

    Args:
        folder: Folder to write the sheets to, as ``epoch_001.png`` and so on.
        data: Validation dataset, whose first images are drawn.
        count: Number of images to draw.
        score_threshold: Draw detections that score above this.
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
        self._shown: list[_Pair] = []

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Start a new sheet."""
        self._shown = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Draw the images of a batch until the sheet has enough."""
        del module
        if outputs is None or not trainer.is_global_zero:
            return
        missing = self.count - len(self._shown)
        for image, target, found in list(zip(*batch, outputs["detections"], strict=True))[:missing]:
            picture, scale = _shrink(image.cpu())
            labels = target["labels"].cpu()
            names = [self.data.class_names[label] for label in labels.tolist()]
            kept, note = _choose(found.to("cpu"), self.score_threshold)
            # In reverse order, the detection with the highest score is drawn on top.
            boxes, found_labels = kept.boxes.float().flip(0), kept.labels.flip(0)
            self._shown.append(
                _Pair(
                    draw_boxes(
                        picture, as_xyxy(target["boxes"]).cpu() * scale, labels, texts=names
                    ),
                    draw_boxes(picture, boxes * scale, found_labels, texts=_texts(kept)[::-1]),
                    note,
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


def _choose(found: Detections, threshold: float) -> tuple[Detections, str]:
    """Return the detections to draw, and a note if none of them scores above the threshold."""
    kept = found.filter(score_threshold=threshold)
    if len(kept):
        return kept, ""
    kept = found[found.scores.argsort(descending=True)[:_FEW]]
    if not len(kept):
        return kept, "no detections"
    best = "the best detection" if len(kept) == 1 else f"the best {len(kept)} detections"
    return kept, f"{best}; none scores above {threshold:g}"


def _texts(found: Detections) -> list[str]:
    scores = found.scores.tolist()
    return [f"{name} {score:.2f}" for name, score in zip(found.label_names, scores, strict=True)]


def _shrink(image: Tensor) -> tuple[Tensor, float]:
    """Shrink an image to the maximum width of the sheet; return it and the scale."""
    image = image[:3] if len(image) >= 3 else image[:1]  # of other channels, the first are shown
    scale = min(1.0, _MAX_WIDTH / image.shape[2])
    if scale < 1:
        image = torch.nn.functional.interpolate(
            image[None], scale_factor=scale, mode="bilinear", antialias=True
        )[0].clamp(0, 1)
    return image, scale


def _sheet(pairs: Sequence[_Pair], heads: tuple[str, str]) -> Image.Image:
    font = ImageFont.load_default(14)
    width = max(pair.left.width for pair in pairs)
    notes = [_wrap(pair.note, width, font) for pair in pairs]
    height = _HEADER + sum(pair.left.height + _GAP for pair in pairs) + _LINE * sum(map(len, notes))
    sheet = Image.new("RGB", (2 * width + 3 * _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((_GAP + column * (width + _GAP), 5), head, fill="black", font=font)
    y = _HEADER
    for (left, right, _), lines in zip(pairs, notes, strict=True):
        sheet.paste(left, (_GAP, y))
        sheet.paste(right, (width + 2 * _GAP, y))
        y += left.height
        for line in lines:
            draw.text((width + 2 * _GAP, y + 1), line, fill=_NOTE_COLOR, font=font)
            y += _LINE
        y += _GAP
    return sheet


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text between its words into lines that fit the width, if each word does."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
