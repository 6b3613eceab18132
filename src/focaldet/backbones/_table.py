"""The table of the backbones known by name, with what is special about each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from focaldet._torchvision import torchvision
from focaldet.backbones._networks import MobileNet, ResNet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

__all__ = ["ROWS", "BackboneSpec"]


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """How one of torchvision's networks becomes a backbone. Called with the network, it makes it one.

    Args:
        name: The name in :data:`focaldet.backbones.BACKBONES`.
        network: Builds torchvision's network with random weights, given its ``norm_layer``.
        extract: Takes the maps of some levels from the network.
        norm_eps: The network's default for the constant added to variances.
        norm_momentum: The momentum of the running statistics, if BatchNorm trains.
        weights: The class in ``torchvision.models`` that lists pretrained weights, if there is one.

    .. versionadded:: 0.3.0
    """

    name: str
    network: Callable[..., nn.Module]
    extract: Callable[..., ResNet | MobileNet]
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    weights: str | None = None

    def __call__(self, network: nn.Module, levels: Sequence[int] = (3, 4, 5)) -> ResNet | MobileNet:
        """Take C3, C4 and C5, or the maps of other levels, from a torchvision network of this name."""
        return self.extract(network, levels=levels)


def _builder(name: str) -> Callable[..., nn.Module]:
    return functools.partial(torchvision.models.get_model, name, weights=None)


def _resnext101_32x4d(*, norm_layer: Callable[..., nn.Module]) -> nn.Module:
    resnet = torchvision.models.resnet
    network: nn.Module = resnet.ResNet(
        resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=norm_layer
    )
    return network


def _resnet(name: str, weights: str) -> BackboneSpec:
    return BackboneSpec(name=name, network=_builder(name), extract=ResNet, weights=weights)


ROWS = (
    _resnet("resnet18", "ResNet18_Weights"),
    _resnet("resnet34", "ResNet34_Weights"),
    _resnet("resnet50", "ResNet50_Weights"),
    _resnet("resnet101", "ResNet101_Weights"),
    _resnet("resnet152", "ResNet152_Weights"),
    _resnet("resnext50_32x4d", "ResNeXt50_32X4D_Weights"),
    BackboneSpec(  # torchvision has its classes, but no builder and no weights
        name="resnext101_32x4d", network=_resnext101_32x4d, extract=ResNet
    ),
    _resnet("resnext101_32x8d", "ResNeXt101_32X8D_Weights"),
    _resnet("resnext101_64x4d", "ResNeXt101_64X4D_Weights"),
    BackboneSpec(
        name="mobilenet_v2",
        network=_builder("mobilenet_v2"),
        extract=functools.partial(MobileNet, ends=(1, 3, 6, 13, 17)),
        weights="MobileNet_V2_Weights",
    ),
    BackboneSpec(
        name="mobilenet_v3_large",
        network=_builder("mobilenet_v3_large"),
        extract=functools.partial(MobileNet, ends=(1, 3, 6, 12, 15)),
        norm_eps=1e-3,
        norm_momentum=0.01,
        weights="MobileNet_V3_Large_Weights",
    ),
)
