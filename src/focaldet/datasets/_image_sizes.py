"""Sizes of images, from their headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from focaldet._checks import must_be
from focaldet.images import UnreadableImageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_size"]

_ORIENTATION = 0x0112  # EXIF; from 5 on the stored picture lies on its side


def read_size(path: Path) -> tuple[int, int]:
    """Return ``(height, width)`` of an image as :func:`focaldet.images.load_image` turns it.

    Raises:
        FileNotFoundError: no such file.
        UnreadableImageError: no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            on_its_side = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
    except FileNotFoundError as error:
        raise FileNotFoundError(must_be("image", "an existing file", repr(str(path)))) from error
    except Exception as error:
        got = f"{str(path)!r} ({str(error) or type(error).__name__})"
        raise UnreadableImageError(must_be("image", "an image that can be read", got)) from error
    return (width, height) if on_its_side else (height, width)
