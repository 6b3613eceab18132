"""Read images from paths, folders, encoded bytes, URLs, PIL images, arrays and tensors.

The result is a ``[3, H, W]`` RGB tensor, or one with as many channels as asked for. It is upright and
has the pixels of the source: nothing is resized or normalised here.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from focaldet._checks import check_choice, check_image, check_integer, check_range, existing_file
from focaldet._files import list_files
from focaldet._image_formats import check_format, open_image
from focaldet._image_urls import download_image
from focaldet.errors import DownloadError, UnreadableImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import TypeIs

__all__ = [
    "IMAGE_EXTENSIONS",
    "ImageSource",
    "LoadedImage",
    "UnreadableImageError",
    "count_images",
    "iter_images",
    "list_images",
    "load_image",
    "load_picture",
    "named_sources",
    "read_image_size",
    "read_orientation",
]

Encoded: TypeAlias = bytes | bytearray | memoryview | BinaryIO
"""The content of an image file: its bytes, or a file that is open in binary mode."""

ImageSource: TypeAlias = str | os.PathLike[str] | Encoded | Image.Image | npt.NDArray[Any] | Tensor
"""One image of any type that :func:`load_image` accepts."""

IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
"""The suffixes, in lower case, of the files that count as images in a folder."""

SKIPPED_ERRORS = (UnreadableImageError, FileNotFoundError, DownloadError)
"""What ``on_error="skip"`` skips: images that are missing or cannot be downloaded or decoded."""

_CACHED_VALUES = 2**16  # float32 values that stay in the cache of a CPU core

_BYTES = (bytes, bytearray, memoryview)
_SINGLE = (str, os.PathLike, *_BYTES, Image.Image, np.ndarray, Tensor)
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # two letters: "C:/" is a drive

_OF_FILES = {1: "L", 3: "RGB"}  # Pillow's mode for each number of channels that a file can give

# Modes that are converted by way of another one: palettes so that Pillow does not warn about
# transparency that is left, premultiplied alpha so that it is divided out.
_VIA = {"P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}

# The turn that makes an image upright, by the value of EXIF tag 0x0112. 1 is upright already.
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
        image: ``[C, H, W]``, as :func:`load_image` returns it.
        name: The path or URL, if the image was read from one.
    """

    image: Tensor
    name: str | None


def load_image(
    source: ImageSource, name: str = "image", *, channels: int = 3, allow_urls: bool = False
) -> Tensor:
    """Read one image as a ``[3, H, W]`` RGB tensor, or with another number of channels.

    Convention:
        The image is returned upright: an EXIF orientation, of a file or of a PIL image, is applied.
        Greyscale is repeated in three channels. 16-bit greyscale (and Pillow's mode ``I``, assumed to
        hold 16-bit values) is scaled to 8 bits, 65535 to 255. Transparency is dropped, not blended
        with a background, and colour profiles are not applied, as in OpenCV and torchvision. Only
        the first frame or page of a file is read.

    Files are read in these formats, whatever their suffix: AVIF, BMP, DIB, GIF, JPEG, JPEG 2000, MPO,
    PNG, PPM, TGA, TIFF and WebP, and HEIF if a plugin of Pillow for it is installed and registered.
    Other formats, and PIL images that were opened from them, raise an error, because some of Pillow's
    loaders run other programs: EPS runs Ghostscript.

    .. versionchanged:: 0.3.0
       Only these formats are read. Before, all formats of Pillow except EPS were. Bytes, binary
       files and URLs are accepted.

    Args:
        source: A path; the content of an image file as bytes, or as a file that is open in binary
            mode, which is read from its beginning if it can be rewound, and is not closed; a PIL
            image of any mode; an ``[H, W, 3]`` uint8 array in RGB order (OpenCV reads BGR: pass
            ``array[..., ::-1]``); or a ``[3, H, W]`` RGB tensor, uint8 or floating point in [0, 1].
        name: What error messages call the source.
        channels: The number of channels. With 1, files and PIL images are converted to greyscale
            (0.299 R + 0.587 G + 0.114 B), and arrays may be ``[H, W]``. With 3, they are RGB. With
            any other number, only arrays and tensors of as many channels are accepted.

            .. versionadded:: 0.3.0
        allow_urls: Whether ``source`` may also be an http or https URL, which is downloaded into
            memory. It may redirect to other http and https URLs, must have at most 100 MB, and must
            arrive within 60 s. A URL can point to a server that only this machine can reach, so do
            not allow URLs that come from users whom you do not trust.

            .. versionadded:: 0.3.0

    Returns:
        A tensor is returned as it is. Anything else becomes a contiguous uint8 ``[channels, H, W]``
        tensor with its own memory.

    Raises:
        FileNotFoundError: If the file does not exist.
        UnreadableImageError: If the file cannot be decoded: it is damaged, not an image in a supported
            format, or so large that Pillow suspects a decompression bomb. This is a ``ValueError``.
        DownloadError: If an image cannot be downloaded. This is an ``OSError``.
        ValueError: If the source is a folder, or a URL without ``allow_urls``, a shape or the range of
            values is wrong, or a file or PIL image is given for a number of channels other than 1
            and 3.
        TypeError: If the source has an unsupported type or dtype.

    >>> load_image(Image.new("L", (4, 2), color=7)).shape
    torch.Size([3, 2, 4])
    >>> load_image(Image.new("RGB", (4, 2), color="red"), channels=1)[0, 0].tolist()
    [76, 76, 76, 76]
    """
    check_integer("channels", channels)
    check_range("channels", channels, 1)
    if isinstance(source, Tensor):
        check_image(name, source, channels=channels)
        return source
    if isinstance(source, np.ndarray):
        if channels == 1 and source.ndim == 2:
            source = source[..., None]
        check_array(name, source, channels)
        return torch.from_numpy(np.array(source.transpose(2, 0, 1), order="C"))
    if isinstance(source, Image.Image):
        _check_has_colors(name, "a PIL image", channels)
        check_format(name, source)
        with _explaining(name, "a PIL image"):
            return _to_tensor(source, channels)
    if isinstance(source, (str, os.PathLike)):
        return _read_file(name, source, channels, allow_urls=allow_urls)
    if is_encoded(source):
        _check_has_colors(name, "an encoded image", channels)
        content = read_encoded(source, name)
        return decode_image(name, f"an encoded image of {len(content)} bytes", content, channels)
    raise TypeError(f"{name} must be {_accepted(channels)}, got {_an(type(source).__name__)}.")


