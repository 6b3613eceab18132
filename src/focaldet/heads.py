"""The head, which predicts class logits and box deltas for every anchor of every level."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from focaldet._checks import check_choice, check_integer, check_maps, check_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["RetinaNetHead", "flatten_maps", "gather_from_map"]

_NORMS = (None, "group", "group_with_bias", "batch")
_PAPER_STD = 0.01  # of the initial weights
_PAPER_CHANNELS = 256


class RetinaNetHead(nn.Module):
    """RetinaNet's class and box subnets, shared by all levels but not with each other.

    Each consists of ``depth`` 3x3 convolutions with ReLU and a final 3x3 convolution with ``A * K``
    channels (classes) or ``A * 4`` (boxes). The bias of the final class convolution is initialised to
    ``-log((1 - prior) / prior)``, so that every class starts with probability ``prior`` at every
    anchor and the many background anchors do not dominate the loss.

    Args:
        in_channels: Channels of every level.
        num_anchors: Number of anchors per cell (A).
        num_classes: Number of foreground classes (K). There is no background channel.
        depth: Number of convolutions before the final one.
        norm: Layer after every tower convolution: None, as in the paper; "group" for GroupNorm after
            convolutions without a bias, as in torchvision's second RetinaNet; "group_with_bias" for
            the same after convolutions with a bias, as in Detectron2; or "batch" for BatchNorm after
            convolutions without a bias. All levels share the statistics of a BatchNorm, and in
            training each level is normalised by its own.

            .. versionchanged:: 0.3.0
                Added "group_with_bias" and "batch".
        box_norm: Layer after the convolutions of the box tower, if it differs: "same" for ``norm``,
            or one of the values of ``norm``, which is then only that of the class tower.

            .. versionadded:: 0.3.0
        num_groups: Number of groups of the GroupNorm. On a map of 1x1, groups of one channel (as many
            groups as channels) leave only the bias of the norm: use at least two channels per group
            if the last levels can be that small.
        prior: Initial probability of each class, in (0, 1).
        init: Standard deviation of the initial weights, which are normal with mean 0: "paper" for 0.01
            in all convolutions, or "fan_in" for numbers that follow from ``in_channels`` (C):
            ``sqrt(2 / (9 * C))`` in the towers, and ``0.01 * sqrt(256 / C)`` in the final convolutions.

            In the towers, "fan_in" keeps the mean square of the activations from layer to layer (He et
            al.). With 0.01, each layer multiplies it by ``9 * C * 0.01**2 / 2``: 0.12 with 256
            channels, but 0.03 with 64, so that hardly anything is left after four layers without a norm.
            The final convolutions have the paper's 0.01 with 256 channels, and outputs of the same
            spread with any other number.

            .. versionadded:: 0.3.0

    Convention: channel ``a * K + k`` is class k of anchor a; channel ``a * 4 + j`` is delta j
    (dx, dy, dw, dh) of anchor a.

    Raises:
        TypeError: If a number of anchors, classes or convolutions is not an integer.
        ValueError: If an option is out of range, or ``num_groups`` does not divide ``in_channels`` and
            a tower has GroupNorm.

    References:
        Lin et al., Focal Loss for Dense Object Detection, sections 3.3, 4, 4.1. arXiv:1708.02002.
        He et al., Delving Deep into Rectifiers, section 2.2, equation 10. arXiv:1502.01852.

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
        norm: Literal["group", "group_with_bias", "batch"] | None = None,
        box_norm: Literal["same", "group", "group_with_bias", "batch"] | None = "same",
        num_groups: int = 32,
        prior: float = 0.01,
        init: Literal["paper", "fan_in"] = "paper",
    ) -> None:
        super().__init__()
        for name, count, lowest in (
            ("num_anchors", num_anchors, 1),
            ("num_classes", num_classes, 1),
            ("depth", depth, 0),
        ):
            check_integer(name, count)
            check_range(name, count, lowest)
        check_choice("norm", norm, _NORMS)
        check_choice("box_norm", box_norm, ("same", *_NORMS))
        check_choice("init", init, ("paper", "fan_in"))
        if box_norm == "same":
            box_norm = norm
        if not 0 < prior < 1:
            raise ValueError(f"prior must be in (0, 1), got {prior}.")
        if {norm, box_norm} & {"group", "group_with_bias"} and in_channels % num_groups:
            raise ValueError(
                f"num_groups must divide in_channels, but {in_channels} is not a multiple of "
                f"{num_groups}."
            )
        self.num_anchors = num_anchors
        self.num_classes = num_classes
        self.class_tower = _tower(in_channels, depth, norm, num_groups)
        self.box_tower = _tower(in_channels, depth, box_norm, num_groups)
        self.class_logits = nn.Conv2d(in_channels, num_anchors * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, num_anchors * 4, 3, padding=1)
        final = (self.class_logits, self.box_deltas)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = _PAPER_STD if init == "paper" else _fan_in_std(module, final=module in final)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps of every level.

        Args:
            features: ``[B, in_channels, H, W]`` per level.

        Returns:
            ``logits``, ``[B, A * K, H, W]`` per level, and ``box_deltas``, ``[B, A * 4, H, W]`` per
            level.

        Raises:
            TypeError: If ``features`` is a tensor.
            ValueError: If a BatchNorm that trains gets a single value per channel: one image with a
                map of 1x1.
        """
        check_maps("features", features)
        if self.training:
            self._check_batch_statistics(features)
        logits = [self.class_logits(self.class_tower(feature)) for feature in features]
        box_deltas = [self.box_deltas(self.box_tower(feature)) for feature in features]
        return logits, box_deltas

    def _check_batch_statistics(self, features: Sequence[Tensor]) -> None:
        """Raise if a BatchNorm of the towers would have to compute a variance from one value."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
        for i, feature in enumerate(features if norms else ()):
            batch, _, height, width = feature.shape
            if batch * height * width == 1:
                raise ValueError(
                    f"features[{i}] is a 1x1 map of one image, so the head's BatchNorm has one value "
                    "per channel and cannot train. Use more images per batch or larger images, or "
                    "norm='group' (head_norm of RetinaNetConfig)."
                )


