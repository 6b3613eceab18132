"""Backbones: feature extractors that give C3, C4 and C5.

A backbone is one of :data:`BACKBONES`, built by torchvision; one of timm's networks, named
``"timm/NAME"``; or any ``nn.Module`` that returns a list of maps and has ``channels`` and ``strides``
(see :class:`Backbone`)::

    RetinaNetConfig(num_classes=3, backbone="resnet101")
    RetinaNetConfig(num_classes=3, backbone="timm/convnext_tiny")  # extra timm
    RetinaNet.from_config(RetinaNetConfig(num_classes=3), backbone=MyBackbone())
"""

from __future__ import annotations

import difflib
import functools
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from focaldet._checks import check_choice, check_integer, check_range
from focaldet._padding import SameConv2d, SameMaxPool2d
from focaldet.backbones._imagenet import ImageNetWeights, of_timm, of_torchvision
from focaldet.backbones._networks import Backbone, MobileNet, ResNet
from focaldet.backbones._norms import FrozenBatchNorm2d
from focaldet.backbones._table import ROWS, BackboneSpec
from focaldet.backbones._timm import TimmBackbone, timm_key
from focaldet.backbones._weights import (
    adapt_input_channels,
    adapt_to_input,
    load_weights,
    replace_first_convolution,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSpec",
    "FrozenBatchNorm2d",
    "ImageNetWeights",
    "MobileNet",
    "NamedBackbone",
    "ResNet",
    "TimmBackbone",
    "adapt_input_channels",
    "adapt_to_input",
    "build_backbone",
    "freeze_stages",
    "imagenet_weights",
    "load_backbone_weights",
]

BACKBONES: dict[str, BackboneSpec] = {spec.name: spec for spec in ROWS}
"""The torchvision backbones known by name. Those of timm are named ``"timm/NAME"``.

:meta hide-value:
"""

NamedBackbone: TypeAlias = ResNet | MobileNet | TimmBackbone
"""A backbone that was built by name. It has five ``stages``.

.. versionadded:: 0.3.0
"""

_TIMM = "timm/"


def build_backbone(
    name: str,
    *,
    norm: Literal["frozen", "batch"] = "frozen",
    norm_eps: float | None = None,
    stride_in_1x1: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    in_channels: int = 3,
    strided_padding: Literal["symmetric", "same"] = "symmetric",
    levels: Sequence[int] = (3, 4, 5),
) -> NamedBackbone:
    """Build a backbone by name.

    Args:
        name: One of :data:`BACKBONES`, or ``"timm/NAME"`` for a network of timm (extra ``timm``); see
            :class:`TimmBackbone`.
        norm: "frozen" for BatchNorm with fixed statistics and scales, "batch" for BatchNorm that
            trains. Other norms are not affected.
        norm_eps: The constant added to variances. None uses the network's default, which is 1e-5
            for all of torchvision's but MobileNetV3 (1e-3).
        stride_in_1x1: Whether the first 1x1 convolution of a stage's first block has the stride, as
            in the ResNet paper and Caffe's weights, instead of the 3x3 convolution. Only for
            torchvision's ResNets and ResNeXts with three convolutions per block.
        weights: The state dict of a classifier as torchvision or timm names its keys; of a
            torchvision MobileNet, ``features`` alone will do. Entries of the classifier are ignored,
            and RGB weights are adapted to ``in_channels`` by :func:`adapt_input_channels`. None starts
            at random, which is of little use with frozen BatchNorm.
        in_channels: The number of channels of the images.

            .. versionadded:: 0.3.0

        strided_padding: How the first convolution and the pooling pad maps with an even side:
            "symmetric", as in PyTorch, or "same", with one row or column less before, as in
            keras-resnet. Only for torchvision's ResNets and ResNeXts.

            .. versionadded:: 0.3.0

        levels: The levels of the maps to return, ascending numbers in [1, 5]. The map of level l has
            stride ``2**l``. What lies above the last of them is not built.

            .. versionadded:: 0.3.0

    Raises:
        ImportError: If a backbone of timm is named and timm is not installed.
        TypeError: If ``in_channels`` or a level is not an integer.
        ValueError: If the name is unknown, an option is out of range, or the weights do not fit.

    >>> build_backbone("resnet18").channels
    (128, 256, 512)
    >>> build_backbone("resnet18", levels=(2, 3, 4)).strides
    (4, 8, 16)
    """
    check_choice("norm", norm, ("frozen", "batch"))
    check_choice("strided_padding", strided_padding, ("symmetric", "same"))
    if norm_eps is not None:
        check_range("norm_eps", norm_eps, 0)
    check_integer("in_channels", in_channels)
    check_range("in_channels", in_channels, 1)
    _check_levels(levels)
    backbone: NamedBackbone
    if name.startswith(_TIMM):
        if stride_in_1x1:
            raise ValueError(_no_stride_to_move(name))
        timm_name = name.removeprefix(_TIMM)
        backbone = TimmBackbone(
            timm_name, norm=norm, norm_eps=norm_eps, in_channels=in_channels, levels=levels
        )
    else:
        backbone = _build_torchvision(name, norm, norm_eps, levels)
        if in_channels != 3:
            replace_first_convolution(backbone, in_channels)
        if stride_in_1x1:
            _move_strides(backbone, name)
    if strided_padding == "same":
        if not isinstance(backbone, ResNet):
            raise ValueError(
                f"strided_padding is 'same', but {name!r} is not a torchvision ResNet; leave it "
                "'symmetric'."
            )
        _pad_as_tensorflow(backbone)
    if weights is not None:
        load_backbone_weights(backbone, name, weights)
    return backbone