def is_encoded(source: object) -> TypeIs[Encoded]:
    """Return whether a source is the content of an image file: bytes, or an open file."""
    return isinstance(source, _BYTES) or hasattr(source, "read")


def read_encoded(source: Encoded, name: str) -> bytes:
    """Return the bytes of an encoded image, without decoding it.

    Args:
        source: Bytes, or a binary file, which is read from its beginning if it can be rewound.
        name: What error messages call the image.

    Raises:
        UnreadableImageError: If the file cannot be read, such as after it was closed.
        TypeError: If it does not read bytes, such as a file in text mode.
    """
    if isinstance(source, _BYTES):
        return bytes(source)
    try:
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        content = source.read()
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnreadableImageError(
            f"Cannot read the open file passed as {name} ({reason})."
        ) from error
    if not isinstance(content, _BYTES):
        raise TypeError(
            f"{name} is {_an(type(source).__name__)} that reads {type(content).__name__} instead of "
            'bytes. Open files in binary mode: open(path, "rb").'
        )
    return bytes(content)


def to_float(image: Tensor) -> Tensor:
    """Return an image as floating-point numbers in [0, 1].

    Args:
        image: ``[C, H, W]``. Integers are divided by 255, which gives numbers of the default dtype.
            Floating-point numbers are returned as they are.
    """
    if image.is_floating_point():
        return image
    dtype = torch.get_default_dtype()
    if image.dtype != torch.uint8 or image.ndim != 3 or image.device.type != "cpu":
        return (image.float() / 255).to(dtype)
    # NumPy separates channels that are adjacent in memory much faster than torch. A few rows at a time
    # are divided while they are in the cache of the CPU.
    pixels, result = image.numpy(), np.empty(image.shape, np.float32)
    rows = max(1, _CACHED_VALUES // max(1, image.shape[2]))
    for channel, values in zip(pixels, result, strict=True):
        for first in range(0, len(channel), rows):
            part = values[first : first + rows]
            part[...] = channel[first : first + rows]
            np.divide(part, np.float32(255), out=part)
    return torch.from_numpy(result).to(dtype)


def load_picture(source: ImageSource, name: str = "image") -> Tensor:
    """Read one RGB or greyscale image, to look at it or to draw on it.

    Args:
        source: As for :func:`load_image`, or a greyscale ``[H, W]`` or ``[H, W, 1]`` array or
            ``[1, H, W]`` tensor. Of an image with other channels, choose three: ``image[:3]``.
        name: What error messages call the source.

    Returns:
        A ``[3, H, W]`` tensor.

    Raises:
        FileNotFoundError, ValueError, TypeError: As :func:`load_image`.

    .. versionadded:: 0.3.0

    >>> load_picture(torch.rand(1, 2, 4)).shape
    torch.Size([3, 2, 4])
    """
    grey_array = isinstance(source, np.ndarray) and (source.ndim == 2 or source.shape[2:] == (1,))
    if grey_array or (isinstance(source, Tensor) and source.ndim == 3 and len(source) == 1):
        return load_image(source, name, channels=1).expand(3, -1, -1)
    return load_image(source, name)


def _accepted(channels: int) -> str:
    array = "an [H, W] uint8 array" if channels == 1 else f"an [H, W, {channels}] uint8 array"
    tensor = f"{array} or a [{channels}, H, W] tensor"
    files = "a path, bytes, a binary file, a PIL image"
    return f"{files}, {tensor}" if channels in _OF_FILES else tensor


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"


def _check_has_colors(name: str, what: str, channels: int) -> None:
    """Raise if a file or PIL image cannot give so many channels."""
    if channels not in _OF_FILES:
        raise ValueError(
            f"{name} is {what}, which is read as RGB or greyscale, but {channels} channels are "
            f"needed; pass {_accepted(channels)}."
        )


def read_image_size(path: str | os.PathLike[str], name: str = "image") -> tuple[int, int]:
    """Read the size of an image file from its header, without decoding the image.

    Args:
        path: The image file.
        name: What error messages call the file.

    Returns:
        ``(height, width)`` of the upright image that :func:`load_image` returns.

    Raises:
        FileNotFoundError: If there is no file at the path.
        UnreadableImageError: If the file is not an image in a format that :func:`load_image` reads, or
            its header is damaged.

    .. versionadded:: 0.3.0
    """
    with (
        _explaining(name, repr(os.fspath(path))),
        open_image(existing_file(name, path)) as image,
    ):
        width, height = image.size
        if image.format == "TIFF":  # Pillow may have swapped its width and height already
            width, height = (image.getexif()[tag] for tag in (_IMAGE_WIDTH, _IMAGE_LENGTH))
        lies_on_its_side = turn_to_upright(image) in _QUARTER_TURNS
    return (width, height) if lies_on_its_side else (height, width)


def read_orientation(path: str | os.PathLike[str], name: str = "image") -> int:
    """Read the EXIF orientation of an image file from its header.

    Args:
        path: The image file.
        name: What error messages call the file.

    Returns:
        The orientation from 1 (the stored pixels are upright) to 8. From 5 on, the width of the stored
        pixels is the height of the upright image. A value that EXIF does not define counts as 1.

    Raises:
        FileNotFoundError, UnreadableImageError: As :func:`read_image_size`.

    .. versionadded:: 0.3.0
    """
    with (
        _explaining(name, repr(os.fspath(path))),
        open_image(existing_file(name, path)) as image,
    ):
        orientation = image.getexif().get(_ORIENTATION, 1)
    return int(orientation) if orientation in _UPRIGHT else 1


def iter_images(
    sources: ImageSource | Iterable[ImageSource],
    *,
    on_error: str = "raise",
    channels: int = 3,
    allow_urls: bool = False,
) -> Iterator[LoadedImage | None]:
    """Read images one at a time, as they are requested.

    Args:
        sources: One image as :func:`load_image` accepts it; a folder, whose visible files with one of
            :data:`IMAGE_EXTENSIONS` are read in name order; a ``[B, C, H, W]`` tensor; or an iterable
            of single images. A generator is advanced by one item at a time.
        on_error: ``"raise"``, or ``"skip"`` to continue after a file that is missing or cannot be
            downloaded or decoded. Wrong types and shapes, folders among the items, and URLs that are
            not allowed, raise in either case.
        channels: The number of channels; see :func:`load_image`.

            .. versionadded:: 0.3.0
        allow_urls: Whether http and https URLs are downloaded; see :func:`load_image`.

            .. versionadded:: 0.3.0

    Returns:
        An iterator over the images in order, with None in place of each that was skipped.

    Raises:
        OSError, ValueError, TypeError: Immediately, if ``sources`` as a whole is wrong, such
            as an empty folder; while iterating, as :func:`load_image`, naming the item's index.

    Warns:
        UserWarning: For each image that is skipped, with its name and the cause.

    >>> [loaded.image.shape[-1] for loaded in iter_images([Image.new("RGB", (5, 3))])]
    [5]
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    return _iterate(
        named_sources(sources), skip=on_error == "skip", channels=channels, allow_urls=allow_urls
    )


def count_images(sources: ImageSource | Iterable[ImageSource]) -> int | None:
    """Count the images that :func:`iter_images` would read, without reading any.

    Args:
        sources: As for :func:`iter_images`.

    Returns:
        The number of images, or None if it is only known after consuming ``sources``.

    Raises:
        ValueError: If ``sources`` is a folder without images.

    >>> count_images(torch.rand(8, 3, 32, 32))
    8
    """
    items = _expand(sources, "sources")
    if isinstance(items, _SINGLE) or is_encoded(items):
        return 1
    try:
        return len(items)  # type: ignore[arg-type]  # asked, not assumed
    except TypeError:
        return None


def _expand(
    sources: ImageSource | Iterable[ImageSource], name: str
) -> ImageSource | Iterable[ImageSource]:
    """Return the files of a folder, the images of a batch, or anything else unchanged."""
    if isinstance(sources, Tensor) and sources.ndim == 4:
        return sources.unbind()
    if isinstance(sources, (str, os.PathLike)) and os.fspath(sources) and _is_folder(sources):
        return _list_folder(Path(sources), name)
    return sources


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Replace each folder among some paths with its images.

    Args:
        paths: Image files and folders. The visible files of a folder with one of
            :data:`IMAGE_EXTENSIONS` are listed in name order; folders inside it are not searched.

    Returns:
        The paths of the images. Files are kept as they are, whether or not they exist.

    Raises:
        ValueError: If a folder contains no images.

    .. versionadded:: 0.3.0

    >>> list_images(["photo.jpg"]) == [Path("photo.jpg")]
    True
    """
    return [
        image
        for path in map(Path, paths)
        for image in (_list_folder(Path(path), "paths") if _is_folder(path) else [path])
    ]


def _is_folder(path: str | os.PathLike[str]) -> bool:
    with contextlib.suppress(OSError):  # a name that is too long, a parent without permission
        return Path(path).is_dir()
    return False


def _list_folder(folder: Path, name: str) -> list[Path]:
    files = list_files(folder, IMAGE_EXTENSIONS)
    if not files:
        extensions = ", ".join(IMAGE_EXTENSIONS)
        raise ValueError(
            f"The folder {str(folder)!r} ({name}) contains no images ({extensions}). Folders inside "
            "it are not searched."
        )
    return files


def named_sources(
    sources: ImageSource | Iterable[ImageSource], name: str = "sources"
) -> Iterator[tuple[str, ImageSource]]:
    """Iterate over the single sources that :func:`iter_images` reads, each with a name for messages.

    Args:
        sources: As for :func:`iter_images`. A generator is advanced by one item at a time.
        name: Name of the caller's argument.

    Raises:
        ValueError, TypeError: Immediately, if ``sources`` as a whole is wrong, such as an empty
            folder.

    >>> list(named_sources(["a.jpg", "b.jpg"]))
    [('sources[0]', 'a.jpg'), ('sources[1]', 'b.jpg')]
    """
    items: Any = _expand(sources, name)
    if isinstance(items, _SINGLE) or is_encoded(items):
        return iter([(name, items)])
    if not hasattr(items, "__iter__"):
        raise TypeError(
            f"{name} must be a path, a folder, bytes, a binary file, a PIL image, an array, a tensor or "
            f"an iterable of these, got {_an(type(items).__name__)}."
        )
    return ((f"{name}[{index}]", item) for index, item in enumerate(items))


def _iterate(
    items: Iterator[tuple[str, ImageSource]], *, skip: bool, channels: int, allow_urls: bool
) -> Iterator[LoadedImage | None]:
    for name, source in items:
        try:
            image = load_image(source, name, channels=channels, allow_urls=allow_urls)
        except SKIPPED_ERRORS as error:
            if not skip:
                raise
            warnings.warn(f"Skipped an image: {error}", UserWarning, stacklevel=2)
            yield None
        else:
            name_of_file = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
            yield LoadedImage(image, name_of_file)


def check_array(name: str, image: npt.NDArray[Any], channels: int) -> None:
    shape = list(image.shape)
    if image.ndim != 3 or shape[-1] != channels:
        wanted = "[H, W] or [H, W, 1]" if channels == 1 else f"[H, W, {channels}]"
        remedy = _array_remedy(shape, channels)
        raise ValueError(f"{name} must have shape {wanted}, got {shape}.{remedy}")
    if image.dtype != np.uint8:
        raise TypeError(
            f"{name} must be a uint8 array, got {image.dtype}. Scale the values to 0 to 255 and use "
            ".astype(np.uint8), or pass a floating-point tensor in [0, 1] with channels first."
        )
    if 0 in shape:
        raise ValueError(f"{name} has no pixels: its shape is {shape}.")


def _array_remedy(shape: list[int], channels: int) -> str:
    if len(shape) == 4:
        return " Pass the images of a batch one by one, as list(batch)."
    if len(shape) == 3 and shape[0] == channels:
        return " Put the channels last with image.transpose(1, 2, 0), or pass a tensor."
    if channels == 3 and (len(shape) == 2 or shape[2:] == [1]):
        repeated = (
            "np.stack([image] * 3, axis=-1)" if len(shape) == 2 else "image.repeat(3, axis=-1)"
        )
        return f" Repeat a greyscale channel with {repeated}."
    if channels == 3 and len(shape) == 3 and shape[-1] > 3:
        return " Keep the red, green and blue channels with image[..., :3]."
    return ""


def load_channels_last(path: str | os.PathLike[str], name: str = "image") -> Tensor:
    """Read an RGB image as :func:`load_image` does, but in the channels_last memory format.

    torchvision resizes images of this format about twice as fast.

    Args:
        path: The image file.
        name: What error messages call the file.

    Returns:
        A uint8 ``[3, H, W]`` tensor whose channels are adjacent in memory.
    """
    return _read_file(name, path, 3, channels_last=True)


def _read_file(
    name: str,
    source: str | os.PathLike[str],
    channels: int,
    *,
    channels_last: bool = False,
    allow_urls: bool = False,
) -> Tensor:
    path = os.fspath(source)
    if not path:
        raise ValueError(f"{name} is an empty string, not the path of an image.")
    if _URL.match(path):
        if not allow_urls:
            raise ValueError(
                f"{name} is the URL {path!r}. URLs are only downloaded with allow_urls=True. Without "
                "it, save the image and pass the file's path."
            )
        _check_has_colors(name, f"the image {path!r}", channels)
        return decode_image(name, repr(path), download_image(path, name), channels)
    _check_has_colors(name, f"the image file {path!r}", channels)
    try:
        with _explaining(name, repr(path)), open_image(path) as image:
            return _to_tensor(image, channels, channels_last=channels_last)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"No such file: {path!r} ({name}).") from error
    except UnreadableImageError:
        if _is_folder(path):  # asked only now, because it takes a tenth of a millisecond
            raise ValueError(
                f"{name} is the folder {path!r}, not an image. A folder is only read if it is the "
                "only source."
            ) from None
        raise


