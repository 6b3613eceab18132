"""The focal loss on devices where kernels do not compute it, piece by piece.

The loss is computed in float32. For all logits at once, PyTorch operations would keep several
float32 tensors of their size until backward, which is more memory than an implementation in half
precision uses. So nothing is kept but the logits, and the temporary tensors are those of a piece.
The functions are called like those of `focaldet.losses._triton`. `EntryPieces` computes what these
do not: soft targets and losses that are not reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet.losses._formula import (
    alpha_for,
    focal,
    focal_derivative,
    soft_focal,
    soft_focal_derivative,
)
from focaldet.losses._layout import Layout, in_memory_order, level_of, memory_of, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from focaldet.losses._arguments import KernelOptions
    from focaldet.losses._layout import Level

PIECES = 16
"""Pieces of a large level: their float32 tensors then take less memory than its gradient."""
SMALLEST, LARGEST = 2**16, 2**21
"""Fewest and most entries in a piece, unless the level or image has fewer."""


def image_totals(
    tensors: Sequence[Tensor],
    levels: Sequence[Level],
    targets: Sequence[Tensor],
    options: KernelOptions,
) -> Tensor:
    """Compute the sum of the losses of each image over all levels, float32 ``[B]``."""
    totals = torch.zeros(levels[0].images, dtype=torch.float32, device=tensors[0].device)
    for x, level, target in zip(tensors, levels, targets, strict=True):
        for part in _parts(x, level, target, options):
            totals[part.image] += part.losses(options.gamma).sum()
    return totals


def gradient(
    x: Tensor, level: Level, target: Tensor, upstream: Tensor, options: KernelOptions
) -> Tensor:
    """Compute the gradient of ``(image_totals(...) * upstream).sum()`` for one level."""
    out = torch.empty_like(x)
    memory = stored(out)
    for part in _parts(x, level, target, options):
        made = part.gradient(options.gamma, upstream[part.image])
        memory[part.span].view(made.shape).copy_(made)
    return out


@dataclass
class _Part:
    """A piece of a level, ``[blocks, classes, inner]``."""

    image: int
    span: slice  # of memory
    x: Tensor
    positive: Tensor
    ignored: Tensor  # [blocks, 1, inner]
    weights: tuple[Tensor | float, Tensor | float]  # of positives and of background

    def losses(self, gamma: float) -> Tensor:
        """Return the losses in float32, 0 where ignored."""
        return self._weigh(focal(self._wrong_logits(), gamma), 1)

    def gradient(self, gamma: float, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(losses * upstream).sum()`` in float32."""
        slope = focal_derivative(self._wrong_logits(), gamma)
        return self._weigh(slope.mul_(upstream), -1)

    def _wrong_logits(self) -> Tensor:
        """Return the logits of wrong predictions in float32, which are 0 where ignored."""
        x = self.x.to(torch.float32, copy=True).masked_fill_(self.ignored, 0.0)
        return torch.where(self.positive, -x, x)

    def _weigh(self, values: Tensor, sign: int) -> Tensor:
        """Multiply by the weights, and by ``sign`` for positives, in place; 0 where ignored."""
        for_positives, for_background = self.weights
        positive = self.positive.float()
        factors = (1 - positive).mul_(for_background)
        factors += positive.mul_(for_positives * sign)
        return values.mul_(factors).masked_fill_(self.ignored, 0.0)


