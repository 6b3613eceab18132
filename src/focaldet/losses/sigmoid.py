"""The sigmoid focal loss: every class an independent yes or no."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet.losses import _arguments as arguments
from focaldet.losses._autograd import EntryLosses, TotalLoss, TotalLossInPlace
from focaldet.losses._dense import FEW, DenseLoss
from focaldet.losses._formula import alpha_for, sigmoid_focal_entries, soft_focal
from focaldet.losses._cpu import SparseLoss
from focaldet.losses._layout import find_special
from focaldet.losses._reduction import count_positives, divisor, reduce


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.losses._arguments import Normalizer, Reduction


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    ignore_index: int = -100,
    inplace_gradient: bool = False,
) -> Tensor:
    """Focal loss of independent classes (equation 5 of the paper)."""
    arguments.check_options(alpha, gamma, reduction, normalizer)
    arguments.check_one_number(normalizer)
    arguments.check_logits("logits", logits)
    arguments.check_targets(logits, targets)
    arguments.check_alpha_size(alpha, logits.shape[arguments.class_axis(logits)])

    def formula(x: Tensor, count: bool = True) -> Tensor:
        return _composite(x, targets, alpha, gamma, reduction, normalizer, ignore_index)

    if inplace_gradient and logits.requires_grad and torch.is_grad_enabled():
        _check_overwritable(logits, reduction)
    elif inplace_gradient:
        inplace_gradient = False
    if not kernels_apply(logits, targets, alpha, normalizer):
        return formula(logits)
    if logits.ndim == 1:
        return formula(logits)
    kernel = _kernel(logits, targets, alpha, gamma, reduction, normalizer, ignore_index, formula)
    if reduction == "none":
        return EntryLosses.apply(kernel, logits)
    if inplace_gradient:
        return TotalLossInPlace.apply(kernel, logits)
    return TotalLoss.apply(kernel, logits)


def _kernel(
    logits: Tensor,
    targets: Tensor,
    alpha: Tensor | float | None,
    gamma: float,
    reduction: Reduction,
    normalizer: Normalizer,
    ignore_index: int,
    formula: Callable[[Tensor], Tensor],
) -> DenseLoss | SparseLoss:
    """Choose the kernel that suits the targets."""
    special, mask, entries = None, None, logits.numel()
    if not targets.is_floating_point():
        K = logits.shape[1]
        if entries > FEW:
            special = find_special(targets.reshape(-1), K, ignore_index)
            entries -= len(special.ignored) * K
        if special is None or len(special.positive) * 40 > entries:
            special = None
            targets, mask = arguments.set_apart_ignored(targets, K, ignore_index)
            if mask is not None and reduction == "mean":
                entries -= int(mask.sum()) * K

    def positives() -> Tensor:
        if special is None:
            return count_positives(targets)
        return torch.tensor(len(special.positive))

    scale = 1.0
    if normalizer is not None:
        scale /= float(divisor(normalizer, positives))
    if reduction == "mean":
        scale /= max(entries, 1)

    def formula_of_first(tensors: Sequence[Tensor]) -> Tensor:
        return formula(tensors[0])

    if special is not None:
        return SparseLoss([special], alpha, gamma, [scale], formula_of_first)
    return DenseLoss(targets, mask, alpha, gamma, scale, formula_of_first)


def kernels_apply(
    logits: Tensor, targets: Tensor, alpha: Tensor | float | None, normalizer: Normalizer
) -> bool:
    """Whether the CPU kernels can take these: plain tensors, and only the logits differentiated."""
    others = [targets, *(t for t in (alpha, normalizer) if isinstance(t, Tensor))]
    return (
        logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and arguments.plain_cpu(logits, *others)
        and not any(t.requires_grad for t in others)
        and torch.autograd.forward_ad._current_level < 0
    )


def _check_overwritable(logits: Tensor, reduction: str) -> None:
    base = logits._base if logits._base is not None else logits
    if base.is_leaf:
        raise ValueError("`logits` must be")
    if reduction == "none":
        raise ValueError("`reduction`")


def _composite(
    logits: Tensor,
    targets: Tensor,
    alpha: Tensor | float | None,
    gamma: float,
    reduction: Reduction,
    normalizer: Normalizer,
    ignore_index: int,
) -> Tensor:
    dim = arguments.class_axis(logits)
    half = logits.dtype in (torch.float16, torch.bfloat16)
    x = logits.float() if half else logits
    if isinstance(alpha, Tensor):
        alpha = alpha.to(x.dtype).view(-1, *[1] * (logits.ndim - dim - 1))
    count: Tensor | int
    if targets.is_floating_point():
        t = targets.to(x.dtype)
        losses = soft_focal(x, t, gamma)
        if alpha is not None:
            losses = losses * alpha_for(t, alpha)
        count = x.numel()
    else:
        losses = sigmoid_focal_entries(
            x, targets, alpha=alpha, gamma=gamma, ignore_index=ignore_index, dim=dim
        )
        count = (targets != ignore_index).sum() * x.shape[dim]
    if normalizer is not None:
        losses = losses / divisor(normalizer, lambda: count_positives(targets, ignore_index))
    if reduction == "none":
        return losses.to(logits.dtype)
    return reduce(losses, reduction, count)


class FocalLoss(nn.Module):
    """`sigmoid_focal_loss` as a module, with the same names, order and defaults."""

    alpha: Tensor | float | None

    def __init__(
        self,
        alpha: Tensor | float | None = 0.25,
        gamma: float = 2.0,
        *,
        reduction: Reduction = "mean",
        normalizer: Normalizer = None,
        ignore_index: int = -100,
        inplace_gradient: bool = False,
    ) -> None:
        super().__init__()
        arguments.check_options(alpha, gamma, reduction, normalizer)
        arguments.check_one_number(normalizer)
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha, persistent=False)
        else:
            self.alpha = alpha
        self.gamma = gamma
        self.reduction: Reduction = reduction
        self.normalizer = normalizer
        self.ignore_index = ignore_index
        self.inplace_gradient = inplace_gradient

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of ``logits`` against ``targets``; see `sigmoid_focal_loss`."""
        return sigmoid_focal_loss(
            logits,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction,
            normalizer=self.normalizer,
            ignore_index=self.ignore_index,
            inplace_gradient=self.inplace_gradient,
        )

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return (
            f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}, "
            f"normalizer={self.normalizer!r}, ignore_index={self.ignore_index}, "
            f"inplace_gradient={self.inplace_gradient}"
        )
