"""The sums of the focal loss in half precision on devices without kernels, piece by piece.

The loss is computed in float32. For all logits at once, PyTorch operations would keep several
float32 tensors of their size until backward, which is more memory than an implementation in half
precision uses. So nothing is kept but the logits, and the temporary tensors are those of a piece.
The functions are called like those of `focaldet.losses._triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet.losses._formula import focal, focal_derivative
from focaldet.losses._layout import Layout, stored

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
            loss = focal(part.wrong_logits(), options.gamma)
            totals[part.image] += part.weigh(loss, 1).sum()
    return totals


def gradient(
    x: Tensor, level: Level, target: Tensor, upstream: Tensor, options: KernelOptions
) -> Tensor:
    """Compute the gradient of ``(image_totals(...) * upstream).sum()`` for one level."""
    out = torch.empty_like(x)
    memory = stored(out)
    for part in _parts(x, level, target, options):
        made = part.weigh(focal_derivative(part.wrong_logits(), options.gamma), -1)
        memory[part.span].view(made.shape).copy_(made.mul_(upstream[part.image]))
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

    def wrong_logits(self) -> Tensor:
        """Return the logits of wrong predictions in float32, which are 0 where ignored."""
        x = self.x.to(torch.float32, copy=True).masked_fill_(self.ignored, 0.0)
        return torch.where(self.positive, -x, x)

    def weigh(self, values: Tensor, sign: int) -> Tensor:
        """Multiply by the weights, and by ``sign`` for positives, in place; 0 where ignored."""
        for_positives, for_background = self.weights
        positive = self.positive.float()
        factors = (1 - positive).mul_(for_background)
        factors += positive.mul_(for_positives * sign)
        return values.mul_(factors).masked_fill_(self.ignored, 0.0)


def _parts(x: Tensor, level: Level, target: Tensor, options: KernelOptions) -> Iterator[_Part]:
    """Divide a level into parts, each within an image."""
    blocks, num_classes, inner = level.shape
    of_image, memory = blocks // level.images, stored(x)
    size = min(max(x.numel() // PIECES, SMALLEST), LARGEST)
    layout = Layout(blocks, num_classes, inner)
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