@dataclass
class _SoftPart:
    """A piece of logits with soft targets, ``[blocks, classes, inner]``."""

    span: slice  # of memory
    x: Tensor
    targets: Tensor
    alpha: Tensor | float | None

    def losses(self, gamma: float) -> Tensor:
        """Return the losses in float32."""
        x, targets = self.x.float(), self.targets.float()
        return soft_focal(x, targets, gamma).mul_(alpha_for(targets, self.alpha))

    def gradient(self, gamma: float, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(losses * upstream).sum()`` in float32."""
        x, targets = self.x.float(), self.targets.float()
        slope = soft_focal_derivative(x, targets, gamma).mul_(alpha_for(targets, self.alpha))
        return slope.mul_(upstream)


@dataclass(frozen=True)
class EntryPieces:
    """The losses of the entries of `dense` logits ``[N, K, ...]``, or their sum.

    It is a `Kernel` of `focaldet.losses._autograd.EntryLosses`.

    Attributes:
        targets: Class indices ``[N, ...]``, or floats in [0, 1] of the logits' shape.
        options: The options.
        divisor: What to divide the losses by.
        reduced: Whether to return the sum, in float32.
        formula: The same, written with operations that autograd can differentiate.
    """

    targets: Tensor
    options: KernelOptions
    divisor: Tensor | float
    reduced: bool
    formula: Callable[[Sequence[Tensor]], Tensor]

    def entries(self, x: Tensor) -> Tensor:
        """Return the losses in the shape and dtype of ``x``, or their sum."""
        gamma = self.options.gamma
        if self.reduced:
            total = torch.zeros((), dtype=torch.float32, device=x.device)
            for part in self._parts(x):
                total += part.losses(gamma).div_(self.divisor).sum()
            return total
        out = torch.empty_like(x)
        memory = stored(out)
        for part in self._parts(x):
            memory[part.span].view(part.x.shape).copy_(part.losses(gamma).div_(self.divisor))
        return out

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""
        out = torch.empty_like(x)
        memory = stored(out)
        if not self.reduced:
            upstream = in_memory_order(upstream, x)
        for part in self._parts(x):
            shape = part.x.shape
            factor = upstream if self.reduced else upstream[part.span].view(shape)
            made = part.gradient(self.options.gamma, factor.float() / self.divisor)
            memory[part.span].view(shape).copy_(made)
        return out

    def _parts(self, x: Tensor) -> Iterator[_Part | _SoftPart]:
        if self.targets.is_floating_point():
            return self._soft_parts(x)
        level = level_of(x)
        return _parts(x, level, self.targets.reshape(level.images, -1), self.options)

    def _soft_parts(self, x: Tensor) -> Iterator[_SoftPart]:
        (memory, layout), targets = memory_of(x), in_memory_order(self.targets, x)
        for piece in layout.pieces(range(layout.blocks), _size_of_pieces(x)):
            span = slice(piece.start, piece.stop)
            alpha = self.options.alpha
            if isinstance(alpha, Tensor):
                alpha = alpha[piece.first_class : piece.first_class + piece.shape[1]].view(-1, 1)
            shape = piece.shape
            yield _SoftPart(span, memory[span].view(shape), targets[span].view(shape), alpha)


def _size_of_pieces(x: Tensor) -> int:
    """Return the largest number of entries in a piece."""
    return min(max(x.numel() // PIECES, SMALLEST), LARGEST)


def _parts(x: Tensor, level: Level, target: Tensor, options: KernelOptions) -> Iterator[_Part]:
    """Divide a level into parts, each within an image."""
    blocks, num_classes, inner = level.shape
    of_image, memory = blocks // level.images, stored(x)
    layout, size = Layout(blocks, num_classes, inner), _size_of_pieces(x)
    classes = torch.arange(num_classes, device=x.device).view(-1, 1)
    for image in range(level.images if level.places else 0):
        start = level.start - image * level.places
        for piece in layout.pieces(range(image * of_image, (image + 1) * of_image), size):
            kind = target[image, start + piece.first_key : start + piece.last_key]
            kind = kind.view(piece.shape[0], 1, piece.shape[2])
            chosen = slice(piece.first_class, piece.first_class + piece.shape[1])
            weights: tuple[Tensor | float, Tensor | float] = options.weights
            if isinstance(options.alpha, Tensor):
                alpha = options.alpha[chosen].view(-1, 1)
                weights = alpha, 1 - alpha
            span = slice(piece.start, piece.stop)
            part = memory[span].view(piece.shape)
            ignored = kind == options.ignore_index
            yield _Part(image, span, part, kind == classes[chosen], ignored, weights)
