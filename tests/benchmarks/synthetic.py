"""Write synthetic datasets of known difficulty, for the accuracy benchmark.

    python -m tests.benchmarks.synthetic FOLDER [--sets tiny large crowded long_tail]
    python -m tests.benchmarks.accuracy FOLDER/tiny --splits train test --weights FEATURES.pth

Each set has 160 photos to train on and 100 to test on, 320x240 pixels, in COCO format:

- tiny: three classes, 15 to 40 objects of 6 to 16 pixels per photo;
- large: four classes, objects of 90 to 210 pixels, one in 70 % of the photos and none in the others;
- crowded: three classes, 14 to 28 objects of 26 to 64 pixels in a few heaps. Boxes surround whole objects,
  of which at least 30 % is visible;
- long_tail: ten classes, each about 0.6 times as frequent as the one before, 18 to 90 pixels.

Classes are shapes. They have any colour, direction and proportions, are translucent and noisy, and lie on a
coloured texture with strokes and blobs that are no objects, so that a detector does not find all of
them. The seed, the set and the number of a photo determine what is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from focaldet._atomic import atomic_write, atomic_write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 320, 240
IMAGES = {"train": 160, "test": 100}
SHAPES = (
    *("disc", "square", "triangle", "ring", "cross"),
    *("star", "hexagon", "crescent", "arrow", "frame"),
)
_FINE = 3  # masks are drawn this many times as large
_VISIBLE = 0.3  # least part of an object that later ones leave visible


@dataclass(frozen=True, kw_only=True)
class Set:
    """What is drawn in the photos of a dataset.

    Attributes:
        classes: Number of classes, the first of ``SHAPES``.
        objects: Fewest and most objects in a photo with objects.
        sides: Smallest and largest side of an object in pixels; small ones are as frequent as large
            ones on a logarithmic scale.
        empty: Part of the photos that have no objects.
        decay: Frequency of a class relative to that of the one before.
        heaps: Whether objects lie on each other.
    """

    classes: int
    objects: tuple[int, int]
    sides: tuple[float, float]
    empty: float = 0.0
    decay: float = 1.0
    heaps: bool = False


SETS = {
    "tiny": Set(classes=3, objects=(15, 40), sides=(6, 16)),
    "large": Set(classes=4, objects=(1, 1), sides=(90, 210), empty=0.3),
    "crowded": Set(classes=3, objects=(14, 28), sides=(26, 64), heaps=True),
    "long_tail": Set(classes=10, objects=(2, 7), sides=(18, 90), decay=0.6),
}


def write_set(folder: Path, name: str, counts: dict[str, int] = IMAGES, seed: int = 0) -> None:
    """Write a dataset: a folder per split, with its photos and ``_annotations.coco.json``."""
    kind = SETS[name]
    number = 0
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            number += 1
            rng = np.random.default_rng([seed, list(SETS).index(name), number])
            photo, boxes, labels = draw_photo(kind, rng)
            file_name = f"{name}_{number:04d}.jpg"
            with atomic_write(folder / split / file_name) as temporary:
                photo.save(temporary, "JPEG", quality=90)
            size = {"width": WIDTH, "height": HEIGHT}
            images.append({"id": index + 1, "file_name": file_name, **size})
            for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        categories = [
            {"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES[: kind.classes])
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        atomic_write_text(folder / split / "_annotations.coco.json", json.dumps(content))


def draw_photo(
    kind: Set, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, int, int, int]], list[int]]:
    """Draw a photo; return it with the xyxy boxes and the labels of its objects."""
    canvas = _background(rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    masks: list[npt.NDArray[np.bool_]] = []  # what is visible of each object
    sizes: list[int] = []  # of the whole objects
    if rng.random() >= kind.empty:
        weights = kind.decay ** np.arange(kind.classes)
        count = int(rng.integers(kind.objects[0], kind.objects[1] + 1))
        heaps = rng.uniform((50, 50), (WIDTH - 50, HEIGHT - 50), (int(rng.integers(2, 5)), 2))
        for _ in range(10 * count):  # places that do not fit are drawn again, but not for ever
            if len(boxes) == count:
                break
            label = int(rng.choice(kind.classes, p=weights / weights.sum()))
            side = float(np.exp(rng.uniform(*np.log(kind.sides))))
            alpha = _shape(SHAPES[label], side, rng)
            place = _place(alpha.shape, kind, heaps, boxes, rng)
            if place is None:
                continue
            x, y = place
            mask = np.zeros((HEIGHT, WIDTH), np.bool_)
            mask[y : y + alpha.shape[0], x : x + alpha.shape[1]] = alpha > 0.5
            left = [old & ~mask for old in masks]
            if any(old.sum() < _VISIBLE * size for old, size in zip(left, sizes, strict=True)):
                continue
            masks = [*left, mask]
            sizes.append(int(mask.sum()))
            _paint(canvas, alpha, x, y, rng)
            boxes.append((x, y, x + alpha.shape[1], y + alpha.shape[0]))
            labels.append(label)
    canvas += rng.normal(0, 8, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), boxes, labels


def _place(
    shape: tuple[int, ...],
    kind: Set,
    heaps: Floats,
    boxes: Sequence[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Return the corner of a new object, or None if it would lie on another and must not."""
    height, width = shape
    if width > WIDTH or height > HEIGHT:
        return None
    if kind.heaps:
        centre = heaps[rng.integers(len(heaps))] + rng.normal(0, 34, 2)
        x, y = (int(v) for v in centre - (width / 2, height / 2))
        return min(max(x, 0), WIDTH - width), min(max(y, 0), HEIGHT - height)
    x, y = int(rng.integers(WIDTH - width + 1)), int(rng.integers(HEIGHT - height + 1))
    for x1, y1, x2, y2 in boxes:
        if min(x + width, x2) > max(x, x1) and min(y + height, y2) > max(y, y1):
            return None
    return x, y


