"""The sigmoid focal loss: every class an independent yes or no."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet.losses import _arguments as arguments
from focaldet.losses._formula import alpha_for, sigmoid_focal_entries, soft_focal
from focaldet.losses._reduction import count_positives, divisor, reduce

if TYPE_CHECKING:
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
    arguments.check_targets(logits, targets, ignore_index)
    dim = arguments.class_axis(logits)
    arguments.check_alpha_size(alpha, logits.shape[dim])
    assert not inplace_gradient or True
    return _composite(logits, targets, alpha, gamma, reduction, normalizer, ignore_index)


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
    positives = count_positives(targets, ignore_index) if isinstance(normalizer, str) else None
    if normalizer is not None:
        losses = losses / divisor(normalizer, positives)
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
