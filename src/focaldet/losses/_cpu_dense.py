"""CPU kernel for soft targets, many positives or few entries: any entry may be positive.

It computes loss and gradient together, in cache-sized pieces of memory. To compare its time and
memory with formulas that autograd differentiates, run
``python -m tests.benchmarks.focal_loss --formula``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from focaldet.losses._layout import CHUNK, from_memory, in_memory_order, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from focaldet.losses._layout import Layout

ONE = torch.ones((), dtype=torch.float32, device="cpu")
FEW = 32_768
"""Up to this many entries, the overhead of a call exceeds its work, so the fewest calls win."""


class _Inputs(NamedTuple):
    """What the loss needs in addition to the logits; everything broadcasts against them."""

    targets: Tensor
    ignored: Tensor | None
    classes: Tensor | None  # None for floating-point targets
    alpha: float | Tensor | None


@dataclass(frozen=True, slots=True)
class DenseLoss:
    """The loss of one tensor of logits ``[N, K, ...]``; a `Kernel` of `focaldet.losses._autograd`.

    Attributes:
        targets: Class indices ``[N, ...]``, or floats in [0, 1] of the logits' shape.
        ignored: Mask of the indices to ignore, or None if there are none.
        alpha: As in `sigmoid_focal_loss`.
        gamma: As in `sigmoid_focal_loss`.
        scale: Factor of the loss.
        formula: The same loss, written with operations that autograd can differentiate.
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
        """Return ``factor`` times the scaled loss, and its gradient if wanted."""
        (x,), (want,) = tensors, wanted
        scale = factor * self.scale
        if x.numel() <= CHUNK:
            losses, slope, weights = self._terms(x, self._whole(x), scale, [])
            value = losses.sum().item()
            if not want:
                return value, [None]
            made = slope * weights  # not in place, or all of the scratch memory would be kept
            return value, [x.copy_(made) if inplace else made.to(x.dtype)]
        value, scratch = 0.0, list[Tensor]()
        memory, layout = memory_of(x)
        gradient = (memory if inplace else torch.empty_like(memory)) if want else None
        for here, logits, inputs in self._pieces(x, memory, layout):
            losses, slope, weights = self._terms(logits, inputs, scale, scratch)
            value += losses.sum().item()
            if gradient is not None:
                torch.mul(slope.view(-1), weights.view(-1), out=gradient[here])
        return value, [None if gradient is None else from_memory(gradient, x)]

    def entries(self, x: Tensor) -> Tensor:
        """Return the scaled loss of each entry."""
        memory, layout = memory_of(x)
        filled, scratch = torch.empty_like(memory), list[Tensor]()
        for here, logits, inputs in self._pieces(x, memory, layout):
            filled[here] = self._terms(logits, inputs, self.scale, scratch)[0].view(-1)
        return from_memory(filled, x)

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""
        memory, layout = memory_of(x)
        flat, filled = in_memory_order(upstream, x), torch.empty_like(memory)
        scratch: list[Tensor] = []
        for here, logits, inputs in self._pieces(x, memory, layout):
            _, slope, weights = self._terms(logits, inputs, self.scale, scratch)
            gradient = slope.mul_(weights).mul_(flat[here].view(slope.shape))
            if inputs.ignored is not None:  # where upstream may be NaN
                gradient.masked_fill_(inputs.ignored, 0.0)
            filled[here] = gradient.view(-1)
        return from_memory(filled, x)

    def _whole(self, x: Tensor) -> _Inputs:
        """Return what `_terms` needs for all logits at once."""
        alpha, ones = self.alpha, [1] * (x.ndim - 2)
        if isinstance(alpha, Tensor):
            alpha = alpha.float().view(-1, *ones)
        if self.targets.is_floating_point():
            return _Inputs(self.targets.float(), None, None, alpha)
        ignored = None if self.ignored is None else self.ignored.unsqueeze(1)
        classes = torch.arange(x.shape[1], device="cpu").view(-1, *ones)
        return _Inputs(self.targets.unsqueeze(1), ignored, classes, alpha)

    def _pieces(
        self, x: Tensor, memory: Tensor, layout: Layout
    ) -> Iterator[tuple[slice, Tensor, _Inputs]]:
        """Yield the position in memory, the logits and the other inputs of each piece."""
        soft = self.targets.is_floating_point()
        targets = in_memory_order(self.targets, x) if soft else self.targets.reshape(-1)
        mask = None if self.ignored is None else self.ignored.reshape(-1)
        for piece in layout.pieces(range(layout.blocks)):
            here, (blocks, count, inner) = slice(piece.start, piece.stop), piece.shape
            own = slice(piece.first_class, piece.first_class + count)
            alpha = self.alpha
            if isinstance(alpha, Tensor):
                alpha = alpha[own].float().view(-1, 1)
            shape = piece.shape if isinstance(alpha, Tensor) or not soft else (-1,)
            logits = memory[here].view(shape)
            if soft:
                inputs = _Inputs(targets[here].view(shape).float(), None, None, alpha)
            else:
                keys, shape = slice(piece.first_key, piece.last_key), (blocks, 1, inner)
                ignored = None if mask is None else mask[keys].view(shape)
                classes = torch.arange(own.start, own.stop, device="cpu").view(-1, 1)
                inputs = _Inputs(targets[keys].view(shape), ignored, classes, alpha)
            yield here, logits, inputs

    def _terms(
        self, x: Tensor, inputs: _Inputs, scale: float, scratch: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses times ``scale`` and two factors of their derivatives.

        The results may be part of ``scratch``, which the next call overwrites.
        """
        x, (targets, ignored, classes, alpha) = x.float(), inputs
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
    """Return the losses for class indices and two factors of their derivatives.

    ``z`` is x for background and -x for a positive, ``p = sigmoid(z)``, ``s = softplus(z)``, and
    ``a`` is ``scale * alpha`` for a positive and ``scale * (1 - alpha)`` for background. The loss
    is ``a p^gamma s``; the factors are ``dz/dx (gamma (1 - p) s + p)`` and ``a p^gamma``.
    """
    sign = torch.where(positive, -ONE, ONE)
    z = x * sign
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
    return s.mul_(a), slope.mul_(sign), a


def _soft(
    x: Tensor,
    t: Tensor,
    alpha: float | Tensor | None,
    *,
    gamma: float,
    scale: float,
    scratch: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses for soft targets and two factors of their derivatives.

    For a target t, the mean error is ``m = (1 - t) p + t (1 - p)``, the cross-entropy is
    ``c = softplus(x) - t x`` and the weight is ``a = scale ((1 - alpha) (1 - t) + alpha t)``. The
    loss is ``a m^gamma c``. The factors are ``gamma p (1 - p) (1 - 2 t) c + m (p - t)`` and
    ``a m^(gamma - 1)``, or ``p - t`` and ``a`` for gamma 0. Both are returned with the opposite
    sign, which saves negating ``c``.
    """
    minus_a, p, minus_c, minus_slope, q, m, *spare = _buffers(scratch, x)
    _weights(t, alpha, -scale, out=minus_a)
    sign = None
    low, high = x.aminmax()
    if not (high.item() <= 1.25 and low.item() > -torch.inf):
        # 1 - p loses digits near p = 1, so use -|x|, and 1 - t as the target where x was negated.
        upper = torch.ge(x, 0, out=spare[0])
        x = torch.abs(x, out=spare[1]).neg_()
        t = torch.sub(t, upper, out=spare[2]).abs_()
        sign = torch.sub(ONE, upper, alpha=2, out=upper)
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
    if sign is not None:
        minus_slope.mul_(sign)
    return minus_c.mul_(minus_a), minus_slope, minus_a


def _buffers(scratch: list[Tensor], x: Tensor) -> list[Tensor]:
    """Return nine float32 buffers of the shape of ``x``, reusing those of the last call."""
    if not scratch or scratch[0].shape != x.shape:
        scratch[:] = torch.empty((9, *x.shape), dtype=torch.float32, device="cpu").unbind()
    return scratch


def _power(m: Tensor, exponent: float) -> Tensor:
    """Compute ``m ** exponent`` in place."""
    if exponent < 0:  # the result is finite, and is multiplied by a factor that vanishes with m
        m.clamp_(min=torch.finfo(m.dtype).tiny)
    return m if exponent == 1 else m.pow_(exponent)


def _weights(t: Tensor, alpha: float | Tensor | None, scale: float, out: Tensor) -> None:
    """Write the weights: ``scale * alpha`` at target 1, ``scale * (1 - alpha)`` at target 0."""
    if alpha is None:
        out.fill_(scale)
        return
    torch.lerp(*_sides(alpha, scale), t, out=out)


def _sides(alpha: float | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the weights of background and of positives."""
    if isinstance(alpha, Tensor):
        return (1 - alpha) * scale, alpha * scale
    return torch.full_like(ONE, (1 - alpha) * scale), torch.full_like(ONE, alpha * scale)
