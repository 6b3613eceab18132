"""The output of a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RetinaNetOutput"]


class RetinaNetOutput(NamedTuple):
    """The output of one forward pass, the same in training and evaluation mode.

    Attributes:
        logits: ``[B, A * K, H, W]`` per level; channel ``a * K + k`` is class k of anchor a.
        box_deltas: ``[B, A * 4, H, W]`` per level.
        anchors: ``[H * W * A, 4]`` per level, xyxy in pixels of the batch.
        sizes: ``(height, width)`` of each image in the batch, without padding.
        original_sizes: ``(height, width)`` of each input image.
        losses: "classification" and "box_regression", scalars. None without targets.
    """

    logits: list[Tensor]
    box_deltas: list[Tensor]
    anchors: list[Tensor]
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    losses: dict[str, Tensor] | None
