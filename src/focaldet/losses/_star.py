"""FL*, the variant of the focal loss from the paper's appendix A."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from focaldet._checks import check_number, check_range
from focaldet.losses import _arguments as arguments
from focaldet.losses._arguments import Options
from focaldet.losses._formula import alpha_for, one_hot_mask, softplus
from focaldet.losses._reduction import count_positives, divisor, reduce

if TYPE_CHECKING:
    from torch import Tensor

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
    """Compute FL*, the cross-entropy of a scaled and shifted logit: ``-log(p_t*) / gamma``.

    Here ``p_t* = sigmoid(gamma x_t + beta)``, where ``x_t`` is x for a positive and -x for
    background. The paper reports 33.8 AP for (gamma, beta) = (2, 1) and 33.9 for (4, 0), compared
    with 34.0 for the focal loss with gamma 2 (table 3).

    Args:
        logits: As in `sigmoid_focal_loss`.
        targets: As in `sigmoid_focal_loss`. A soft target t gives the mean of the losses for
            targets 1 and 0 with weights t and 1 - t. The paper does not define soft targets.
        alpha: As in `sigmoid_focal_loss`. The formula in the paper's appendix omits it.
        gamma: Factor of the logit, > 0.
        beta: Shift of the logit, finite. With beta 0, this is fvcore's ``sigmoid_focal_loss_star``.
        reduction: As in `sigmoid_focal_loss`.
        normalizer: As in `sigmoid_focal_loss`.
        ignore_index: As in `sigmoid_focal_loss`.

    Returns:
        The loss, as from `sigmoid_focal_loss`.

    Raises:
        TypeError: If an argument has an unsupported type or dtype.
        ValueError: If gamma is 0, if another option or a target is out of range, or if shapes do
            not match.

    Examples:
        >>> loss = focal_star_loss(torch.zeros(1, 1), torch.tensor([0]), alpha=None)
        >>> round(loss.item(), 4)  # log(1 + exp(-1)) / 2
        0.1566

    References:
        Lin et al. Focal Loss for Dense Object Detection. ICCV 2017, appendix A.
        arXiv:1708.02002.
    """
    Options(alpha, gamma, reduction, normalizer, ignore_index).check()
    check_range("gamma", gamma, 0.0, low_open=True)
    check_number("beta", beta)
    if not math.isfinite(beta):
        raise ValueError(f"beta must be finite, got {beta}.")
    arguments.check_one_number(normalizer)
    arguments.check_logits("logits", logits)
    arguments.check_targets(logits, targets)
    K = arguments.count_classes(logits)
    arguments.check_alpha_size(alpha, K)
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    count: Tensor | int = x.numel()
    if targets.is_floating_point():
        t = targets.to(x.dtype)
    else:
        arguments.check_indices(targets, K, ignore_index)
        dim = arguments.class_axis(logits)
        ignored = (targets == ignore_index).unsqueeze(dim)
        t = (one_hot_mask(targets, K, dim) & ~ignored).to(x.dtype)
        x = x.masked_fill(ignored, -torch.inf)  # the loss of background is 0 there
        count = (~ignored).sum() * K
    # The side with weight 0 is evaluated at 0, since 0 * inf is NaN.
    positive = softplus(-(gamma * x.where(t > 0, 0.0) + beta))
    negative = softplus(gamma * x.where(t < 1, 0.0) - beta)
    losses = (t * positive + (1 - t) * negative) / gamma
    losses = losses * alpha_for(t, arguments.align_alpha(alpha, x))
    if normalizer is not None:
        losses = losses / divisor(normalizer, lambda: count_positives(targets, ignore_index))
    return reduce(losses, reduction, count, logits.dtype)