def _check_levels(levels: Sequence[int]) -> None:
    for i, level in enumerate(levels):
        check_integer(f"levels[{i}]", level)
        check_range(f"levels[{i}]", level, 1, 5)
    if not levels or list(levels) != sorted(set(levels)):
        raise ValueError(f"levels must be ascending numbers in [1, 5], got {tuple(levels)}.")


def _build_torchvision(
    name: str, norm: str, norm_eps: float | None, levels: Sequence[int]
) -> ResNet | MobileNet:
    spec = _spec(name)
    eps = spec.norm_eps if norm_eps is None else norm_eps
    norm_layer: Callable[..., nn.Module]
    if norm == "frozen":
        norm_layer = functools.partial(FrozenBatchNorm2d, eps=eps)
    else:
        norm_layer = functools.partial(nn.BatchNorm2d, eps=eps, momentum=spec.norm_momentum)
    return spec(spec.network(norm_layer=norm_layer), levels)


def _spec(name: str) -> BackboneSpec:
    if name in BACKBONES:
        return BACKBONES[name]
    close = difflib.get_close_matches(name, BACKBONES, n=2, cutoff=0.7)
    hint = f"did you mean {' or '.join(map(repr, close))}? Choose" if close else "choose"
    raise ValueError(
        f"Unknown backbone {name!r}; {hint} {', '.join(map(repr, BACKBONES))}, 'timm/NAME' "
        "for a network of timm, or 'custom' for a module of your own."
    )


def _pad_as_tensorflow(backbone: ResNet) -> None:
    """Replace the two layers of the stem. keras-resnet pads the layers of the blocks symmetrically."""
    conv: Any = backbone.conv1
    pool: Any = backbone.maxpool
    backbone.conv1 = SameConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False
    )
    backbone.maxpool = SameMaxPool2d(pool.kernel_size, pool.stride, pool.padding)


def _move_strides(backbone: nn.Module, name: str) -> None:
    blocks = [module for module in backbone.modules() if hasattr(module, "conv3")]
    if not blocks:
        raise ValueError(_no_stride_to_move(name))
    for block in blocks:
        first, second = block.get_submodule("conv1"), block.get_submodule("conv2")
        first.stride, second.stride = second.stride, first.stride


def _no_stride_to_move(name: str) -> str:
    return (
        f"stride_in_1x1 is True, but {name!r} is not a torchvision ResNet with three convolutions "
        "per block; leave it False."
    )


def imagenet_weights(name: str) -> ImageNetWeights:
    """Return where the ImageNet weights of a backbone are published. Nothing is downloaded.

    ``RetinaNet.from_config(config, backbone_weights="imagenet")`` downloads and loads them.

    Args:
        name: One of :data:`BACKBONES`, for the weights ``IMAGENET1K_V1`` of torchvision; or
            ``"timm/NAME"``, for timm's default weights of that network, or those of the tag in a name
            such as ``"timm/convnext_tiny.fb_in22k"``.

    Raises:
        ImportError: If a backbone of timm is named and timm is not installed.
        ValueError: If the name is unknown, or no weights are published for it.

    .. versionadded:: 0.3.0

    >>> imagenet_weights("resnet18").file_name
    'resnet18-f37072fd.pth'
    """
    if name.startswith(_TIMM):
        return of_timm(name.removeprefix(_TIMM))
    return of_torchvision(_spec(name))


def load_backbone_weights(
    backbone: NamedBackbone,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    argument: str = "weights",
) -> None:
    """Load a classifier's weights into a backbone that was built by name.

    Args:
        backbone: The backbone.
        name: The name that it was built by.
        weights: The state dict; see :func:`build_backbone`.
        argument: What error messages call the weights.

    Raises:
        ValueError: If keys are missing or shapes differ.

    .. versionadded:: 0.3.0
    """
    if isinstance(backbone, TimmBackbone):
        load_weights(argument, backbone.body, weights, description=name, rename=timm_key)
    else:
        description = f"a torchvision {name}"
        load_weights(argument, backbone, weights, description=description, rename=_torchvision_key)


def _torchvision_key(key: str, wanted: Mapping[str, object]) -> str:
    """Put the prefix before the keys of a MobileNet's ``features`` that were saved alone."""
    return key if key in wanted else f"features.{key}"


def freeze_stages(backbone: NamedBackbone, trainable_stages: int) -> None:
    """Make the last stages of a backbone trainable and freeze the parameters of the others.

    The running statistics of BatchNorm that trains (``norm="batch"``) still follow the data in frozen
    stages, as in torchvision.

    Args:
        backbone: A backbone built by name.
        trainable_stages: The number of stages that train, from 0 to 5, counted from the last one
            back. 5 trains everything.

    Raises:
        ValueError: If ``trainable_stages`` is out of range.
    """
    check_range("trainable_stages", trainable_stages, 0, 5)
    stages: Sequence[Sequence[nn.Module | nn.Parameter]] = backbone.stages
    frozen = len(stages) - trainable_stages
    for index, stage in enumerate(stages):
        for part in stage:
            part.requires_grad_(index >= frozen)
