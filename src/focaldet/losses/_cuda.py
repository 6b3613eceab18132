"""The sigmoid focal loss on CUDA devices: when the Triton kernels are used, and their autograd.

Triton is optional. It is imported only when a CUDA tensor arrives that its kernels support.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focaldet.losses import _arguments as arguments
from focaldet.losses._formula import sigmoid_focal_entries
from focaldet.losses._reduction import count_positives, divisor

if TYPE_CHECKING:
    from types import ModuleType

    from focaldet.losses._arguments import Options

MOST_ENTRIES = 2**31 - 2**16
"""Largest number of entries: indices are int32, and those of the last program may exceed it."""


def applies(logits: Tensor, targets: Tensor, options: Options, *, device: str = "cuda") -> bool:
    """Return whether to use the Triton kernels: for plain tensors on a device where they work."""
    return (
        logits.device.type == device
        and suits(logits, targets, options)
        and arguments.plain(device, logits, targets)
        and torch.autograd.forward_ad._current_level < 0  # noqa: SLF001 (no public equivalent)
        and kernels(logits.device) is not None
    )


def suits(logits: Tensor, targets: Tensor, options: Options) -> bool:
    """Return whether the kernels support this: a reduced loss of rows with class indices."""
    return (
        options.reduction != "none"
        and not isinstance(options.alpha, Tensor)
        and logits.ndim == 2
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and targets.dtype in (torch.int64, torch.int32)
        and 0 < logits.numel() <= MOST_ENTRIES
        and logits.layout == torch.strided
        and logits.is_contiguous()
        and targets.is_contiguous()
    )


@functools.cache
def kernels(device: torch.device) -> ModuleType | None:
    """Return the module of the kernels, or None if Triton is missing or fails on this device.

    A loss of one entry is computed as a test, because Triton depends on compilers that it calls
    only then. Without them, the loss must still work.
    """
    try:
        module = importlib.import_module("focaldet.losses._triton")
    except ImportError:
        return None
    try:
        x, targets = torch.zeros(1, 1, device=device), torch.zeros(1, device=device).long()
        module.total(x, targets, alpha=None, gamma=2.0, ignore_index=-100)
    except Exception as error:  # noqa: BLE001 (compilers and drivers may raise anything)
        warnings.warn(
            f"Triton is installed but does not work on {device}, so the focal loss uses "
            f"PyTorch operations there. Fix or uninstall Triton to remove this warning: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return module


def rows_loss(logits: Tensor, targets: Tensor, options: Options) -> Tensor:
    """Compute the reduced loss where `applies` is true, without waiting for the device."""
    alpha, gamma, reduction, normalizer, ignore_index = options
    total: Tensor = _RowsTotal.apply(logits, targets, alpha, gamma, ignore_index)
    if normalizer is not None:
        total = total / divisor(normalizer, lambda: count_positives(targets, ignore_index))
    if reduction == "mean":
        count = (targets != ignore_index).sum() * logits.shape[1]
        total = total / count.clamp(min=1)
    return total.view(())


class _RowsTotal(torch.autograd.Function):
    """The sum of the losses, which saves logits and targets only and recomputes in backward."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes arguments by position)
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        alpha: float | None,
        gamma: float,
        ignore_index: int,
    ) -> Tensor:
        """Compute the loss."""
        ctx.save_for_backward(logits, targets)
        ctx.options = {"alpha": alpha, "gamma": gamma, "ignore_index": ignore_index}
        return _loaded(logits).total(logits, targets, **ctx.options)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient, with the formula if it will be differentiated again."""
        logits, targets = ctx.saved_tensors
        if torch.is_grad_enabled():
            total = sigmoid_focal_entries(logits.float(), targets, dim=1, **ctx.options).sum()
            (gradient,) = torch.autograd.grad(total, logits, upstream, create_graph=True)
        else:
            gradient = _loaded(logits).gradient(logits, targets, upstream, **ctx.options)
        return gradient, None, None, None, None


def _loaded(x: Tensor) -> ModuleType:
    module = kernels(x.device)
    assert module is not None  # noqa: S101 (`applies` has checked)
    return module
