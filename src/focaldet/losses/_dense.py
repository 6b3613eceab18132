"""The loss on a CPU where any entry may be positive: soft targets, many positives, few entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from focaldet.losses._layout import Layout, from_memory, in_memory_order, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ONE = torch.ones((), dtype=torch.float32, device="cpu")
FEW = 32_768
"""Up to so many entries a call costs more than what it computes, so the fewest calls win."""
PIECE = 131_072
"""Entries worked on at a time: the temporary tensors of so many stay in cache."""


class _Places(NamedTuple):
    """What belongs to some logits, broadcasting against them."""

    targets: Tensor
    ignored: Tensor | None
    classes: Tensor | None  # None for floating-point targets
    alpha: float | Tensor | None


@dataclass(frozen=True, slots=True)
class DenseLoss:
    """The loss of one tensor of logits ``[N, K, ...]``, as `_autograd` wants it.

    Attributes:
        targets: Class indices ``[N, ...]``, or floats in [0, 1] of the logits' shape.
        ignored: Mask of the indices that take no part, if there are any.
        alpha: As in `sigmoid_focal_loss`.
        gamma: As in `sigmoid_focal_loss`.
        scale: Factor of the loss.
        formula: The same loss by operations that autograd differentiates.
    """

    targets: Tensor
    ignored: Tensor | None
    alpha: float | Tensor | None
    gamma: float
    scale: float
    formula: Callable[[Sequence[Tensor]], Tensor]

    def total(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float, *, inplace: bool
    ) -> tuple[float, list[Tensor | None]]:
        """Return ``factor`` times the scaled loss and, if wanted, its gradient."""
        (x,), (want,) = tensors, wanted
        scale = factor * self.scale
        if x.numel() <= PIECE:
            losses, slope, weights = self._terms(x, self._whole(x), scale, [])
            value = losses.sum().item()
            if not want:
                return value, [None]
            made = slope * weights  # not in place: what they are part of should not live on
            return value, [x.copy_(made) if inplace else made.to(x.dtype)]
        value, scratch = 0.0, list[Tensor]()
        memory, layout = memory_of(x)
        gradient = (memory if inplace else torch.empty_like(memory)) if want else None
        for here, logits, places in self._pieces(x, memory, layout):
            losses, slope, weights = self._terms(logits, places, scale, scratch)
            value += losses.sum().item()
            if gradient is not None:
                torch.mul(slope.view(-1), weights.view(-1), out=gradient[here])
        return value, [None if gradient is None else from_memory(gradient, x)]

    def entries(self, x: Tensor) -> Tensor:
        """Return the scaled loss of each entry."""
        memory, layout = memory_of(x)
        filled, scratch = torch.empty_like(memory), list[Tensor]()
        for here, logits, places in self._pieces(x, memory, layout):
            filled[here] = self._terms(logits, places, self.scale, scratch)[0].view(-1)
        return from_memory(filled, x)

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""
        memory, layout = memory_of(x)
        flat, filled = in_memory_order(upstream, x), torch.empty_like(memory)
        scratch: list[Tensor] = []
        for here, logits, places in self._pieces(x, memory, layout):
            _, slope, weights = self._terms(logits, places, self.scale, scratch)
            filled[here] = slope.mul_(weights).view(-1).mul_(flat[here])
        return from_memory(filled, x)

    def _whole(self, x: Tensor) -> _Places:
        """Return what `_terms` needs besides the logits, for all of them."""
        alpha, ones = self.alpha, [1] * (x.ndim - 2)
        if isinstance(alpha, Tensor):
            alpha = alpha.float().view(-1, *ones)
        if self.targets.is_floating_point():
            return _Places(self.targets.float(), None, None, alpha)
        ignored = None if self.ignored is None else self.ignored.unsqueeze(1)
        classes = torch.arange(x.shape[1], device="cpu").view(-1, *ones)
        return _Places(self.targets.unsqueeze(1), ignored, classes, alpha)

    def _pieces(
        self, x: Tensor, memory: Tensor, layout: Layout
    ) -> Iterator[tuple[slice, Tensor, _Places]]:
        """Cut everything up: where in memory, the logits, and what else `_terms` needs."""
        soft = self.targets.is_floating_point()
        targets = in_memory_order(self.targets, x) if soft else self.targets.reshape(-1)
        mask = None if self.ignored is None else self.ignored.reshape(-1)
        for piece in layout.pieces(range(layout.blocks), PIECE):
            here, (blocks, count, inner) = slice(piece.start, piece.stop), piece.shape
            own = slice(piece.first_class, piece.first_class + count)
            alpha = self.alpha
            if isinstance(alpha, Tensor):
                alpha = alpha[own].float().view(-1, 1)
            shape = piece.shape if isinstance(alpha, Tensor) or not soft else (-1,)
            logits = memory[here].view(shape)
            if soft:
                places = _Places(targets[here].view(shape).float(), None, None, alpha)
            else:
                keys, shape = slice(piece.first_key, piece.last_key), (blocks, 1, inner)
                ignored = None if mask is None else mask[keys].view(shape)
                classes = torch.arange(own.start, own.stop, device="cpu").view(-1, 1)
                places = _Places(targets[keys].view(shape), ignored, classes, alpha)
            yield here, logits, places

    def _terms(
        self, x: Tensor, places: _Places, scale: float, scratch: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses times ``scale`` and two factors of their derivatives.

        What is returned may be part of ``scratch``, which the next call uses again.
        """
        x, (targets, ignored, classes, alpha) = x.float(), places
        if classes is None:
            return _soft(x, targets, alpha, gamma=self.gamma, scale=scale, scratch=scratch)
        return _hard(x, targets == classes, ignored, alpha, gamma=self.gamma, scale=scale)


