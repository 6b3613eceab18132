"""Normalisation and reduction of losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from focaldet.losses._arguments import Normalizer, Options, Reduction


def count_positives(targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Count the class indices that name a class, or sum floating-point targets."""
    if targets.is_floating_point():
        return targets.sum(dtype=torch.promote_types(targets.dtype, torch.float32))
    positive = targets >= 0
    if ignore_index >= 0:
        positive = positive & (targets != ignore_index)
    return positive.sum()


def divisor(normalizer: Normalizer, count: Callable[[], Tensor]) -> float | Tensor:
    """Return the divisor of the losses: ``normalizer``, or ``count()`` positives but at least 1.

    ``"num_pos_all_ranks"`` gives the mean count over the ranks, not the sum. Data-parallel training
    averages gradients over the ranks, so that in effect the sum of all losses is divided by the sum
    of all counts.
    """
    if normalizer is None:
        return 1.0
    if not isinstance(normalizer, str):
        return normalizer
    positives = count()
    ranks = torch.distributed
    if normalizer == "num_pos_all_ranks" and ranks.is_available() and ranks.is_initialized():
        positives = positives.detach().to(torch.float32, copy=True)
        ranks.all_reduce(positives)
        positives = positives / ranks.get_world_size()
    return positives.clamp(min=1)


def reduce(losses: Tensor, reduction: Reduction, count: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Return the sum, the mean over ``count`` entries (0 if none), or all losses in ``dtype``."""
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def reduce_images(totals: Tensor, targets: Tensor, options: Options, num_classes: int) -> Tensor:
    """Divide the sums of the losses of each image, ``[B]``, and add them up.

    Args:
        totals: The sums.
        targets: All class indices.
        options: A normalizer with several elements has one per image. The reduction is "mean" or
            "sum".
        num_classes: Entries per class index.
    """
    ignored = options.ignore_index
    divided = divisor(options.normalizer, lambda: count_positives(targets, ignored))
    if isinstance(divided, Tensor) and divided.ndim:
        divided = divided.to(totals.dtype).view(-1)
    total = (totals / divided).sum()
    if options.reduction == "mean":
        total = total / ((targets != ignored).sum() * num_classes).clamp(min=1)
    return total
