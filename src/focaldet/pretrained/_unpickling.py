"""Arrays out of a pickle, of which nothing is ever run.

Detectron2 publishes pickles of NumPy arrays. A pickle is a program that may call whatever it can
import; here it can import nothing. The few names by which NumPy's arrays are pickled stand for
records that only keep what they are told, and every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["RefusedError", "unpickle_arrays"]

_DTYPES: dict[str, torch.dtype] = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
}
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before NumPy 2, and since
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


class RefusedError(Exception):
    """A pickle asks for something to be imported. The message is its name."""


def unpickle_arrays(data: bytes) -> Any:
    """Read a pickle made of dictionaries, lists, numbers, strings and NumPy arrays.

    Args:
        data: the whole pickle, of any protocol, by Python 2 or 3.

    Returns:
        What it holds, with tensors for the arrays.

    Raises:
        RefusedError: it asks for anything else.
        pickle.UnpicklingError: it is damaged.
    """
    try:
        return _with_tensors(_Unpickler(data).load())
    except _BROKEN as error:
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


_BROKEN = (
    *(AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError),
    *(RecursionError, TypeError, ValueError),  # of which UnicodeDecodeError is one
)


class _Unpickler(pickle.Unpickler):
    """Gives records for the names of NumPy's arrays, made anew so that no pickle changes them."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._known = _records()

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None


class _Array:
    """What a pickle says of an array."""

    parts: tuple[Any, ...] = ()

    def to_tensor(self) -> Tensor:
        """Return the array.

        Raises:
            pickle.UnpicklingError: it is not one of numbers, or not as long as its shape says.
        """
        try:
            shape, dtype, fortran, data = self.parts
            code, order = dtype.code, dtype.order
            data = data.encode("latin1") if isinstance(data, str) else data
            count = math.prod(shape)
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(f"an array that is not one of numbers: {error}") from error
        if code not in _DTYPES or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array of the dtype {code!r}, which is not a number's")
        size = int(code[1:])
        if min(shape, default=0) < 0 or len(data) != count * size:
            got = f"an array of shape {tuple(shape)} and dtype {code!r} in {len(data)} bytes"
            raise pickle.UnpicklingError(got)
        if not count:
            return torch.empty(shape, dtype=_DTYPES[code])
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, size)
        if order == ">":
            raw = raw.flip(1)
        values = raw.contiguous().view(_DTYPES[code]).view(-1)
        if fortran:
            return (
                values.view(tuple(reversed(shape)))
                .permute(*reversed(range(len(shape))))
                .contiguous()
            )
        return values.view(tuple(shape))


def _records() -> dict[tuple[str, str], Any]:
    class Array(_Array):
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _version, *parts = state
            self.parts = tuple(parts)

    class DType:
        def __init__(self, code: Any = "", *_: Any) -> None:
            text = code.decode("latin1") if isinstance(code, bytes) else str(code)
            self.code = text.lstrip("<>=|")
            self.order = text[:1]

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            order = state[1]
            self.order = order.decode("latin1") if isinstance(order, bytes) else order

    def reconstruct(*_: Any) -> Array:
        return Array()

    def from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> Array:
        array = Array()
        array.parts = (shape, dtype, order == "F", buffer)
        return array

    def scalar(dtype: Any, data: Any) -> Array:
        array = Array()
        array.parts = ((), dtype, False, data)
        return array

    def encode(text: str, encoding: str = "latin1") -> bytes:  # how protocol 2 writes bytes
        if encoding not in ("latin1", "latin-1"):
            raise RefusedError(f"_codecs.encode to {encoding!r}")
        return text.encode("latin1")

    def no_bytes() -> bytes:  # how it writes none
        return b""

    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): no_bytes,
        ("collections", "OrderedDict"): dict,
    }
    known |= {(module, "_reconstruct"): reconstruct for module in _ARRAY_MODULES}
    known |= {(module, "scalar"): scalar for module in _ARRAY_MODULES}
    known |= {(module, "_frombuffer"): from_buffer for module in _NUMERIC_MODULES}
    return known


def _with_tensors(content: Any) -> Any:
    """Replace the arrays in a dictionary, and in those within it."""
    if isinstance(content, _Array):
        return content.to_tensor()
    if isinstance(content, dict):
        return {key: _with_tensors(value) for key, value in content.items()}
    return content
