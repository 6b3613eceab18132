"""A file beside the annotations with what was read from them, opened instead the next time.

It is used only if the annotations have the size, the time of change and the content they had when it
was written. The content is compared by the CRC-32 of every piece of it: a checksum against mistakes,
not against somebody who wants two files to look alike, and the only one in the standard library that
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

from focaldet.datasets._table import AnnotationTable, PackedStrings

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["cache_path", "fingerprint", "load_cache", "save_cache"]

_VERSION = 2
_PIECE = 2**24
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
_OF_IMAGES = ("image_ids", "image_sizes")


def cache_path(path: Path) -> Path:
    """Return where the cache of an annotation file lies."""
    return path.with_name(f"{path.name}.focaldet.npz")


def fingerprint(path: Path) -> dict[str, Any]:
    """Return what tells one state of a file from another."""
    with path.open("rb") as file:
        status = path.stat()
        with contextlib.ExitStack() as stack:
            try:
                data = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (ValueError, OSError):  # empty, or a file system that cannot map
                data = file.read()  # type: ignore[assignment]
            with memoryview(data) as view, ThreadPoolExecutor(max_workers=4) as pool:
                pieces = [view[start : start + _PIECE] for start in range(0, len(view), _PIECE)]
                checksums = list(pool.map(zlib.crc32, pieces))
                for piece in pieces:
                    piece.release()
    return {
        "version": _VERSION,
        "size": status.st_size,
        "time": status.st_mtime_ns,
        "checksums": checksums,
    }


def load_cache(path: Path, image_folder: Path) -> AnnotationTable | None:
    """Return what the cache holds; None if there is none, it is of another state, or damaged."""
    try:
        with cache_path(path).open("rb") as file, np.load(file, allow_pickle=False) as content:
            facts = json.loads(content["facts"].tobytes())
            with ThreadPoolExecutor(max_workers=1) as pool:
                state = pool.submit(fingerprint, path)  # while the arrays are read
                arrays = {name: content[name] for name in _ARRAYS}
                names = PackedStrings(content["file_names"], content["file_name_ends"])
            if facts["fingerprint"] != state.result():
                return None
            _check(arrays, names)
            return AnnotationTable(
                source=path,
                image_folder=image_folder,
                file_names=names,
                class_names=tuple(facts["class_names"]),
                category_ids=tuple(facts["category_ids"]),
                **arrays,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _check(arrays: dict[str, npt.NDArray[Any]], names: PackedStrings) -> None:
    boxes, images = len(arrays["boxes"]), len(names)
    for name, (dtype, shape) in _ARRAYS.items():
        number = images if name in _OF_IMAGES else boxes
        if arrays[name].dtype != dtype or arrays[name].shape != (number, *shape):
            raise ValueError(name)


def save_cache(table: AnnotationTable, path: Path, state: dict[str, Any]) -> None:
    """Write the cache, if the folder takes it and the annotations did not change meanwhile."""
    from focaldet._atomic import atomic_write  # with what a checkpoint needs

    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (state["size"], state["time"]):
        return
    facts = {
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
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            file_names=names.data,
            file_name_ends=names.ends,
            **{name: getattr(table, name) for name in _ARRAYS},
        )
