"""Read arrays from HDF5 files, as Keras writes them, without following anything out of the file.

HDF5 is a format with many features: links to other files, data stored in other files, filters that are
loaded as plugins, and compression. Keras uses none of them for weights, so each of them is an error here.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from focaldet._checks import shortened
from focaldet._extras import import_extra

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["HDF5_SUFFIXES", "is_hdf5", "read_hdf5"]

HDF5_SUFFIXES = (".h5", ".hdf5")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_WEIGHTS = "model_weights"  # of a whole model; a file of weights alone has the layers at the top
_ATTRIBUTES = ("model_config", "keras_version", "backend")
_MAX_OBJECTS = 20_000
_MAX_DEPTH = 16
_MAX_DIMENSIONS = 8
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


def is_hdf5(path: Path) -> bool:
    """Whether a file is an HDF5 file, by its suffix or its first bytes."""
    if path.suffix.lower() in HDF5_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


def read_hdf5(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights in a file of Keras.

    Args:
        path: The file. Its optimiser's weights are not read.

    Returns:
        The arrays by their path in the file, without the group of the weights; and the texts that
        describe the model, such as its configuration.

    Raises:
        ImportError: If h5py is not installed.
        ValueError: If the file contains links, stored data or filters that Keras does not write, or far
            more than its size justifies.
        OSError: If it is damaged. h5py raises RuntimeError, KeyError and TypeError as well.
    """
    h5py = import_extra("h5py", purpose=f"Reading {str(path)!r}", install="focaldet[keras]")
    size = path.stat().st_size
    with path.open("rb") as file:
        if not file.read(len(_SIGNATURE)).startswith(_SIGNATURE):
            raise ValueError("it does not begin as an HDF5 file does")
    # Without locks, which fail on read-only file systems.
    with h5py.File(os.fspath(path), "r", locking=False) as root:
        texts = {name: text for name in _ATTRIBUTES if (text := _text(root, name)) is not None}
        weights = root
        if _WEIGHTS in root and _is_plain_link(h5py, root, _WEIGHTS):
            weights = root[_WEIGHTS]
            if not isinstance(weights, h5py.Group):
                raise ValueError(f"{_WEIGHTS!r} is not a group")
        datasets = _Walk(h5py).datasets(weights)
        declared = sum(map(_declared_bytes, datasets.values()))
        if declared > size:  # without compression, only arrays that were never written
            raise ValueError(f"its arrays have {declared} bytes, but the file has {size}")
        return {name: _tensor(one) for name, one in datasets.items()}, texts


def _is_plain_link(h5py: Any, group: Any, name: str) -> bool:
    """Whether an entry of a group is stored in the same file, not a link to elsewhere."""
    return isinstance(group.get(name, getlink=True), h5py.HardLink)


class _Walk:
    """Collects the arrays of a file. The number of its objects and their depth are bounded."""

    def __init__(self, h5py: Any) -> None:
        self.h5py = h5py
        self.count = 0
        self.found: dict[str, Any] = {}

    def datasets(self, group: Any) -> dict[str, Any]:
        """Return the arrays of a group and of the groups within it, by path."""
        self._visit(group, "", 0)
        return self.found

    def _visit(self, group: Any, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {_MAX_DEPTH} levels deep")
        for name in group:
            self.count += 1
            if self.count > _MAX_OBJECTS:
                raise ValueError(f"it has more than {_MAX_OBJECTS} groups and arrays")
            path = f"{prefix}{name}"
            if not prefix and name == "optimizer_weights":
                continue
            if not _is_plain_link(self.h5py, group, name):
                raise ValueError(f"{shortened(path)} is a link, which is not followed")
            member = group[name]
            if isinstance(member, self.h5py.Group):
                self._visit(member, f"{path}/", depth + 1)
            elif isinstance(member, self.h5py.Dataset):
                _check_storage(self.h5py, path, member)
                self.found[path] = member
            else:
                raise ValueError(f"{shortened(path)} is neither a group nor an array")


def _check_storage(h5py: Any, path: str, dataset: Any) -> None:
    """Raise unless an array of numbers is stored in the file itself, uncompressed."""
    name = shortened(path)
    stored = dataset.id.get_create_plist()
    if stored.get_external_count():
        raise ValueError(f"{name} is stored in another file, which is not opened")
    if stored.get_layout() not in (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        raise ValueError(f"{name} is assembled from other arrays")
    # A compressed chunk may unpack to far more than the array's size.
    if stored.get_nfilters():
        raise ValueError(
            f"{name} is compressed or filtered; save the model with Keras, which does not do this"
        )
    if dataset.shape is None or len(dataset.shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name} is not an array of at most {_MAX_DIMENSIONS} dimensions")
    if dataset.dtype.str[1:] not in _NUMBERS:
        raise ValueError(f"{name} has the dtype {shortened(str(dataset.dtype))}, not numbers")


def _declared_bytes(dataset: Any) -> int:
    """Return the bytes that reading an array takes, at least those of its largest chunk."""
    lengths = [dataset.shape, *([dataset.chunks] if dataset.chunks else [])]
    return max(math.prod(map(int, shape)) for shape in lengths) * int(dataset.dtype.itemsize)


def _tensor(dataset: Any) -> Tensor:
    values = np.asarray(dataset[()])
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C"))


def _text(root: Any, name: str) -> str | None:
    """Return an attribute that is a single text, or None."""
    if name not in root.attrs:
        return None
    attribute = root.attrs.get_id(name)
    if attribute.shape != ():
        return None
    value = root.attrs[name]
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else None