def _background(rng: np.random.Generator) -> Floats:
    """Return a texture of several scales with strokes and blobs, ``[H, W, 3]`` in 0 to 255."""
    canvas = np.tile(rng.uniform(70, 185, 3), (HEIGHT, WIDTH, 1))
    for cells, strength in ((3, 28), (12, 18), (48, 14), (160, 10)):
        coarse = rng.normal(0, strength, (cells * 3 // 4 + 1, cells + 1, 3))
        canvas += np.stack(
            [
                np.asarray(
                    Image.fromarray(coarse[..., channel].astype(np.float32)).resize(
                        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
                    )
                )
                for channel in range(3)
            ],
            axis=2,
        )
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(6, 16))):
        color = tuple(int(value) for value in rng.integers(40, 216, 3))
        ends = [tuple(point) for point in rng.uniform((0, 0), (WIDTH, HEIGHT), (3, 2))]
        if rng.random() < 0.5:
            draw.line(ends, fill=color, width=int(rng.integers(1, 6)), joint="curve")
        else:
            points = np.asarray(ends[0]) + rng.normal(0, rng.uniform(4, 30), (7, 2))
            draw.polygon([tuple(point) for point in points], fill=color)
    blurred = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    return np.asarray(blurred).astype(np.float64)


def _paint(canvas: Floats, alpha: Floats, x: int, y: int, rng: np.random.Generator) -> None:
    """Blend an object into the canvas: its colour, a gradient and noise, not fully opaque."""
    height, width = alpha.shape
    part = canvas[y : y + height, x : x + width]
    away = rng.normal(0, 1, 3)
    color = part.mean((0, 1)) + away / np.linalg.norm(away) * rng.uniform(45, 130)
    ramp = np.linspace(-1, 1, width)[None, :, None] * rng.normal(0, 14, 3)
    fill = color + ramp + rng.normal(0, 12, (height, width, 3))
    strength = alpha[..., None] * rng.uniform(0.6, 0.95)
    part += strength * (fill - part)


def _shape(name: str, side: float, rng: np.random.Generator) -> Floats:
    """Return how much of each pixel a turned shape covers, ``[h, w]`` in 0 to 1, without a margin."""
    size = math.ceil(2 * side) * _FINE
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    stretch = float(np.exp(rng.uniform(-0.3, 0.3)))
    turn = float(rng.uniform(0, 2 * math.pi))

    def at(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Turn, stretch and move points of the square from -1 to 1."""
        half = side / 2 * _FINE
        return [
            (
                size / 2 + half * (u * stretch * math.cos(turn) - v / stretch * math.sin(turn)),
                size / 2 + half * (u * stretch * math.sin(turn) + v / stretch * math.cos(turn)),
            )
            for u, v in points
        ]

    outline, hole = _outline(name)
    draw.polygon(at(outline), fill=255)
    if hole:
        draw.polygon(at(hole), fill=0)
    rows, columns = (np.flatnonzero(np.asarray(mask).any(axis)) for axis in (1, 0))
    # Whole pixels, so that a box is exact to the pixels that the object touches.
    top, left = rows[0] // _FINE * _FINE, columns[0] // _FINE * _FINE
    bottom, right = -(-(rows[-1] + 1) // _FINE) * _FINE, -(-(columns[-1] + 1) // _FINE) * _FINE
    fine = np.asarray(mask)[top:bottom, left:right] / 255
    height, width = fine.shape[0] // _FINE, fine.shape[1] // _FINE
    covered: Floats = fine.reshape(height, _FINE, width, _FINE).mean((1, 3))
    return covered


def _outline(name: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the outline of a shape and of the hole in it, in the square from -1 to 1."""

    def circle(radius: float, corners: int = 40, x: float = 0.0) -> list[tuple[float, float]]:
        angles = (2 * math.pi * i / corners for i in range(corners))
        return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]

    def square(half: float) -> list[tuple[float, float]]:
        return [(-half, -half), (half, -half), (half, half), (-half, half)]

    arm = 0.32
    cross: list[tuple[float, float]] = [
        *((-1, -arm), (-arm, -arm), (-arm, -1), (arm, -1), (arm, -arm), (1, -arm)),
        *((1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm), (-1, arm)),
    ]
    arrow: list[tuple[float, float]] = [
        (-1, -0.3),
        (0, -0.3),
        (0, -0.9),
        (1, 0),
        (0, 0.9),
        (0, 0.3),
        (-1, 0.3),
    ]
    star = [
        (r * math.cos(math.pi * i / 5), r * math.sin(math.pi * i / 5))
        for i, r in enumerate((1.0, 0.42) * 5)
    ]
    outlines: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {
        "disc": (circle(0.9), []),
        "square": (square(0.8), []),
        "triangle": (circle(1, 3), []),
        "ring": (circle(0.95), circle(0.55)),
        "cross": (cross, []),
        "star": (star, []),
        "hexagon": (circle(0.95, 6), []),
        "crescent": (circle(0.95), circle(0.75, x=0.4)),
        "arrow": (arrow, []),
        "frame": (square(0.85), square(0.5)),
    }
    return outlines[name]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for the datasets, one in each subfolder")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(arguments)
    for name in options.sets:
        write_set(options.folder / name, name, seed=options.seed)
        print(options.folder / name)


if __name__ == "__main__":
    main()
