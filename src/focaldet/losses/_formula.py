r"""The focal loss as formulas that autograd can differentiate as often as it likes.

With :math:`x_t = x` for a positive and :math:`x_t = -x` for background, the paper's equation 5,
:math:`\mathrm{FL} = -\alpha_t (1 - p_t)^\gamma \log p_t`, reads

.. math:: \mathrm{FL} = \alpha_t\, f(-x_t), \qquad f(z) = \sigma(z)^\gamma \log(1 + e^z),

since :math:`1 - p_t = \sigma(-x_t)` and :math:`-\log p_t = \log(1 + e^{-x_t})`. Everything here is
written in ``z``, the logit of being wrong, because ``f`` is accurate for any ``z``: it never takes
the difference of two numbers that are nearly equal, and never a power of a number that is 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def softplus(z: Tensor) -> Tensor:
    """``log(1 + exp(z))`` without the threshold above which ``F.softplus`` returns ``z`` itself."""
    return -F.logsigmoid(-z)


def focal(z: Tensor, gamma: float) -> Tensor:
    """``f(z) = sigmoid(z)^gamma softplus(z)``, the loss of an entry whose logit of error is z.

    The integer part of gamma is a product of sigmoids, the rest an exponential of their logarithm:
    the derivative of ``sigmoid(z) ** gamma`` would be ``0 * inf`` where the sigmoid underflows.
    """
    whole = math.floor(gamma)
    loss = softplus(z)
    if whole > 0:
        loss = loss * torch.sigmoid(z).pow(whole)
    if gamma > whole:
        loss = loss * torch.exp((gamma - whole) * F.logsigmoid(z))
    return loss


def soft_focal(x: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Focal loss of logits ``x`` against ``targets`` in [0, 1], not yet weighed by alpha.

    A soft target t gives ``m^gamma (t softplus(-x) + (1 - t) softplus(x))`` with the mean error
    ``m = t sigmoid(-x) + (1 - t) sigmoid(x)``; at t = 0 and t = 1 that is `focal`.
    """
    # The side that has no weight is evaluated at 0, since 0 * inf is NaN.
    negative, positive = x.where(targets < 1, 0.0), x.where(targets > 0, 0.0)
    loss = targets * softplus(-positive) + (1 - targets) * softplus(negative)
    whole = math.floor(gamma)
    if whole > 0:
        loss = loss * _mean_error(x, targets).pow(whole)
    if gamma > whole:
        # Beyond the limit m no longer changes in this precision, but its logarithm must not be inf.
        limit = 80.0 if x.dtype == torch.float32 else 600.0
        log_error = _mean_error(x.clamp(-limit, limit), targets).log()
        loss = loss * torch.exp((gamma - whole) * log_error)
    return loss


def _mean_error(x: Tensor, targets: Tensor) -> Tensor:
    return targets * torch.sigmoid(-x) + (1 - targets) * torch.sigmoid(x)


def alpha_for(positive: Tensor, alpha: Tensor | float | None) -> Tensor | float:
    """The paper's alpha_t: ``alpha`` on the positive side, ``1 - alpha`` on the background side.

    ``positive`` is 0, 1 or, for a soft target, between; ``None`` weighs both sides with 1.
    """
    if alpha is None:
        return 1.0
    return alpha * positive + (1 - alpha) * (1 - positive)


def one_hot_mask(targets: Tensor, num_classes: int, dim: int) -> Tensor:
    """``True`` where a class is the target: ``targets`` with a class axis put in at ``dim``."""
    classes = torch.arange(num_classes, device=targets.device)
    shape = [1] * (targets.ndim + 1)
    shape[dim] = num_classes
    return targets.unsqueeze(dim) == classes.view(shape)


def sigmoid_focal_entries(
    x: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | float | None,
    gamma: float,
    ignore_index: int,
    dim: int,
) -> Tensor:
    """Loss of every entry of ``x`` for class indices ``targets``; 0 where a row is ignored.

    Args:
        x: Float logits with K classes on axis ``dim``.
        targets: Class indices, -1 or ``ignore_index``, of x's shape without axis ``dim``.
        alpha: See `alpha_for`; a tensor must broadcast against ``x``.
        gamma: Focusing parameter.
        ignore_index: The index of rows that take no part.
        dim: The class axis.
    """
    ignored = (targets == ignore_index).unsqueeze(dim)
    positive = one_hot_mask(targets, x.shape[dim], dim)
    # Before the formula: a NaN that meets a mask only afterwards still poisons the gradient.
    x = x.masked_fill(ignored, 0.0)
    loss = focal(torch.where(positive, -x, x), gamma)
    if alpha is not None:
        loss = loss * alpha_for(positive.to(x.dtype), alpha)
    return loss.masked_fill(ignored, 0.0)
