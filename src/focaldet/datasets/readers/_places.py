"""Where the images of a dataset are, if its files name them as another machine or tool did."""

from __future__ import annotations

import logging
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from focaldet._checks import printable
from focaldet._files import is_hidden
from focaldet.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ImageIndex", "Located", "is_file", "locate_images", "native_name"]

_TRIED_NAMES = 16  # images that are looked for in each folder
_SEARCHED = 2**18  # files at most, so that a file in a home folder does not cause a long search

_logger = logging.getLogger(__name__)


class Located(NamedTuple):
    """Where images are.

    Attributes:
        folder: The folder to which the names are relative.
        names: The name of each image.
        tried: The folders in which none of the first images was found; () if one was.
    """

    folder: Path
    names: Sequence[str]
    tried: tuple[Path, ...]


class ImageIndex:
    """The images in a folder and the folders inside it, to be found by the end of their path.

    Args:
        folder: The folder. At most 262,144 files in it are listed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, list[tuple[str, ...]]] = {}
        for parts in islice(_files_in(folder), _SEARCHED):
            name = parts[-1]
            stem, dot, suffix = name.rpartition(".")
            if f"{dot}{suffix}".lower() in IMAGE_EXTENSIONS:
                for key in (name, stem):
                    self._by_name.setdefault(key, []).append(parts)

    def find(self, name: str) -> str | None:
        r"""Return the image whose path ends like a name, relative to the folder.

        Args:
            name: A path, with ``/`` or ``\`` and with or without a suffix.

        Returns:
            The path whose last parts agree best. None if no file has this name, or several files
            agree equally well.
        """
        wanted = tuple(part for part in name.replace("\\", "/").split("/") if part)
        if not wanted:
            return None
        ranked = sorted(
            (
                (_common_end(parts[:-1], wanted[:-1]), parts)
                for parts in self._by_name.get(wanted[-1], ())
            ),
            key=lambda one: (-one[0], one[1]),
        )
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return "/".join(ranked[0][1])

    def names(self) -> set[str]:
        """Return the path of every image, relative to the folder."""
        return {"/".join(parts) for found in self._by_name.values() for parts in found}


def locate_images(
    names: Sequence[str], folders: Sequence[Path], searched: Path, source: Path
) -> Located:
    """Find the folder of images, and the names of the images in it.

    The first folder that contains one of the first images is taken. If there is none, images with the
    same names are looked for in all folders inside ``searched``, and what is found is logged.

    Args:
        names: The names in the annotations.
        folders: The folders in which they are looked for, in this order.
        searched: The folder that is searched at the end.
        source: The annotations, for messages.
    """
    first = list(islice(names, _TRIED_NAMES))
    for folder in folders:
        if any(is_file(folder / native_name(name, folder)) for name in first):
            return Located(folder, names, ())
    if not first:
        return Located(folders[0], names, ())
    index = ImageIndex(searched)
    found = [index.find(name) for name in names]
    count = sum(name is not None for name in found)
    if not count:
        return Located(folders[0], names, tuple(folders))
    place = next(i for i, name in enumerate(found) if name is not None)
    _logger.warning(
        "%s: found %d of %d images by the end of their names in %s. The first is %s for %s.",
        printable(str(source)),
        count,
        len(names),
        printable(str(searched)),
        printable(str(found[place])),
        printable(names[place]),
    )
    return Located(searched, [new or old for new, old in zip(found, names, strict=True)], ())


def native_name(name: str, folder: Path) -> str:
    """Return a file name with the separators of this system, if only then the file exists."""
    other = name.replace("\\", "/")
    if other != name and not is_file(folder / name) and is_file(folder / other):
        return other
    return name


def is_file(path: Path) -> bool:
    """Return whether there is a file, also for a path that cannot exist."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count


def _files_in(folder: Path) -> Iterator[tuple[str, ...]]:
    """Yield the parts of the path of each file, relative to the folder, in the order of names."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        above = Path(place).relative_to(folder).parts
        yield from ((*above, name) for name in sorted(files) if not is_hidden(name))
