"""Copies of small tensors to an accelerator for which the host does not wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Constants", "upload"]


class Constants:
    """Numbers as tensors of a device and dtype.

    A tensor made from Python numbers is copied to the device, for which the host waits. Here that
    happens only once per device and dtype. On a CPU, where nothing is copied, and in compiled graphs,
    tensors are made each time. Copies and pickles are empty.

    >>> Constants()((1.0, 2.0), torch.zeros(3))
    tensor([1., 2.])
    """

    def __init__(self) -> None:
        self._tensors: dict[object, Tensor] = {}

    def __call__(self, values: Sequence[float], like: Tensor) -> Tensor:
        """Return numbers with the device and dtype of a tensor. Do not change the result in place."""
        if like.device.type == "cpu" or torch.compiler.is_compiling():
            return like.new_tensor(values)
        key = (tuple(values), like.dtype, like.device)
        tensor = self._tensors.get(key)
        if tensor is None:
            with torch.inference_mode(mode=False):  # for a later training step
                tensor = torch.tensor(values, dtype=like.dtype, device=like.device)
            self._tensors[key] = tensor
        return tensor

    def __reduce__(self) -> tuple[type[Constants], tuple[()]]:
        return Constants, ()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device. The host does not wait for a GPU, which reads pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
