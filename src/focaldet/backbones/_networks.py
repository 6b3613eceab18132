"""What a backbone is, and the two kinds of torchvision's networks that are used as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Backbone", "MobileNet", "ResNet"]


@runtime_checkable
class Backbone(Protocol):
    """What the detector needs of a backbone.

    Attributes:
        channels: The numbers of channels of C3, C4 and C5.
        strides: The strides of C3, C4 and C5, in pixels.
    """

    channels: tuple[int, int, int]
    strides: tuple[int, int, int]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Map ``[B, C, H, W]`` images to C3, C4 and C5, ``[B, C, H, W]`` each."""


class ResNet(nn.Module):
    """C3, C4 and C5 of a torchvision ResNet or ResNeXt: the outputs of its last three stages.

    Args:
        network: A ``torchvision.models.ResNet``. Its pooling and classifier are left out.

    References:
        He et al., Deep Residual Learning. CVPR 2016. arXiv:1512.03385.
    """

    strides = (8, 16, 32)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.conv1 = network.get_submodule("conv1")
        self.bn1 = network.get_submodule("bn1")
        self.relu = network.get_submodule("relu")
        self.maxpool = network.get_submodule("maxpool")
        self.layer1 = network.get_submodule("layer1")
        self.layer2 = network.get_submodule("layer2")
        self.layer3 = network.get_submodule("layer3")
        self.layer4 = network.get_submodule("layer4")
        widths = [
            _last_conv(stage).out_channels for stage in (self.layer2, self.layer3, self.layer4)
        ]
        self.channels = (widths[0], widths[1], widths[2])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map ``[B, C, H, W]`` images to C3, C4 and C5."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the five stages, first to last."""
        return [
            [self.conv1, self.bn1],
            [self.layer1],
            [self.layer2],
            [self.layer3],
            [self.layer4],
        ]


class MobileNet(nn.Module):
    """C3, C4 and C5 of a torchvision MobileNet: its last maps of stride 8, 16 and 32.

    The last 1x1 convolution, which widens C5 for the classifier, is left out.

    Args:
        network: A ``torchvision.models.MobileNetV2`` or ``MobileNetV3``.
        ends: For each of the five strides, the index in ``features`` of its last block.

    References:
        Sandler et al., MobileNetV2. CVPR 2018. arXiv:1801.04381.
        Howard et al., Searching for MobileNetV3. ICCV 2019. arXiv:1905.02244.
    """

    strides = (8, 16, 32)

    def __init__(self, network: nn.Module, ends: Sequence[int]) -> None:
        super().__init__()
        self.ends = tuple(ends)
        features = network.get_submodule("features")
        self.features = nn.Sequential(*list(features.children())[: ends[-1] + 1])
        widths = [_last_conv(self.features[i]).out_channels for i in ends[2:]]
        self.channels = (widths[0], widths[1], widths[2])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map ``[B, C, H, W]`` images to C3, C4 and C5."""
        maps = []
        x = images
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.ends[2:]:
                maps.append(x)
        return maps

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the five stages, first to last: the blocks of one stride each."""
        starts = (0, *(end + 1 for end in self.ends))
        blocks = list(self.features)
        return [blocks[start : end + 1] for start, end in zip(starts, self.ends, strict=False)]


def _last_conv(stage: nn.Module) -> nn.Conv2d:
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1]
