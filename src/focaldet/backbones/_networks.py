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
        channels: The number of channels of each map; of C3, C4 and C5 for the default levels.
        strides: The stride of each map, in pixels, from the finest to the coarsest.

    .. versionchanged:: 0.3.0
        There can be any number of maps: as many as there are levels up to 5 in the config.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Map ``[B, C, H, W]`` images to a list of maps, ``[B, C, H, W]`` each."""


class ResNet(nn.Module):
    """C3, C4 and C5 of a torchvision ResNet or ResNeXt: the outputs of its last three stages.

    Args:
        network: A ``torchvision.models.ResNet``. Its pooling and classifier are left out, as are stages
            above the last level.
        levels: The levels of the maps to return, ascending numbers in [1, 5]. 2 is the output of the
            first stage of blocks, and 1 that of the first convolution.

            .. versionadded:: 0.3.0

    References:
        He et al., Deep Residual Learning. CVPR 2016. arXiv:1512.03385.
    """

    def __init__(self, network: nn.Module, levels: Sequence[int] = (3, 4, 5)) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.strides = tuple(2**level for level in self.levels)
        self.conv1 = network.get_submodule("conv1")
        self.bn1 = network.get_submodule("bn1")
        self.relu = network.get_submodule("relu")
        self.maxpool = network.get_submodule("maxpool")
        for name in self._layer_names():
            self.add_module(name, network.get_submodule(name))
        self.channels = tuple(
            _last_conv(
                self.conv1 if level == 1 else getattr(self, f"layer{level - 1}")
            ).out_channels
            for level in self.levels
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map ``[B, C, H, W]`` images to C3, C4 and C5, or to the maps of ``levels``."""
        stem = self.relu(self.bn1(self.conv1(images)))
        maps = [stem] if 1 in self.levels else []
        x = self.maxpool(stem)
        for level, name in enumerate(self._layer_names(), 2):
            x = getattr(self, name)(x)
            if level in self.levels:
                maps.append(x)
        return maps

    def _layer_names(self) -> list[str]:
        return [f"layer{level - 1}" for level in range(2, self.levels[-1] + 1)]

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules of the five stages, first to last. Those above the last level are empty."""
        layers = [[getattr(self, name)] for name in self._layer_names()]
        return [[self.conv1, self.bn1], *layers, *([] for _ in range(4 - len(layers)))]


class MobileNet(nn.Module):
    """C3, C4 and C5 of a torchvision MobileNet: its last maps of stride 8, 16 and 32.

    The last 1x1 convolution, which widens C5 for the classifier, is left out.

    Args:
        network: A ``torchvision.models.MobileNetV2`` or ``MobileNetV3``.
        ends: For each of the five strides, the index in ``features`` of its last block.
        levels: The levels of the maps to return, ascending numbers in [1, 5]. Blocks above the last one
            are left out.

            .. versionadded:: 0.3.0

    References:
        Sandler et al., MobileNetV2. CVPR 2018. arXiv:1801.04381.
        Howard et al., Searching for MobileNetV3. ICCV 2019. arXiv:1905.02244.
    """

    def __init__(
        self, network: nn.Module, ends: Sequence[int], levels: Sequence[int] = (3, 4, 5)
    ) -> None:
        super().__init__()
        self.ends = tuple(ends)
        self.levels = tuple(levels)
        self.strides = tuple(2**level for level in self.levels)
        self._returned = tuple(ends[level - 1] for level in self.levels)
        features = network.get_submodule("features")
        self.features = nn.Sequential(*list(features.children())[: self._returned[-1] + 1])
        self.channels = tuple(_last_conv(self.features[i]).out_channels for i in self._returned)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map ``[B, C, H, W]`` images to C3, C4 and C5, or to the maps of ``levels``."""
        maps = []
        x = images
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self._returned:
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
