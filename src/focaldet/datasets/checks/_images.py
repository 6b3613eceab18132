"""Checks of the image files of a dataset."""

from __future__ import annotations

import collections
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from focaldet._image_formats import open_image
from focaldet.datasets.checks._report import Finding
from focaldet.images import load_image, read_image_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable

__all__ = [
    "duplicate_images",
    "image_findings",
    "images_of_unknown_size",
    "images_without_objects",
]

_CHUNK = 64  # images per task of a thread
_HEAD = 16384  # bytes; most different files already differ here


class _Scan(NamedTuple):
    """What was found out about one file.

    Attributes:
        kind: Kind of the finding, if the file cannot be used.
        cause: Why it cannot be used.
        size: Upright ``(height, width)``.
        digest: Hash of the length and the first bytes of the file, equal for equal files.
    """

    kind: str | None = None
    cause: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""


def image_findings(
    table: AnnotationTable,
    *,
    decode: bool,
    workers: int,
    progress: Callable[[int, int], object] | None,
) -> tuple[list[Finding], npt.NDArray[np.int32]]:
    """Read every image.

    Args:
        table: The annotations with the file names and sizes of the images.
        decode: Whether to decode the images. Otherwise, only their headers are read.
        workers: Number of threads.
        progress: Called with the number of images read so far and the total.

    Returns:
        The findings, and the sizes of the images, ``[I, 2]``, 0 for images that cannot be read.
    """
    scans: list[_Scan] = []
    with ThreadPoolExecutor(workers) as pool:
        starts = range(0, len(table), _CHUNK)
        for chunk in pool.map(lambda start: _scan_chunk(table, start, decode=decode), starts):
            scans += chunk
            if progress is not None:
                progress(len(scans), len(table))
    findings = [
        _finding(table, i, scan.kind, scan.cause) for i, scan in enumerate(scans) if scan.kind
    ]
    findings += [
        _finding(table, i, "image-size", difference)
        for i, scan in enumerate(scans)
        if (difference := _size_difference(table, i, scan))
    ]
    findings += _equal_contents(table, scans)
    return findings, np.array([scan.size for scan in scans], np.int32).reshape(-1, 2)


def _finding(table: AnnotationTable, index: int, kind: str, message: str) -> Finding:
    return Finding(
        kind=kind,
        message=message,
        file=table.file_names[index],
        image_id=int(table.image_ids[index]),
    )


def _scan_chunk(table: AnnotationTable, start: int, *, decode: bool) -> list[_Scan]:
    stop = min(start + _CHUNK, len(table))
    return [_scan(table.image_path(index), decode=decode) for index in range(start, stop)]


def _scan(path: Path, *, decode: bool) -> _Scan:
    try:
        digest = _digest_of_head(path)
        if decode:
            _, height, width = load_image(path).shape  # the way training reads it
            return _Scan(size=(height, width), digest=digest)
        return _Scan(size=read_image_size(path), digest=digest)
    except FileNotFoundError:
        return _Scan("image-missing", f"{str(path)!r} does not exist")
    except (OSError, ValueError) as error:
        return _Scan("image-unreadable", str(error.__cause__ or error))


def _digest_of_head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    length = path.stat().st_size
    return hashlib.blake2b(head + length.to_bytes(8, "big"), digest_size=16).digest()


def _size_difference(table: AnnotationTable, index: int, scan: _Scan) -> str:
    height, width = (int(side) for side in table.image_sizes[index])
    if scan.kind or min(height, width) <= 0 or scan.size == (height, width):
        return ""
    message = (
        f"annotated as {width}x{height} (width x height), but the image is "
        f"{scan.size[1]}x{scan.size[0]}"
    )
    if scan.size != (width, height):
        return message
    with open_image(table.image_path(index)) as image:
        as_stored = image.size == (width, height)
    if as_stored:
        return (
            f"{message}: it is stored on its side and turned upright by its EXIF orientation; "
            "the annotated size and boxes must fit the upright image, or be read with exif='stored'"
        )
    return f"{message}: width and height are swapped"


def _equal_contents(table: AnnotationTable, scans: list[_Scan]) -> Iterator[Finding]:
    """Find equal files. Only files with equal lengths and first bytes are read completely."""
    alike: dict[bytes, dict[str, int]] = collections.defaultdict(dict)
    for index, scan in enumerate(scans):
        if scan.digest and not scan.kind:
            alike[scan.digest].setdefault(table.file_names[index], index)
    for indices in alike.values():
        seen: dict[bytes, str] = {}
        for name, index in indices.items() if len(indices) > 1 else ():
            with table.image_path(index).open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").digest()
            if first := seen.get(digest):
                yield _finding(table, index, "image-content-duplicate", f"same content as {first}")
            seen.setdefault(digest, name)


def duplicate_images(table: AnnotationTable) -> Iterator[Finding]:
    """Find images with the same id or the same file."""
    for kind, keys, what in (
        ("image-id-duplicate", table.image_ids.tolist(), "id"),
        ("image-file-duplicate", list(table.file_names), "file"),
    ):
        first: dict[int | str, int] = {}
        for index, key in enumerate(keys):
            other = first.setdefault(key, index)
            if other != index:
                message = (
                    f"same {what} as image {table.image_ids[other]} ({table.file_names[other]})"
                )
                yield _finding(table, index, kind, message)


def images_of_unknown_size(table: AnnotationTable) -> Iterator[Finding]:
    """Find images whose size is not annotated."""
    heights, widths = table.image_sizes.T
    for index in ((heights <= 0) | (widths <= 0)).nonzero()[0].tolist():
        yield _finding(table, index, "image-size-unknown", "no annotated size")


def images_without_objects(table: AnnotationTable) -> Iterator[Finding]:
    """Find images without boxes or with only crowds."""
    boxes = np.bincount(table.image_indices, minlength=len(table))
    crowds = np.bincount(table.image_indices[table.crowd], minlength=len(table))
    for kind, wanted, message in (
        ("image-empty", boxes == 0, "no boxes"),
        ("image-only-crowds", (boxes > 0) & (boxes == crowds), "only crowds"),
    ):
        for index in wanted.nonzero()[0].tolist():
            yield _finding(table, index, kind, message)
