"""CUDA graphs without a GPU: operations on the CPU are recorded and repeated on the same memory.

As on a GPU, a repetition runs no Python, reads its inputs from the tensors that were used in the
recording, writes its results to those of the recording, and cannot contain an operation whose value or
shape the host must know.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focaldet._cuda_graphs import CudaCapture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

__all__ = ["CpuCapture", "RecordedGraph", "recorded_graphs"]

_NOT_PERMITTED = ("_local_scalar_dense", "nonzero", "nms", "item", "_unique2", "masked_select")


class CpuCapture(CudaCapture):
    """Captures functions of tensors on the CPU, within :func:`recorded_graphs`."""

    @staticmethod
    def applies(inputs: Sequence[Tensor]) -> bool:
        on_cpu = all(one.device.type == "cpu" for one in inputs)
        return on_cpu and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class RecordedGraph:
    """Imitates ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, recorded in self.operations:
            result = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _NOT_PERMITTED:
            raise RuntimeError(
                f"CUDA error: {name} is not permitted when stream is capturing.\n..."
            )
        result = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, result))
        return result


class Log(NamedTuple):
    """What happened within :func:`recorded_graphs`.

    Attributes:
        graphs: Graphs whose capture began, in order.
        pools: The memory pool of each.
        events: Calls that order the work of streams.
    """

    graphs: list[RecordedGraph]
    pools: list[object]
    events: list[str]


class _Stream:
    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: _Stream) -> None:
        self.log.events.append(f"{self.name} waits for {other.name}")

    def wait_event(self, _: object) -> None:
        self.log.events.append(f"{self.name} waits for the last call")


class _Event:
    def __init__(self, log: Log) -> None:
        self.log = log

    def record(self, stream: _Stream) -> None:
        self.log.events.append(f"{stream.name} finished a call")

    def synchronize(self) -> None:
        self.log.events.append("the host waits")


def _note(log: Log, event: str, *_: object) -> None:
    log.events.append(event)


@contextlib.contextmanager
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """Replace the parts of ``torch.cuda`` that capture and replay graphs."""
    log = Log([], [], [])
    local = threading.local()
    main, side = _Stream(log, "main"), _Stream(log, "side")

    @contextlib.contextmanager
    def stream(chosen: _Stream) -> Iterator[None]:
        before, local.stream = getattr(local, "stream", main), chosen
        try:
            yield
        finally:
            local.stream = before

    @contextlib.contextmanager
    def graph(graph: RecordedGraph, *, pool: object, stream: _Stream, **_: Any) -> Iterator[None]:
        log.graphs.append(graph)
        log.pools.append(pool)
        local.stream = stream
        with _Recorder(graph):
            yield
        local.stream = main  # not after an error, as in torch.cuda.graph

    with monkeypatch.context() as patch:
        for name, value in {
            "graph_pool_handle": object,
            "Stream": lambda _: side,
            "Event": lambda: _Event(log),
            "device": contextlib.nullcontext,
            "current_stream": lambda: getattr(local, "stream", main),
            "stream": stream,
            "CUDAGraph": RecordedGraph,
            "graph": graph,
        }.items():
            patch.setattr(torch.cuda, name, value)
        for name, event in {
            "_cuda_endAllocateToPool": "the pool is closed",
            "_cuda_releasePool": "the pool is released",
        }.items():
            note = functools.partial(_note, log, event)
            patch.setattr(torch._C, name, note, raising=False)
        yield log
