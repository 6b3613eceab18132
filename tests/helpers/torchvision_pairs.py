"""Small torchvision RetinaNets of several architectures, each with its drop-in of the same weights."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focaldet import torchvision as drop_in
from tests.helpers.reference_torchvision import everything_of

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"min_size": 64, "max_size": 96}


CHANNELS = 64  # of the pyramid; torchvision's builders use 256


def resnet() -> Any:
    """ResNet-18 with P3 to P7, as torchvision's builders make it of a ResNet-50, but narrower."""
    return backbone_utils.BackboneWithFPN(
        models.resnet18(weights=None),
        {f"layer{stage}": str(stage - 2) for stage in (2, 3, 4)},
        [128, 256, 512],
        CHANNELS,
        LastLevelP6P7(CHANNELS, CHANNELS),
    )


def mobilenet() -> Any:
    """MobileNetV3 with the pyramid of torchvision's ``mobilenet_backbone``."""
    return backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_small",
        weights=None,
        fpn=True,
        trainable_layers=6,
        norm_layer=nn.BatchNorm2d,
    )


def one_map() -> Any:
    """The example in torchvision's docstring: the features of a MobileNetV2, without a pyramid."""
    features = models.mobilenet_v2(weights=None).features[:14]
    features.out_channels = 96
    return features


def _v1(num_classes: int) -> dict[str, Any]:
    return {"backbone": resnet(), "num_classes": num_classes}


def _v2(num_classes: int) -> dict[str, Any]:
    head = RetinaNetHead(CHANNELS, 9, num_classes, norm_layer=functools.partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    return {"backbone": resnet(), "num_classes": num_classes, "head": head}


def _mobilenet(num_classes: int) -> dict[str, Any]:
    backbone = mobilenet()
    with torch.no_grad():
        levels = len(backbone(torch.zeros(1, 3, 64, 64)))
    anchors = AnchorGenerator(((16, 32, 64),) * levels, ((0.5, 1.0, 2.0),) * levels)
    return {"backbone": backbone, "num_classes": num_classes, "anchor_generator": anchors}


def _one_map(num_classes: int) -> dict[str, Any]:
    anchors = AnchorGenerator(((8, 16, 32, 64, 128),), ((0.5, 1.0, 2.0),))
    return {"backbone": one_map(), "num_classes": num_classes, "anchor_generator": anchors}


ARCHITECTURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "v1": _v1,
    "v2": _v2,
    "mobilenet": _mobilenet,
    "one map": _one_map,
}


def build_pair(
    name: str = "v1", num_classes: int = 3, ours: type = drop_in.RetinaNet, **options: Any
) -> tuple[detection.RetinaNet, drop_in.RetinaNet]:
    """Return torchvision's model and the drop-in, with equal weights that find many objects."""
    pair = copy.deepcopy(_pair(name, num_classes, ours, **options))
    torch.manual_seed(0)  # whether or not the pair was built just now
    return pair


@functools.lru_cache(maxsize=4)  # a pair takes about 100 MB
def _pair(
    name: str, num_classes: int, ours: type, **options: Any
) -> tuple[detection.RetinaNet, drop_in.RetinaNet]:
    torch.manual_seed(0)
    parts = ARCHITECTURES[name](num_classes)
    options = {**SIZES, "score_thresh": 0.2, **options}
    theirs = detection.RetinaNet(**copy.deepcopy(parts), **copy.deepcopy(options))
    for tower in (theirs.head.classification_head, theirs.head.regression_head):
        for conv in (module for module in tower.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight)
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.8, 1.2)
        norm.momentum = 1.0
    with torch.no_grad():  # statistics of the activations, without which deep networks fade out
        theirs.backbone.train()(torch.stack([image[:, :64, :64] for image in images()]))
    # Without this, scores saturate and their order is arbitrary.
    with torch.no_grad(), everything_of(theirs.eval()) as seen:
        theirs(images())
    theirs.head.classification_head.cls_logits.weight.data /= seen["cls_logits"].std()
    theirs.head.classification_head.cls_logits.bias.data.fill_(
        float(-2 - seen["cls_logits"].mean() / seen["cls_logits"].std())
    )
    theirs.head.regression_head.bbox_reg.weight.data *= 0.3 / seen["bbox_regression"].std()
    mine = ours(**parts, **options)
    mine.load_state_dict(theirs.state_dict())
    return theirs.eval(), mine.eval()


def images(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Return three images of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((80, 100), (120, 64), (96, 96))
    return [torch.rand(3, *size, generator=generator, dtype=dtype) for size in sizes]


def targets(num_classes: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Return targets of the images: three objects, none, and one."""
    # Odd numbers, so that no IoU is exactly a threshold, where rounding decides.
    boxes: tuple[list[list[float]], ...] = (
        [[8.13, 8.37, 40.59, 43.71], [30.41, 20.17, 89.83, 69.61], [50.29, 5.53, 60.97, 30.19]],
        [],
        [[20.23, 24.67, 79.31, 89.47]],
    )
    return [
        {
            "boxes": torch.tensor(rows, dtype=dtype).reshape(-1, 4),
            "labels": torch.arange(len(rows)) % num_classes,
        }
        for rows in boxes
    ]
