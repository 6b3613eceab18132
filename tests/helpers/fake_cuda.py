"""CUDA tensors without a GPU, and counts of what the GPU would wait for.

``FakeTensorMode`` runs operations on shapes, dtypes and devices only, so it needs no GPU and no memory.
:func:`fake_cuda` adds counters to it::

    with fake_cuda() as counts:
        with torch.device("cuda:0"):
            model = RetinaNet.from_config(config)
        counts.clear()
        model(images, targets, validate=False)
    assert counts.num_waits == 0, counts.report()

Modules must be built under ``torch.device("cuda:0")`` inside the context, because a module cannot be moved
there, and there is no backward pass.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Counts", "WouldWaitError", "fake_cuda"]

_PACKAGES = ("/focaldet/", "/torchvision/", "/pytorch_lightning/", "/lightning_fabric/")
_ALLOCATION = 512  # bytes; CUDA's allocator rounds up to multiples of this


class WouldWaitError(RuntimeError):
    """An operation for which a GPU would wait, in strict mode."""


@dataclass
class Counts:
    """What a GPU would have waited for and copied, and the memory it would have used.

    Attributes:
        waits: Number of waits by (operation, file and line): the host reads a value or a
            shape that depends on values.
        uploads: Number of copies from host to device by (kind, file and line). The kind is "pinned",
            "pageable" (non-blocking, from ordinary memory) or "blocking", which waits as well.
        downloads: Number of non-blocking copies from device to host by (shape, file and line). They do
            not wait; reading them without an event is an error.
        live: Bytes of all CUDA tensors that exist.
        peak: Maximum of ``live`` since the last :meth:`clear`.
        peak_place: File and line where it was reached.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    uploads: Counter[tuple[str, str]] = field(default_factory=Counter)
    downloads: Counter[tuple[str, str]] = field(default_factory=Counter)
    live: int = 0
    peak: int = 0
    peak_place: str = ""

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    @property
    def num_uploads(self) -> int:
        return sum(self.uploads.values())

    @property
    def num_blocking_uploads(self) -> int:
        return sum(count for (kind, _), count in self.uploads.items() if kind == "blocking")

    def clear(self) -> None:
        """Start counting from 0, and the peak from the bytes that are live now."""
        for counter in (self.waits, self.uploads, self.downloads):
            counter.clear()
        self.peak, self.peak_place = self.live, ""

    def report(self) -> str:
        """Return a table of everything counted, for messages and benchmarks."""
        lines = [
            f"{self.num_waits} waits, {self.num_uploads} uploads, peak {self.peak / 2**20:.1f} MiB"
        ]
        for name in ("waits", "uploads", "downloads"):
            for (kind, place), count in getattr(self, name).most_common():
                lines.append(f"  {name} {count:4d} {kind:24s} {place}")
        return "\n".join(lines)

    def _add(self, tensor: Tensor, seen: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in seen:
            return
        size = -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
        seen.add(key)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_place = self.live, _place()
        weakref.finalize(storage, self._drop, key, size, seen)

    def _drop(self, key: int, size: int, seen: set[int]) -> None:
        seen.discard(key)
        self.live -= size


@contextlib.contextmanager
def fake_cuda(*, strict: bool = False, rows: int = 60) -> Iterator[Counts]:
    """Run code with fake CUDA tensors on ``cuda:0`` and count what a GPU would wait for.

    Args:
        strict: Whether to raise at the first operation for which a GPU would wait:
            :class:`WouldWaitError`, or the error of ``FakeTensorMode`` (which also has no values on the
            CPU). Otherwise, the operation is counted and the code continues with zeros, False, or
            ``rows`` rows.
        rows: Number of rows that an operation returns if it depends on values. An input of at most as
            many elements is taken for rows that were chosen before, and gives a fifth of them, as if
            they were spread over five levels.
    """
    counts = Counts()
    with (
        FakeTensorMode(),
        _Counting(counts, strict=strict, rows=rows),
        contextlib.ExitStack() as stack,
    ):
        if not strict:
            stack.enter_context(_one_wait_per_list(counts))
        yield counts


class _Counting(TorchDispatchMode):
    """Intercept operations on top of ``FakeTensorMode``."""

    def __init__(self, counts: Counts, *, strict: bool, rows: int) -> None:
        super().__init__()
        self.counts, self.strict, self.rows = counts, strict, rows
        self.seen: set[int] = set()
        self.pinned: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "prim":
            return func(*args, **kwargs)
        if name in ("is_pinned", "_pin_memory"):
            return self._pin(name, args[0])
        on_cuda = any(t.device.type == "cuda" for t in _tensors([args, list(kwargs.values())]))
        if on_cuda:
            self._count(name, args, kwargs)
        elif name == "_to_copy":
            self._count_copy(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if self.strict:
                raise
            if on_cuda:
                self._wait(name)
            result = _assumed(name, args, self.rows)
        for tensor in _tensors(result):
            if tensor.device.type == "cuda":
                self.counts._add(tensor, self.seen)
        return result

    def _pin(self, name: str, tensor: Tensor) -> Tensor | bool:
        """Imitate pinned memory, which needs a GPU."""
        if name == "is_pinned":
            return self._is_pinned(tensor)
        result = tensor.clone()
        self.pinned.add(result.untyped_storage())
        return result

    def _count(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if hidden := _hidden_wait(name, args):
            self._wait(hidden)
        if name in ("_to_copy", "copy_"):
            self._count_copy(name, args, kwargs)

    def _wait(self, kind: str) -> None:
        place = _place()
        if self.strict:
            raise WouldWaitError(f"A GPU would wait here: {kind} at {place}.")
        self.counts.waits[kind, place] += 1

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self.pinned

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        devices = source.device.type, torch.device(target).type
        if devices == ("cpu", "cuda"):
            kind = "blocking" if waits else "pinned" if self._is_pinned(source) else "pageable"
            self.counts.uploads[kind, _place()] += 1
            if self.strict and waits:
                raise WouldWaitError(f"A GPU would wait here: upload at {_place()}.")
        elif devices == ("cuda", "cpu"):
            if waits:
                self._wait("copy to host")
            else:
                self.counts.downloads[str(tuple(source.shape)), _place()] += 1


def _hidden_wait(name: str, args: Any) -> str | None:
    """Name an operation that waits on a GPU although ``FakeTensorMode`` accepts it."""
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        one_number = len(args[1]) == 1 and args[2].ndim == 0 and args[2].device.type == "cpu"
        if masks and not one_number:  # one number becomes masked_fill
            return "index_put by a mask"
    if name == "where" and any(t.device.type == "cpu" for t in _tensors(args)):
        return "upload of a number by where"
    if name in ("index", "index_select", "gather") and any(
        t.device.type == "cpu" for t in _tensors(args[1:])
    ):
        return "upload of an index"
    return None


def _assumed(name: str, args: Any, rows: int) -> Any:
    """Return a result of an operation that depends on values."""
    first = args[0]
    count = _assumed_rows(first.numel(), rows)
    indices = torch.empty(count, dtype=torch.int64, device=first.device)
    if name in ("_local_scalar_dense", "equal"):
        return False if name == "equal" else _zero(first.dtype)
    results: dict[str, Callable[[], Any]] = {
        "nonzero": lambda: indices[:, None].expand(-1, first.ndim).clone(),
        "repeat_interleave": lambda: indices,
        "nms": lambda: indices,
        "masked_select": first.flatten()[:count].clone,
        "index": lambda: _assumed_index(first, args[1], rows),
    }
    for unique in ("_unique2", "unique_consecutive", "unique_dim"):
        results[unique] = lambda: (first.flatten()[:count].clone(), first.long(), indices)
    if name not in results:
        raise ValueError(f"fake_cuda does not know what {name} returns; add it to _assumed.")
    return results[name]()


def _assumed_index(first: Tensor, indices: Any, rows: int) -> Tensor:
    at = next(i for i, index in enumerate(indices) if index is not None)
    mask = indices[at]
    count = _assumed_rows(mask.numel(), rows)
    shape = [*first.shape[:at], count, *first.shape[at + mask.ndim :]]
    return torch.empty(shape, dtype=first.dtype, device=first.device)


def _zero(dtype: torch.dtype) -> float | bool:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _assumed_rows(elements: int, rows: int) -> int:
    return rows if elements > rows else min(elements, max(1, elements // 5))


@contextlib.contextmanager
def _one_wait_per_list(counts: Counts) -> Iterator[None]:
    """Count ``tolist`` as one wait. ``FakeTensor.tolist`` reads the values one by one."""
    original: Callable[[FakeTensor], Any] = FakeTensor.tolist

    def tolist(self: FakeTensor) -> Any:
        if self.device.type != "cuda":
            return original(self)
        counts.waits["tolist", _place()] += 1
        values: Any = _zero(self.dtype)
        for size in reversed(self.shape):
            values = [values] * size
        return values

    FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FakeTensor.tolist = original  # type: ignore[method-assign]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _place() -> str:
    """Return file and line of the innermost frame in focaldet, or else in another known package.

    In the latter case the caller in focaldet follows, if there is one.
    """
    frame = sys._getframe(1)
    other = ""
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if any(package in name for package in _PACKAGES) and "/tests/" not in name:
            place = f"{name.split('/src/')[-1].split('site-packages/')[-1]}:{frame.f_lineno}"
            if "/focaldet/" in name:
                return f"{other} from {place}" if other else place
            other = other or place
        frame = frame.f_back  # type: ignore[assignment]
    return other or "?"
