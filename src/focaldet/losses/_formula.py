r"""The focal loss as formulas that autograd can differentiate any number of times.

With :math:`x_t = x` for a positive and :math:`x_t = -x` for background, the paper's equation 5,
:math:`\mathrm{FL} = -\alpha_t (1 - p_t)^\gamma \log p_t`, becomes

.. math:: \mathrm{FL} = \alpha_t\, f(-x_t), \qquad f(z) = \sigma(z)^\gamma \log(1 + e^z),

since :math:`1 - p_t = \sigma(-x_t)` and :math:`-\log p_t = \log(1 + e^{-x_t})`. Everything here is
a function of ``z``, the logit of a wrong prediction, because ``f`` is accurate for every ``z``: it
never subtracts nearly equal numbers and never raises 0 to a fractional power.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def softplus(z: Tensor) -> Tensor:
    """Compute ``log(1 + exp(z))`` without the threshold above which ``F.softplus`` returns z."""
    return -F.logsigmoid(-z)


def focal(z: Tensor, gamma: float) -> Tensor:
    """Compute ``f(z) = sigmoid(z)^gamma softplus(z)``, the loss of an entry with wrong logit z.

    The integer part of gamma is a product of sigmoids, and the rest is the exponential of their
    logarithm, since the derivative of ``sigmoid(z) ** gamma`` would be ``0 * inf`` where the
    sigmoid underflows.
    """
    whole = math.floor(gamma)
    loss = softplus(z)
    if whole > 0:
        loss = loss * torch.sigmoid(z).pow(whole)
    if gamma > whole:
        loss = loss * torch.exp((gamma - whole) * F.logsigmoid(z))
    return loss


def focal_derivative(z: Tensor, gamma: float) -> Tensor:
    """Compute ``f'(z) = p^gamma (gamma q s + p)`` with p = sigmoid(z), q = 1 - p, s = softplus(z).

    Autograd derives the same from `focal`, but keeps more tensors.
    """
    whole = math.floor(gamma)
    p = torch.sigmoid(z)
    # q is 0 where s is infinite, and their product would be NaN.
    out = softplus(z).clamp_(max=1e30).mul_(torch.sigmoid(-z)).mul_(gamma).add_(p)
    if whole > 0:
        out *= p.pow_(whole)
    if gamma > whole:
        out *= F.logsigmoid(z).mul_(gamma - whole).exp_()
    return out


def soft_focal(x: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Compute the focal loss of logits ``x`` for ``targets`` in [0, 1], not weighted by alpha.

    A soft target t gives ``m^gamma (t softplus(-x) + (1 - t) softplus(x))`` with the mean error
    ``m = t sigmoid(-x) + (1 - t) sigmoid(x)``; at t = 0 and t = 1 that is `focal`.
    """
    loss = _cross_entropy(x, targets)
    whole = math.floor(gamma)
    if whole > 0:
        loss = loss * _mean_error(x, targets).pow(whole)
    if gamma > whole:
        # Beyond the limit, m is constant in this precision, but its logarithm must stay finite.
        limit = 80.0 if x.dtype == torch.float32 else 600.0
        log_error = _mean_error(x.clamp(-limit, limit), targets).log()
        loss = loss * torch.exp((gamma - whole) * log_error)
    return loss


def soft_focal_derivative(x: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Compute the derivative of `soft_focal` by the logits.

    With the mean error m, the cross-entropy c, p = sigmoid(x) and q = 1 - p, it is
    ``m^gamma (gamma (1 - 2 t) c p q / m + (1 - t) p - t q)``. Autograd keeps more tensors.
    """
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    m = _mean_error(x, targets)
    # p q / m is at most 1, but m may underflow. 0 * inf would be NaN where c is infinite.
    out = _cross_entropy(x, targets).clamp_(max=1e30)
    out.mul_(p * q).div_(m.clamp(min=torch.finfo(m.dtype).tiny))
    out.mul_((1 - 2 * targets).mul_(gamma))
    out += p.mul_(1 - targets).sub_(q.mul_(targets))
    return out if gamma == 0 else out.mul_(m.pow_(gamma))


def _cross_entropy(x: Tensor, targets: Tensor) -> Tensor:
    # The side with weight 0 is evaluated at 0, since 0 * inf is NaN.
    negative = x.masked_fill((targets < 1).logical_not(), 0.0)
    positive = x.masked_fill((targets > 0).logical_not(), 0.0)
    return targets * softplus(-positive) + (1 - targets) * softplus(negative)


def _mean_error(x: Tensor, targets: Tensor) -> Tensor:
    return targets * torch.sigmoid(-x) + (1 - targets) * torch.sigmoid(x)


def alpha_for(positive: Tensor, alpha: Tensor | float | None) -> Tensor | float:
    """Return the paper's alpha_t: ``alpha`` for positives and ``1 - alpha`` for background.

    ``positive`` is 0, 1 or, for soft targets, between them. An ``alpha`` of None gives 1 for both.
    """
    if alpha is None:
        return 1.0
    return alpha * positive + (1 - alpha) * (1 - positive)


def one_hot_mask(targets: Tensor, num_classes: int, dim: int) -> Tensor:
    """Return class indices as a Boolean one-hot mask with a new class axis ``dim``."""
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
    """Compute the loss of every entry for class indices; it is 0 for ignored places.

    Args:
        x: Floating-point logits with K classes on axis ``dim``.
        targets: Class indices, -1 or ``ignore_index``, in the shape of ``x`` without axis ``dim``.
        alpha: See `alpha_for`. A tensor must broadcast against ``x``.
        gamma: Focusing parameter.
        ignore_index: Index of places to ignore.
        dim: Class axis.
    """
    ignored = (targets == ignore_index).unsqueeze(dim)
    positive = one_hot_mask(targets, x.shape[dim], dim)
    # Masking only the result would still propagate NaN to the gradient.
    x = x.masked_fill(ignored, 0.0)
    loss = focal(torch.where(positive, -x, x), gamma)
    if alpha is not None:
        loss = loss * alpha_for(positive.to(x.dtype), alpha)
    return loss.masked_fill(ignored, 0.0)
