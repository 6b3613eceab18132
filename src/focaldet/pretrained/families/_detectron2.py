"""Detectron2 RetinaNets: the pickles of its model zoo and the files that its training writes.

Folded into the weights: BGR images in [0, 255], and anchors whose ratio varies fastest. Set in the
config: strides in the 1x1 convolutions of the ResNet, anchors centred on the corners of cells, clipping
after suppression, sizes rounded after two steps, and Pillow's resizing. What the tensors do not show is
read from the ``config.yaml`` that training writes, if it lies beside the file.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import (
    OTHER_ANCHORS,
    class_names_of,
    fold_bgr_input,
    num_classes_of,
    p6_source_of,
    rename,
    reorder_anchors,
    resnet_of,
    with_norm_of,
)
from focaldet.pretrained.families._detectron2_config import (
    Fields,
    add_anchors,
    add_numbers,
    add_pixels,
    check_settings,
    class_names_in,
    settings_of,
)
from focaldet.pretrained.families._detectron2_pixels import pixels_of

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
        (r"head\.cls_score\.(weight|bias)", r"head.class_logits.\1"),
        (r"head\.bbox_pred\.(weight|bias)", r"head.box_deltas.\1"),
    )
)
_IGNORED = re.compile(
    r"pixel_(mean|std)|anchor_generator\.cell_anchors\.\d|.*\.num_batches_tracked"
)

_TOWERS = (("cls", "class"), ("bbox", "box"))
_FIRST_CONV = "backbone.conv1.weight"


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a Detectron2 RetinaNet.

    Anchors and pixel values are those that the file stores, or else those in the run's settings, which
    also give sizes and thresholds. What neither says is as in the model zoo, so strides are assumed to
    be in the 1x1 convolutions of a ResNet, and in the 3x3 convolutions of a ResNeXt.

    Args:
        file: The state dict, and the run's ``config.yaml`` in ``beside``.

    Raises:
        CheckpointError: If tensors belong to a different model, contradict the settings, or need an
            option that focaldet does not have.
    """
    settings = settings_of(file)
    renamed = _renamed(file)
    num_anchors = renamed["head.box_deltas.weight"].shape[0] // 4
    num_classes = num_classes_of(renamed, NAME, num_anchors)
    check_settings(settings, num_classes)
    backbone = resnet_of(renamed, NAME)
    names = class_names_in(file, num_classes)
    found = Fields()
    coco = class_names_of(num_classes)
    if names is None and coco is not None:
        found.add("class_names", None, coco)
    else:
        found.values["class_names"] = names
    add_anchors(found, file, settings, num_anchors)
    add_pixels(found, pixels_of(file, settings, backbone))
    bottleneck = "backbone.layer1.0.conv3.weight" in renamed
    stride_in_1x1 = settings.flag("MODEL.RESNETS.STRIDE_IN_1X1")
    if bottleneck:
        found.add("stride_in_1x1", stride_in_1x1, not backbone.startswith("resnext"))
    if "head.class_tower.0.norm.weight" in renamed:
        norm = "group_with_bias" if settings.text("MODEL.RETINANET.NORM") else None
        found.add("head_norm", norm, "group_with_bias")
    add_numbers(found, settings)
    return SuggestedConfig(
        RetinaNetConfig(
            num_classes=num_classes,
            backbone=backbone,
            fpn_channels=len(renamed["fpn.p7.weight"]),
            p6_from=p6_source_of(renamed),
            head_depth=sum(bool(_CLASS_CONV.fullmatch(key)) for key in renamed),
            normalizer="ema",
            clip_to="image_after_nms",
            drop_empty=True,
            size_rounding="round_two_step",
            antialias=True,
            round_pixels=True,
            **{"box_loss": "l1", **found.values},
        ),
        tuple(found.assumed),
    )


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a Detectron2 RetinaNet.

    Args:
        file: The state dict, and the run's ``config.yaml`` in ``beside``, which say the order and the
            scale of the pixels.
        config: The configuration to use. Its octave scales and aspect ratios are in the file's order.

    Raises:
        CheckpointError: If tensors belong to a different model, or have different anchors from the
            config's.
    """
    renamed = _renamed(file)
    num_scales, num_ratios = len(config.octave_scales), len(config.aspect_ratios)
    num_classes_of(renamed, NAME, num_scales * num_ratios, remedy=OTHER_ANCHORS)
    pixels = pixels_of(file, settings_of(file), resnet_of(renamed, NAME))
    if pixels.is_rgb:
        renamed[_FIRST_CONV] = renamed[_FIRST_CONV].flip(1)  # as if it took BGR
    scale = [theirs / ours for theirs, ours in zip(config.image_std, pixels.std, strict=False)]
    fold_bgr_input(renamed, scale if len(config.image_std) == 3 else config.image_std)
    # In Detectron2 the ratio varies fastest, in focaldet the scale.
    order = [s * num_ratios + r for r in range(num_ratios) for s in range(num_scales)]
    reorder_anchors(renamed, order)
    if config.normalizer == "ema":
        renamed["criterion.positives_average"] = torch.tensor(100.0)  # not saved by Detectron2
    return with_norm_of(renamed, config)


_CLASS_CONV = re.compile(r"head\.class_tower\.\d+\.conv\.weight")


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    other = [k for k in file.tensors if re.match(r"head\.(cls|bbox)_subnet\..*running_mean", k)]
    if other:
        raise CheckpointError(
            f"The head of this Detectron2 RetinaNet has BatchNorm ({other[0]!r}), but only GroupNorm "
            "(MODEL.RETINANET.NORM: GN) or no norm is supported."
        )
    has_norm = "head.cls_subnet.1.weight" in file.tensors
    step = 3 if has_norm else 2  # convolution, norm and ReLU, or only the first and the last
    towers = [
        (
            re.compile(rf"head\.{theirs}_subnet\.{step * index + place}\.(weight|bias)"),
            rf"head.{ours}_tower.{index}.{layer}.\1",
        )
        for theirs, ours in _TOWERS
        for index in range(_MAX_DEPTH)
        for place, layer in enumerate(("conv", "norm")[: 1 + has_norm])
    ]
    return rename(file.tensors, NAME, (*_RENAMES, *towers), _IGNORED)


_MAX_DEPTH = 64  # as in the config
