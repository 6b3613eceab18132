"""Backbones: feature extractors that give C3, C4 and C5, built by torchvision.

Any ``nn.Module`` does that returns three maps and has ``channels`` and ``strides``. One of timm's,
for example, with an adapter of five lines::

    class Timm(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.body = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1))
            self.channels = tuple(self.body.feature_info.channels())
            self.strides = tuple(self.body.feature_info.reduction())

        def forward(self, images):
            return self.body(images)


    model = RetinaNet.from_config(
        RetinaNetConfig(num_classes=3, backbone="custom"), backbone=Timm("convnext_tiny")
    )
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from focaldet._checks import check_choice, check_range, must_be
from focaldet._torchvision import torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "BACKBONES",
    "Backbone",
    "FrozenBatchNorm2d",
    "MobileNet",
    "ResNet",
    "build_backbone",
    "freeze_stages",
]


@runtime_checkable
class Backbone(Protocol):
    """What the detector asks of a backbone.

    Attributes:
        channels: of C3, C4, C5.
        strides: of C3, C4, C5, in pixels.
    """

    channels: tuple[int, int, int]
    strides: tuple[int, int, int]

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Map ``[B, 3, H, W]`` to C3, C4, C5, ``[B, C, H, W]`` each."""


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):  # type: ignore[misc]  # has no types
    """torchvision's BatchNorm of fixed statistics and scales, in one pass over the map, not two.

    Deviation: a map in half precision, as under autocast, stays so, while its scales are float32;
    torchvision's becomes float32.

    >>> norm = FrozenBatchNorm2d(3)
    >>> norm(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` maps."""
        if x.dtype != self.weight.dtype:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # Unlike batch_norm this keeps no map for the backward pass.
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class ResNet(nn.Module):
    """C3..C5 of a torchvision ResNet or ResNeXt: the outputs of its last three stages.

    Args:
        network: a ``torchvision.models.ResNet``; its pooling and classifier are left out.

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
        """Map ``[B, 3, H, W]`` to C3, C4, C5."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The five stages, first to last."""
        return [
            [self.conv1, self.bn1],
            [self.layer1],
            [self.layer2],
            [self.layer3],
            [self.layer4],
        ]


class MobileNet(nn.Module):
    """C3..C5 of a torchvision MobileNet: its last maps of stride 8, 16 and 32.

    The last 1x1 convolution, which widens C5 for the classifier, is left out.

    Args:
        network: a ``torchvision.models.MobileNetV2`` or ``MobileNetV3``.
        ends: index in ``features`` of the last block of each of the five strides.

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
        """Map ``[B, 3, H, W]`` to C3, C4, C5."""
        maps = []
        x = images
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.ends[2:]:
                maps.append(x)
        return maps

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The five stages, first to last: the blocks of one stride each."""
        starts = (0, *(end + 1 for end in self.ends))
        blocks = list(self.features)
        return [blocks[start : end + 1] for start, end in zip(starts, self.ends, strict=False)]


def _last_conv(stage: nn.Module) -> nn.Conv2d:
    return [module for module in stage.modules() if isinstance(module, nn.Conv2d)][-1]


_MOBILENET_V2_ENDS = (1, 3, 6, 13, 17)
_MOBILENET_V3_ENDS = (1, 3, 6, 12, 15)

BACKBONES: dict[str, Callable[[nn.Module], ResNet | MobileNet]] = {
    "resnet18": ResNet,
    "resnet34": ResNet,
    "resnet50": ResNet,
    "resnet101": ResNet,
    "resnet152": ResNet,
    "resnext50_32x4d": ResNet,
    "resnext101_32x4d": ResNet,
    "resnext101_32x8d": ResNet,
    "resnext101_64x4d": ResNet,
    "mobilenet_v2": functools.partial(MobileNet, ends=_MOBILENET_V2_ENDS),
    "mobilenet_v3_large": functools.partial(MobileNet, ends=_MOBILENET_V3_ENDS),
}
"""The backbones known by name: those of torchvision's builders, and a ResNeXt of its classes."""


