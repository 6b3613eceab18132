"""Columns of checked values from the rows of a COCO file; an error names the row and its value."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from focaldet._checks import shortened
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

__all__ = [
    "FLAGS",
    "MAX_SIDE",
    "Rows",
    "as_boxes",
    "as_sizes",
    "describe_row",
    "field_column",
    "numbered",
    "usable_boxes",
]

MAX_SIDE = 2**31 - 1  # image sizes are stored as int32
FLAGS = frozenset({0, 1, None})  # 0.0, 1.0, False and True are equal to 0 and 1

_INT64 = np.iinfo(np.int64)
_EXACT_BELOW = 2**53  # a float of this size may be a rounded integer

Value = TypeVar("Value")
_Number = TypeVar("_Number", bound=np.generic)


class _FieldError(Exception):
    """A value does not fit its field. The message completes a sentence that starts with the key."""


def describe_row(section: str, index: int, source: str | None = None, row_id: object = None) -> str:
    """Name a row for a message.

    >>> describe_row("annotations", 3, "train.json", 17)
    "annotations[3] (id 17) in 'train.json'"
    """
    name = f"{section}[{index}]"
    if row_id is not None:
        name += f" (id {shortened(row_id, 40)})"
    return name if source is None else f"{name} in {source!r}"


class Rows:
    """The rows of one list, such as ``annotations``, read column by column.

    Args:
        rows: The objects of the list.
        section: The name of the list, for messages.
        source: The path of the file; None for a list passed as an argument.
        valid_text: Whether the whole file was valid text. If not, U+FFFD stands for what was not.
        start: Index of the first row in the list, for messages.

    Raises:
        AnnotationError: If a row is not an object.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        section: str,
        source: str | None,
        *,
        valid_text: bool = True,
        start: int = 0,
    ) -> None:
        self.rows, self.section, self.source = rows, section, source
        self._valid_text = valid_text
        self._start = start
        if not all(issubclass(kind, Mapping) for kind in set(map(type, rows))):
            index = next(i for i, row in enumerate(rows) if not isinstance(row, Mapping))
            raise AnnotationError(
                f"{describe_row(section, start + index, source)} must be an object with named fields, "
                f"got {shortened(rows[index])}."
            )

    def error(self, index: int, problem: str, *, with_id: bool = True) -> AnnotationError:
        """Build an error about one row."""
        row_id = self.rows[index].get("id") if with_id else None
        return AnnotationError(
            f"{describe_row(self.section, self._start + index, self.source, row_id)}: {problem}"
        )

    def integers(self, key: str) -> npt.NDArray[np.int64]:
        """Return a column of integers, ``[N]``."""
        values = self._values(key)
        if set(map(type, values)) <= {int}:
            with contextlib.suppress(OverflowError):  # the row is found below
                return np.array(values, np.int64)
        return np.array(self._convert(key, values, _integer), np.int64)

    def numbered_ids(self) -> tuple[npt.NDArray[np.int64], bool]:
        """Return the column "id", as :func:`numbered` does."""
        values = self._values("id")
        if set(map(type, values)) <= {int, type(None)}:
            with contextlib.suppress(OverflowError):  # the row is found below
                return numbered(values)
        return numbered(self._convert_optional("id", values, _integer))

    def sides(self, key: str) -> list[int | None]:
        """Return a column of widths or heights; a missing one is None, 0 or -1."""
        values = self._values(key)
        if set(map(type, values)) <= {int, type(None)}:
            known = set(values) - {None}
            if not known or (min(known) >= -1 and max(known) <= MAX_SIDE):
                return values
        return self._convert_optional(key, values, _side)

    def numbers(self, key: str) -> npt.NDArray[np.float64]:
        """Return a column of finite numbers, ``[N]``."""
        values = self._values(key)
        if set(map(type, values)) <= {int, float}:
            with contextlib.suppress(OverflowError):  # the row is found below
                numbers = np.array(values, np.float64)
                if np.isfinite(numbers).all():
                    return numbers
        return np.array(self._convert(key, values, _finite), np.float64)

    def optional_numbers(self, key: str) -> npt.NDArray[np.float64]:
        """Return a column of finite numbers, ``[N]``, with NaN for those that are missing."""
        values = self._values(key)
        if set(map(type, values)) <= {int, float, type(None)}:
            with contextlib.suppress(OverflowError):  # the row is found below
                numbers = np.array(values, np.float64)
                if not np.isinf(numbers).any():
                    return numbers
        return np.array(self._convert_optional(key, values, _finite), np.float64)

    def flags(self, key: str) -> list[Any]:
        """Return a column of 0 and 1, or values equal to them, and None for missing ones."""
        values = self._values(key)
        if set(map(type, values)) <= {int, float, bool, type(None)} and set(values) <= FLAGS:
            return values
        return self._convert_optional(key, values, _flag)

    def texts(self, key: str, *, integers: bool = False) -> list[str | None]:
        """Return a column of strings in which some may be missing.

        Args:
            key: The name of the field.
            integers: Whether an integer is accepted, and written as text.
        """
        values = self._values(key)
        if not set(map(type, values)) <= {str, type(None)}:
            values = self._convert_optional(key, values, _text_or_integer if integers else _text)
        if not self._valid_text:
            for index, value in enumerate(values):
                if value is not None and "\ufffd" in value:
                    problem = f"{key} is not valid UTF-8: {value!r}. Save the file as UTF-8."
                    raise self.error(index, problem)
        return values

    def boxes(self) -> npt.NDArray[np.float64]:
        """Return the boxes, ``[N, 4]``, as x, y, width, height."""
        values = self._values("bbox")
        if (
            set(map(type, values)) <= {list, tuple}
            and set(map(len, values)) <= {4}
            and set(map(type, itertools.chain.from_iterable(values))) <= {int, float}
        ):
            with contextlib.suppress(OverflowError):  # the row is found below
                return as_boxes(values, len(values))
        return as_boxes(self._convert("bbox", values, _box), len(values))

    def _values(self, key: str) -> list[Any]:
        return [row.get(key) for row in self.rows]

    def _convert(
        self, key: str, values: Sequence[Any], convert: Callable[[Any], Value]
    ) -> list[Value]:
        """Convert values one by one, which is slow but knows the row of a wrong one."""
        return [
            self._convert_one(key, index, value, convert)
            for index, value in enumerate(map(_plain, values))
        ]

    def _convert_optional(
        self, key: str, values: Sequence[Any], convert: Callable[[Any], Value]
    ) -> list[Value | None]:
        """Convert values one by one; null, or NaN as pandas writes it, gives None."""
        return [
            None if _is_missing(value) else self._convert_one(key, index, value, convert)
            for index, value in enumerate(map(_plain, values))
        ]

    def _convert_one(
        self, key: str, index: int, value: object, convert: Callable[[Any], Value]
    ) -> Value:
        if value is None:
            problem = f"{key} is missing."
        else:
            try:
                return convert(value)
            except _FieldError as fault:
                problem = f"{key} {fault}, got {shortened(value)}."
        raise self.error(index, problem, with_id=key != "id")


