"""torchvision RetinaNets: state dicts of ``retinanet_resnet50_fpn``, its ``_v2`` and variants.

The backbone can be any ResNet or ResNeXt of torchvision. Both spellings of the keys are supported,
because the published V1 file predates a renaming in torchvision. A head of 91 classes is COCO's: its
channels are numbered by category id, and those of the 80 actual classes are kept.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from focaldet.class_names import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import NUM_ANCHORS, OTHER_ANCHORS, resnet_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "torchvision"

_COCO_CHANNELS = 91
_CHARACTERISTIC = (
    "backbone.body.conv1.weight",
    "head.classification_head.cls_logits.weight",
    "head.regression_head.bbox_reg.weight",
)

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.body\.", "backbone."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?", r"fpn.lateral.\1."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?", r"fpn.output.\1."),
        (r"backbone\.fpn\.extra_blocks\.", "fpn."),
        (r"head\.classification_head\.cls_logits\.", "head.class_logits."),
        (r"head\.regression_head\.bbox_reg\.", "head.box_deltas."),
        (r"head\.classification_head\.conv\.(\d)\.0\.", r"head.class_tower.\1.conv."),
        (r"head\.classification_head\.conv\.(\d)\.1\.", r"head.class_tower.\1.norm."),
        (r"head\.regression_head\.conv\.(\d)\.0\.", r"head.box_tower.\1.conv."),
        (r"head\.regression_head\.conv\.(\d)\.1\.", r"head.box_tower.\1.norm."),
    )
)
# Before the renaming, convolutions and ReLUs were numbered together: 0, 2, 4, 6.
_OLD_TOWER = re.compile(r"head\.(classification|regression)_head\.conv\.(\d)\.(weight|bias)")


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a torchvision RetinaNet, as far as its tensors show it.

    The file does not record everything. With GroupNorm in the head it is treated as a V2, otherwise as
    a V1. With batch counters its BatchNorm trains, otherwise it is frozen. The published V1 weights
    need an eps of 0 in their frozen BatchNorm, and every 91-class V1 with frozen BatchNorm is treated
    as one of them.

    Raises:
        CheckpointError: If the backbone or the number of anchors is not one of torchvision's own.
    """
    return SuggestedConfig(_config_of(_renamed(file)))


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a torchvision RetinaNet's state dict.

    Args:
        file: The state dict.
        config: The configuration to use. With 91 classes it keeps all channels of a COCO head.
    """
    renamed = _renamed(file)
    channels = len(renamed["head.class_logits.bias"])
    if config.backbone_norm == "frozen":
        renamed = {k: v for k, v in renamed.items() if not k.endswith("num_batches_tracked")}
    if channels == NUM_ANCHORS * _COCO_CHANNELS and config.num_classes == len(COCO_CLASS_NAMES):
        for key in ("head.class_logits.weight", "head.class_logits.bias"):
            renamed[key] = _coco_rows(renamed[key])
    return renamed


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    return {_rename(key): value for key, value in file.tensors.items()}


def _rename(key: str) -> str:
    old = _OLD_TOWER.fullmatch(key)
    if old:
        key = f"head.{old[1]}_head.conv.{int(old[2]) // 2}.0.{old[3]}"
    for pattern, name in _RENAMES:
        key, count = pattern.subn(name, key)
        if count:
            break
    return key


def _config_of(renamed: Mapping[str, Tensor]) -> RetinaNetConfig:
    num_anchors = len(renamed["head.box_deltas.weight"]) // 4
    if num_anchors != NUM_ANCHORS:
        raise CheckpointError(
            f"The head of this {NAME} RetinaNet has {num_anchors} anchors per cell instead of "
            f"{NUM_ANCHORS}. {OTHER_ANCHORS}"
        )
    second = "head.class_tower.0.norm.weight" in renamed
    trains = "backbone.bn1.num_batches_tracked" in renamed
    num_classes = len(renamed["head.class_logits.weight"]) // num_anchors
    preset = RetinaNetConfig.torchvision_v2 if second else RetinaNetConfig.torchvision_v1
    published_v1 = not second and not trains and num_classes == _COCO_CHANNELS
    names = COCO_CLASS_NAMES if num_classes == _COCO_CHANNELS else None
    return preset(len(names) if names else num_classes, names).replace(
        backbone=resnet_of(renamed, NAME),
        backbone_norm="batch" if trains else "frozen",
        backbone_norm_eps=0.0 if published_v1 else None,
        fpn_channels=len(renamed["fpn.p7.weight"]),
    )


def _coco_rows(values: Tensor) -> Tensor:
    rows = values.view(NUM_ANCHORS, _COCO_CHANNELS, *values.shape[1:])
    return rows[:, list(COCO_CATEGORY_IDS)].flatten(0, 1).clone()
