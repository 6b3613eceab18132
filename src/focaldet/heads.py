"""The head: two small towers that classify and shape every anchor of every level."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from focaldet._checks import check_choice, check_range, must_be

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["RetinaNetHead", "flatten_maps", "gather_from_map"]


class RetinaNetHead(nn.Module):
    """RetinaNet's class and box subnets, shared over levels, separate from one another.

    Each is ``depth`` 3x3 convolutions with ReLU and a last 3x3 convolution with ``A * K`` (classes)
    or ``A * 4`` (boxes) channels. The last class bias starts at ``-log((1 - prior) / prior)``, so
    that at first every anchor says "object" with probability ``prior`` and the many background
    anchors don't swamp the loss.

    Args:
        in_channels: channels of every level.
        num_anchors: anchors per cell (A).
        num_classes: foreground classes (K); there is no background channel.
        depth: convolutions before the last.
        norm: None, as in the paper, or "group" for GroupNorm after every tower convolution (which
            then has no bias), as in torchvision's second RetinaNet.
        num_groups: groups of the GroupNorm.
        prior: initial probability of "object", in (0, 1).

    Convention: channel ``a * K + k`` is class k of anchor a; channel ``a * 4 + j`` is delta j
    (dx, dy, dw, dh) of anchor a.

    Raises:
        ValueError: an option out of its range, or channels that ``num_groups`` does not divide.

    References:
        Lin et al., Focal Loss for Dense Object Detection, sections 3.3, 4, 4.1. arXiv:1708.02002.

    >>> head = RetinaNetHead(in_channels=8, num_anchors=9, num_classes=3, depth=1)
    >>> logits, box_deltas = head([torch.zeros(2, 8, 4, 5), torch.zeros(2, 8, 2, 3)])
    >>> [tuple(m.shape) for m in logits + box_deltas]
    [(2, 27, 4, 5), (2, 27, 2, 3), (2, 36, 4, 5), (2, 36, 2, 3)]
    >>> flatten_maps(logits, num_anchors=9).shape
    torch.Size([2, 234, 3])
    """

    def __init__(
        self,
        in_channels: int = 256,
        num_anchors: int = 9,
        num_classes: int = 80,
        *,
        depth: int = 4,
        norm: Literal["group"] | None = None,
        num_groups: int = 32,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        check_range("num_anchors", num_anchors, 1)
        check_range("num_classes", num_classes, 1)
        check_range("depth", depth, 0)
        check_choice("norm", norm, (None, "group"))
        if not 0 < prior < 1:
            raise ValueError(must_be("prior", "in (0, 1)", prior))
        if norm == "group" and in_channels % num_groups:
            raise ValueError(must_be("num_groups", f"a divisor of {in_channels}", num_groups))
        self.num_anchors = num_anchors
        self.num_classes = num_classes
        groups = num_groups if norm == "group" else None
        self.class_tower = _tower(in_channels, depth, groups)
        self.box_tower = _tower(in_channels, depth, groups)
        self.class_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps of every level.

        Args:
            features: ``[B, in_channels, H, W]`` each.

        Returns:
            ``logits``: ``[B, A * K, H, W]`` a level, and ``box_deltas``: ``[B, A * 4, H, W]`` a level.
        """
        logits = [self.class_logits(self.class_tower(feature)) for feature in features]
        box_deltas = [self.box_deltas(self.box_tower(feature)) for feature in features]
        return logits, box_deltas


def _tower(channels: int, depth: int, num_groups: int | None) -> nn.Sequential:
    def block() -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = nn.Conv2d(channels, channels, 3, padding=1, bias=num_groups is None)
        if num_groups is not None:
            layers["norm"] = nn.GroupNorm(num_groups, channels)
        layers["relu"] = nn.ReLU(inplace=True)
        return nn.Sequential(layers)

    return nn.Sequential(*(block() for _ in range(depth)))


def flatten_maps(maps: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Concatenate the maps of all levels into one row per anchor.

    This permutes and copies everything; losses and post-processing read the maps as they lie.

    Args:
        maps: ``[B, A * N, H, W]`` a level, as :class:`RetinaNetHead` gives them.
        num_anchors: anchors per cell (A).

    Returns:
        ``[B, R, N]``: levels in order, then rows, cells, anchors, as ``AnchorGenerator`` has them.
    """
    rows = []
    for level in maps:
        batch, channels, height, width = level.shape
        cells = level.view(batch, num_anchors, channels // num_anchors, height, width)
        rows.append(cells.permute(0, 3, 4, 1, 2).reshape(batch, -1, channels // num_anchors))
    return torch.cat(rows, dim=1)


def gather_from_map(level: Tensor, images: Tensor, anchors: Tensor, num_anchors: int) -> Tensor:
    """Pick single anchors' rows out of a map, without flattening it.

    Args:
        level: ``[B, A * N, H, W]``.
        images: ``[P]`` int64, the image of each wanted row, in ``0 .. B - 1``.
        anchors: ``[P]`` int64, its anchor within the level, in ``0 .. H * W * A - 1``.
        num_anchors: anchors per cell (A).

    Returns:
        ``[P, N]``.
    """
    batch, channels, height, width = level.shape
    cells = level.view(batch, num_anchors, channels // num_anchors, height, width)
    cell, anchor = anchors // num_anchors, anchors % num_anchors
    return cells[images, anchor, :, cell // width, cell % width]
