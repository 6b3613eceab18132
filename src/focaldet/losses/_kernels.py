"""Loss and gradient of class indices on a CPU, a cache-sized piece of memory at a time.

Every entry is taken for background, ``f(z) = p^gamma s`` with ``p = sigmoid(z)`` and
``s = softplus(z) = -log(1 - p)``, whose derivative is ``p^gamma (gamma (1 - p) s + p)``. Ignored
places are blanked (p = 0); so are the few positives, whose loss and gradient come in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from focaldet.losses._layout import CHUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.losses._layout import Layout, Piece, Special

ZERO = torch.zeros(())


def background(
    memory: Tensor,
    layout: Layout,
    special: Special,
    *,
    span: range,
    weight: float | Tensor,
    gamma: float,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    upstream: Tensor | None = None,
    losses: Tensor | None = None,
) -> float:
    """Sum the losses of the blocks of ``span``, all but the special entries, as background.

    Args:
        memory: Flat logits in the order of ``layout``; float32, bfloat16 or float16.
        layout: That order.
        special: Positives and ignored places, whose loss and gradient here are 0.
        span: The blocks to work on.
        weight: ``1 - alpha``: a number, or one for each class.
        gamma: Focusing parameter.
        gradient: Flat; where the gradient goes, if anywhere. May be ``memory`` itself.
        scale: Factor of the gradient and of the losses one by one, not of their sum.
        upstream: Flat; a factor of the gradient for each entry.
        losses: Flat; where the losses go one by one, if anywhere.
    """
    pieces = list(layout.pieces(span))
    blank = _Blank(layout, special, pieces)
    native = memory.dtype == torch.float32
    buffers = _buffers(pieces, 3 if native else 4)
    constant = 1.0 if isinstance(weight, Tensor) else weight
    limit = 0.982 if gamma % 1 in (0, 0.5) else 0.88
    lowest = torch.tensor(-1 / gamma) if gamma > 0 else ZERO
    factor = -scale * constant * (gamma if gamma > 0 else 1.0)
    total = 0.0
    for i, piece in enumerate(pieces):
        here = slice(piece.start, piece.stop)
        p, log_q, power, *rest = buffers[len(piece)]
        x = memory[here] if native else rest[0].copy_(memory[here])
        torch.sigmoid(x, out=p)
        blank(p, i)
        # 1 - p has few digits left where p is near 1. A piece with a logit above 4 (2 where the
        # powers of p are taken from log q) goes the longer way, and so do NaN and infinity.
        plain = p.amax().item() <= limit
        if plain:
            torch.neg(p, out=log_q).log1p_()
        else:
            log_q.copy_(F.softplus(x)).neg_().masked_fill_(p == 0, 0.0)
        power = _power(x, p, log_q, gamma, out=power)
        if gamma % 1:
            blank(power, i)
        if gradient is not None:
            # f'(z) / p^gamma = -factor ((1 - p) s + p / gamma), or p where gamma is 0
            slope = gradient[here] if native else x
            if gamma == 0:
                torch.neg(p, out=slope)
            elif plain:
                torch.lerp(log_q, lowest, p, out=slope)
            else:
                torch.addcmul(p * lowest, torch.sigmoid(-x), log_q, out=slope)
        if isinstance(weight, Tensor):
            power = _weigh(power, weight, piece)
        total -= log_q.mul_(power).sum().item()
        if losses is not None:
            losses[here] = log_q.mul_(-constant * scale)
        if gradient is not None:
            torch.addcmul(ZERO, slope, power, value=factor, out=slope)
            if upstream is not None:
                slope.mul_(upstream[here])
            if not native:
                gradient[here] = slope
    return total * constant


def _buffers(pieces: Sequence[Piece], count: int) -> dict[int, list[Tensor]]:
    """Scratch memory for pieces of each length; the same memory for all of them."""
    lengths = {len(piece) for piece in pieces}
    memory = torch.empty(count, max(lengths, default=0))
    return {length: [row[:length] for row in memory] for length in lengths}


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


class _Blank:
    """Sets the special entries of a piece to 0."""

    def __init__(self, layout: Layout, special: Special, pieces: Sequence[Piece]) -> None:
        entries = layout.entry(special.positive, special.classes)
        self.entries = entries if layout.inner == 1 else entries.sort().values
        self.ignored = special.ignored
        self.pieces = pieces
        self.entry_ends = _ends(self.entries, [(p.start, p.stop) for p in pieces])
        self.ignored_ends = _ends(self.ignored, [(p.first_key, p.last_key) for p in pieces])

    def __call__(self, values: Tensor, index: int) -> None:
        piece = self.pieces[index]
        first, last = self.entry_ends[index]
        if last > first:
            values.index_fill_(0, self.entries[first:last] - piece.start, 0.0)
        first, last = self.ignored_ends[index]
        if last > first:
            keys = self.ignored[first:last] - piece.first_key
            blocks, classes, inner = piece.shape
            if inner == 1:
                values.view(blocks, classes).index_fill_(0, keys, 0.0)
            elif blocks == 1:
                values.view(classes, inner).index_fill_(1, keys, 0.0)
            else:
                values.view(piece.shape)[keys // inner, :, keys % inner] = 0.0


def _ends(ordered: Tensor, intervals: list[tuple[int, int]]) -> list[list[int]]:
    """Where in ``ordered`` each interval begins and ends."""
    if len(ordered) == 0:
        return [[0, 0]] * len(intervals)
    ends = torch.searchsorted(ordered, torch.tensor(intervals, dtype=torch.int64))
    return ends.tolist()  # type: ignore[no-any-return]


def positives(
    logits: Tensor,
    entries: Tensor,
    *,
    weight: float | Tensor,
    gamma: float,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    upstream: Tensor | None = None,
    losses: Tensor | None = None,
) -> float:
    """Sum the losses of the positive entries, in float64.

    Args:
        logits: Those of the positives, taken from memory before a gradient overwrites it.
        entries: Where in memory they are.
        weight: ``alpha``: a number, or one for each of ``entries``.
        gamma: Focusing parameter.
        gradient: As in `background`, like the arguments after it.
        scale: Factor of the gradient and of the losses one by one, not of their sum.
        upstream: Flat; a factor of the gradient for each entry of the memory.
        losses: Flat; where the losses go one by one, if anywhere.
    """
    total = 0.0
    for first in range(0, len(entries), CHUNK):
        here = slice(first, first + CHUNK)
        where, z = entries[here], logits[here].double().neg_()
        p, s = torch.sigmoid(z), F.logsigmoid(-z).neg_()
        power = p**gamma * (weight[here].double() if isinstance(weight, Tensor) else weight)
        loss = power * s
        total += loss.sum().item()
        if losses is not None:
            losses[where] = (loss * scale).to(losses.dtype)
        if gradient is not None:
            slope = power * (gamma * torch.sigmoid(-z) * s + p) * -scale
            if upstream is not None:
                slope = slope * upstream[where]
            gradient[where] = slope.to(gradient.dtype)
    return total
