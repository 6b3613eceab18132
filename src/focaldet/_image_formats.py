"""The image formats that are read, and the only place that opens image files.

Pillow also has loaders that run another program or open a second image inside the first one: EPS runs
Ghostscript, and IPTC opens whatever it contains, an EPS included. Only the formats listed here are
opened, whatever the suffix of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageFile, UnidentifiedImageError

from focaldet.errors import UnreadableImageError

if TYPE_CHECKING:
    from io import BytesIO
    from pathlib import Path

__all__ = ["check_format", "open_image"]

# Pillow's names, in the order in which they are tried. Those of the second line are only tried if a
# file is none of the first, because that imports all plugins of Pillow. TGA has no signature and
# comes last. AVIF and HEIF need a new Pillow or a plugin, which may be missing.
_COMMON = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_OTHERS = ("JPEG2000", "AVIF", "HEIF", "DIB", "TGA")

_ALLOWED = {*_COMMON, *_OTHERS, "MPO"}  # MPO is opened as JPEG
_LISTED = ", ".join(sorted(_ALLOWED))


def open_image(path: str | Path | BytesIO) -> Image.Image:
    """Open an image file in one of the allowed formats, without decoding it.

    Args:
        path: The image file, or its content.

    Raises:
        FileNotFoundError: If the file does not exist.
        PIL.UnidentifiedImageError: If it has none of the formats. Damaged files raise various other
            exceptions of Pillow.
    """
    Image.preinit()
    try:
        return Image.open(path, formats=_COMMON)
    except UnidentifiedImageError:
        Image.init()
    try:
        return Image.open(path, formats=[name for name in _OTHERS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_LISTED) from None


def check_format(name: str, image: Image.Image) -> None:
    """Raise unless a PIL image can be decoded safely: it is in memory or has an allowed format.

    Args:
        name: What the message calls the image.
        image: The image to check. It is not decoded.

    Raises:
        UnreadableImageError: If the image was opened from a file of a different format.
    """
    if isinstance(image, ImageFile.ImageFile) and type(image).format not in _ALLOWED:
        raise UnreadableImageError(
            f"{name} is a PIL image in the format {type(image).format}, which is not decoded because "
            f"its loader may run other programs. The supported formats are {_LISTED}. If you trust "
            f"the file, pass {name}.copy()."
        )
