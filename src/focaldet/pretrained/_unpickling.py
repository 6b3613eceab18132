"""Read arrays from a pickle without running anything in it.

Detectron2 publishes pickles of NumPy arrays. A pickle is a program that can call whatever it imports,
so here it can import nothing: the few names that pickled NumPy arrays use are replaced by classes and
functions that only record their arguments, and any other name raises an error.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import shortened
from focaldet.pretrained._budget import check_contents, check_pickle

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["UnsafePickleError", "admitted_names", "unpickle_arrays"]

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
_MAX_DIMENSIONS = 64
_MAX_LENGTH = 2**48
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before NumPy 2, and since
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


class UnsafePickleError(Exception):
    """A pickle asks for something other than NumPy arrays. The message is the name it asks for."""


def unpickle_arrays(data: bytes) -> Any:
    """Read a pickle made of dictionaries, lists, numbers, strings and NumPy arrays.

    Args:
        data: The whole pickle, in any protocol, written by Python 2 or 3.

    Returns:
        Its contents, with tensors in place of the arrays.

    Raises:
        UnsafePickleError: If it asks for anything else.
        pickle.UnpicklingError: If it is damaged, or far more expensive than its length justifies.
    """
    try:
        check_pickle(io.BytesIO(data), len(data), strict=True)
        contents = _Unpickler(data).load()
        check_contents(contents, len(data))
        return _with_tensors(contents, {})
    except _BROKEN as error:
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


_BROKEN = (
    *(AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError),
    *(RecursionError, TypeError, ValueError),  # UnicodeDecodeError is a ValueError
)


class _Unpickler(pickle.Unpickler):
    """Replaces the names of NumPy's arrays by stand-ins.

    Each unpickler has its own, so a pickle that modifies them does not affect the next one.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._known = _stand_ins()

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise UnsafePickleError(f"{module}.{name}") from None


class _Array:
    """An array as a pickle describes it: shape, dtype, whether in Fortran order, and data."""

    parts: tuple[Any, ...] = ()

    def to_tensor(self) -> Tensor:
        """Convert the array.

        Raises:
            pickle.UnpicklingError: If it is not numeric, or its data does not have the length that
                its shape and dtype require.
        """
        try:
            shape, dtype, fortran, data = self.parts
            code, order = dtype.code, dtype.order
            data = data.encode("latin1") if isinstance(data, str) else data
            shape = _checked_shape(shape)
            count = math.prod(shape)
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(f"an array that is not numeric: {error}") from error
        if code not in _DTYPES or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, which is not numeric")
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


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape, if it is one that a tensor can have; a product of huge numbers would take long."""
    lengths: tuple[Any, ...] = tuple(shape)
    if len(lengths) > _MAX_DIMENSIONS:
        raise ValueError(f"it has {len(lengths)} dimensions")
    if not all(type(length) is int and -_MAX_LENGTH < length < _MAX_LENGTH for length in lengths):
        raise ValueError("its shape is not made of lengths")
    return lengths


def _text(value: Any) -> str:
    """Return a text, decoding it first if necessary. The text of a nested list could have any length."""
    text = value.decode("latin1") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise TypeError(f"a {type(text).__name__} in place of a text")
    return text


def _stand_ins() -> dict[tuple[str, str], Any]:
    class Array(_Array):
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _version, *parts = state
            self.parts = tuple(parts)

    class DType:
        def __init__(self, code: Any = "", *_: Any) -> None:
            text = _text(code)
            self.code = text.lstrip("<>=|")
            self.order = text[:1]

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = _text(state[1])

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

    def encode(text: str, encoding: str = "latin1") -> bytes:  # how protocol 2 stores bytes
        if _text(encoding) not in ("latin1", "latin-1"):
            raise UnsafePickleError(f"_codecs.encode to {shortened(encoding)}")
        return _text(text).encode("latin1")

    def no_bytes() -> bytes:  # how protocol 2 stores empty bytes
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


class Inert:
    """Stands for an object that training scripts save, and keeps nothing of it."""

    __slots__ = ()

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _new_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _new_list(*_: Any) -> list[Any]:
    return []


def _inert(*_: Any) -> Inert:
    return Inert()


def admitted_names() -> list[tuple[Any, str]]:
    """Return what torch's reader of tensors may use besides tensors, as (stand-in, full name).

    Training scripts save their arguments, paths, logs and settings next to the weights. Nothing of
    these is imported or run: each name stands for a class or function of this module that does
    nothing. What is a dictionary remains one, so that its entries can be read.
    """
    names = [
        *((Inert, name) for name in _INERT_NAMES),
        *((collections.OrderedDict, name) for name in _DICTIONARY_NAMES),
        (_new_dict, "collections.defaultdict"),
        (_new_list, "collections.deque"),
        (_inert, "builtins.getattr"),  # how the methods of a class are saved
    ]
    for module in _ARRAY_MODULES:
        names += [(_inert, f"{module}._reconstruct"), (_inert, f"{module}.scalar")]
    return [*names, *((_inert, f"{module}._frombuffer") for module in _NUMERIC_MODULES)]


_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_INERT_NAMES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.torch_version.TorchVersion",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
    *(
        f"{package}.callbacks.{name}"
        for package in _LIGHTNING
        for name in (
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
            "model_checkpoint.ModelCheckpoint",
        )
    ),
    *(
        f"omegaconf.{name}"
        for name in (
            "base.ContainerMetadata",
            "base.Metadata",
            "dictconfig.DictConfig",
            "listconfig.ListConfig",
            *(
                f"nodes.{kind}Node"
                for kind in (
                    "Any",
                    "Boolean",
                    "Bytes",
                    "Enum",
                    "Float",
                    "Integer",
                    "Path",
                    "String",
                )
            ),
        )
    ),
)
_DICTIONARY_NAMES = (
    *(f"{package}.utilities.parsing.AttributeDict" for package in _LIGHTNING),
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "fvcore.common.config.CfgNode",
)


def _with_tensors(content: Any, converted: dict[int, Any]) -> Any:
    """Convert the arrays in a dictionary and in the dictionaries within it, each of them once."""
    if not isinstance(content, _Array | dict):
        return content
    if id(content) not in converted:
        converted[id(content)] = (
            content.to_tensor()
            if isinstance(content, _Array)
            else {key: _with_tensors(value, converted) for key, value in content.items()}
        )
    return converted[id(content)]
