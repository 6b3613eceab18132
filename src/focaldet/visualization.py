"""Draw boxes on an image, with readable labels that stay inside it."""

from __future__ import annotations

import colorsys
import functools
import math
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from focaldet._checks import check_boxes, check_image, check_range, shortened
from focaldet._image_formats import check_format
from focaldet.boxes import as_xyxy

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["class_color", "draw_boxes"]

Color: TypeAlias = tuple[int, int, int]
_Rectangle: TypeAlias = tuple[int, int, int, int]  # pixels, half-open: x1, y1, x2, y2

_SMALLEST_FONT = 9.0  # pixels; in smaller sizes, letters of the built-in font run together
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_TONES = ((0.5, 1.0), (0.72, 0.95), (0.34, 0.9), (0.6, 0.7))  # lightness and saturation


class _Label(NamedTuple):
    text: str
    font: ImageFont.FreeTypeFont
    width: int
    height: int
    origin: tuple[int, int]  # start of the text's baseline, from the label's top left corner


def class_color(label: int) -> Color:
    """Return the colour of a class: always the same, and unlike that of its neighbours.

    Hues advance by the golden section of the circle. After 8 labels (5 turns less 20 degrees) they
    come close to an earlier one, so the lightness changes there.

    Args:
        label: The class, from 0.

    Returns:
        Red, green and blue, from 0 to 255.

    Raises:
        ValueError: If ``label`` is negative.

    >>> class_color(0), class_color(1)
    ((0, 102, 255), (210, 251, 116))
    """
    check_range("label", label, 0)
    hue = (0.6 + label * 0.6180339887) % 1
    lightness, saturation = _TONES[(label + label // 8) % len(_TONES)]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Tensor | Image.Image,
    boxes: Tensor,
    labels: Tensor | None = None,
    *,
    texts: Sequence[str] | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
    line_width: int | None = None,
    font_size: float | None = None,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Draw boxes and their texts on a copy of an image.

    Boxes are drawn in order, so the last one is on top: put the best one last. All labels are drawn
    after all boxes. A label is placed above, inside or below its box, wherever it covers the least of
    the other labels; the last label is placed first. Labels never leave the image: if a text is too
    wide, its letters become smaller (down to 9 pixels), and then the text is shortened.

    Args:
        image: A ``[3, H, W]`` RGB or ``[1, H, W]`` greyscale tensor, uint8 or floating-point in
            [0, 1]; or a PIL image with 8 bits per channel, which is turned upright according to its
            EXIF data, as by :func:`focaldet.images.load_image`. Of an image with other channels,
            choose the three to draw on, as in ``image[:3]``.

            .. versionchanged:: 0.3.0
               Greyscale tensors are accepted.
        boxes: ``[N, 4]``, xyxy in pixels of the upright image. Parts outside are not drawn.
        labels: ``[N]`` integers from 0, which determine the colours. None gives all boxes the colour
            of class 0.
        texts: One text per box. An empty text draws no label.
        colors: One colour per box, as red, green and blue from 0 to 255, in place of the colours of
            the classes.

            .. versionadded:: 0.3.0
        line_width: Line width in pixels. By default it depends on the size of the image. Small boxes
            get thinner lines.
        font_size: Font size in pixels. By default it depends on the size of the image and the amount
            of text.
        font: The path of a TrueType or OpenType font. The built-in font has ASCII characters only.

    Returns:
        A new RGB image of the same size.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, a number of texts or labels, or a size is wrong, a label is negative, a
            box is not finite or has swapped corners, or the font cannot be read.

    Warns:
        UserWarning: If the font lacks characters of the texts.

    >>> image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    >>> picture = draw_boxes(image, torch.tensor([[8.0, 20.0, 40.0, 44.0]]), texts=["cat"])
    >>> picture.size, picture.getpixel((8, 30)) == class_color(0)
    ((64, 48), True)
    """
    picture = _to_picture(image)
    boxes = as_xyxy(boxes)
    chosen = _check(boxes, labels, texts, colors)
    if line_width is None:
        line_width = max(1, round(_side(picture) / 240))
    check_range("line_width", line_width, 1)
    if font_size is None:
        font_size = _font_size(picture, texts or ())
    check_range("font_size", font_size, 1)

    rectangles = [_to_pixels(box, picture.size) for box in boxes.tolist()]
    # In mode "RGBA", ImageDraw blends colours that have an alpha channel with the RGB picture.
    draw = ImageDraw.Draw(picture, "RGBA")
    for rectangle, color in zip(rectangles, chosen, strict=True):
        if rectangle is not None:
            _draw_outline(draw, rectangle, color, line_width)
    if texts is not None:
        path = None if font is None else os.fspath(font)
        _warn_of_missing_characters(texts, _load_font(path, font_size))
        fitted = [_fit(text, path, font_size, picture.size) for text in texts]
        corners = _place(rectangles, fitted, picture.size)
        for label, corner, color in zip(fitted, corners, chosen, strict=True):
            if label is not None and corner is not None:
                _draw_label(draw, label, corner, color)
    return picture


def _to_picture(image: object) -> Image.Image:
    """Return a new RGB picture to draw on."""
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(
                f"image must have 8 bits per channel, got mode {image.mode}. Read it with "
                "focaldet.images.load_image, which scales it to 8 bits."
            )
        check_format("image", image)
        picture = ImageOps.exif_transpose(image)
        if picture.mode == "P":  # by way of RGBA, because Pillow warns about its transparency
            picture = picture.convert("RGBA")
        return picture.convert("RGB")
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image must be a [3, H, W] tensor or a PIL image, got {type(image).__name__}. Read paths "
            "and arrays with focaldet.images.load_image."
        )
    if image.ndim == 3 and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    check_image("image", image)
    if image.is_floating_point():
        image = image.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _check(
    boxes: Tensor,
    labels: Tensor | None,
    texts: Sequence[str] | None,
    colors: Sequence[Color] | None,
) -> list[Color]:
    """Check boxes, texts and labels, and return the colour of each box."""
    check_boxes("boxes", boxes)
    for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise ValueError(f"boxes[{index}] = {[x1, y1, x2, y2]} contains NaN or infinity.")
        if x2 < x1 or y2 < y1:
            raise ValueError(
                f"boxes[{index}] = {[x1, y1, x2, y2]} has swapped corners. Boxes are (x1, y1, x2, y2) "
                "with x1 <= x2 and y1 <= y2."
            )
    if texts is not None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a sequence of strings, got {shortened(texts)}.")
        if len(texts) != len(boxes):
            raise ValueError(f"texts must have one entry per box ({len(boxes)}), got {len(texts)}.")
    if colors is not None:
        return _checked_colors(colors, len(boxes))
    return [class_color(0)] * len(boxes) if labels is None else _colors(labels, len(boxes))


def _checked_colors(colors: Sequence[Color], count: int) -> list[Color]:
    given: Sequence[Sequence[int]] = colors
    if len(colors) != count:
        raise ValueError(f"colors must have one entry per box ({count}), got {len(colors)}.")
    for index, color in enumerate(given):
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            raise ValueError(
                f"colors[{index}] must be red, green and blue from 0 to 255, got {color}."
            )
    return list(colors)


def _colors(labels: Tensor, count: int) -> list[Color]:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be a tensor of integers, got {labels.dtype}.")
    if list(labels.shape) != [count]:
        raise ValueError(
            f"labels must have shape [{count}], one per box, got {list(labels.shape)}."
        )
    for index, label in enumerate(labels.tolist()):
        check_range(f"labels[{index}]", label, 0)
    return [class_color(label) for label in labels.tolist()]


def _side(picture: Image.Image) -> float:
    """Return the side of a square with as many pixels: a panorama is small for its width."""
    return math.sqrt(picture.width * picture.height)


def _font_size(picture: Image.Image, texts: Sequence[str]) -> float:
    """Choose a font size for the picture, smaller if the labels would cover a fifth of it."""
    usual, least = _side(picture) / 36, _side(picture) / 100
    letters = max(1, sum(map(len, texts)))
    # With its share of the margins, a letter takes about 0.75 of the font size squared.
    uncrowded = _side(picture) * math.sqrt(0.2 / (0.75 * letters))
    return max(_SMALLEST_FONT, round(min(usual, max(least, uncrowded))))


def _to_pixels(box: Sequence[float], size: tuple[int, int]) -> _Rectangle | None:
    """Round a box to whole pixels, at least one, inside the image; None if it lies outside."""
    x1, y1, x2, y2 = box
    width, height = size
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return None
    left = round(min(max(x1, 0), width - 1))
    top = round(min(max(y1, 0), height - 1))
    return left, top, max(left + 1, round(min(x2, width))), max(top + 1, round(min(y2, height)))


def _draw_outline(
    draw: ImageDraw.ImageDraw, rectangle: _Rectangle, color: Color, line_width: int
) -> None:
    """Draw a box inside its edges, between two thin lines that make it visible on any background."""
    x1, y1, x2, y2 = rectangle
    line_width = max(1, min(line_width, min(x2 - x1, y2 - y1) // 4))
    halo_width = max(1, line_width // 3)
    halo = (*_contrasting(color), 140)
    outside = (x1 - halo_width, y1 - halo_width, x2 - 1 + halo_width, y2 - 1 + halo_width)
    draw.rectangle(outside, outline=halo, width=halo_width)
    inside = (x1 + line_width, y1 + line_width, x2 - 1 - line_width, y2 - 1 - line_width)
    if inside[0] <= inside[2] and inside[1] <= inside[3]:
        draw.rectangle(inside, outline=halo, width=halo_width)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=color, width=line_width)
    else:
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)


def _contrasting(color: Color) -> Color:
    """Return black or white, whichever has more contrast (WCAG 2 relative luminance)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 3294 for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _BLACK if luminance > 0.179 else _WHITE


@functools.lru_cache(maxsize=32)
def _load_font(path: str | None, size: float) -> ImageFont.FreeTypeFont:
    if path is None:
        return cast("ImageFont.FreeTypeFont", ImageFont.load_default(size))
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ValueError(
            f"Cannot read font {path!r}: it must be an existing TrueType or OpenType file ({error})."
        ) from error


def _warn_of_missing_characters(texts: Sequence[str], font: ImageFont.FreeTypeFont) -> None:
    unusual = {char for text in texts for char in text if not char.isascii() and char.isprintable()}
    if not unusual:
        return
    substitute = bytes(font.getmask("\uffff"))  # drawn in place of missing characters
    missing = "".join(sorted(char for char in unusual if bytes(font.getmask(char)) == substitute))
    if missing:
        warnings.warn(
            f"The font has no characters {missing!r}, so they are drawn as placeholders. Pass font= "
            "with a font that has them.",
            UserWarning,
            stacklevel=3,
        )


def _fit(text: str, path: str | None, font_size: float, size: tuple[int, int]) -> _Label | None:
    """Make a text small and short enough for the image. Return None if nothing of it is left."""
    text = " ".join(text.split())[: size[0]]  # no character is narrower than a pixel
    smallest = min(font_size, _SMALLEST_FONT)
    while text:
        label = _measure(text, _load_font(path, font_size))
        if label.width <= size[0] and label.height <= size[1]:
            return label
        if font_size > smallest:
            font_size = max(smallest, font_size * 0.9)
        elif label.height > size[1]:
            return None
        else:
            kept = text.removesuffix("…")[:-1].rstrip()
            text = kept and kept + "…"
    return None


def _measure(text: str, font: ImageFont.FreeTypeFont) -> _Label:
    """Add a margin around a text. Labels in one font have the same height, if the script allows."""
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    _, highest, _, lowest = font.getbbox("Agj", anchor="ls")
    top, bottom = math.floor(min(top, highest)), math.ceil(max(bottom, lowest))
    left, right = math.floor(left), math.ceil(right)
    margin = max(1, int(font.size / 7))
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    return _Label(text, font, width, height, (margin - left, margin - top))


def _place(
    rectangles: Sequence[_Rectangle | None],
    labels: Sequence[_Label | None],
    size: tuple[int, int],
) -> list[tuple[int, int] | None]:
    """Choose the top left corner of each label, starting with the last label."""
    corners: list[tuple[int, int] | None] = [None] * len(labels)
    taken = np.zeros((0, 4), dtype=np.int64)
    for index in reversed(range(len(labels))):
        rectangle, label = rectangles[index], labels[index]
        if rectangle is None or label is None:
            continue
        options = np.array(_options(rectangle, label, size))
        spots = np.hstack([options, options + np.array([label.width, label.height])])
        overlap = np.minimum(spots[:, None, 2:], taken[:, 2:])
        overlap -= np.maximum(spots[:, None, :2], taken[:, :2])
        covered = overlap.clip(min=0).prod(axis=-1).sum(axis=-1)
        best = int(covered.argmin())  # the first of equals
        corners[index] = (int(options[best, 0]), int(options[best, 1]))
        taken = np.vstack([taken, spots[best]])
    return corners


def _options(rectangle: _Rectangle, label: _Label, size: tuple[int, int]) -> list[tuple[int, int]]:
    """List the possible corners of a label inside the image, best first."""
    x1, y1, x2, y2 = rectangle
    farthest_x, farthest_y = size[0] - label.width, size[1] - label.height
    left, right = min(x1, farthest_x), min(max(x2 - label.width, 0), farthest_x)
    above, below = [(x, y1 - label.height) for x in (left, right)], [(x, y2) for x in (left, right)]
    inside = [(x, y) for y in (y1, y2 - label.height) for x in (left, right)]
    # In a box that is hardly larger than the label, the label would hide the object.
    roomy = x2 - x1 >= label.width and y2 - y1 >= 3 * label.height
    places = [*above, *inside, *below] if roomy else [*above, *below, *inside]
    return [(x, y) for x, y in places if 0 <= y <= farthest_y] or [
        (left, min(max(y1, 0), farthest_y))
    ]


def _draw_label(
    draw: ImageDraw.ImageDraw, label: _Label, corner: tuple[int, int], color: Color
) -> None:
    x, y = corner
    draw.rectangle((x, y, x + label.width - 1, y + label.height - 1), fill=color)
    origin = (x + label.origin[0], y + label.origin[1])
    draw.text(origin, label.text, fill=_contrasting(color), font=label.font, anchor="ls")
