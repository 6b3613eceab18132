"""RetinaNets of NVIDIA's Object Detection Toolkit (retinanet-examples), and its released zip files.

Folded into the weights: the order of the anchors. Set in the config: anchors centred in cells, rounded
in older versions and one pixel larger in newer ones; no clamp of box sizes; boxes that include their
last pixel, clipped to the padded batch and scaled back by one factor; Pillow's resizing; and batches
padded to multiples of 128.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from focaldet._checks import shortened
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import (
    class_names_of,
    depth_of_head,
    num_classes_of,
    rename,
    reorder_anchors,
    resnet_of,
    with_norm_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "ODTK"

_CHARACTERISTIC = (
    "backbones.….lateral3.weight",
    "backbones.….pyramid6.weight",
    "cls_head.0.weight",
    "box_head.0.weight",
)
_BACKBONE = re.compile(r"backbones\.[^.]+\.")
_NORM = r"(weight|bias|running_mean|running_var)"
_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"features\.conv1\.weight", r"backbone.conv1.weight"),
        (rf"features\.bn1\.{_NORM}", r"backbone.bn1.\1"),
        (r"features\.layer(\d\.\d+)\.conv(\d)\.weight", r"backbone.layer\1.conv\2.weight"),
        (rf"features\.layer(\d\.\d+)\.bn(\d)\.{_NORM}", r"backbone.layer\1.bn\2.\3"),
        (
            rf"features\.layer(\d\.\d+)\.downsample\.([01])\.{_NORM}",
            r"backbone.layer\1.downsample.\2.\3",
        ),
        # MobileNetV2: all of its 19 blocks except the last are used.
        (rf"features\.features\.((?:\d|1[0-7])\.[\d.a-z]+\.{_NORM})", r"backbone.features.\1"),
        *(
            row
            for index, level in enumerate((3, 4, 5))
            for row in (
                (rf"lateral{level}\.(weight|bias)", rf"fpn.lateral.{index}.\1"),
                (rf"smooth{level}\.(weight|bias)", rf"fpn.output.{index}.\1"),
            )
        ),
        (r"pyramid([67])\.(weight|bias)", r"fpn.p\1.\2"),
        *(
            (rf"{theirs}_head\.{2 * index}\.(weight|bias)", rf"head.{ours}.\1")
            for theirs, tower, output in (
                ("cls", "class_tower", "class_logits"),
                ("box", "box_tower", "box_deltas"),
            )
            for index, ours in (*((i, f"{tower}.{i}.conv") for i in range(4)), (4, output))
        ),
    )
)
_IGNORED = re.compile(
    r"features\.(fc|classifier\.\d|features\.18\..*)\.(weight|bias|running_mean|running_var)"
    r"|.*\.num_batches_tracked"
)
_STRIDES = (8, 16, 32, 64, 128)
_RATIOS = (1.0, 2.0, 0.5)
_SCALES = tuple(4 * 2 ** (i / 3) for i in range(3))

_THRESHOLDS = ("score_threshold", "pre_nms_top_k", "nms_threshold", "max_detections")


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    known = {_BACKBONE.sub("backbones.….", key) for key in tensors}
    return [key for key in _CHARACTERISTIC if key not in known]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of an ODTK RetinaNet.

    Args:
        file: The state dict, with the entries "ratios" and "scales". A file without these was written
            before the project stopped rounding its anchors, so its anchors are rounded.

    Raises:
        CheckpointError: If tensors belong to a different model, or the model has several backbones or
            rotated boxes.
    """
    renamed = _renamed(file)
    ratios, scales = _anchor_shapes(file)
    num_classes = num_classes_of(renamed, NAME, len(ratios) * len(scales))
    rounded = not {"ratios", "scales"} & file.extras.keys()
    config = RetinaNetConfig(
        num_classes=num_classes,
        class_names=class_names_of(num_classes),
        backbone=_backbone_of(renamed),
        fpn_channels=len(renamed["fpn.p7.weight"]),
        head_depth=depth_of_head(renamed),
        anchor_sizes=_STRIDES,
        octave_scales=scales,
        aspect_ratios=ratios,
        anchor_mode="rounded" if rounded else "exact",
        anchor_plus_one=not rounded,
        log_scale_clamp=None,
        force_match_floor=None,
        clip_to="batch",
        inclusive_corners=True,
        uniform_rescale=True,
        size_divisor=128,
        antialias=True,
        round_pixels=True,
    )
    assumed = ["min_size", "max_size", *_THRESHOLDS]
    if rounded:
        assumed += ["anchor_mode", "octave_scales", "aspect_ratios"]
    if config.class_names is not None:
        assumed.append("class_names")
    return SuggestedConfig(config, tuple(assumed))


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert an ODTK RetinaNet.

    Args:
        file: The state dict, with the entries "ratios" and "scales".
        config: The configuration to use.

    Raises:
        CheckpointError: If tensors belong to a different model, or the model has several backbones or
            rotated boxes.
    """
    renamed = _renamed(file)
    ratios, scales = _anchor_shapes(file)
    num_classes_of(renamed, NAME, len(ratios) * len(scales))
    reorder_anchors(renamed, _anchor_order(len(ratios), len(scales)))
    return with_norm_of(renamed, config)


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    if "angles" in file.extras:
        raise CheckpointError(f"This {NAME} model detects rotated boxes, which are not supported.")
    backbones = {match[0] for key in file.tensors if (match := _BACKBONE.match(key))}
    if len(backbones) != 1:
        names = ", ".join(backbone.split(".")[1] for backbone in sorted(backbones))
        raise CheckpointError(
            f"This {NAME} model has {len(backbones)} backbones ({names}), but only one is supported."
        )
    tensors = {_BACKBONE.sub("", key): value for key, value in file.tensors.items()}
    return rename(tensors, NAME, _RENAMES, _IGNORED)


def _anchor_shapes(file: CheckpointFile) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ratios and scales of a file's anchors."""
    return _numbers(file.extras, "ratios", _RATIOS), _numbers(file.extras, "scales", _SCALES)


def _backbone_of(renamed: Mapping[str, Tensor]) -> str:
    if "backbone.features.17.conv.0.0.weight" in renamed:
        return "mobilenet_v2"
    return resnet_of(renamed, NAME)


def _numbers(extras: Mapping[str, Any], name: str, default: Sequence[float]) -> tuple[float, ...]:
    values = extras.get(name, default)
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, int | float) for value in values
    ):
        raise CheckpointError(
            f"The entry {name!r} of an {NAME} file must be a list of numbers, got {shortened(values)}."
        )
    return tuple(float(value) for value in values)


def _anchor_order(ratios: int, scales: int) -> list[int]:
    """Return where ODTK has each of focaldet's anchors: its ratio varies fastest, ours the scale."""
    return [scale * ratios + ratio for ratio in range(ratios) for scale in range(scales)]