class _GroupNorm(nn.GroupNorm):
    """GroupNorm that also accepts groups of a single value, whose normalised value is 0.

    ``nn.GroupNorm`` raises an error for them, but only in a batch of one image.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _fan_in_std(convolution: nn.Conv2d, *, final: bool) -> float:
    """Return the standard deviation of initial weights that suits the number of inputs."""
    if final:
        return _PAPER_STD * math.sqrt(_PAPER_CHANNELS / convolution.in_channels)
    inputs = convolution.in_channels * math.prod(convolution.kernel_size)
    return math.sqrt(2 / inputs)


def _tower(channels: int, depth: int, norm: str | None, num_groups: int) -> nn.Sequential:
    bias = norm in (None, "group_with_bias")

    def block() -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        if norm == "batch":
            layers["norm"] = nn.BatchNorm2d(channels)
        elif norm is not None:
            layers["norm"] = _GroupNorm(num_groups, channels)
        layers["relu"] = nn.ReLU(inplace=True)
        return nn.Sequential(layers)

    return nn.Sequential(*(block() for _ in range(depth)))


def flatten_maps(maps: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Concatenate the maps of all levels into one row per anchor.

    This permutes and copies all values. Losses and post-processing avoid it by reading the maps in
    their memory layout.

    Args:
        maps: ``[B, A * N, H, W]`` per level, as returned by :class:`RetinaNetHead`.
        num_anchors: Number of anchors per cell (A).

    Returns:
        ``[B, R, N]``, ordered by level, row, column and anchor, as in ``AnchorGenerator``.

    Raises:
        ValueError: If ``num_anchors`` does not divide the channels of every map.
    """
    by_anchor = [_by_anchor(level, num_anchors) for level in maps]
    rows = [cells.permute(0, 3, 4, 1, 2).flatten(1, 3) for cells in by_anchor]
    return torch.cat(rows, dim=1)


def gather_from_map(level: Tensor, images: Tensor, anchors: Tensor, num_anchors: int) -> Tensor:
    """Return the rows of some anchors from a map, without flattening it.

    Args:
        level: ``[B, A * N, H, W]``.
        images: ``[P]`` int64, the image of each row, in ``0 .. B - 1``.
        anchors: ``[P]`` int64, the anchor of each row within the level, in ``0 .. H * W * A - 1``.
        num_anchors: Number of anchors per cell (A).

    Returns:
        ``[P, N]``.

    Raises:
        ValueError: If ``num_anchors`` does not divide the channels of the map.
    """
    width = level.shape[3]
    cells = _by_anchor(level, num_anchors)
    cell, anchor = anchors // num_anchors, anchors % num_anchors
    return cells[images, anchor, :, cell // width, cell % width]


def _by_anchor(level: Tensor, num_anchors: int) -> Tensor:
    """View ``[B, A * N, H, W]`` as ``[B, A, N, H, W]``."""
    batch, channels, height, width = level.shape
    if num_anchors < 1 or channels % num_anchors:
        raise ValueError(
            f"num_anchors must divide the channels of every map, got num_anchors={num_anchors} for a "
            f"map of shape {list(level.shape)}."
        )
    return level.view(batch, num_anchors, channels // num_anchors, height, width)
