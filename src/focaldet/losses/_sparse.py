"""Loss and gradient of class indices on a CPU, a cache-sized piece of memory at a time.

Every entry is taken for background, ``f(z) = p^gamma s`` with ``p = sigmoid(z)`` and
``s = softplus(z) = -log(1 - p)``, whose derivative is ``p^gamma (gamma (1 - p) s + p)``. Ignored
places are blanked (p = 0); so are the few positives, whose loss and gradient come in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from focaldet.losses._layout import CHUNK
from focaldet.losses._pieces import Blank, scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.losses._layout import Layout, Piece, Special

ZERO = torch.zeros((), dtype=torch.float32, device="cpu")


def sparse(
    memory: Tensor,
    layout: Layout,
    special: Special,
    *,
    span: range,
    alpha: float | Tensor | None,
    gamma: float,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    upstream: Tensor | None = None,
    losses: Tensor | None = None,
) -> float:
    """Sum the losses of the blocks of ``span``.

    Args:
        memory: Flat logits in the order of ``layout``; float32, bfloat16 or float16.
        layout: That order.
        special: The places that are not background.
        span: The blocks to work on.
        alpha: A number, None, or one for each class.
        gamma: Focusing parameter.
        gradient: Flat; where the gradient goes, if anywhere. May be ``memory`` itself.
        scale: Factor of the gradient and of the losses one by one, not of their sum.
        upstream: Flat; a factor of the gradient for each entry.
        losses: Flat; where the losses go one by one, if anywhere.
    """
    if len(span) < layout.blocks:
        special = special.within(range(span.start * layout.inner, span.stop * layout.inner))
    entries = layout.entry(special.positive, special.classes)
    logits = memory[entries]  # before a gradient overwrites them
    positive_weight: float | Tensor = 1.0
    background_weight: float | Tensor = 1.0
    if isinstance(alpha, Tensor):
        positive_weight, background_weight = alpha[special.classes], 1 - alpha.float()
    elif alpha is not None:
        positive_weight, background_weight = alpha, 1 - alpha
    out = _Out(gradient, scale, upstream, losses)
    pieces = list(layout.pieces(span))
    blank = Blank(entries, special.ignored, pieces)
    total = _background(memory, pieces, blank, weight=background_weight, gamma=gamma, out=out)
    return total + _positives(logits, entries, positive_weight, gamma, out)


class _Out(NamedTuple):
    """What is wanted besides the sum: see `sparse`."""

    gradient: Tensor | None
    scale: float
    upstream: Tensor | None
    losses: Tensor | None

    def write_gradient(self, here: slice, slope: Tensor, power: Tensor, factor: float) -> None:
        """Write ``factor * slope * power`` (where ``slope`` is) to a stretch of memory."""
        torch.addcmul(ZERO, slope, power, value=factor, out=slope)
        if self.upstream is not None:
            slope.mul_(self.upstream[here])
        if self.gradient is not None and self.gradient.dtype != slope.dtype:
            self.gradient[here] = slope


def _background(
    memory: Tensor,
    pieces: Sequence[Piece],
    blank: Blank,
    *,
    weight: float | Tensor,
    gamma: float,
    out: _Out,
) -> float:
    """Take every entry but the blank ones for background."""
    native = memory.dtype == torch.float32
    buffers = scratch(pieces, 3 if native else 4)
    constant = 1.0 if isinstance(weight, Tensor) else weight
    factor = -out.scale * constant * (gamma if gamma > 0 else 1.0)
    total = 0.0
    for i, piece in enumerate(pieces):
        here = slice(piece.start, piece.stop)
        p, log_q, power, *rest = buffers[len(piece)]
        x = memory[here] if native else rest[0].copy_(memory[here])
        torch.sigmoid(x, out=p)
        blank(p, i)
        near_one = _log_complement(x, p, out=log_q)
        power = _power(x, p, log_q, gamma, out=power)
        if gamma % 1:
            blank(power, i)
        slope = None
        if out.gradient is not None:
            slope = out.gradient[here] if native else x
            _slope(x, p, log_q, gamma, near_one=near_one, out=slope)
        if isinstance(weight, Tensor):
            power = _weigh(power, weight, piece)
        total -= log_q.mul_(power).sum().item()
        if out.losses is not None:
            out.losses[here] = log_q.mul_(-constant * out.scale)
        if slope is not None:
            out.write_gradient(here, slope, power, factor)
    return total * constant


def _log_complement(x: Tensor, p: Tensor, out: Tensor) -> bool:
    """Write ``log(1 - p)``, and 0 where p is 0; return whether p comes near 1.

    ``1 - p`` has few digits left there. A piece with a logit above 2 goes the longer way, and so do
    NaN and infinity.
    """
    near_one = not p.amax().item() <= 0.88
    if near_one:
        out.copy_(F.softplus(x)).neg_().masked_fill_(p == 0, 0.0)
    else:
        torch.neg(p, out=out).log1p_()
    return near_one


def _slope(
    x: Tensor, p: Tensor, log_q: Tensor, gamma: float, *, near_one: bool, out: Tensor
) -> None:
    """Write ``-((1 - p) s + p / gamma)``, or ``-p`` where gamma is 0; ``out`` may be ``x``."""
    if gamma == 0:
        torch.neg(p, out=out)
    elif near_one:
        torch.addcmul(p * (-1 / gamma), torch.sigmoid(-x), log_q, out=out)
    else:
        torch.lerp(log_q, torch.full_like(ZERO, -1 / gamma), p, out=out)


def _power(x: Tensor, p: Tensor, log_q: Tensor, gamma: float, out: Tensor) -> Tensor:
    """``p ** gamma``, by products, a square root and, for other fractions, ``log p = x + log q``."""
    whole, rest = math.floor(gamma), gamma % 1
    if rest == 0.5:
        torch.sqrt(p, out=out)
    elif rest:
        torch.add(x, log_q, out=out).mul_(rest / math.log(2)).exp2_()
    elif whole == 0:
        return out.fill_(1.0)
    elif whole == 1:
        return p
    elif whole == 2:
        return torch.mul(p, p, out=out)
    else:
        return torch.pow(p, whole, out=out)
    for _ in range(whole):
        out.mul_(p)
    return out


def _weigh(values: Tensor, weight: Tensor, piece: Piece) -> Tensor:
    """Multiply by the weights of the classes."""
    classes = piece.shape[1]
    w = weight[piece.first_class : piece.first_class + classes].view(1, classes, 1)
    return values.view(piece.shape).mul_(w).view(-1)


def _positives(
    logits: Tensor, entries: Tensor, weight: float | Tensor, gamma: float, out: _Out
) -> float:
    """Write the positive entries over, in float64."""
    gradient, scale, upstream, losses = out
    total = 0.0
    for first in range(0, len(entries), CHUNK):
        here = slice(first, first + CHUNK)
        where, x = entries[here], logits[here].double()
        p, log_q = torch.sigmoid(-x), F.logsigmoid(x)  # of z = -x: log(1 - p) = log sigmoid(x)
        power = p**gamma * (weight[here].double() if isinstance(weight, Tensor) else weight)
        loss = power * log_q
        total -= loss.sum().item()
        if losses is not None:
            losses[where] = (loss * -scale).to(losses.dtype)
        if gradient is not None:
            slope = torch.addcmul(p, torch.sigmoid(x), log_q, value=-gamma).mul_(power)
            if upstream is not None:
                slope.mul_(upstream[where])
            gradient[where] = slope.mul_(-scale).to(gradient.dtype)
    return total
