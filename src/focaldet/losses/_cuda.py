"""The sigmoid focal loss on CUDA devices without the memory of PyTorch operations.

Triton kernels compute reduced losses with class indices. Triton is optional, and is imported only
when a CUDA tensor arrives that its kernels support. Without it, and for soft targets and reduction
"none", the loss is computed piece by piece.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focaldet.losses import _arguments as arguments
from focaldet.losses import _pieces
from focaldet.losses._arguments import KernelOptions
from focaldet.losses._autograd import differentiable
from focaldet.losses._layout import Level, by_plane
from focaldet.losses._reduction import reduce_images

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from focaldet.losses._arguments import Options

    Formula = Callable[[Sequence[Tensor]], Tensor]

MOST_PLANES = 65_535
"""Largest number of images, and of planes of all images: a limit of the axes of CUDA's grids."""
MOST_ENTRIES = 2**31 - 2**16
"""Largest number of entries in a plane: offsets there are int32, and may exceed it by a tile."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_logger = logging.getLogger(__name__)
_probed: dict[torch.device, ModuleType | None] = {}
_reported: set[torch.device] = set()


def applies(
    tensors: Sequence[Tensor],
    targets: Tensor,
    options: Options,
    num_classes: int,
    *,
    device: str = "cuda",
) -> bool:
    """Return whether `reduced_loss` can be used, for which the tensors must be plain.

    Only the logits may be differentiated, and a tensor ``normalizer``.
    """
    return _are_plain(tensors, (targets, options.alpha), device) and suits(
        tensors, targets, options, num_classes
    )


def applies_to_entries(
    logits: Tensor, targets: Tensor, options: Options, *, device: str = "cuda"
) -> bool:
    """Return whether `EntryPieces` can be used, for which the tensors must be plain.

    Only the logits may be differentiated.
    """
    return (
        _are_plain([logits], (targets, options.alpha, options.normalizer), device)
        and logits.numel() > 0
        and logits.dtype in _DTYPES
        and logits.layout == torch.strided
    )


def _are_plain(tensors: Sequence[Tensor], more: Sequence[object], device: str) -> bool:
    others = [value for value in more if isinstance(value, Tensor)]
    return (
        tensors[0].device.type == device
        and arguments.plain(device, *tensors, *others)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in others))
        and torch.autograd.forward_ad._current_level < 0  # noqa: SLF001 (no public equivalent)
    )


def suits(tensors: Sequence[Tensor], targets: Tensor, options: Options, num_classes: int) -> bool:
    """Return whether the modules support this: a reduced loss with class indices."""
    return (
        options.reduction != "none"
        and targets.dtype in (torch.int64, torch.int32)
        and -(2**31) <= options.ignore_index < 2**31
        and sum(x.numel() for x in tensors) > 0
        and all(_suits(x, num_classes) for x in tensors)
    )


def _suits(x: Tensor, num_classes: int) -> bool:
    return (
        x.ndim >= 2
        and num_classes > 0
        and x.dtype in _DTYPES
        and x.layout == torch.strided
        and (x.ndim == 2 or x.shape[:2].numel() // num_classes <= MOST_PLANES)
        and (x.ndim == 2 or x.shape[1:].numel() <= MOST_ENTRIES)
    )


def kernels(device: torch.device) -> ModuleType | None:
    """Return the module of the kernels, or None if they cannot be used on this device now.

    A loss of one entry is computed as a test, because Triton depends on compilers that it calls
    only then. Without them, the loss must still work. A failure that can pass, such as one for want
    of memory, is not remembered.
    """
    if device in _probed:
        return _probed[device]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _report(device, "the first loss there was computed during the capture of a CUDA graph")
        return None
    module = None
    try:
        module = importlib.import_module("focaldet.losses._triton")
    except ImportError:
        _report(device, "Triton is not installed", logging.INFO)
    else:
        try:
            _probe(module, device)
        except Exception as error:  # noqa: BLE001 (compilers and drivers may raise anything)
            _report(device, f"Triton does not work on it: {error}")
            if _may_pass(error):
                return None
            module = None
    _probed[device] = module
    return module


def _probe(module: ModuleType, device: torch.device) -> None:
    x, targets = torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device).long()
    level, options = Level(num_classes=1, images=1, places=1), KernelOptions(None, 2.0, -100)
    module.image_totals([x], [level], [targets], options)


def _may_pass(error: Exception) -> bool:
    """Return whether the device failed, not a compiler: a later attempt may then succeed."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("CUDA error" in message or "[CUDA]" in message)
    )


