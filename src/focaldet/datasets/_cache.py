"""A cache next to an annotation file, which is read instead the next time.

The cache is used only if the annotations still have the size, modification time and content that they
had when it was written. The content is compared by the CRC-32 of each of its chunks. That detects
accidental changes, not deliberate ones, and it is the only checksum in the standard library that
takes less time than the cache saves. The cache holds numbers and text, never pickled objects.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._atomic import atomic_write
from focaldet.datasets._table import AnnotationTable, PackedStrings

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["cache_path", "fingerprint", "load_cache", "save_cache"]

_VERSION = 2
_CHUNK = 2**24
_ARRAYS = {
    "image_ids": (np.int64, ()),
    "image_sizes": (np.int32, (2,)),
    "boxes": (np.float64, (4,)),
    "labels": (np.int64, ()),
    "areas": (np.float64, ()),
    "crowd": (np.bool_, ()),
    "annotation_ids": (np.int64, ()),
    "image_indices": (np.int64, ()),
}
_PER_IMAGE = ("image_ids", "image_sizes")


def cache_path(path: Path) -> Path:
    """Return the path of the cache of an annotation file."""
    return path.with_name(f"{path.name}.focaldet.npz")


def fingerprint(path: Path) -> dict[str, Any]:
    """Return the size, modification time and checksums of a file."""
    with path.open("rb") as file:
        status = path.stat()
        with contextlib.ExitStack() as stack:
            try:
                data = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (ValueError, OSError):  # the file is empty or cannot be mapped
                data = file.read()  # type: ignore[assignment]
            with memoryview(data) as view, ThreadPoolExecutor(max_workers=4) as pool:
                chunks = [view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK)]
                checksums = list(pool.map(zlib.crc32, chunks))
                for chunk in chunks:
                    chunk.release()
    return {
        "version": _VERSION,
        "size": status.st_size,
        "time": status.st_mtime_ns,
        "checksums": checksums,
    }


def load_cache(path: Path, image_folder: Path) -> AnnotationTable | None:
    """Return the cached table; None if there is none, it is outdated, or it is damaged."""
    try:
        with cache_path(path).open("rb") as file, np.load(file, allow_pickle=False) as content:
            metadata = json.loads(content["metadata"].tobytes())
            with ThreadPoolExecutor(max_workers=1) as pool:
                current = pool.submit(fingerprint, path)  # while the arrays are read
                arrays = {name: content[name] for name in _ARRAYS}
                names = PackedStrings(content["file_names"], content["file_name_ends"])
            if metadata["fingerprint"] != current.result():
                return None
            _check(arrays, names)
            return AnnotationTable(
                source=path,
                image_folder=image_folder,
                file_names=names,
                class_names=tuple(metadata["class_names"]),
                category_ids=tuple(metadata["category_ids"]),
                **arrays,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _check(arrays: dict[str, npt.NDArray[Any]], names: PackedStrings) -> None:
    boxes, images = len(arrays["boxes"]), len(names)
    for name, (dtype, shape) in _ARRAYS.items():
        number = images if name in _PER_IMAGE else boxes
        if arrays[name].dtype != dtype or arrays[name].shape != (number, *shape):
            raise ValueError(name)


def save_cache(table: AnnotationTable, path: Path, state: dict[str, Any]) -> None:
    """Write the cache, unless the folder is read-only or the annotations changed meanwhile."""
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (state["size"], state["time"]):
        return
    metadata = {
        "fingerprint": state,
        "class_names": table.class_names,
        "category_ids": table.category_ids,
    }
    names = PackedStrings.pack(table.file_names)
    with (
        contextlib.suppress(OSError),
        atomic_write(cache_path(path)) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez(
            file,
            metadata=np.frombuffer(json.dumps(metadata).encode(), np.uint8),
            file_names=names.data,
            file_name_ends=names.ends,
            **{name: getattr(table, name) for name in _ARRAYS},
        )
