"""FL*, the focal loss of the paper's appendix A."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet._checks import check_range
from focaldet.losses import _arguments as arguments
from focaldet.losses._formula import alpha_for, one_hot_mask, softplus
from focaldet.losses._reduction import count_positives, divisor, reduce

if TYPE_CHECKING:
    from focaldet.losses._arguments import Normalizer, Reduction


def focal_star_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | float | None = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    ignore_index: int = -100,
) -> Tensor:
    """The paper's FL*: cross-entropy of a steeper, shifted logit."""
    arguments.check_options(alpha, gamma, reduction, normalizer)
    check_range("gamma", gamma, 0.0, low_open=True)
    arguments.check_one_number(normalizer)
    arguments.check_logits("logits", logits)
    arguments.check_targets(logits, targets)
    dim = arguments.class_axis(logits)
    arguments.check_alpha_size(alpha, logits.shape[dim])
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if isinstance(alpha, Tensor):
        alpha = alpha.to(x.dtype).view(-1, *[1] * (logits.ndim - dim - 1))
    if targets.is_floating_point():
        t = targets.to(x.dtype)
        ignored = torch.zeros_like(t, dtype=torch.bool)
    else:
        ignored = (targets == ignore_index).unsqueeze(dim).expand_as(x)
        t = one_hot_mask(targets, x.shape[dim], dim).to(x.dtype)
    x = x.masked_fill(ignored, 0.0)
    yes, no = softplus(-(gamma * x + beta)), softplus(gamma * x - beta)
    losses = (alpha_for(t, alpha) * (t * yes + (1 - t) * no) / gamma).masked_fill(ignored, 0.0)
    if normalizer is not None:
        losses = losses / divisor(normalizer, lambda: count_positives(targets, ignore_index))
    if reduction == "none":
        return losses.to(logits.dtype)
    return reduce(losses, reduction, (~ignored).sum())