def _report(device: torch.device, reason: str, level: int = logging.WARNING) -> None:
    """Log once per device why PyTorch operations are used."""
    if device not in _reported:
        _reported.add(device)
        _logger.log(
            level, "The focal loss on %s uses PyTorch operations, because %s.", device, reason
        )


def reduced_loss(
    tensors: Sequence[Tensor],
    levels: Sequence[Level],
    targets: Tensor,
    options: Options,
    formula: Formula,
) -> Tensor:
    """Compute the reduced loss where `applies` is true, without waiting for the device.

    Args:
        tensors: Dense logits per level.
        levels: How each of them is stored.
        targets: Class indices ``[B, R]`` of all levels, in the order of memory or, for several
            planes, in the order of `by_plane`.
        options: Options of the loss.
        formula: Computes the sums of the losses of each image, ``[B]``, with operations that
            autograd can differentiate, from ``tensors``.
    """
    totals: Tensor = _ImageTotals.apply(levels, targets, options, formula, *tensors)
    return reduce_images(totals, targets, options, levels[0].num_classes)


class _ImageTotals(torch.autograd.Function):
    """The sums of the losses of each image, ``[B]``.

    Backward recomputes everything from the logits, so nothing of their size is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        levels: Sequence[Level],
        targets: Tensor,
        options: Options,
        formula: Formula,
        *tensors: Tensor,
    ) -> Tensor:
        """Compute the sums."""
        module = kernels(tensors[0].device) or _pieces
        targets = targets.contiguous()
        planes = _in_planes(levels, targets)
        ctx.save_for_backward(targets, planes, *tensors)
        ctx.module, ctx.levels, ctx.formula = module, levels, formula
        ctx.options = KernelOptions.of(options)
        chosen = _chosen(levels, targets, planes)
        return module.image_totals(tensors, levels, chosen, ctx.options)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient, with the formula if it will be differentiated again."""
        targets, planes, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            gradients = differentiable(ctx.formula, tensors, wanted, upstream)
            return None, None, None, None, *gradients
        upstream = upstream.contiguous()
        chosen = _chosen(ctx.levels, targets, planes)
        return (
            None,
            None,
            None,
            None,
            *(
                ctx.module.gradient(x, level, target, upstream, ctx.options) if want else None
                for x, level, target, want in zip(tensors, ctx.levels, chosen, wanted, strict=True)
            ),
        )


def _in_planes(levels: Sequence[Level], targets: Tensor) -> Tensor | None:
    """Copy the targets of levels with several planes, as int32 ``[planes, positions]``.

    The kernels then read neighbouring targets of a plane together. Other levels are left unset.
    """
    if all(level.planes <= 1 for level in levels):
        return None
    out = torch.empty_like(targets, dtype=torch.int32)
    for level in levels:
        if level.planes > 1:
            part = out[:, level.start : level.start + level.places]
            part.view(level.images, level.planes, level.positions).copy_(by_plane(targets, level))
    return out


def _chosen(levels: Sequence[Level], targets: Tensor, planes: Tensor | None) -> list[Tensor]:
    """Return the tensor of targets that is in the order of each level."""
    return [planes if level.planes > 1 and planes is not None else targets for level in levels]
