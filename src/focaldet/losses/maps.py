"""The sigmoid focal loss of a dense head's maps, read as they lie in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet._checks import must_be
from focaldet.losses import _arguments as arguments
from focaldet.losses._formula import sigmoid_focal_entries
from focaldet.losses._reduction import count_positives, divisor
from focaldet.losses.sigmoid import sigmoid_focal_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.losses._arguments import Normalizer, Reduction


def sigmoid_focal_loss_maps(
    maps: Sequence[Tensor],
    targets: Tensor,
    *,
    num_classes: int,
    alpha: Tensor | float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    ignore_index: int = -100,
) -> Tensor:
    """Sigmoid focal loss of the maps of a dense head."""
    arguments.check_options(alpha, gamma, reduction, normalizer)
    arguments.check_alpha_size(alpha, num_classes)
    check_maps(maps, targets, num_classes, normalizer)
    if reduction == "none":
        rows = torch.cat([_rows(m, num_classes) for m in maps], 1)
        if isinstance(normalizer, Tensor) and normalizer.ndim:
            rows_loss = sigmoid_focal_loss(
                rows.movedim(-1, 1), targets, alpha=alpha, gamma=gamma,
                reduction="none", ignore_index=ignore_index,
            )
            return rows_loss.movedim(1, -1) / normalizer.view(-1, 1, 1)
        return sigmoid_focal_loss(
            rows.movedim(-1, 1), targets, alpha=alpha, gamma=gamma, reduction="none",
            normalizer=normalizer, ignore_index=ignore_index,
        ).movedim(1, -1)
    arguments.check_indices(targets, num_classes, ignore_index)
    total: Tensor | float = 0.0
    scale = divisor(normalizer, lambda: count_positives(targets, ignore_index))
    if isinstance(scale, Tensor) and scale.ndim:
        scale = scale.view(-1, 1, 1, 1, 1)
    start = 0
    for m in maps:
        batch, channels, height, width = m.shape
        anchors = channels // num_classes
        stop = start + height * width * anchors
        level = targets[:, start:stop].view(batch, height, width, anchors).permute(0, 3, 1, 2)
        x = m.unflatten(1, (anchors, num_classes))
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        weights = alpha.to(x.dtype).view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
        losses = sigmoid_focal_entries(
            x, level, alpha=weights, gamma=gamma, ignore_index=ignore_index, dim=2
        )
        total = total + (losses / scale).sum()
        start = stop
    assert isinstance(total, Tensor)
    if reduction == "mean":
        total = total / ((targets != ignore_index).sum() * num_classes).clamp(min=1)
    return total


def _rows(m: Tensor, num_classes: int) -> Tensor:
    """``[B, A*K, H, W]`` -> ``[B, H*W*A, K]``."""
    return m.unflatten(1, (-1, num_classes)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def check_maps(
    maps: Sequence[Tensor], targets: Tensor, num_classes: int, normalizer: Normalizer
) -> None:
    """Raise unless the maps have one batch and whole anchors, and the targets fit them."""
    if not maps:
        raise ValueError(must_be("maps", "at least one tensor", "none"))
    rows = 0
    for i, m in enumerate(maps):
        name = f"maps[{i}]"
        arguments.check_logits(name, m)
        if m.ndim != 4 or m.shape[0] != maps[0].shape[0] or m.shape[1] % num_classes:
            condition = f"of shape [{maps[0].shape[0]}, A*{num_classes}, H, W]"
            raise ValueError(must_be(name, condition, list(m.shape)))
        rows += m.numel() // num_classes
    batch = maps[0].shape[0]
    if targets.is_floating_point():
        raise TypeError(must_be("targets", "class indices (int64)", targets.dtype))
    arguments.check_target_type(maps[0], targets)
    if list(targets.shape) != [batch, rows // max(batch, 1)]:
        condition = f"of shape [{batch}, {rows // max(batch, 1)}], one index for each anchor"
        raise ValueError(must_be("targets", condition, list(targets.shape)))
    if isinstance(normalizer, Tensor) and normalizer.shape not in ((), (1,), (batch,)):
        condition = f"one number or one an image, [{batch}]"
        raise ValueError(must_be("normalizer", condition, list(normalizer.shape)))
