"""Fuzz image files: ``python -m tests.fuzz.fuzz_images --seconds 300``."""

from __future__ import annotations

import functools
import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from focaldet.errors import UnreadableImageError
from focaldet.images import load_image, read_image_size
from tests.fuzz.mutations import mutate_bytes, run_main

if TYPE_CHECKING:
    import random

__all__ = ["ALLOWED", "attempt"]

ALLOWED = (UnreadableImageError,)

_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
    *("EPS", "ICO", "PCX", "SGI"),
)
_MODES = {"JPEG": ("L", "RGB", "CMYK"), "EPS": ("L", "RGB"), "GIF": ("P",), "MPO": ("RGB",)}
_MAX_PIXELS = 2**22  # keep Pillow from decoding what only a large machine can


def attempt(rng: random.Random) -> None:
    """Read the header and the pixels of a damaged image, and compare their sizes."""
    data = mutate_bytes(_image(rng.choice(_FORMATS), rng.randrange(3), rng.randint(1, 8)), rng)
    path = _folder() / f"image.{rng.choice(('jpg', 'png', 'tif', 'webp', 'gif', 'bmp'))}"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
        size: Any = None
        try:
            size = read_image_size(path)
        finally:
            if size is None or size[0] * size[1] <= _MAX_PIXELS:
                image = load_image(path)
                assert image.dtype == torch.uint8
                assert image.shape[0] == 3


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="focaldet_fuzz_"))


@functools.cache
def _image(name: str, mode_index: int, orientation: int) -> bytes:
    """Return a small image file with an EXIF orientation, if its format has EXIF data."""
    modes = _MODES.get(name, ("RGB", "L", "P" if name in ("PNG", "TIFF", "BMP") else "RGB"))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(modes[mode_index % len(modes)])
    stream = io.BytesIO()
    options: dict[str, Any] = {}
    if name in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if name == "MPO":
        options |= {"save_all": True, "append_images": [image]}
    image.save(stream, name, **options)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(run_main("image files", attempt, ALLOWED))
