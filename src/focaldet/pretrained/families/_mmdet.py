"""MMDetection RetinaNets, versions 1 to 3, with ResNets of either style or ResNeXts.

Folded into the weights: the caffe style's BGR images in [0, 255]. Set in the config: no ReLU before
P7, box sizes clamped above and below, empty boxes dropped, anchors centred on the corners of cells,
sizes rounded to the nearest integer, OpenCV's resizing, and the caffe style's strides in 1x1
convolutions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from focaldet.config import RetinaNetConfig
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import (
    OTHER_ANCHORS,
    class_names_of,
    depth_of_head,
    fold_bgr_input,
    num_classes_of,
    p6_source_of,
    rename,
    resnet_of,
    with_norm_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "is_caffe_style", "missing", "suggest"]

NAME = "MMDetection"

_CHARACTERISTIC = (
    "backbone.conv1.weight",
    "neck.lateral_convs.0.conv.weight",
    "bbox_head.retina_cls.weight",
    "bbox_head.retina_reg.weight",
)
_NORM = r"(weight|bias|running_mean|running_var)"
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.conv1\.weight", r"backbone.conv1.weight"),
        (rf"backbone\.bn1\.{_NORM}", r"backbone.bn1.\1"),
        (r"backbone\.layer(\d\.\d+)\.conv(\d)\.weight", r"backbone.layer\1.conv\2.weight"),
        (rf"backbone\.layer(\d\.\d+)\.bn(\d)\.{_NORM}", r"backbone.layer\1.bn\2.\3"),
        (
            rf"backbone\.layer(\d\.\d+)\.downsample\.([01])\.{_NORM}",
            r"backbone.layer\1.downsample.\2.\3",
        ),
        (r"neck\.lateral_convs\.([012])\.conv\.(weight|bias)", r"fpn.lateral.\1.\2"),
        (r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)", r"fpn.output.\1.\2"),
        (r"neck\.fpn_convs\.3\.conv\.(weight|bias)", r"fpn.p6.\1"),
        (r"neck\.fpn_convs\.4\.conv\.(weight|bias)", r"fpn.p7.\1"),
        # Before version 0.6 the towers were plain convolutions.
        (r"bbox_head\.cls_convs\.(\d)\.(?:conv\.)?(weight|bias)", r"head.class_tower.\1.conv.\2"),
        (r"bbox_head\.reg_convs\.(\d)\.(?:conv\.)?(weight|bias)", r"head.box_tower.\1.conv.\2"),
        (r"bbox_head\.retina_cls\.(weight|bias)", r"head.class_logits.\1"),
        (r"bbox_head\.retina_reg\.(weight|bias)", r"head.box_deltas.\1"),
    )
)
_IGNORED = re.compile(r".*\.num_batches_tracked")
_STYLE = re.compile(r"style\s*=\s*['\"](caffe|pytorch)['\"]")


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def is_caffe_style(file: CheckpointFile) -> bool:
    """Return whether a file's ResNet is of the caffe style.

    Both styles have the same tensors. The style is read from the configuration in the file's ``meta``.
    Without one, it is caffe if the file's name contains "caffe", as in all published files of that
    style.
    """
    meta = file.extras.get("meta")
    described = meta.get("config") if isinstance(meta, dict) else None
    if isinstance(described, str):
        style = _STYLE.search(described)
        if style:
            return style[1] == "caffe"
    return "caffe" in file.name


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of an MMDetection RetinaNet.

    Args:
        file: The state dict, with the ``meta`` entry and the file name, which show the style.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = rename(file.tensors, NAME, _RENAMES, _IGNORED)
    return SuggestedConfig(_config_of(renamed, caffe=is_caffe_style(file)))


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert an MMDetection RetinaNet.

    Args:
        file: The state dict, with the ``meta`` entry and the file name, which show the style.
        config: The configuration to use. Its ``stride_in_1x1`` decides whether the file is treated
            as caffe style.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = rename(file.tensors, NAME, _RENAMES, _IGNORED)
    basic = config.backbone in _BASIC  # without 1x1 convolutions that could have the stride
    if is_caffe_style(file) if basic else config.stride_in_1x1:
        fold_bgr_input(renamed, config.image_std)
    return with_norm_of(renamed, config)


_BASIC = ("resnet18", "resnet34")


def _config_of(renamed: Mapping[str, Tensor], *, caffe: bool) -> RetinaNetConfig:
    num_classes = num_classes_of(renamed, NAME, remedy=OTHER_ANCHORS)
    backbone = resnet_of(renamed, NAME)
    return RetinaNetConfig(
        num_classes=num_classes,
        class_names=class_names_of(num_classes),
        backbone=backbone,
        stride_in_1x1=caffe and backbone not in _BASIC,
        fpn_channels=len(renamed["fpn.p7.weight"]),
        p6_from=p6_source_of(renamed),
        p7_relu=False,
        head_depth=depth_of_head(renamed),
        anchor_offset=0.0,
        log_scale_clamp="both",
        box_loss="l1",
        drop_empty=True,
        size_rounding="round",
        round_pixels=True,
    )
