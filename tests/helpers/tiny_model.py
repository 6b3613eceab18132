"""A detector of a few thousand parameters, with a custom backbone."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from focaldet import RetinaNetConfig

__all__ = ["TINY_CONFIG", "MapsBackbone", "TinyBackbone"]


class TinyBackbone(nn.Module):
    """A backbone of a few hundred parameters."""

    channels = (2, 3, 4)
    strides = (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.c3 = nn.Conv2d(3, 2, 8, stride=8)
        self.c4 = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.c5 = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        c3 = self.c3(images).relu()
        c4 = self.c4(c3).relu()
        return [c3, c4, self.c5(c4)]


class MapsBackbone(nn.Module):
    """A backbone of any number of maps, with a BatchNorm after the first convolution."""

    def __init__(self, channels: tuple[int, ...], first_stride: int = 8) -> None:
        super().__init__()
        self.channels = channels
        self.strides = tuple(first_stride * 2**i for i in range(len(channels)))
        first = nn.Conv2d(3, channels[0], first_stride, stride=first_stride)
        self.first = nn.Sequential(first, nn.BatchNorm2d(channels[0]), nn.ReLU())
        self.others = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in itertools.pairwise(channels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.first(images)]
        for conv in self.others:
            maps.append(conv(maps[-1].relu()))
        return maps


TINY_CONFIG = RetinaNetConfig(
    num_classes=2,
    class_names=("cat", "owl"),
    backbone="custom",
    fpn_channels=4,
    head_depth=1,
    min_size=64,
    max_size=96,
    score_threshold=0.0,
    max_detections=20,
)
