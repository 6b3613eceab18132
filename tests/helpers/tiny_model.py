"""A detector of a few thousand parameters, with a custom backbone."""

from __future__ import annotations

from torch import Tensor, nn

from focaldet import RetinaNetConfig

__all__ = ["TINY_CONFIG", "TinyBackbone"]


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
