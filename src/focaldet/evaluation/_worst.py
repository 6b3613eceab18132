"""The images with the most errors, and pictures of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image

from focaldet.boxes import xywh_to_xyxy
from focaldet.evaluation._matching import HIT, IGNORED
from focaldet.images import load_picture
from focaldet.visualization import draw_boxes

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import numpy.typing as npt
    from torch import Tensor

    from focaldet.evaluation._matching import Matches

__all__ = ["ImageErrors"]

_FEW = 5  # detections to draw if none scores above the threshold
_MOST_TEXTS = 12  # boxes of an image that get a text; more would hide the image


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageErrors:
    """What was found in an image and what was not. Boxes are xyxy in pixels of the image.

    Attributes:
        COLORS: Red, green and blue of hits, missed objects, false alarms, and detections below the
            threshold.
        image_id: Id of the image.
        hits: ``[H, 4]``, the detections that hit an object.
        misses: ``[S, 4]``, the objects that were missed.
        false_alarms: ``[F, 4]``, the detections that hit nothing.
        hit_texts: Class and score of each hit.
        miss_texts: Class of each missed object.
        false_alarm_texts: Class and score of each false alarm.
        below: ``[B, 4]``, the five detections with the highest scores, if none scores above the
            threshold. They count neither as hits nor as false alarms.
        below_texts: Class and score of each of them.

    .. versionadded:: 0.3.0
    """

    COLORS: ClassVar[Mapping[str, tuple[int, int, int]]] = {
        "hit": (0, 158, 115),
        "missed": (255, 200, 0),
        "false alarm": (213, 60, 0),
        "below the threshold": (90, 130, 230),
    }

    image_id: int
    hits: Tensor
    misses: Tensor
    false_alarms: Tensor
    hit_texts: tuple[str, ...]
    miss_texts: tuple[str, ...]
    false_alarm_texts: tuple[str, ...]
    below: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.float64))
    below_texts: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The three numbers in words, or the misses if only detections below the threshold are drawn."""
        counts = (len(self.hits), len(self.misses), len(self.false_alarms))
        words = (("hit", "hits"), ("miss", "misses"), ("false alarm", "false alarms"))
        texts = [f"{n} {word[n != 1]}" for n, word in zip(counts, words, strict=True)]
        if len(self.below):
            best = f"best {len(self.below)}" if len(self.below) > 1 else "best one"
            return f"{texts[1]}; {best} below the threshold"
        return ", ".join(texts)

    def draw(self, image: Tensor | Image.Image, *, scale: float = 1.0) -> Image.Image:
        """Draw hits in green, misses in yellow and false alarms in red on a copy of the image.

        Detections below the threshold, which are only there if none is above, are blue. Errors are drawn on top. Images with more than 12 boxes have no texts at the boxes.

        Args:
            image: The image, as for :func:`focaldet.visualization.draw_boxes`.
            scale: Factor by which the image was resized.
        """
        boxes = torch.cat([self.below, self.hits, self.misses, self.false_alarms]) * scale
        texts = [*self.below_texts, *self.hit_texts, *self.miss_texts, *self.false_alarm_texts]
        colors = (
            [self.COLORS["below the threshold"]] * len(self.below)
            + [self.COLORS["hit"]] * len(self.hits)
            + [self.COLORS["missed"]] * len(self.misses)
            + [self.COLORS["false alarm"]] * len(self.false_alarms)
        )
        few = len(texts) <= _MOST_TEXTS
        width, height = image.size if isinstance(image, Image.Image) else image.shape[:-3:-1]
        return draw_boxes(
            image,
            boxes.float(),
            colors=colors,
            texts=texts if few else None,
            line_width=max(
                2, round((width * height) ** 0.5 / 140)
            ),  # thinner ones lose their colour
        )

    def draw_file(
        self, path: str | os.PathLike[str], *, max_size: tuple[int, int] = (640, 640)
    ) -> Image.Image:
        """Read an image, shrink it and draw on it as `draw` does.

        Args:
            path: The image file.
            max_size: Maximum width and height of the picture, in pixels.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the image cannot be read.
        """
        picture = Image.fromarray(load_picture(path).permute(1, 2, 0).numpy())
        width = picture.width
        picture.thumbnail(max_size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        return self.draw(picture, scale=picture.width / width)


def find_worst(
    matches: Matches, thresholds: npt.NDArray[np.float64], count: int
) -> tuple[ImageErrors, ...]:
    """Return the images with the most misses and false alarms above the score thresholds."""
    truth = matches.truth
    above = matches.scores > thresholds[matches.categories]
    hit = above & (matches.kinds == HIT)
    false = above & ~hit & (matches.kinds != IGNORED)
    missed = ~truth.crowd
    missed[matches.objects[hit]] = False
    images = len(truth.image_ids)
    errors = np.bincount(matches.images[false], minlength=images)
    errors += np.bincount(truth.images[missed], minlength=images)
    order = np.argsort(-errors, kind="stable")[:count]

    def detected(rows: npt.NDArray[np.int64]) -> tuple[Tensor, tuple[str, ...]]:
        rows = rows[::-1]  # the highest score is drawn last, on top
        names = [truth.category_names[k] for k in matches.categories[rows]]
        texts = (
            f"{name} {score:.2f}" for name, score in zip(names, matches.scores[rows], strict=True)
        )
        return xywh_to_xyxy(torch.from_numpy(matches.boxes[rows])), tuple(texts)

    found = []
    for image in order[errors[order] > 0].tolist():
        here = matches.images == image
        hits, hit_texts = detected(np.flatnonzero(here & hit))
        alarms, alarm_texts = detected(np.flatnonzero(here & false))
        objects = np.flatnonzero(missed & (truth.images == image))
        low = np.flatnonzero(here)[:_FEW] if not above[here].any() else np.zeros(0, np.int64)
        below, below_texts = detected(low)
        found.append(
            ImageErrors(
                image_id=int(truth.image_ids[image]),
                hits=hits,
                misses=xywh_to_xyxy(torch.from_numpy(truth.boxes[objects])),
                false_alarms=alarms,
                hit_texts=hit_texts,
                miss_texts=tuple(truth.category_names[k] for k in truth.categories[objects]),
                false_alarm_texts=alarm_texts,
                below=below,
                below_texts=below_texts,
            )
        )
    return tuple(found)
