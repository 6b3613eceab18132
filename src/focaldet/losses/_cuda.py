"""The sigmoid focal loss on a CUDA device: when Triton's kernels take it, and their autograd.

Triton is optional, and nothing of it is imported before a CUDA tensor comes that it could serve.
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
"""Indices are int32, and the last program may count a little further than there are entries."""


def applies(logits: Tensor, targets: Tensor, options: Options, *, device: str = "cuda") -> bool:
    """Whether the Triton kernels take these: plain tensors of a device on which they work."""
    return (
        logits.device.type == device
        and suits(logits, targets, options)
        and arguments.plain(device, logits, targets)
        and torch.autograd.forward_ad._current_level < 0  # noqa: SLF001 (nothing public tells)
        and kernels(logits.device) is not None
    )


def suits(logits: Tensor, targets: Tensor, options: Options) -> bool:
    """Whether the kernels are written for this: a reduced loss of rows with class indices."""
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
    """The module of the kernels, or None if Triton is missing or does not work on this device.

    One entry is tried, since only then are the compilers called on which Triton depends: a loss
    that worked before must not fail because they are not there.
    """
    try:
        module = importlib.import_module("focaldet.losses._triton")
    except ImportError:
        return None
    try:
        x, targets = torch.zeros(1, 1, device=device), torch.zeros(1, device=device).long()
        module.total(x, targets, alpha=None, gamma=2.0, ignore_index=-100)
    except Exception as error:  # noqa: BLE001 (whatever a compiler or a driver may raise)
        warnings.warn(
            f"Triton is installed but does not work on {device}, so the focal loss there takes "
            f"operations of PyTorch: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return module


def rows_loss(logits: Tensor, targets: Tensor, options: Options) -> Tensor:
    """The reduced loss where `applies`, without waiting for the device."""
    alpha, gamma, reduction, normalizer, ignore_index = options
    total: Tensor = _RowsTotal.apply(logits, targets, alpha, gamma, ignore_index)
    if normalizer is not None:
        total = total / divisor(normalizer, lambda: count_positives(targets, ignore_index))
    if reduction == "mean":
        count = (targets != ignore_index).sum() * logits.shape[1]
        total = total / count.clamp(min=1)
    return total.view(())


class _RowsTotal(torch.autograd.Function):
    """The sum of the losses; only logits and targets are kept, and the gradient is made late."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them by position)
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
        """Compute the gradient, by the formula if it is to be differentiated in turn."""
        logits, targets = ctx.saved_tensors
        if torch.is_grad_enabled():
            total = sigmoid_focal_entries(logits.float(), targets, dim=1, **ctx.options).sum()
            (gradient,) = torch.autograd.grad(total, logits, upstream, create_graph=True)
        else:
            gradient = _loaded(logits).gradient(logits, targets, upstream, **ctx.options)
        return gradient, None, None, None, None


def _loaded(x: Tensor) -> ModuleType:
    module = kernels(x.device)
    assert module is not None  # noqa: S101 (`applies` has asked)
    return module
