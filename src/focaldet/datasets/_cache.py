"""A cache next to an annotation file, which is read instead the next time.

The cache is used only if the annotations still have the size, modification time and content that they
had when it was written. The content is compared by the CRC-32 of each of its chunks. That detects
accidental changes, not deliberate ones, and it is the only checksum in the standard library that
takes less time than the cache saves. The cache holds numbers and text, never pickled objects. Its
values are checked, and if there is anything wrong with it, the annotations are read instead.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import warnings
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

_VERSION = 4
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
_INT64 = np.iinfo(np.int64)
_CONTINUATION = 0b10  # the first two bits of every byte in UTF-8 but the first of a character


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
    cache = cache_path(path)
    if not cache.is_file():  # a named pipe would wait for a writer
        return None
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            cache.open("rb") as file,
            np.load(file, allow_pickle=False) as content,
        ):
            _check_members(content.zip, cache.stat().st_size)
            metadata = json.loads(content["metadata"].tobytes())
            with ThreadPoolExecutor(max_workers=1) as pool:
                current = pool.submit(fingerprint, path)  # while the arrays are read
                arrays = {name: content[name] for name in _ARRAYS}
                names = PackedStrings(content["file_names"], content["file_name_ends"])
            if metadata["fingerprint"] != current.result():
                return None
            _check_names(names)
            _check_shapes(arrays, len(names))
            _check_classes(metadata["class_names"], metadata["category_ids"])
            _check_values(arrays, len(names), len(metadata["class_names"]))
            return AnnotationTable(
                source=path,
                image_folder=image_folder,
                file_names=names,
                class_names=tuple(metadata["class_names"]),
                category_ids=tuple(metadata["category_ids"]),
                **arrays,
            )
    except Exception:  # noqa: BLE001  # zipfile, zlib, json and numpy raise a dozen kinds
        return None


def _require(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Check that reading cannot take much more memory than the file has bytes."""
    members = archive.infolist()
    _require(all(one.compress_type == zipfile.ZIP_STORED for one in members), "compressed")
    _require(sum(one.file_size for one in members) <= size, "members larger than the file")


def _check_names(names: PackedStrings) -> None:
    data, ends = names.data, names.ends
    _require(data.dtype == np.uint8 and data.ndim == 1, "file_names")
    _require(ends.dtype == np.int64 and ends.ndim == 1, "file_name_ends")
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    _require((starts[1:] >= starts[:-1]).all() and starts[-1] == len(data), "file_name_ends")
    data.tobytes().decode("utf-8", "surrogatepass")
    _require((data[starts[starts < len(data)]] >> 6 != _CONTINUATION).all(), "file_name_ends")


def _check_shapes(arrays: dict[str, npt.NDArray[Any]], images: int) -> None:
    boxes = len(arrays["boxes"])
    for name, (dtype, shape) in _ARRAYS.items():
        number = images if name in _PER_IMAGE else boxes
        _require(arrays[name].dtype == dtype and arrays[name].shape == (number, *shape), name)


def _check_classes(names: object, ids: object) -> None:
    if not isinstance(names, list) or not isinstance(ids, list) or len(names) != len(ids):
        raise TypeError("class_names")
    _require({*map(type, names)} <= {str} and {*map(type, ids)} <= {int}, "class_names")
    _require(all(a < b for a, b in itertools.pairwise(ids)), "category_ids")
    _require(not ids or (ids[0] >= _INT64.min and ids[-1] <= _INT64.max), "category_ids")


def _check_values(arrays: dict[str, npt.NDArray[Any]], images: int, classes: int) -> None:
    """Check the values that other values refer to, or that have few possibilities."""
    indices, labels = arrays["image_indices"], arrays["labels"]
    if len(indices):
        _require(indices[0] >= 0 and indices[-1] < images, "image_indices")
        _require((indices[1:] >= indices[:-1]).all(), "image_indices")
        _require(labels.min() >= -1 and labels.max() < classes, "labels")
    _require(len(np.unique(arrays["image_ids"])) == images, "image_ids")
    _require((arrays["image_sizes"] >= 0).all(), "image_sizes")
    _require((arrays["crowd"].view(np.uint8) <= 1).all(), "crowd")


def save_cache(table: AnnotationTable, path: Path, state: dict[str, Any]) -> None:
    """Write the cache, unless the folder is read-only or the annotations changed meanwhile."""
    try:
        status = path.stat()
    except OSError:  # it was removed
        return
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