def decode_image(name: str, what: str, content: bytes, channels: int) -> Tensor:
    """Decode the content of an image file as :func:`load_image` does.

    Args:
        name: What error messages call the source.
        what: What error messages call the image.
        content: The bytes of the file.
        channels: 1 or 3.
    """
    with _explaining(name, what), open_image(io.BytesIO(content)) as image:
        return _to_tensor(image, channels)


@contextlib.contextmanager
def _explaining(name: str, what: str) -> Iterator[None]:
    """Turn Pillow's errors, which depend on the format and the damage, into one kind of error."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        reason = str(error).partition(", ")[0]
        raise UnreadableImageError(
            f"Cannot read {what} ({name}): it is too large to be decoded whole ({reason}). Save it as a "
            "tiled TIFF, which predict(..., tile=...) reads by windows, or, if you trust it, raise the "
            "limit PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UnreadableImageError(
            f"Cannot read {what} ({name}): it is damaged, or not an image in a supported format "
            f"({reason})."
        ) from error


def turn_to_upright(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image upright according to its EXIF orientation, or None if it is."""
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))


def _to_tensor(image: Image.Image, channels: int, *, channels_last: bool = False) -> Tensor:
    image = _to_upright(image, channels)
    if channels_last:
        return torch.from_numpy(np.array(image).reshape(*image.size[::-1], channels)).permute(
            2, 0, 1
        )
    # Pillow packs one band of an RGB image as fast as all bands, and faster than `split` copies it.
    bands = [np.frombuffer(image.tobytes("raw", band), np.uint8) for band in image.mode]
    return torch.from_numpy(np.stack(bands)).view(channels, *image.size[::-1])


def _to_upright(image: Image.Image, channels: int) -> Image.Image:
    """Return an upright image whose mode has so many channels of 8 bits."""
    if 0 in image.size:
        raise ValueError("its width or height is zero")
    image.load()  # some formats have their orientation only now
    turn = turn_to_upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.mode in _VIA:
        image = image.convert(_VIA[image.mode])
    if image.mode != _OF_FILES[channels]:
        # Pillow drops the transparency of RGBA and LA; only RGB and greyscale convert to greyscale.
        image = image.convert("RGB") if image.mode not in ("L", "LA", "1") else image
        image = image.convert(_OF_FILES[channels])
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(
            f"mode {image.mode} with values from {low:g} to {high:g}, not 8 or 16 bits per channel; "
            "scale the values to 0 to 255 and store them as uint8"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
