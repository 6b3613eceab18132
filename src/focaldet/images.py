"""Images as people hold them: paths, folders, PIL images, arrays and tensors, read as tensors.

Whatever comes in, ``[3, H, W]`` RGB comes out, upright and with the pixels of the image as given:
nothing is resized or normalised here.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from focaldet._checks import check_choice, check_image, existing_file, must_be
from focaldet._files import list_files
from focaldet.errors import UnreadableImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "IMAGE_EXTENSIONS",
    "ImageSource",
    "LoadedImage",
    "UnreadableImageError",
    "count_images",
    "iter_images",
    "load_image",
    "named_sources",
    "read_image_size",
]

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor
"""One image, in any form that :func:`load_image` takes."""

IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""The suffixes, in lower case, by which an image is found in a folder."""

_SINGLE = (str, os.PathLike, Image.Image, np.ndarray, Tensor)
_TAKEN = "a path, a PIL image, an [H, W, 3] uint8 array or a [3, H, W] tensor"
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # two letters: "C:/" is a drive

# Modes that must pass through another on their way to RGB: palettes so that no transparency is left
# for Pillow to warn about, premultiplied alpha so that it is divided out.
_VIA = {"P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}

# EXIF tag 0x0112 says how the stored picture lies; this turns it upright. 1 is upright already.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IMAGE_WIDTH, _IMAGE_LENGTH = 0x0100, 0x0101  # TIFF tags
_QUARTER_TURNS = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}  # swap width and height


class LoadedImage(NamedTuple):
    """One image of :func:`iter_images`.

    Attributes:
        image: ``[3, H, W]`` RGB, as :func:`load_image` returns it.
        name: The path, if the image was read from a file.
    """

    image: Tensor
    name: str | None


def load_image(source: ImageSource, name: str = "image") -> Tensor:
    """Read one image as a ``[3, H, W]`` RGB tensor.

    Convention:
        The image is returned upright: an EXIF orientation, of a file or of a PIL image, is applied.
        Greyscale is repeated in three channels. 16-bit greyscale (and Pillow's mode ``I``, taken to
        hold 16-bit values) is scaled to 8 bits, 65535 to 255. Transparency is dropped, not blended
        with a background, and colour profiles are not applied, as in OpenCV and torchvision. Of an
        animation or of several pages the first is taken.

    Args:
        source: A path; a PIL image of any mode; an ``[H, W, 3]`` uint8 array in RGB order (OpenCV
            reads BGR: pass ``array[..., ::-1]``); or a ``[3, H, W]`` RGB tensor, uint8 or floating
            point in [0, 1].
        name: What error messages call the source.

    Returns:
        A tensor is returned as it is. Anything else becomes a contiguous uint8 ``[3, H, W]`` tensor
        with memory of its own.

    Raises:
        FileNotFoundError: If there is no file at the path.
        UnreadableImageError: If the file cannot be decoded: it is damaged, no image, or so large
            that Pillow takes it for a decompression bomb. This is a ``ValueError``.
        ValueError: If the source is a URL or a folder, or a shape or a range is wrong.
        TypeError: If the source is of another type, or an array or tensor of another dtype.

    >>> load_image(Image.new("L", (4, 2), color=7)).shape
    torch.Size([3, 2, 4])
    """
    if isinstance(source, Tensor):
        check_image(name, source)
        return source
    if isinstance(source, np.ndarray):
        _check_array(name, source)
        return torch.from_numpy(np.array(source.transpose(2, 0, 1), order="C"))
    if isinstance(source, Image.Image):
        with _explaining(name, "a PIL image"):
            return _to_tensor(source)
    if isinstance(source, (str, os.PathLike)):
        return _read_file(name, source)
    raise TypeError(must_be(name, _TAKEN, type(source).__name__))


