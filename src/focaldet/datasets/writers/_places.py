"""Names of images and of their annotation files in a folder that is being written."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

import numpy as np

from focaldet._checks import printable
from focaldet._files import is_hidden
from focaldet.datasets.writers._text import is_control
from focaldet.errors import AnnotationError, UnreadableImageError
from focaldet.images import IMAGE_EXTENSIONS, read_image_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._writer import Output

__all__ = [
    "check_suffixes",
    "image_paths",
    "known_sizes",
    "place_images",
    "places_of",
    "relative_path",
    "safe_part",
    "without_suffix",
]

_logger = logging.getLogger(__name__)


def image_paths(table: AnnotationTable) -> list[Path]:
    """Return the absolute path of each image, without "." and ".."."""
    folder = os.path.abspath(table.image_folder)  # noqa: PTH100  (resolve() would follow links)
    return [Path(os.path.normpath(os.path.join(folder, name))) for name in table.file_names]  # noqa: PTH118


def relative_path(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, with "/". On a different drive, it stays absolute."""
    with contextlib.suppress(ValueError):  # Windows has no relative path between drives
        path = Path(os.path.relpath(path, folder))
    return path.as_posix()


def places_of(paths: Sequence[Path], *, flat: bool) -> list[str]:
    """Choose a place for each image in a folder, so that annotation files do not collide.

    An image keeps its path below the innermost folder that contains all images, or only its name if
    ``flat``. Images of which only the folder, the suffix or the case of letters differs get different
    names, because the annotation file has the name of the image with another suffix. Characters that
    lists of files cannot hold are replaced, and names that count as hidden get a "_" in front.

    >>> places_of([Path("/a/x.jpg"), Path("/a/b/x.jpg"), Path("/a/x.png")], flat=False)
    ['x.jpg', 'b/x.jpg', 'x_2.png']
    >>> places_of([Path("/a/x.jpg"), Path("/a/b/x.jpg"), Path("/a/y.png")], flat=True)
    ['x.jpg', 'b_x.jpg', 'y.png']
    """
    common = _common_parts(paths)
    taken: set[str] = set()
    places = []
    for path in paths:
        *folders, name = [safe_part(part) for part in path.parts[common:]]
        if flat:
            if _key(name) in taken:
                name = "_".join([*folders, name])
            folders = []
        place = "/".join([*folders, name])
        stem, suffix = without_suffix(place), PurePath(name).suffix
        number = 2
        while _key(place) in taken:
            place = f"{stem}_{number}{suffix}"
            number += 1
        taken.add(_key(place))
        places.append(place)
    renamed = sum(
        PurePath(place).name != path.name for place, path in zip(places, paths, strict=True)
    )
    if renamed:
        _logger.warning(
            "Images whose files get a new name in the dataset that is written: %d. Their old names "
            "would collide, or cannot be held by the format.",
            renamed,
        )
    return places


def without_suffix(place: str) -> str:
    """Return a place without the suffix of the image."""
    return place.removesuffix(PurePath(place).suffix)


def place_images(
    table: AnnotationTable,
    paths: Sequence[Path],
    places: Sequence[str],
    folder: str,
    output: Output,
) -> None:
    """Link or copy the images of a split to their places below ``folder``, as ``output`` says.

    Raises:
        FileNotFoundError: If an image does not exist.
    """
    if output.image_files == "keep":
        return
    for path, place in zip(paths, places, strict=True):
        if not path.is_file():
            raise FileNotFoundError(
                f"No such image: {str(path)!r}. {table.describe_folder()} To write annotations without "
                "images, pass image_files='keep'."
            )
        output.folder.place_image(path, f"{folder}/{place}", output.image_files)


def check_suffixes(paths: Sequence[Path]) -> None:
    """Raise ``AnnotationError`` unless readers that list the images of a folder find each image."""
    for path in paths:
        if path.suffix.lower() not in IMAGE_EXTENSIONS:
            raise AnnotationError(
                f"{printable(repr(str(path)))} does not have the suffix of an image, so readers would not "
                f"find it. Supported are {', '.join(IMAGE_EXTENSIONS)}."
            )


def known_sizes(
    table: AnnotationTable, paths: Sequence[Path], *, missing: Literal["raise", "zero"]
) -> npt.NDArray[np.int32]:
    """Return the annotated sizes, ``[I, 2]``, after reading the missing ones from the images.

    Args:
        table: The annotations.
        paths: The path of each image.
        missing: What to do about an image that does not exist or cannot be read: raise an error, or
            return 0 for it.
    """
    sizes = np.where((table.image_sizes > 0).all(axis=1, keepdims=True), table.image_sizes, 0)
    for index in np.flatnonzero(sizes[:, 0] == 0).tolist():
        try:
            sizes[index] = read_image_size(paths[index])
        except (FileNotFoundError, UnreadableImageError) as error:
            if missing == "raise":
                raise type(error)(
                    f"{error} Its size is not annotated, and the format needs it. "
                    f"{table.describe_folder()}"
                ) from error
    return sizes.astype(np.int32)


def _common_parts(paths: Sequence[Path]) -> int:
    """Return how many parts of the paths are the same folders."""
    if not paths:
        return 0
    folders = [path.parts[:-1] for path in paths]
    low, high = min(folders), max(folders)  # whatever they share, all share
    return next(
        (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b),
        min(len(low), len(high)),
    )


def _key(place: str) -> str:
    """Return what must differ between two places, also on file systems that ignore case."""
    return without_suffix(place).casefold()


def safe_part(part: str) -> str:
    """Return a part of a path without characters that end a line or separate folders."""
    cleaned = "".join(
        "_" if is_control(one) or one in '\\:/<>|"?*' else one for one in part
    ).strip()
    suffix = PurePath(cleaned).suffix
    cleaned = cleaned.removesuffix(suffix).strip() + suffix  # lists have names without suffix
    return f"_{cleaned}" if not cleaned or is_hidden(cleaned) else cleaned
