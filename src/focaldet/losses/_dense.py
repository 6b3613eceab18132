"""Loss and gradient on a CPU where any entry may be positive, a piece of memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from focaldet.losses._layout import Layout, Piece

ZERO, ONE = torch.zeros(()), torch.ones(())
PIECE = 32_768
"""Entries worked on at a time: the temporary tensors of a piece stay in a core's L2 cache."""


def dense(
    memory: Tensor,
    layout: Layout,
    targets: Tensor,
    *,
    hard: bool,
    alpha: float | Tensor | None,
    gamma: float,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    upstream: Tensor | None = None,
    losses: Tensor | None = None,
) -> float:
    """Sum the losses.

    Args:
        memory: Flat logits in the order of ``layout``; float32, bfloat16 or float16.
        layout: That order.
        targets: Flat targets in [0, 1] of the same order.
        hard: Whether all targets are 0 or 1.
        alpha: A number, None, or one for each class.
        gamma: Focusing parameter.
        gradient: Flat; where the gradient goes, if anywhere. May be ``memory`` itself.
        scale: Factor of the gradient and of the losses one by one, not of their sum.
        upstream: Flat; a factor of the gradient for each entry.
        losses: Flat; where the losses go one by one, if anywhere.
    """
    sides = None if alpha is None else _sides(alpha)
    terms = _hard_terms if hard else _soft_terms
    total = 0.0
    for piece in layout.pieces(range(layout.blocks), PIECE):
        here = slice(piece.start, piece.stop)
        x, t = memory[here].float(), targets[here].float()
        loss, slope, power = terms(x, t, gamma)
        if sides is not None:
            a = _alpha(t, sides, piece)
            power = a if power is None else power.mul_(a)
        if power is not None:
            loss.mul_(power)
        total += loss.sum().item()
        if losses is not None:
            losses[here] = loss.mul_(scale)
        if gradient is not None:
            if power is not None:
                slope.mul_(power)
            if upstream is not None:
                slope.mul_(upstream[here])
            torch.mul(slope, scale, out=gradient[here])
    return total


def _hard_terms(x: Tensor, t: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors of ``f(z) = p^gamma s`` and of its derivative, ``z`` the logit of being wrong.

    Returns:
        ``s`` and ``dz/dx (gamma (1 - p) s + p)``, both to be multiplied by the third, ``p^gamma``.
    """
    turn = torch.sub(ONE, t, alpha=2)
    z = x * turn
    p, s = torch.sigmoid(z), F.softplus(z)
    if gamma == 0:
        return s, p.mul_(turn), None
    slope = torch.addcmul(p, torch.sigmoid(z.neg_()), s, value=gamma).mul_(turn)
    return s, slope, p.pow_(gamma)


def _soft_terms(x: Tensor, t: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors of ``m^gamma c`` and of its derivative.

    For a target t the mean error is ``m = (1 - t) p + t (1 - p)`` and the cross-entropy
    ``c = softplus(x) - t x``.

    Returns:
        ``m c`` and ``gamma p (1 - p) (1 - 2 t) c + m (p - t)``, both to be multiplied by the third,
        ``m^(gamma - 1)``; for gamma 0, ``c`` and ``p - t``.
    """
    turn = None
    if not x.amax().item() <= 1:
        # Near p = 1 digits are lost: look at -|x|, and at the target as it is seen from there.
        upper = x.ge(0).float()
        x, t, turn = x.abs().neg_(), (t - upper).abs_(), torch.sub(ONE, upper, alpha=2)
    p = torch.sigmoid(x)
    log_q = p.neg().log1p_()
    minus_c = torch.addcmul(log_q, x, t)
    if x.amin().item() == -torch.inf:
        minus_c = torch.where(t == 0, log_q, minus_c)
    q = torch.sub(ONE, p)
    m = torch.lerp(p, q, t)
    slope = p - t
    if gamma > 0:
        error_slope = q.mul_(p).addcmul_(q, t, value=-2)  # p (1 - p) (1 - 2 t)
        slope.mul_(m).addcmul_(error_slope, minus_c, value=-gamma)
        minus_c.mul_(m)
    if turn is not None:
        slope.mul_(turn)
    return minus_c.neg_(), slope, _power(m, gamma)


def _power(m: Tensor, gamma: float) -> Tensor | None:
    """``m ** (gamma - 1)``, in place; None stands for 1."""
    if gamma in (0, 1):
        return None
    if gamma < 1:  # what this is multiplied by vanishes with m
        m.clamp_(min=torch.finfo(m.dtype).tiny)
    return m if gamma == 2 else m.pow_(gamma - 1)


def _sides(alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """The weights of targets 0 and 1."""
    if isinstance(alpha, Tensor):
        return 1 - alpha.float(), alpha.float()
    return torch.full((), 1 - alpha), torch.full((), alpha)


def _alpha(t: Tensor, sides: tuple[Tensor, Tensor], piece: Piece) -> Tensor:
    """The weight of each entry."""
    if sides[0].ndim == 0:
        return torch.lerp(*sides, t)
    classes = piece.shape[1]
    own = slice(piece.first_class, piece.first_class + classes)
    low, high = (side[own].view(1, classes, 1) for side in sides)
    return torch.lerp(low, high, t.view(piece.shape)).view(-1)