def read_image_size(path: str | os.PathLike[str], name: str = "image") -> tuple[int, int]:
    """Read the size of an image file from its header, without decoding the image.

    Args:
        path: The image file.
        name: What error messages call the file.

    Returns:
        ``(height, width)`` of the upright image that :func:`load_image` returns.

    Raises:
        FileNotFoundError: If there is no file at the path.
        UnreadableImageError: If the file is not an image or its header is damaged.

    .. versionadded:: 0.3.0
    """
    with (
        _explaining(name, repr(os.fspath(path))),
        Image.open(existing_file(name, path)) as image,
    ):
        width, height = image.size
        if image.format == "TIFF":  # Pillow may have swapped its width and height already
            width, height = (image.getexif()[tag] for tag in (_IMAGE_WIDTH, _IMAGE_LENGTH))
        lies_on_its_side = _turn_to_upright(image) in _QUARTER_TURNS
    return (width, height) if lies_on_its_side else (height, width)


def iter_images(
    sources: ImageSource | Iterable[ImageSource], *, on_error: str = "raise"
) -> Iterator[LoadedImage | None]:
    """Read images one after another, each when it is asked for.

    Args:
        sources: One image as :func:`load_image` takes it; a folder, of which the images directly
            inside, found by :data:`IMAGE_EXTENSIONS` and not hidden, are read in the order of their
            names; a ``[B, 3, H, W]`` tensor; or an iterable of single images. A generator is
            advanced by one item at a time.
        on_error: ``"raise"``, or ``"skip"`` to go on after a file that is missing or cannot be
            decoded. Wrong types and shapes, URLs and folders among the items raise in either case.

    Returns:
        An iterator over the images in order, with None in the place of each that was skipped.

    Raises:
        FileNotFoundError, ValueError, TypeError: At once, if ``sources`` as a whole is wrong, an
            empty folder included; while iterating, as :func:`load_image`, naming the item's index.

    Warns:
        UserWarning: For each image skipped, with its name and the cause.

    >>> [loaded.image.shape[-1] for loaded in iter_images([Image.new("RGB", (5, 3))])]
    [5]
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    return _iterate(named_sources(sources), skip=on_error == "skip")


def count_images(sources: ImageSource | Iterable[ImageSource]) -> int | None:
    """Count the images that :func:`iter_images` will give, without reading any.

    Args:
        sources: As for :func:`iter_images`.

    Returns:
        The number of images, or None if only consuming ``sources`` would tell.

    Raises:
        ValueError: If ``sources`` is a folder without images.

    >>> count_images(torch.rand(8, 3, 32, 32))
    8
    """
    items = _expand(sources)
    if isinstance(items, _SINGLE):
        return 1
    try:
        return len(items)  # type: ignore[arg-type]  # asked, not assumed
    except TypeError:
        return None


def _expand(sources: ImageSource | Iterable[ImageSource]) -> ImageSource | Iterable[ImageSource]:
    """Turn a folder into its files and a batch into its images; leave anything else as it is."""
    if isinstance(sources, Tensor) and sources.ndim == 4:
        return sources.unbind()
    if isinstance(sources, (str, os.PathLike)) and os.fspath(sources) and _is_folder(sources):
        return _list_folder(Path(sources))
    return sources


def _is_folder(path: str | os.PathLike[str]) -> bool:
    with contextlib.suppress(OSError):  # a name too long, a folder above that may not be entered
        return Path(path).is_dir()
    return False


def _list_folder(folder: Path) -> list[Path]:
    files = list_files(folder, IMAGE_EXTENSIONS)
    if not files:
        extensions = ", ".join(IMAGE_EXTENSIONS)
        raise ValueError(
            must_be(
                "sources",
                f"a folder with images ({extensions})",
                f"{str(folder)!r}, which holds none",
                "Folders inside it are not searched.",
            )
        )
    return files


def named_sources(
    sources: ImageSource | Iterable[ImageSource],
) -> Iterator[tuple[str, ImageSource]]:
    """Give the single sources that :func:`iter_images` reads, each with its name in messages.

    Args:
        sources: As for :func:`iter_images`. A generator is advanced by one item at a time.

    Raises:
        ValueError, TypeError: At once, if ``sources`` as a whole is wrong, an empty folder included.

    >>> list(named_sources(["a.jpg", "b.jpg"]))
    [('sources[0]', 'a.jpg'), ('sources[1]', 'b.jpg')]
    """
    items: Any = _expand(sources)
    if isinstance(items, _SINGLE):
        return iter([("sources", items)])
    if isinstance(items, (bytes, bytearray)) or not hasattr(items, "__iter__"):
        condition = f"{_TAKEN}, a folder, or an iterable of images"
        raise TypeError(must_be("sources", condition, type(items).__name__))
    return ((f"sources[{index}]", item) for index, item in enumerate(items))


def _iterate(
    items: Iterator[tuple[str, ImageSource]], *, skip: bool
) -> Iterator[LoadedImage | None]:
    for name, source in items:
        try:
            image = load_image(source, name)
        except (UnreadableImageError, FileNotFoundError) as error:
            if not skip:
                raise
            warnings.warn(f"Skipped an image: {error}", UserWarning, stacklevel=2)
            yield None
        else:
            name_of_file = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
            yield LoadedImage(image, name_of_file)


def _check_array(name: str, image: npt.NDArray[Any]) -> None:
    shape = list(image.shape)
    if image.ndim != 3 or shape[-1] != 3:
        raise ValueError(must_be(name, "of shape [H, W, 3]", shape, _array_remedy(shape)))
    if image.dtype != np.uint8:
        remedy = "Scale the values to 0..255 and use .astype(np.uint8)."
        raise TypeError(must_be(name, "a uint8 array", image.dtype, remedy))
    _check_not_empty(name, shape)


def _array_remedy(shape: list[int]) -> str:
    if len(shape) == 4:
        return "Give the images of a batch one by one, as list(batch)."
    if len(shape) == 2:
        return "Repeat a greyscale channel with np.stack([image] * 3, axis=-1)."
    if len(shape) == 3 and shape[-1] == 1:
        return "Repeat a greyscale channel with image.repeat(3, axis=-1)."
    if len(shape) == 3 and shape[-1] == 4:
        return "Drop the alpha channel with image[..., :3]."
    if len(shape) == 3 and shape[0] == 3:
        return "Put channels last with image.transpose(1, 2, 0), or give a tensor."
    return ""


def _check_not_empty(name: str, shape: Iterable[int]) -> None:
    if 0 in shape:
        raise ValueError(must_be(name, "at least one pixel high and wide", list(shape)))


def _read_file(name: str, source: str | os.PathLike[str]) -> Tensor:
    path = os.fspath(source)
    if not path:
        raise ValueError(must_be(name, "a path", "an empty string"))
    if _URL.match(path):
        remedy = "Download it first and give the path of the file."
        raise ValueError(must_be(name, "an image on this machine", f"the URL {path!r}", remedy))
    if _is_folder(path):
        remedy = "A folder is read when it is the only source, not as an item among others."
        raise ValueError(must_be(name, "one image", f"the folder {path!r}", remedy))
    try:
        with _explaining(name, repr(path)), Image.open(path) as image:
            if image.format == "EPS":
                raise ValueError("EPS is not read, because decoding it runs Ghostscript on it")
            return _to_tensor(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(must_be(name, "an existing file", repr(path))) from error


@contextlib.contextmanager
def _explaining(name: str, what: str) -> Iterator[None]:
    """Turn what Pillow raises, which depends on format and damage, into one kind of error."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        got = f"{what} ({str(error) or type(error).__name__})"
        raise UnreadableImageError(must_be(name, "an image that can be decoded", got)) from error


def _turn_to_upright(image: Image.Image) -> Image.Transpose | None:
    """Return what turns a picture upright according to its EXIF orientation."""
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))


def _to_tensor(image: Image.Image) -> Tensor:
    if 0 in image.size:
        raise ValueError("its width or height is zero")
    image.load()  # some formats know their orientation only now
    turn = _turn_to_upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.mode in _VIA:
        image = image.convert(_VIA[image.mode])
    if image.mode != "RGB":
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(
            f"mode {image.mode} with values from {low:g} to {high:g}, not 8 or 16 bits a channel: "
            "scale the values to 0..255 and store them as uint8"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