def _hard(
    x: Tensor,
    positive: Tensor,
    ignored: Tensor | None,
    alpha: float | Tensor | None,
    *,
    gamma: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``a p^gamma s``, and of its derivative ``dz/dx (gamma (1 - p) s + p)`` and ``a p^gamma``.

    ``z`` is the logit of being wrong, ``p = sigmoid(z)``, ``s = softplus(z)``, and ``a`` is
    ``scale * alpha`` for positives and ``scale * (1 - alpha)`` for the others.
    """
    turn = torch.where(positive, -ONE, ONE)
    z = x * turn
    if ignored is not None:
        z.masked_fill_(ignored, -torch.inf)
    p, s = torch.sigmoid(z), F.softplus(z)
    a = p.pow(gamma)
    if alpha is None:
        a.mul_(scale)
    else:
        low, high = _sides(alpha, scale)
        a.mul_(torch.where(positive, high, low))
    slope = torch.addcmul(p, torch.sigmoid(z.neg_()), s, value=gamma)
    return s.mul_(a), slope.mul_(turn), a


def _soft(
    x: Tensor,
    t: Tensor,
    alpha: float | Tensor | None,
    *,
    gamma: float,
    scale: float,
    scratch: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """``a m^gamma c``, and two factors of its derivative.

    For a target t the mean error is ``m = (1 - t) p + t (1 - p)``, the cross-entropy
    ``c = softplus(x) - t x`` and the weight ``a = scale ((1 - alpha) (1 - t) + alpha t)``. The
    factors are ``gamma p (1 - p) (1 - 2 t) c + m (p - t)`` and ``a m^(gamma - 1)``, for gamma 0
    ``p - t`` and ``a``; both with their signs turned, which saves turning that of ``c``.
    """
    minus_a, p, minus_c, minus_slope, q, m, *spare = _like(scratch, x)
    _weights(t, alpha, -scale, out=minus_a)
    turn = None
    low, high = x.aminmax()
    if not (high.item() <= 1.25 and low.item() > -torch.inf):
        # Near p = 1 digits are lost: look at -|x|, and at the target as it is seen from there.
        upper = torch.ge(x, 0, out=spare[0])
        x = torch.abs(x, out=spare[1]).neg_()
        t = torch.sub(t, upper, out=spare[2]).abs_()
        turn = torch.sub(ONE, upper, alpha=2, out=upper)
        if low.item() == -torch.inf or high.item() == torch.inf:  # 0 * inf is NaN
            x.masked_fill_((x == -torch.inf) & (t == 0), -1e30)
    torch.sigmoid(x, out=p)
    torch.neg(p, out=minus_c).log1p_().addcmul_(x, t)
    torch.sub(t, p, out=minus_slope)
    if gamma > 0:
        torch.sub(ONE, p, out=q)
        p.addcmul_(p, t, value=-2)  # p (1 - 2 t) = m - t
        torch.add(t, p, out=m)
        q.mul_(p)
        minus_slope.mul_(m).addcmul_(q, minus_c, value=gamma)
        minus_c.mul_(m)
        if gamma != 1:
            minus_a.mul_(_power(m, gamma - 1))
    if turn is not None:
        minus_slope.mul_(turn)
    return minus_c.mul_(minus_a), minus_slope, minus_a


def _like(scratch: list[Tensor], x: Tensor) -> list[Tensor]:
    """Nine float32 buffers of the shape of ``x``: those of the last call, if they fit."""
    if not scratch or scratch[0].shape != x.shape:
        scratch[:] = torch.empty((9, *x.shape), dtype=torch.float32, device="cpu").unbind()
    return scratch


def _power(m: Tensor, exponent: float) -> Tensor:
    """``m ** exponent``, in place."""
    if exponent < 0:  # what this is multiplied by vanishes with m
        m.clamp_(min=torch.finfo(m.dtype).tiny)
    return m if exponent == 1 else m.pow_(exponent)


def _weights(t: Tensor, alpha: float | Tensor | None, scale: float, out: Tensor) -> None:
    """Write the weights: ``scale * alpha`` at target 1, ``scale * (1 - alpha)`` at target 0."""
    if alpha is None:
        out.fill_(scale)
        return
    torch.lerp(*_sides(alpha, scale), t, out=out)


def _sides(alpha: float | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The weights of background and of positives."""
    if isinstance(alpha, Tensor):
        return (1 - alpha) * scale, alpha * scale
    return torch.full_like(ONE, (1 - alpha) * scale), torch.full_like(ONE, alpha * scale)
