"""A gallery: images of a dataset on one sheet, with their objects drawn on them."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from focaldet._atomic import atomic_write
from focaldet._checks import check_range, printable, shortened
from focaldet.datasets._table import AnnotationTable
from focaldet.images import load_picture
from focaldet.visualization import class_color, draw_boxes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from focaldet.detections import Detections
    from focaldet.evaluation import ImageErrors

__all__ = ["draw_errors", "draw_gallery"]

_TILE = (384, 288)  # largest width and height of an image on the sheet, in pixels
_GAP, _LINE = 8, 18  # pixels
_FONT_SIZE = 13
_MOST_TEXTS = 12  # objects of an image that get a text; more would hide the image
_NO_NAME = "undeclared category"
_BACKGROUND, _TEXT = "white", (30, 30, 30)


class _Objects(NamedTuple):
    """An image to draw: G objects, in the order of drawing."""

    path: Path
    boxes: Tensor  # [G, 4], xyxy
    labels: Tensor  # [G]
    texts: list[str]


def draw_gallery(
    source: AnnotationTable | Sequence[Detections],
    path: str | os.PathLike[str],
    *,
    count: int = 24,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> list[Path]:
    """Draw a random choice of images with their objects on one sheet, and write it to a file.

    A look at the gallery shows most mistakes in annotations: boxes in the wrong format, images that
    are annotated in part, names that are mixed up. Each image has its file name and the number of its
    objects below it; the colours of the classes are explained at the top. Images with more than 12
    objects have no texts at the boxes.

    Args:
        source: The ground truth, or detections whose ``source`` is set, as by
            :meth:`focaldet.RetinaNet.predict`.
        path: The picture to write, such as ``gallery.png`` or ``gallery.jpg``.
        count: Number of images to draw. If there are fewer, all are drawn.
        seed: Seed of the random choice.
        class_names: Draw only objects of these classes, and only images that have one. None draws
            all, and images without objects, too.

    Returns:
        The paths of the images on the sheet, in its order, which is that of ``source``.

    Raises:
        FileNotFoundError: If an image or the folder of ``path`` does not exist.
        ValueError: If an image cannot be read, a class is unknown, there is no image to draw,
            detections have no ``source``, or the extension of ``path`` is not that of a picture.

    Warns:
        UserWarning: If boxes are not drawn because they are not finite or have swapped corners.

    .. versionadded:: 0.3.0

    >>> import tempfile
    >>> from focaldet import Detections
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     photo = f"{folder}/cat.png"
    ...     Image.new("RGB", (64, 48)).save(photo)
    ...     box, score, label = (
    ...         torch.tensor([[8.0, 8, 40, 40]]),
    ...         torch.tensor([0.9]),
    ...         torch.tensor([0]),
    ...     )
    ...     found = Detections(box, score, label, (48, 64), class_names=("cat",), source=photo)
    ...     [path.name for path in draw_gallery([found], f"{folder}/gallery.png")]
    ['cat.png']
    """
    path = Path(path)
    file_format = _format_of(path)
    check_range("count", count, 1)
    names, indices, objects_of = _describe(source, class_names)
    if not indices:
        wanted = "" if class_names is None else f" with objects of {shortened(list(class_names))}"
        raise ValueError(f"There is no image{wanted} to draw.")
    if len(indices) > count:
        indices = sorted(random.Random(seed).sample(indices, count))  # noqa: S311
    shown = [objects_of(index) for index in indices]
    sheet = _sheet(shown, names)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format=file_format)
    return [objects.path for objects in shown]


def draw_errors(
    errors: Sequence[ImageErrors], table: AnnotationTable, path: str | os.PathLike[str]
) -> None:
    """Draw images with their hits, misses and false alarms on one sheet, and write it to a file.

    Hits are green, missed objects yellow, and false alarms red. Of an image in which no detection scores
    above the threshold, the best five are drawn in blue. Each image has its file name and the numbers
    below it.

    Args:
        errors: The images, as :meth:`focaldet.evaluation.ErrorAnalysis.worst_images` returns them.
        table: The ground truth that was evaluated, which knows where the images are.
        path: The picture to write, such as ``worst.png`` or ``worst.jpg``.

    Raises:
        FileNotFoundError: If an image or the folder of ``path`` does not exist.
        ValueError: If there are no images, one is not in the table or cannot be read, or the extension
            of ``path`` is not that of a picture.

    .. versionadded:: 0.3.0
    """
    from focaldet.evaluation import ImageErrors

    path = Path(path)
    file_format = _format_of(path)
    if not errors:
        raise ValueError("errors is empty, so there is no image to draw.")
    rows = {int(image_id): row for row, image_id in enumerate(table.image_ids)}
    unknown = [one.image_id for one in errors if one.image_id not in rows]
    if unknown:
        raise ValueError(f"The table has no image with the id {unknown[0]} (errors).")
    tiles, captions = [], []
    for one in errors:
        source = table.image_path(rows[one.image_id])
        tiles.append(one.draw_file(source, max_size=_TILE))
        captions.append((source.name, one.summary))
    counts = (
        sum(len(one.hits) for one in errors),
        sum(len(one.misses) for one in errors),
        sum(len(one.false_alarms) for one in errors),
        sum(len(one.below) for one in errors),
    )
    legend = [
        (color, f"{name}  {count:,}")
        for (name, color), count in zip(ImageErrors.COLORS.items(), counts, strict=True)
        if count or name != "below the threshold"
    ]
    sheet = _lay_out(tiles, captions, legend)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format=file_format)


def _format_of(path: Path) -> str:
    known = Image.registered_extensions()
    file_format = known.get(path.suffix.lower())
    if file_format is None or file_format not in Image.SAVE:
        raise ValueError(
            f"Cannot write a picture to {str(path)!r}: its extension must be .png, .jpg or that of "
            "another format that Pillow writes."
        )
    return file_format


def _describe(
    source: AnnotationTable | Sequence[Detections], class_names: Sequence[str] | None
) -> tuple[list[str], list[int], Callable[[int], _Objects]]:
    """Return the names of the labels, the images to choose from, and what tells the objects of one."""
    if isinstance(source, AnnotationTable):
        table = source
        wanted = _labels_of(class_names, table.class_names)
        with_wanted = {*table.image_indices[np.isin(table.labels, wanted or [])].tolist()}
        indices = [i for i in range(len(table)) if wanted is None or i in with_wanted]
        return [*table.class_names, _NO_NAME], indices, lambda i: _of_table(table, i, wanted)
    found = list(source)
    names = next((one.class_names for one in found if one.class_names is not None), None)
    if names is None:
        highest = max((int(one.labels.max()) for one in found if len(one)), default=-1)
        names = tuple(map(str, range(highest + 1)))
    wanted = _labels_of(class_names, names)
    chosen = [one if wanted is None else one.filter(labels=wanted) for one in found]
    indices = [index for index, one in enumerate(chosen) if wanted is None or len(one)]
    return list(names), indices, lambda i: _of_detections(chosen[i], i)


def _labels_of(class_names: Sequence[str] | None, names: Sequence[str]) -> list[int] | None:
    if class_names is None:
        return None
    for name in class_names:
        if name not in names:
            raise ValueError(
                f"Unknown class {name!r} (class_names). The classes are {shortened(list(names))}."
            )
    return [names.index(name) for name in class_names]


def _of_table(table: AnnotationTable, index: int, wanted: list[int] | None) -> _Objects:
    rows = np.arange(len(table.boxes))[table.boxes_of(index)]
    if wanted is not None:
        rows = rows[np.isin(table.labels[rows], wanted)]
    boxes = torch.from_numpy(table.boxes[rows])
    labels = torch.from_numpy(table.labels[rows])
    labels = torch.where(labels < 0, len(table.class_names), labels)
    names = (*table.class_names, _NO_NAME)
    texts = [
        f"{names[label]} (crowd)" if crowd else names[label]
        for label, crowd in zip(labels.tolist(), table.crowd[rows].tolist(), strict=True)
    ]
    return _Objects(table.image_path(index), boxes, labels, texts)


def _of_detections(found: Detections, index: int) -> _Objects:
    if found.source is None:
        raise ValueError(f"source[{index}] has no source, so its image cannot be read.")
    shown = found.to("cpu")[found.scores.cpu().argsort()]  # the best on top
    texts = [
        f"{name} {score:.2f}"
        for name, score in zip(shown.label_names, shown.scores.tolist(), strict=True)
    ]
    return _Objects(Path(found.source), shown.boxes.double(), shown.labels, texts)


def _sheet(shown: Sequence[_Objects], names: Sequence[str]) -> Image.Image:
    """Draw the images with their objects in rows below a legend of the classes."""
    tiles = _draw_tiles(shown)
    counts = Counter(label for objects in shown for label in objects.labels.tolist())
    legend = [
        (class_color(label), f"{names[label]}  {counts[label]:,}") for label in sorted(counts)
    ]
    captions = [(objects.path.name, _counted(len(objects.boxes))) for objects in shown]
    return _lay_out(tiles, captions, legend)


def _lay_out(
    tiles: Sequence[Image.Image],
    captions: Sequence[tuple[str, str]],
    entries: Sequence[tuple[tuple[int, int, int], str]],
) -> Image.Image:
    """Paste pictures in rows below a legend, each with its name, which may be cut, and a note."""
    columns = min(len(tiles), math.ceil(math.sqrt(1.5 * len(tiles))))
    width = _GAP + columns * (_TILE[0] + _GAP)
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _LINE + _GAP for row in rows]
    legend = _legend(entries, width)
    sheet = Image.new("RGB", (width, legend.height + sum(heights)), _BACKGROUND)
    sheet.paste(legend, (0, 0))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    remaining = iter(captions)
    y = legend.height
    for row, height in zip(rows, heights, strict=True):
        for column, (tile, (name, note)) in enumerate(zip(row, remaining, strict=False)):
            x = _GAP + column * (_TILE[0] + _GAP)
            sheet.paste(tile, (x + (_TILE[0] - tile.width) // 2, y))
            room = _TILE[0] - font.getlength(f"  {note}")
            caption = f"{_shorten(name, room, font)}  {note}"
            place = (x + (_TILE[0] - font.getlength(caption)) / 2, y + tile.height + 2)
            draw.text(place, caption, fill=_TEXT, font=font)
        y += height
    return sheet


def _draw_tiles(shown: Sequence[_Objects]) -> list[Image.Image]:
    tiles = []
    left_out = 0
    for objects in shown:
        picture = Image.fromarray(load_picture(objects.path).permute(1, 2, 0).numpy())
        size = picture.size
        picture.thumbnail(_TILE, Image.Resampling.LANCZOS, reducing_gap=3.0)
        scale = torch.tensor([picture.width / size[0], picture.height / size[1]]).double()
        boxes = objects.boxes
        drawable = boxes.isfinite().all(dim=1) & (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
        left_out += int((~drawable).sum())
        texts = [objects.texts[row] for row in drawable.nonzero()[:, 0].tolist()]
        tiles.append(
            draw_boxes(
                picture,
                (boxes[drawable] * scale.repeat(2)).float(),
                objects.labels[drawable],
                texts=texts if len(texts) <= _MOST_TEXTS else None,
            )
        )
    if left_out:
        are = "box is" if left_out == 1 else "boxes are"
        warnings.warn(
            f"{left_out} {are} not drawn, because numbers are not finite or corners are swapped. "
            "check_dataset lists such boxes.",
            UserWarning,
            stacklevel=4,
        )
    return tiles


def _legend(entries: Sequence[tuple[tuple[int, int, int], str]], width: int) -> Image.Image:
    """Explain the colours on the sheet."""
    font = ImageFont.load_default(_FONT_SIZE)
    placed = []
    x, y = _GAP, _GAP
    for color, entry in entries:
        text = _shorten(entry, width - 2 * _GAP - _LINE, font)
        needed = _LINE + math.ceil(font.getlength(text)) + 2 * _GAP
        if x > _GAP and x + needed > width:
            x, y = _GAP, y + _LINE
        placed.append((x, y, color, text))
        x += needed
    legend = Image.new("RGB", (width, y + (_LINE + _GAP if placed else 0)), _BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for x, y, color, text in placed:
        draw.rectangle((x, y + 1, x + 12, y + 13), fill=color, outline=_TEXT)
        draw.text((x + _LINE, y), text, fill=_TEXT, font=font)
    return legend


def _counted(number: int) -> str:
    return "1 object" if number == 1 else f"{number:,} objects"


def _shorten(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut the middle out of a text that is too wide. File names differ at their beginning or end."""
    text = printable(text)
    kept = len(text)
    shown = text
    while font.getlength(shown) > room and kept > 2:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"
    return shown