def numbered(ids: list[int | None]) -> tuple[npt.NDArray[np.int64], bool]:
    """Return ids, with the lowest unused numbers for missing ones, and whether none is missing.

    >>> numbered([None, 1, 7, None])
    (array([2, 1, 7, 3]), False)
    """
    if None not in ids:
        return np.array(ids, np.int64), True
    used = set(ids)
    unused = (number for number in itertools.count(1) if number not in used)
    return np.array([next(unused) if one is None else one for one in ids], np.int64), False


def field_column(rows: Sequence[Any], name: str, dtype: type[_Number]) -> npt.NDArray[_Number]:
    """Return a numeric attribute of each row, ``[N]``; None becomes NaN where that exists."""
    return np.fromiter(map(attrgetter(name), rows), dtype, len(rows))


def as_boxes(boxes: Iterable[Sequence[float]], number: int) -> npt.NDArray[np.float64]:
    """Return N boxes, each a list or tuple of four numbers, as an array ``[N, 4]``."""
    values = itertools.chain.from_iterable(boxes)
    return np.fromiter(values, np.float64, 4 * number).reshape(-1, 4)


def usable_boxes(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which boxes (x, y, width, height) are finite and have no negative size, ``[N]``."""
    usable: npt.NDArray[np.bool_] = np.logical_and(
        np.isfinite(boxes).all(axis=1), (boxes[:, 2:] >= 0).all(axis=1)
    )
    return usable


def as_sizes(heights: Sequence[int | None], widths: Sequence[int | None]) -> npt.NDArray[np.int32]:
    """Return image sizes ``(height, width)`` as an array ``[N, 2]``, with 0 for unknown sides."""
    sides = [side or 0 for size in zip(heights, widths, strict=True) for side in size]
    sizes: npt.NDArray[np.int32] = np.array(sides, np.int64).clip(min=0).astype(np.int32)
    return sizes.reshape(-1, 2)


def _plain(value: Any) -> Any:
    """Return what an array or a scalar of NumPy or torch stands for."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _integer(value: object) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_BELOW:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _FieldError("must be an integer")
    if not _INT64.min <= value <= _INT64.max:
        raise _FieldError("must fit into 64 bits")
    return value


def _side(value: object) -> int:
    try:
        side = _integer(value)
    except _FieldError:
        side = -2
    if not -1 <= side <= MAX_SIDE:
        raise _FieldError("must be a whole number of pixels, or 0 if it is unknown")
    return side


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _FieldError("must be a number")
    try:
        return float(value)
    except OverflowError:
        raise _FieldError("must fit into 64 bits") from None


def _finite(value: object) -> float:
    try:
        number = _number(value)
    except _FieldError:
        number = math.nan
    if not math.isfinite(number):
        raise _FieldError("must be a finite number")
    return number


def _flag(value: object) -> int:
    if not isinstance(value, int | float) or value not in FLAGS:
        raise _FieldError("must be 0 or 1")
    return int(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _FieldError("must be a string")
    return value


def _text_or_integer(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(_integer(value))
    return _text(value)


def _box(value: object) -> list[float]:
    if isinstance(value, list | tuple) and len(value) == 4:
        with contextlib.suppress(_FieldError):
            return [_number(_plain(number)) for number in value]
    raise _FieldError("must be four numbers (x, y, width, height)")
