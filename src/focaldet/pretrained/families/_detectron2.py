"""Detectron2 RetinaNets: the pickles of its model zoo and the files that its training writes.

Folded into the weights: BGR images in [0, 255], and anchors whose ratio varies fastest. Set in the
config: strides in the 1x1 convolutions of the ResNet, anchors centred on the corners of cells, clipping
after suppression, sizes rounded to the nearest integer, and Pillow's resizing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from focaldet._checks import shortened
from focaldet.anchors import AnchorGenerator
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import (
    class_names_of,
    depth_of_head,
    fold_bgr_input,
    num_classes_of,
    p6_source_of,
    rename,
    reorder_anchors,
    resnet_of,
    with_norm_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "Detectron2"

_CHARACTERISTIC = (
    "backbone.bottom_up.stem.conv1.weight",
    "backbone.fpn_lateral3.weight",
    "head.cls_score.weight",
    "head.bbox_pred.weight",
)
_RESNETS = ("resnet50", "resnet101", "resnet152")  # their strides are in 1x1 convolutions
_NORM = r"(weight|bias|running_mean|running_var)"

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.bottom_up\.stem\.conv1\.weight", r"backbone.conv1.weight"),
        (rf"backbone\.bottom_up\.stem\.conv1\.norm\.{_NORM}", r"backbone.bn1.\1"),
        *(
            row
            for stage in (2, 3, 4, 5)
            for row in (
                (
                    rf"backbone\.bottom_up\.res{stage}\.(\d+)\.conv([123])\.weight",
                    rf"backbone.layer{stage - 1}.\1.conv\2.weight",
                ),
                (
                    rf"backbone\.bottom_up\.res{stage}\.(\d+)\.conv([123])\.norm\.{_NORM}",
                    rf"backbone.layer{stage - 1}.\1.bn\2.\3",
                ),
                (
                    rf"backbone\.bottom_up\.res{stage}\.(\d+)\.shortcut\.weight",
                    rf"backbone.layer{stage - 1}.\1.downsample.0.weight",
                ),
                (
                    rf"backbone\.bottom_up\.res{stage}\.(\d+)\.shortcut\.norm\.{_NORM}",
                    rf"backbone.layer{stage - 1}.\1.downsample.1.\2",
                ),
            )
        ),
        *(
            row
            for index, level in enumerate((3, 4, 5))
            for row in (
                (rf"backbone\.fpn_lateral{level}\.(weight|bias)", rf"fpn.lateral.{index}.\1"),
                (rf"backbone\.fpn_output{level}\.(weight|bias)", rf"fpn.output.{index}.\1"),
            )
        ),
        (r"backbone\.top_block\.(p6|p7)\.(weight|bias)", r"fpn.\1.\2"),
        *(
            (
                rf"head\.{theirs}_subnet\.{2 * index}\.(weight|bias)",
                rf"head.{ours}_tower.{index}.conv.\1",
            )
            for theirs, ours in (("cls", "class"), ("bbox", "box"))
            for index in range(10)
        ),
        (r"head\.cls_score\.(weight|bias)", r"head.class_logits.\1"),
        (r"head\.bbox_pred\.(weight|bias)", r"head.box_deltas.\1"),
    )
)
_IGNORED = re.compile(
    r"pixel_(mean|std)|anchor_generator\.cell_anchors\.\d|.*\.num_batches_tracked"
)

# In Detectron2 the ratio varies fastest, in focaldet the scale.
_ORDER = (0, 3, 6, 1, 4, 7, 2, 5, 8)
_PIXEL_MEAN = (103.53, 116.28, 123.675)  # blue, green, red


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a Detectron2 RetinaNet.

    The file does not record where the strides are, nor always the scale of the pixels. As in all three
    published files, strides are assumed to be in the 1x1 convolutions and pixels not to be divided by
    a standard deviation. Pass a config if the strides are elsewhere.

    Args:
        file: The state dict. Its pixel mean and standard deviation and its anchors are checked, if it
            has them.

    Raises:
        CheckpointError: If tensors belong to a different model, or pixels or anchors differ from the
            model zoo's.
    """
    renamed = _renamed(file)
    config = _config_of(renamed, num_classes_of(renamed, NAME))
    _check_anchors(file.tensors, config)
    return SuggestedConfig(config)


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a Detectron2 RetinaNet.

    Args:
        file: The state dict. Its pixel mean and standard deviation are checked, if it has them.
        config: The configuration to use.

    Raises:
        CheckpointError: If tensors belong to a different model, or pixels differ from the model
            zoo's.
    """
    renamed = _renamed(file)
    num_classes_of(renamed, NAME)
    fold_bgr_input(renamed, config.image_std)
    reorder_anchors(renamed, _ORDER)
    if config.normalizer == "ema":
        renamed["criterion.positives_average"] = torch.tensor(100.0)  # not saved by Detectron2
    return with_norm_of(renamed, config)


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    _check_input(file.tensors)
    return rename(file.tensors, NAME, _RENAMES, _IGNORED)


def _config_of(renamed: Mapping[str, Tensor], num_classes: int) -> RetinaNetConfig:
    backbone = resnet_of(renamed, NAME)
    if backbone not in _RESNETS:
        raise CheckpointError(
            f"The backbone of this {NAME} RetinaNet is a {backbone}, but only {', '.join(_RESNETS)} are "
            "recognised. Pass config= to describe it."
        )
    return RetinaNetConfig(
        num_classes=num_classes,
        class_names=class_names_of(num_classes),
        backbone=backbone,
        stride_in_1x1=True,
        fpn_channels=len(renamed["fpn.p7.weight"]),
        p6_from=p6_source_of(renamed),
        head_depth=depth_of_head(renamed),
        anchor_offset=0.0,
        box_loss="l1",
        normalizer="ema",
        clip_to="image_after_nms",
        drop_empty=True,
        size_rounding="round",
        antialias=True,
        round_pixels=True,
    )


def _check_input(tensors: Mapping[str, Tensor]) -> None:
    for name, expected in (("pixel_mean", _PIXEL_MEAN), ("pixel_std", (1.0, 1.0, 1.0))):
        values = tensors.get(name, torch.tensor(expected)).flatten().tolist()
        if len(values) != 3 or any(
            abs(a - b) > 1e-2 for a, b in zip(values, expected, strict=True)
        ):
            raise CheckpointError(
                f"{name} is {values}, but only {list(expected)} as in {NAME}'s model zoo is supported."
            )


def _check_anchors(tensors: Mapping[str, Tensor], config: RetinaNetConfig) -> None:
    generator = AnchorGenerator(config.anchor_sizes)
    for level in range(len(config.anchor_sizes)):
        key = f"anchor_generator.cell_anchors.{level}"
        if key not in tensors:
            continue
        ours, theirs = generator.cell_anchors(level), tensors[key].float()
        if theirs.shape != ours.shape or (theirs[list(_ORDER)] - ours).abs().max() > 0.1:
            raise CheckpointError(
                f"{key} is {shortened(tensors[key].tolist())}, which differs from the model zoo's anchors "
                f"of {config.anchor_sizes[level]} pixels. Pass config= with the file's anchors."
            )
