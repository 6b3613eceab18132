"""CUDA graphs: launch all operations of a function at once, for shapes that were seen before.

A graph repeats the operations that were recorded, on the same memory. So its inputs are copied to fixed
tensors, its results are copied from fixed tensors, and whatever else the function depends on must be part
of the key that the graph is stored under.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from focaldet._tf32 import convolutions_use_tf32

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

__all__ = ["Capture", "CudaCapture", "Graph", "GraphCache", "Outputs"]

_logger = logging.getLogger(__name__)

Outputs: TypeAlias = tuple[Tensor | None, ...]

_MAX_GRAPHS = 8  # those of the network and of the detection for four shapes
_EAGER_CALLS = 1  # before a graph is captured: many shapes come only once
_STALE_CALLS = 1000  # after which an unused graph makes room for that of a different shape
_RETRY_CALLS = 1000  # after which a capture that failed is tried again
_MAX_ENTRIES = 64  # shapes whose calls are counted
_WARM_UP_CALLS = 2  # so that libraries allocate and choose algorithms before the capture


class Graph(Protocol):
    """A captured function."""

    def __call__(self, inputs: Sequence[Tensor]) -> Outputs:
        """Return the results for other inputs of the same shapes, in memory of their own."""

    def wait(self) -> None:
        """Wait until the device has finished all calls, so that the memory can be freed."""


class Capture(Protocol):
    """Captures functions on a device. The graphs may share memory."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def applies(inputs: Sequence[Tensor]) -> bool:
        """Return whether a function of these inputs can be run as a graph now."""

    def __call__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Graph:
        """Capture a function whose operations depend only on the shapes of the inputs.

        Raises:
            RuntimeError: If the capture failed.
        """


@dataclass
class _Entry:
    """What is known of a function and the shapes of its inputs."""

    eager_calls: int = _EAGER_CALLS  # that remain before a graph is captured
    graph: Graph | None = None
    last_call: int = 0
    is_logged: bool = False


class GraphCache:
    """Run functions as graphs where possible, and directly otherwise.

    A graph is captured at the second call with the same key and shapes. Once there are as many graphs as
    the cache keeps, a graph is only replaced when it has not been used for many calls, because a capture
    takes as long as hundreds of calls. A capture that fails is logged once, and tried again much later.

    Several threads may use the cache. Copies and pickles of it are empty.

    Args:
        kind: The class that captures graphs. There is one instance per device, and a new one after
            :meth:`clear` and after a capture that failed. None uses :class:`CudaCapture`.
    """

    def __init__(self, kind: type[Capture] | None = None) -> None:
        self._kind: type[Capture] = CudaCapture if kind is None else kind
        self._captures: dict[torch.device, Capture] = {}
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._state: Hashable = None
        self._calls = 0
        self._lock = threading.Lock()

    def __call__(
        self,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        *,
        key: tuple[Hashable, ...],
        find_state: Callable[[], Hashable] | None = None,
    ) -> Outputs:
        """Return ``function(*inputs)``.

        Args:
            function: Its operations must be determined by the key, the state and the shapes of the
                inputs, and it must read no other tensors than the inputs and those of the state.
            inputs: Copied at each call that runs a graph.
            key: The name of the function, for messages, and everything that changes its operations.
            find_state: Returns what identifies the other tensors that the function reads, or None if the
                function cannot run as a graph. All graphs are dropped if it changes.
        """
        if not self._kind.applies(inputs):
            return function(*inputs)
        state = None if find_state is None else find_state()
        if find_state is not None and state is None:
            return function(*inputs)
        shapes = tuple((one.shape, one.dtype, one.device) for one in inputs)
        with self._lock:
            if state is not None and state != self._state:
                self._drop_all()
                self._state = state
            graph = self._graph((key, shapes, _settings()), function, inputs)
            if graph is not None:
                return graph(inputs)
        return function(*inputs)

    def clear(self) -> None:
        """Drop all graphs, and free their memory."""
        with self._lock:
            self._drop_all()

    def _drop_all(self) -> None:
        for entry in self._entries.values():
            if entry.graph is not None:
                entry.graph.wait()
        self._entries.clear()
        self._captures.clear()

    def _graph(
        self,
        key: tuple[tuple[Hashable, ...], Hashable, Hashable],
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
    ) -> Graph | None:
        """Return the graph for a key, captured if it is time to, or None to run the function."""
        self._calls += 1
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        if entry.graph is None:
            entry.eager_calls -= 1
            if entry.eager_calls < 0 and self._make_room():
                self._try_capture(entry, str(key[0][0]), function, inputs)
            self._forget_old()
        entry.last_call = self._calls
        return entry.graph

    def _make_room(self) -> bool:
        """Return whether there is room for a graph, after dropping one that is no longer used."""
        captured = [entry for entry in self._entries.values() if entry.graph is not None]
        if len(captured) < _MAX_GRAPHS:
            return True
        oldest = min(captured, key=lambda entry: entry.last_call)
        if self._calls - oldest.last_call <= _STALE_CALLS:
            return False
        if oldest.graph is not None:
            oldest.graph.wait()
        oldest.graph, oldest.eager_calls = None, _EAGER_CALLS
        return True

    def _try_capture(
        self,
        entry: _Entry,
        name: str,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
    ) -> None:
        device = inputs[0].device
        try:
            if device not in self._captures:
                self._captures[device] = self._kind(device)
            entry.graph = self._captures[device](function, inputs)
        except RuntimeError as error:  # running out of memory is one, too
            self._captures.pop(device, None)  # its memory may be in an undefined state
            entry.eager_calls = _RETRY_CALLS
            if not entry.is_logged:
                entry.is_logged = True
                _logger.warning(
                    "No CUDA graph of %s for an input of shape %s: %s It runs without one, and the "
                    "capture is tried again after %d calls.",
                    *(name, list(inputs[0].shape), _sentence(error), _RETRY_CALLS),
                )

    def _forget_old(self) -> None:
        """Forget the shapes without graphs that were used least recently, beyond a limit."""
        unused = [key for key, entry in self._entries.items() if entry.graph is None]
        for key in unused[: max(0, len(self._entries) - _MAX_ENTRIES)]:
            del self._entries[key]

    def __reduce__(self) -> tuple[type[GraphCache], tuple[type[Capture]]]:
        return GraphCache, (self._kind,)


