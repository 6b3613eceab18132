"""The softmax focal loss: exactly one of K classes is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._checks import check_range
from focaldet.losses import _arguments as arguments
from focaldet.losses._formula import focal, one_hot_mask
from focaldet.losses._reduction import divisor, reduce

if TYPE_CHECKING:
    from focaldet.losses._arguments import Reduction


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | float | None = None,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Focal loss of exclusive classes."""
    arguments.check_class_weights(alpha)
    arguments.check_gamma(gamma)
    arguments.check_reduction(reduction, normalizer)
    arguments.check_one_number(normalizer)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    arguments.check_logits("logits", logits)
    arguments.check_targets(logits, targets)
    dim = arguments.class_axis(logits)
    num_classes = logits.shape[dim]
    arguments.check_alpha_size(alpha, num_classes)
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if isinstance(alpha, Tensor):
        alpha = alpha.to(x.dtype).view(-1, *[1] * (logits.ndim - dim - 1))
    if targets.is_floating_point():
        t = targets.to(x.dtype)
        ignored = torch.zeros_like(t.select(dim, 0), dtype=torch.bool)
    else:
        ignored = targets == ignore_index
        t = one_hot_mask(targets, num_classes, dim).to(x.dtype)
    t = t * (1 - label_smoothing) + label_smoothing / num_classes
    x = x.masked_fill(ignored.unsqueeze(dim), 0.0)
    losses = focal(_log_odds_against(x, dim), gamma).masked_fill(t == 0, 0.0) * t
    if alpha is not None:
        losses = losses * alpha
    losses = losses.sum(dim).masked_fill(ignored, 0.0)
    if normalizer is not None:
        losses = losses / divisor(normalizer, None)
    if reduction == "none":
        return losses.to(logits.dtype)
    return reduce(losses, reduction, (~ignored).sum())


def _log_odds_against(x: Tensor, dim: int) -> Tensor:
    """``log((1 - p) / p)`` of every class."""
    log_p = x.log_softmax(dim)
    top = one_hot_mask(x.argmax(dim), x.shape[dim], dim)
    others = x.masked_fill(top, -torch.inf).logsumexp(dim, keepdim=True)
    p = log_p.exp().masked_fill(top, 0.0)
    return torch.where(top, others - x, torch.log1p(-p) - log_p)


class SoftmaxFocalLoss(nn.Module):
    """`softmax_focal_loss` as a module, with the same names, order and defaults."""

    alpha: Tensor | float | None

    def __init__(
        self,
        alpha: Tensor | float | None = None,
        gamma: float = 2.0,
        *,
        reduction: Reduction = "mean",
        normalizer: Tensor | float | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha, persistent=False)
        else:
            self.alpha = alpha
        self.gamma = gamma
        self.reduction: Reduction = reduction
        self.normalizer = normalizer
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of ``logits`` against ``targets``; see `softmax_focal_loss`."""
        return softmax_focal_loss(
            logits,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction,
            normalizer=self.normalizer,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
