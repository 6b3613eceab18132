"""RetinaNets of yhenon/pytorch-retinanet: its published state dict and those that its training writes.

Folded into the weights: the factors of the box deltas. Set in the config: no clamp of box sizes, boxes
clipped to the padded batch and scaled back by one factor, no limits on the numbers of candidates and
detections, and at least one pixel of padding.
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
    fold_delta_scales,
    num_classes_of,
    rename,
    resnet_of,
    with_norm_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "yhenon/pytorch-retinanet"

_CHARACTERISTIC = (
    "conv1.weight",
    "fpn.P5_1.weight",
    "classificationModel.output.weight",
    "regressionModel.output.weight",
)
_NORM = r"(weight|bias|running_mean|running_var)"
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1\.weight", r"backbone.conv1.weight"),
        (rf"bn1\.{_NORM}", r"backbone.bn1.\1"),
        (r"layer(\d\.\d+)\.conv(\d)\.weight", r"backbone.layer\1.conv\2.weight"),
        (rf"layer(\d\.\d+)\.bn(\d)\.{_NORM}", r"backbone.layer\1.bn\2.\3"),
        (rf"layer(\d\.\d+)\.downsample\.([01])\.{_NORM}", r"backbone.layer\1.downsample.\2.\3"),
        *(
            (rf"fpn\.P{level}_{part}\.(weight|bias)", rf"fpn.{name}.{index}.\1")
            for index, level in enumerate((3, 4, 5))
            for part, name in ((1, "lateral"), (2, "output"))
        ),
        (r"fpn\.P6\.(weight|bias)", r"fpn.p6.\1"),
        (r"fpn\.P7_2\.(weight|bias)", r"fpn.p7.\1"),
        *(
            (rf"{theirs}Model\.conv{index + 1}\.(weight|bias)", rf"head.{ours}.{index}.conv.\1")
            for theirs, ours in (("classification", "class_tower"), ("regression", "box_tower"))
            for index in range(4)
        ),
        (r"classificationModel\.output\.(weight|bias)", r"head.class_logits.\1"),
        (r"regressionModel\.output\.(weight|bias)", r"head.box_deltas.\1"),
    )
)
_IGNORED = re.compile(r".*\.num_batches_tracked")
_DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a RetinaNet of yhenon/pytorch-retinanet.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = _renamed(file)
    num_classes = num_classes_of(renamed, NAME, remedy=OTHER_ANCHORS)
    config = RetinaNetConfig(
        num_classes=num_classes,
        class_names=class_names_of(num_classes),
        backbone=resnet_of(renamed, NAME),
        fpn_channels=len(renamed["fpn.p7.weight"]),
        head_depth=depth_of_head(renamed),
        log_scale_clamp=None,
        force_match_floor=None,
        smooth_l1_beta=1 / 9,
        normalizer="image",
        pre_nms_top_k=None,
        max_detections=None,
        clip_to="batch",
        uniform_rescale=True,
        min_size=608,
        max_size=1024,
        size_rounding="round_half_even",
        always_pad=True,
    )
    return SuggestedConfig(config)


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a state dict of yhenon/pytorch-retinanet.

    Args:
        file: The state dict.
        config: The configuration to use.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = _renamed(file)
    fold_delta_scales(renamed, _DELTA_SCALES)
    return with_norm_of(renamed, config)


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    return rename(file.tensors, NAME, _RENAMES, _IGNORED)
