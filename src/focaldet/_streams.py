"""Streams of a CUDA device in which one batch is copied or read while the network runs on another.

A CUDA device executes operations later than the host calls them, in order within a stream. Here a second
stream copies images and detects objects while the network runs in the current one. Elsewhere, nothing
has an effect.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

__all__ = ["CudaTransfers", "Transfers"]


class Transfers:
    """Copies nothing, and lets nothing overlap."""

    copies = False
    """Whether images are copied to the model's device, which is better done in bytes."""

    overlaps = False
    """Whether a batch may be launched before the results of the last one are read."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host in memory from which it can be copied without a wait."""
        return tensor

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors on the model's device, for which the current stream waits, but not the host."""
        return list(tensors)

    def mark(self) -> Any:
        """Return a mark of everything that was called until now, or None if nothing overlaps."""
        return None

    def after(self, mark: Any) -> AbstractContextManager[None]:
        """Return a context whose operations wait only for what was called before the mark.

        With None, they wait for everything that was called.
        """
        del mark
        return contextlib.nullcontext()


class CudaTransfers(Transfers):
    """Uses a second stream of a CUDA device.

    Args:
        device: The device, with an index.
        overlaps: Whether a batch may be launched before the results of the last one are read. The
            output of the network must not be in memory that the next batch uses again.
    """

    copies = True

    def __init__(self, device: torch.device, *, overlaps: bool) -> None:
        self.overlaps = overlaps
        self._device = device
        self._side = _side_stream(device)

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if tensor.device.type == "cpu" else tensor

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._side):
            # PyTorch does not use pinned memory again before its copy is complete.
            copies = {
                index: tensor.to(self._device, non_blocking=True)
                for index, tensor in enumerate(tensors)
                if tensor.device.type == "cpu"
            }
        current.wait_stream(self._side)
        for copied in copies.values():
            copied.record_stream(current)  # it belongs to the other stream
        return [copies.get(index, tensor) for index, tensor in enumerate(tensors)]

    def mark(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event() if self.overlaps else None

    @contextlib.contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        if mark is None:
            yield
            return
        self._side.wait_event(mark)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            # Memory that was read here may be freed, and used again by the current stream.
            torch.cuda.current_stream(self._device).wait_stream(self._side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream in each call, because PyTorch keeps memory for each stream."""
    # The host waits for its small operations, which should not queue behind those of a network.
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return stream