def _settings() -> Hashable:
    """Return the settings of PyTorch that determine which operations are recorded."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return (
        convolutions_use_tf32(),
        getattr(matmul, "fp32_precision", None) or matmul.allow_tf32,  # the latter before torch 2.9
        cudnn.enabled,
        cudnn.deterministic,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def _sentence(error: RuntimeError) -> str:
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{first or type(error).__name__}."


# One capture at a time, as torch.cuda.graph requires.
_capturing = threading.Lock()


class CudaCapture:
    """Captures CUDA graphs that share their working memory, because they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        # torch does not annotate all of these.
        make_pool: Any = torch.cuda.graph_pool_handle
        make_stream: Any = torch.cuda.Stream
        make_event: Any = torch.cuda.Event
        self._device = device
        self._pool: Any = make_pool()
        self._stream = make_stream(device)
        self._finished = make_event()

    @staticmethod
    def applies(inputs: Sequence[Tensor]) -> bool:
        """Return whether a function of these inputs can be run as a graph now."""
        return (
            # Not a subclass, which may do other things than compute.
            all(one.device.type == "cuda" and type(one) is Tensor for one in inputs)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Graph:
        """Capture a function; see :class:`Capture`."""
        with (
            _capturing,
            torch.cuda.device(self._device),
            torch.inference_mode(mode=False),  # or else the buffers could only be changed in it
            torch.no_grad(),
        ):
            buffers = [torch.empty_like(one) for one in inputs]
            torch._foreach_copy_(buffers, list(inputs))
            self._warm_up(function, buffers)
            graph = torch.cuda.CUDAGraph()
            outputs = self._record(graph, function, buffers)
        return _CudaGraph(graph, buffers, outputs, self._finished)

    def _warm_up(self, function: Callable[..., Outputs], buffers: Sequence[Tensor]) -> None:
        """Call the function on the stream of the capture."""
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP_CALLS):
                    function(*buffers)
        finally:
            caller.wait_stream(self._stream)

    def _record(
        self,
        graph: torch.cuda.CUDAGraph,
        function: Callable[..., Outputs],
        buffers: Sequence[Tensor],
    ) -> Outputs:
        recording = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # other threads may allocate memory meanwhile
        )
        try:
            # The outer context restores the stream: torch.cuda.graph does not if the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                return function(*buffers)
        except RuntimeError:
            # torch.cuda.graph omits this if the capture was invalidated, and the allocator would keep
            # the memory and wait for an end. If the capture has ended properly, the first call raises.
            with contextlib.suppress(
                RuntimeError, AttributeError
            ):  # the names depend on the version
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # noqa: SLF001
                torch._C._cuda_releasePool(self._device.index, self._pool)  # noqa: SLF001
            raise


class _CudaGraph:
    """A captured graph with its inputs and outputs."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], outputs: Outputs, finished: Any
    ) -> None:
        self._graph, self._inputs, self._outputs = graph, inputs, outputs
        self._finished = finished  # recorded after each call of all graphs that share memory

    def __call__(self, inputs: Sequence[Tensor]) -> Outputs:
        device = self._inputs[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._finished)  # the previous call may have used a different stream
            with torch.no_grad():
                torch._foreach_copy_(self._inputs, list(inputs))
            self._graph.replay()
            outputs = tuple(None if one is None else one.clone() for one in self._outputs)
            self._finished.record(stream)
        return outputs

    def wait(self) -> None:
        """Wait until the device has finished all calls."""
        self._finished.synchronize()
