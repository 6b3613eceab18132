"""JSON files of rows, and columns of checked numbers out of them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._checks import must_be

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import numpy.typing as npt

_INTEGER = "an integer"
_NUMBER = "a finite number"
_BOX = "x, y, width and height in finite numbers, the last two not negative"


def read_json(name: str, path: str | os.PathLike[str]) -> Any:
    """Read a JSON file without the outlines, which are most of a COCO file and not needed.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            return json.load(file, object_hook=_without_outline)
    except ValueError as error:  # what json and the decoder raise
        raise ValueError(must_be(name, "a JSON file", f"{path} ({error})")) from error


def _without_outline(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("segmentation", None)
    return row


class Rows:
    """Rows of a COCO file, to be read column by column; what is wrong is named with its row.

    Args:
        rows: dictionaries, as the file has them.
        kind: what a row is called, "annotation" say; rows with an ``id`` are told by it.
        source: the file they are from, or what it is called.
    """

    def __init__(self, rows: Sequence[Any], kind: str, source: str) -> None:
        self.rows, self.kind, self.source = rows, kind, source

    def integers(self, key: str) -> npt.NDArray[np.int64]:
        """Return a column of integers, ``[N]``."""
        return self._array(key, self._column(key), _INTEGER, _as_integers).astype(np.int64)

    def numbers(
        self, key: str, default: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return a column of finite numbers, ``[N]``; absent ones come from ``default``."""
        if default is None:
            values = self._column(key)
        else:
            values = [
                other if row.get(key) is None else row[key]
                for row, other in zip(self.rows, default.tolist(), strict=True)
            ]
        return self._array(key, values, _NUMBER, _as_numbers)

    def boxes(self) -> npt.NDArray[np.float64]:
        """Return the boxes, ``[N, 4]``: x, y, width, height."""
        return self._array("bbox", self._column("bbox"), _BOX, _as_boxes)

    def where(self, index: int) -> str:
        """Say which row this is."""
        number = self.rows[index].get("id", f"number {index}")
        return f"{self.kind} {number} of {self.source}"

    def _column(self, key: str) -> list[Any]:
        try:
            return [row[key] for row in self.rows]
        except (KeyError, TypeError, IndexError):
            pass
        for index, row in enumerate(self.rows):
            if not isinstance(row, Mapping):
                got = f"{reprlib.repr(row)} as number {index} of {self.source}"
                raise ValueError(must_be(self.kind, "an object with named values", got))
            if key not in row:
                raise ValueError(
                    must_be(key, f"in every {self.kind}", f"none in {self.where(index)}")
                )
        raise AssertionError(key)

    def _array(
        self,
        key: str,
        values: list[Any],
        condition: str,
        convert: Callable[[list[Any]], npt.NDArray[Any] | None],
    ) -> npt.NDArray[Any]:
        array = convert(values)
        if array is not None:
            return array
        wrong = next(i for i, value in enumerate(values) if convert([value]) is None)
        got = f"{reprlib.repr(values[wrong])} in {self.where(wrong)}"
        raise ValueError(must_be(key, condition, got))


def _plain(values: list[Any]) -> npt.NDArray[Any] | None:
    """Return an array of whatever numbers these are, or None: strings are not numbers here."""
    try:
        array = np.array(values)
    except (ValueError, OverflowError):  # rows of different lengths
        return None
    return array if array.dtype.kind in "iuf" else None


def _as_integers(values: list[Any]) -> npt.NDArray[Any] | None:
    if not values:
        return np.zeros(0, np.int64)
    array = _plain(values)
    if array is None or array.ndim != 1 or not np.can_cast(array.dtype, np.int64):
        return None
    return array


def _as_numbers(values: list[Any]) -> npt.NDArray[Any] | None:
    array = _plain(values)
    if array is None or array.ndim != 1 or not np.isfinite(array).all():
        return None
    return array.astype(np.float64)


def _as_boxes(values: list[Any]) -> npt.NDArray[Any] | None:
    if not values:
        return np.zeros((0, 4))
    array = _plain(values)
    if array is None or array.shape != (len(values), 4):
        return None
    if not np.isfinite(array).all() or (array[:, 2:] < 0).any():
        return None
    return array.astype(np.float64)
