"""CPU kernel for class indices of which nearly all are background.

It computes loss and gradient in cache-sized pieces of memory. Every entry is treated as background,
``f(z) = p^gamma s`` with ``p = sigmoid(z)`` and ``s = softplus(z) = -log(1 - p)``, whose derivative
is ``p^gamma (gamma (1 - p) s + p)``. Ignored places are blanked, which means that p is set to 0. So
are the few positives, whose loss and gradient are computed separately, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from focaldet.losses._layout import CHUNK, from_memory, in_memory_order, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.losses._layout import Layout, Piece, Special

ZERO = torch.zeros((), dtype=torch.float32, device="cpu")


@dataclass(frozen=True, slots=True)
class SparseLoss:
    """The loss of one or more tensors of logits; a `Kernel` of `focaldet.losses._autograd`.

    Attributes:
        special: The places of each tensor that are not background.
        alpha: As in `sigmoid_focal_loss`.
        gamma: As in `sigmoid_focal_loss`.
        scales: Factors of the loss. Each tensor's blocks are split into as many equal spans, one
            per factor: a single one, or one per image.
        formula: The same loss, written with operations that autograd can differentiate.
        layouts: The memory layout of each tensor. None uses what `memory_of` finds.
    """

    special: Sequence[Special]
    alpha: float | Tensor | None
    gamma: float
    scales: Sequence[float]
    formula: Callable[[Sequence[Tensor]], Tensor]
    layouts: Sequence[Layout] | None = None

    def total(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float, *, inplace: bool
    ) -> tuple[float, list[Tensor | None]]:
        """Return ``factor`` times the sum of the scaled losses, and its gradient where wanted."""
        value, gradients = 0.0, []
        for i, (x, want) in enumerate(zip(tensors, wanted, strict=True)):
            memory, layout = self._memory_of(x, i)
            gradient = None
            if want:
                gradient = memory if inplace else torch.empty_like(memory)
            step = layout.blocks // len(self.scales)
            for j, scale in enumerate(self.scales):
                span = range(j * step, (j + 1) * step)
                run = self._run(i, memory, layout, span, scale * factor, gradient=gradient)
                value += scale * run
            gradients.append(None if gradient is None else from_memory(gradient, x))
        return value * factor, gradients

    def entries(self, x: Tensor) -> Tensor:
        """Return the scaled loss of each entry."""
        memory, layout = self._memory_of(x, 0)
        losses, span = torch.empty_like(memory), range(layout.blocks)
        self._run(0, memory, layout, span, self.scales[0], losses=losses)
        return from_memory(losses, x)

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""
        memory, layout = self._memory_of(x, 0)
        gradient, span = torch.empty_like(memory), range(layout.blocks)
        flat = in_memory_order(upstream, x)
        self._run(0, memory, layout, span, self.scales[0], gradient=gradient, upstream=flat)
        return from_memory(gradient, x)

    def _memory_of(self, x: Tensor, index: int) -> tuple[Tensor, Layout]:
        memory, layout = memory_of(x)
        return memory, layout if self.layouts is None else self.layouts[index]

    def _run(
        self,
        index: int,
        memory: Tensor,
        layout: Layout,
        span: range,
        scale: float,
        *,
        gradient: Tensor | None = None,
        upstream: Tensor | None = None,
        losses: Tensor | None = None,
    ) -> float:
        """Sum the losses of a span of blocks, and write what else is wanted.

        Args:
            index: Index of the tensor.
            memory: Its logits, flat in the order of ``layout``; float32, bfloat16 or float16.
            layout: The memory layout.
            span: The blocks to process.
            scale: Factor of the gradient and of the individual losses, but not of their sum.
            gradient: Flat tensor to write the gradient to; it may be ``memory`` itself.
            upstream: Flat factors of the gradient, one per entry.
            losses: Flat tensor to write the individual losses to.
        """
        special, alpha = self.special[index], self.alpha
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
        out = _Outputs(gradient, scale, upstream, losses)
        pieces = list(layout.pieces(span))
        blanks = _Blanks(entries, special.ignored, pieces)
        total = _background(
            memory, pieces, blanks, weight=background_weight, gamma=self.gamma, out=out
        )
        return total + _positives(logits, entries, positive_weight, self.gamma, out)


class _Outputs(NamedTuple):
    """What is wanted in addition to the sum: see `SparseLoss._run`."""

    gradient: Tensor | None
    scale: float
    upstream: Tensor | None
    losses: Tensor | None


class _Blanks:
    """The positives and the ignored places of each piece, where values are set to 0."""

    def __init__(self, positive: Tensor, ignored: Tensor, pieces: Sequence[Piece]) -> None:
        """Take the entries of positives in any order and the sorted keys of ignored places."""
        self.shapes = [piece.shape for piece in pieces]
        self.positive = _split(
            positive.sort().values, [(piece.start, piece.stop) for piece in pieces]
        )
        self.ignored = _split(ignored, [(piece.first_key, piece.last_key) for piece in pieces])

    def clear(self, values: Tensor, index: int) -> None:
        """Set ``values`` of piece ``index`` to 0 in its positives and ignored places."""
        entries, keys = self.positive[index], self.ignored[index]
        if entries is not None:
            values.index_fill_(0, entries, 0.0)
        if keys is None:
            return
        blocks, classes, inner = self.shapes[index]
        if inner == 1:
            values.view(blocks, classes).index_fill_(0, keys, 0.0)
        elif blocks == 1:
            values.view(classes, inner).index_fill_(1, keys, 0.0)
        else:
            values.view(blocks, classes, inner)[keys // inner, :, keys % inner] = 0.0


def _split(ordered: Tensor, intervals: Sequence[tuple[int, int]]) -> list[Tensor | None]:
    """Return the numbers in each interval, relative to its start; None if it holds none."""
    if len(ordered) == 0:
        return [None] * len(intervals)
    if len(intervals) == 1:  # which holds all of them
        return [ordered - intervals[0][0]]
    bounds = torch.tensor(intervals, dtype=torch.int64, device="cpu")
    ends = torch.searchsorted(ordered, bounds)
    parts: list[Tensor | None] = []
    for (start, _), (first, last) in zip(intervals, ends.tolist(), strict=True):
        parts.append(ordered[first:last] - start if last > first else None)
    return parts


def _scratch(pieces: Sequence[Piece], count: int) -> dict[int, tuple[Tensor, ...]]:
    """Allocate ``count`` float32 buffers per length of piece; all lengths share their memory."""
    lengths = {len(piece) for piece in pieces}
    memory = torch.empty(count, max(lengths, default=0), dtype=torch.float32, device="cpu")
    return {length: memory[:, :length].unbind() for length in lengths}


def _background(
    memory: Tensor,
    pieces: Sequence[Piece],
    blanks: _Blanks,
    *,
    weight: float | Tensor,
    gamma: float,
    out: _Outputs,
) -> float:
    """Sum and write the losses of all entries as background, except for the blanked ones.

    Logits of blanked places may be NaN or infinite. After ``p`` has been blanked, a factor that is
    computed from ``x`` again has to be blanked too, because 0 times NaN is NaN.
    """
    native = memory.dtype == torch.float32
    buffers = _scratch(pieces, 3 if native else 4)
    constant = 1.0 if isinstance(weight, Tensor) else weight
    factor = -out.scale * constant * (gamma if gamma > 0 else 1.0)
    total = 0.0
    for i, piece in enumerate(pieces):
        here = slice(piece.start, piece.stop)
        p, log_q, power, *rest = buffers[len(piece)]
        x = memory[here] if native else rest[0].copy_(memory[here])
        torch.sigmoid(x, out=p)
        blanks.clear(p, i)
        near_one = _log_complement(x, p, out=log_q)
        power = _power(x, p, log_q, gamma, out=power)
        if gamma % 1:
            blanks.clear(power, i)
        slope = None
        if out.gradient is not None:
            slope = out.gradient[here] if native else x
            _slope(p, log_q, gamma, near_one=near_one, out=slope)
        if isinstance(weight, Tensor):
            power = _weighted(power, weight, piece)
        total -= log_q.mul_(power).sum().item()
        if out.losses is not None:
            out.losses[here] = log_q.mul_(-constant * out.scale)
        if slope is not None and out.gradient is not None:
            torch.addcmul(ZERO, slope, power, value=factor, out=slope)
            if out.upstream is not None:
                slope.mul_(out.upstream[here])
                blanks.clear(slope, i)  # upstream may be NaN where a place is ignored
            if not native:
                out.gradient[here] = slope
    return total * constant


def _log_complement(x: Tensor, p: Tensor, out: Tensor) -> bool:
    """Write ``log(1 - p)``, which is 0 where p is 0; return whether some p is close to 1.

    There ``1 - p`` has few digits left, so a piece with a logit above 2 (or with NaN or infinity)
    takes the softplus of the logits instead, which is slower.
    """
    near_one = not p.amax().item() <= 0.88
    if near_one:
        out.copy_(F.softplus(x)).neg_().masked_fill_(p == 0, 0.0)
    else:
        torch.neg(p, out=out).log1p_()
    return near_one


def _slope(p: Tensor, log_q: Tensor, gamma: float, *, near_one: bool, out: Tensor) -> None:
    """Write ``-((1 - p) s + p / gamma)``, or ``-p`` if gamma is 0, without reading the logits."""
    if gamma == 0:
        torch.neg(p, out=out)
    elif near_one:
        torch.exp(log_q, out=out).mul_(log_q).add_(p, alpha=-1 / gamma)
    else:
        torch.lerp(log_q, torch.full_like(ZERO, -1 / gamma), p, out=out)


def _power(x: Tensor, p: Tensor, log_q: Tensor, gamma: float, out: Tensor) -> Tensor:
    """Return ``p ** gamma``, by products, a square root or, otherwise, ``log p = x + log q``."""
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


def _weighted(values: Tensor, weight: Tensor, piece: Piece) -> Tensor:
    """Multiply ``values`` by the weights of their classes, in place."""
    classes = piece.shape[1]
    w = weight[piece.first_class : piece.first_class + classes].view(1, classes, 1)
    return values.view(piece.shape).mul_(w).view(-1)


def _positives(
    logits: Tensor, entries: Tensor, weight: float | Tensor, gamma: float, out: _Outputs
) -> float:
    """Sum the losses of the positive entries in float64, and write what else is wanted."""
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