def build_backbone(
    name: str,
    *,
    norm: Literal["frozen", "batch"] = "frozen",
    norm_eps: float | None = None,
    stride_in_1x1: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> ResNet | MobileNet:
    """Build a backbone by name.

    Args:
        name: one of :data:`BACKBONES`.
        norm: "frozen" for BatchNorm with fixed statistics and scales, "batch" for one that trains.
        norm_eps: added to the variances; None takes the builder's default (1e-5, and 1e-3 for
            MobileNetV3).
        stride_in_1x1: halve a stage's maps in the first 1x1 convolution of its first block, as the
            ResNet paper and Caffe's weights do, rather than in its 3x3 convolution. Only for ResNets
            and ResNeXts of three convolutions a block.
        weights: a classifier's state dict in torchvision's key names, whole or ``features`` alone;
            entries for the classifier are left out. None starts at random, which a frozen
            BatchNorm does not survive in training.

    Raises:
        ValueError: an unknown name or option, or weights of another architecture.

    >>> build_backbone("resnet18").channels
    (128, 256, 512)
    """
    check_choice("name", name, BACKBONES)
    check_choice("norm", norm, ("frozen", "batch"))
    eps = norm_eps if norm_eps is not None else (1e-3 if name == "mobilenet_v3_large" else 1e-5)
    check_range("norm_eps", eps, 0)
    norm_layer: Callable[..., nn.Module]
    if norm == "frozen":
        norm_layer = functools.partial(FrozenBatchNorm2d, eps=eps)
    elif name == "mobilenet_v3_large":
        norm_layer = functools.partial(nn.BatchNorm2d, eps=eps, momentum=0.01)
    else:
        norm_layer = functools.partial(nn.BatchNorm2d, eps=eps)
    backbone = BACKBONES[name](_network(name, norm_layer))
    if stride_in_1x1:
        _move_strides(backbone, name)
    if weights is not None:
        _load_classifier_weights(backbone, name, weights)
    return backbone


def _network(name: str, norm_layer: Callable[..., nn.Module]) -> nn.Module:
    if name == "resnext101_32x4d":  # has no builder
        resnet = torchvision.models.resnet
        network: nn.Module = resnet.ResNet(
            resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=norm_layer
        )
    else:
        network = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
    return network


def _move_strides(backbone: nn.Module, name: str) -> None:
    blocks = [module for module in backbone.modules() if hasattr(module, "conv3")]
    if not blocks:
        condition = "False for a backbone without blocks of three convolutions"
        raise ValueError(must_be("stride_in_1x1", condition, f"True for {name!r}"))
    for block in blocks:
        first, second = block.get_submodule("conv1"), block.get_submodule("conv2")
        first.stride, second.stride = second.stride, first.stride


def _load_classifier_weights(backbone: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    wanted = backbone.state_dict()
    if not any(key in weights for key in wanted):  # ``features`` saved alone has no prefix
        weights = {f"features.{key}": value for key, value in weights.items()}
    kept = {key: value for key, value in weights.items() if key in wanted}
    optional = ("num_batches_tracked",)
    missing = sorted(k for k in wanted.keys() - kept.keys() if not k.endswith(optional))
    misshapen = sorted(k for k, v in kept.items() if v.shape != wanted[k].shape)
    if missing or misshapen:
        few = ", ".join((missing or misshapen)[:3])
        got = f"{len(missing)} keys missing, {len(misshapen)} of another shape ({few}, …)"
        raise ValueError(must_be("weights", f"those of a torchvision {name}", got))
    backbone.load_state_dict(kept, strict=False)


def freeze_stages(backbone: ResNet | MobileNet, trainable_stages: int) -> None:
    """Let the last stages of a backbone train, and freeze the parameters of the others.

    The running statistics of a BatchNorm that trains ("batch") go on moving in frozen stages, as
    in torchvision.

    Args:
        backbone: a backbone built by name.
        trainable_stages: 0 to 5, counted from the last one back; 5 trains everything.

    Raises:
        ValueError: ``trainable_stages`` out of its range.
    """
    check_range("trainable_stages", trainable_stages, 0, 5)
    frozen = len(backbone.stages) - trainable_stages
    for index, stage in enumerate(backbone.stages):
        for module in stage:
            module.requires_grad_(requires_grad=index >= frozen)
