"""Mosaics: training images that are put together from four images of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from focaldet.datasets._combining import ImageCombiner, Sample
from focaldet.datasets._tensors import v2

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MosaicTransform", "Tile", "assemble", "draw_tiles"]

_MARGIN = 0.25  # smallest part of a side between the centre and the border
_MIN_VISIBLE = 0.1  # smallest part of a box's area that must be left
_MIN_SIDE = 1.0  # smallest side of a box, in pixels of the mosaic


class TrainingSizes(Protocol):
    """The sizes that images are resized to for training."""

    def draw(self) -> int:
        """Draw the length that determines the sizes of all images of a mosaic."""

    def resized(self, size: tuple[int, int], length: int) -> tuple[int, int]:
        """Return the ``(height, width)`` for training of an image of this ``(height, width)``."""

    def canvas(self, size: tuple[int, int], length: int) -> tuple[int, int]:
        """Return the ``(height, width)`` of what an image of this ``(height, width)`` is put on."""


class Tile(NamedTuple):
    """Part of a mosaic: a rectangle of an image, and the rectangle of the mosaic that it fills.

    Attributes:
        source: ``(top, left, height, width)`` in pixels of the image.
        place: ``(top, left, height, width)`` in pixels of the mosaic.
    """

    source: tuple[int, int, int, int]
    place: tuple[int, int, int, int]


class MosaicTransform(ImageCombiner):
    """A transform for training that turns a share of the images into mosaics.

    A mosaic has the size that the image would have alone, so that batches keep their shapes. A point
    is drawn at least a quarter of each side away from the border, and the image and three others,
    drawn with replacement from the dataset, fill the four rectangles around it. Each shows a random
    part of its image, with the aspect ratio of the rectangle. The size of that part is drawn so that
    the image is at most as large as it would be alone, and at least so large that it fills its
    rectangle. Nothing is padded. Only where that is impossible, as for a portrait in a wide
    rectangle, the image is enlarged a little more.

    Boxes are clipped to their rectangle. Those of which less than a tenth of the area is left, or
    which are less than a pixel wide or high, are removed together with their labels. What is left of
    such an object trains as background, so few objects should be removed; but a sliver shows too
    little to be recognised, or to tell where the rest would be.

    Args:
        probability: Probability that an image becomes a mosaic.
        each: Transform of each of the four images before they are put together, such as a mirror.
        sizes: The sizes of images in training.
        single: Transform of images that do not become mosaics.
        antialias: Whether to antialias when resizing.

    References:
        Bochkovskiy et al., YOLOv4 (mosaic). arXiv:2004.10934. The paper says that four images are
        mixed, but not how. The centre, the scales and the rule for boxes are ours. At these scales
        most objects are between half as large and as large as in images that are not mosaics, so that
        anchors that fit the ones fit the others.
    """

    def __init__(
        self,
        probability: float,
        *,
        each: Any,
        sizes: TrainingSizes,
        single: Any,
        antialias: bool,
    ) -> None:
        self.probability = probability
        self.each = each
        self.sizes = sizes
        self.single = single
        self.antialias = antialias

    def __repr__(self) -> str:
        return f"MosaicTransform({self.probability}, {self.single})"

    def draw_others(self, count: int) -> list[int]:
        """Draw three images with the probability of a mosaic."""
        if float(torch.rand(())) >= self.probability:
            return []
        others: list[int] = torch.randint(count, (3,)).tolist()
        return others

    def combine(self, samples: Sequence[Sample]) -> tuple[Any, dict[str, Any]]:
        """Return a mosaic of four images, with the image id of the first, or transform a single image."""
        if len(samples) == 1:
            [sample] = samples
            result: tuple[Any, dict[str, Any]] = self.single(*sample)
            return result
        changed = [self.each(*sample) for sample in samples]
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image, _ in changed]
        length = self.sizes.draw()
        canvas = self.sizes.canvas(sizes[0], length)
        tiles = draw_tiles(canvas, sizes, [self.sizes.resized(size, length) for size in sizes])
        return assemble(changed, canvas, tiles, antialias=self.antialias)


def draw_tiles(
    canvas: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    training_sizes: Sequence[tuple[int, int]],
) -> list[Tile]:
    """Draw the tiles of a mosaic: top left, top right, bottom left and bottom right.

    Args:
        canvas: ``(height, width)`` of the mosaic.
        sizes: ``(height, width)`` of the four images.
        training_sizes: ``(height, width)`` that each would have alone.
    """
    height, width = canvas
    y, x = _draw_centre(height), _draw_centre(width)
    places = [
        (0, 0, y, x),
        (0, x, y, width - x),
        (y, 0, height - y, x),
        (y, x, height - y, width - x),
    ]
    return [
        Tile(_draw_source(place[2:], size, resized), place)
        for place, size, resized in zip(places, sizes, training_sizes, strict=True)
    ]


def assemble(
    samples: Sequence[Sample], canvas: tuple[int, int], tiles: Sequence[Tile], *, antialias: bool
) -> Sample:
    """Put images and their boxes together.

    Args:
        samples: The images, ``[C, H, W]``, and their targets.
        canvas: ``(height, width)`` of the mosaic.
        tiles: A tile for each image.
        antialias: Whether to antialias when resizing.

    Returns:
        The mosaic, and a target with the boxes and labels of all images. Other entries are those of
        the first one.
    """
    first = samples[0][0].as_subclass(Tensor)
    mosaic = first.new_zeros((len(first), *canvas))
    boxes, labels = [], []
    for (image, target), (source, place) in zip(samples, tiles, strict=True):
        top, left, height, width = source
        y, x, new_height, new_width = place
        if not new_height or not new_width:  # of a mosaic of one row or column
            continue
        part = image.as_subclass(Tensor)[:, top : top + height, left : left + width]
        mosaic[:, y : y + new_height, x : x + new_width] = v2.functional.resize(
            part, [new_height, new_width], antialias=antialias
        )
        moved, kept = _moved(target["boxes"].as_subclass(Tensor), source, place)
        boxes.append(moved)
        labels.append(target["labels"][kept])
    return mosaic, {**samples[0][1], "boxes": torch.cat(boxes), "labels": torch.cat(labels)}


def _draw_centre(side: int) -> int:
    part = _MARGIN + (1 - 2 * _MARGIN) * float(torch.rand(()))
    return min(max(1, round(side * part)), side - 1)


def _draw_source(
    place: tuple[int, ...], size: tuple[int, int], resized: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Draw the rectangle of an image that fills a place of this ``(height, width)``."""
    smallest = max(side / full for side, full in zip(place, resized, strict=True))
    scale = smallest + max(0.0, 1 - smallest) * float(torch.rand(()))
    height, width = (
        min(old, max(1, round(side * old / (scale * full))))
        for side, old, full in zip(place, size, resized, strict=True)
    )
    top = int(torch.randint(size[0] - height + 1, ()))
    left = int(torch.randint(size[1] - width + 1, ()))
    return top, left, height, width


def _moved(
    boxes: Tensor, source: tuple[int, int, int, int], place: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the boxes in pixels of the mosaic, and which of the boxes these are."""
    top, left, height, width = source
    y, x, new_height, new_width = place
    moved = boxes - boxes.new_tensor([left, top, left, top])
    moved = moved * boxes.new_tensor([new_width / width, new_height / height] * 2)
    limits = boxes.new_tensor([new_width, new_height] * 2)
    clipped = torch.minimum(moved.clamp(min=0), limits)
    sides, whole = (each[:, 2:] - each[:, :2] for each in (clipped, moved))
    kept = (sides >= _MIN_SIDE).all(1) & (sides.prod(1) >= _MIN_VISIBLE * whole.prod(1))
    return clipped[kept] + boxes.new_tensor([x, y, x, y]), kept
