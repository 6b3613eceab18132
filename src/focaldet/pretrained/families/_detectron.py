"""Detectron RetinaNets, of the project before Detectron2: pickles of Caffe2's blobs.

Folded into the weights: BGR images in [0, 255], and anchors whose ratio varies fastest. Set in the
config: the affine layers in place of BatchNorm, as norms without variance; strides in the 1x1
convolutions of ResNets; rounded anchors centred in cells; boxes that include their last pixel and are
scaled to the input image before they are suppressed; no score threshold at the last level; sizes rounded
to even numbers; resizing by the factor; and batches padded to multiples of 128.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import shortened
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
from focaldet.pretrained.families._settings import Settings, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "Detectron"

_CHARACTERISTIC = ("conv1_w", "fpn_7_w", "retnet_cls_pred_fpn3_w", "retnet_bbox_pred_fpn3_w")

# The template of each layer's name; the last group is the letter of the blob.
_BLOBS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1_(w)", r"backbone.conv1"),
        (r"res_conv1_bn_(s|b)", r"backbone.bn1"),
        *(
            row
            for stage in (2, 3, 4, 5)
            for row in (
                (rf"res{stage}_(\d+)_branch1_(w)", rf"backbone.layer{stage - 1}.\1.downsample.0"),
                (
                    rf"res{stage}_(\d+)_branch1_bn_(s|b)",
                    rf"backbone.layer{stage - 1}.\1.downsample.1",
                ),
                *(
                    row
                    for index, letter in enumerate("abc", start=1)
                    for row in (
                        (
                            rf"res{stage}_(\d+)_branch2{letter}_(w)",
                            rf"backbone.layer{stage - 1}.\1.conv{index}",
                        ),
                        (
                            rf"res{stage}_(\d+)_branch2{letter}_bn_(s|b)",
                            rf"backbone.layer{stage - 1}.\1.bn{index}",
                        ),
                    )
                ),
            )
        ),
        (r"fpn_inner_res5_\d+_sum_(w|b)", r"fpn.lateral.2"),
        (r"fpn_inner_res4_\d+_sum_lateral_(w|b)", r"fpn.lateral.1"),
        (r"fpn_inner_res3_\d+_sum_lateral_(w|b)", r"fpn.lateral.0"),
        (r"fpn_res5_\d+_sum_(w|b)", r"fpn.output.2"),
        (r"fpn_res4_\d+_sum_(w|b)", r"fpn.output.1"),
        (r"fpn_res3_\d+_sum_(w|b)", r"fpn.output.0"),
        (r"fpn_([67])_(w|b)", r"fpn.p\1"),
        (r"retnet_cls_conv_n(\d+)_fpn3_(w|b)", r"head.class_tower.\1.conv"),
        (r"retnet_bbox_conv_n(\d+)_fpn3_(w|b)", r"head.box_tower.\1.conv"),
        (r"retnet_cls_pred_fpn3_(w|b)", r"head.class_logits"),
        (r"retnet_bbox_pred_fpn3_(w|b)", r"head.box_deltas"),
    )
)
# Momentum; and what a classifier has, which Detectron keeps although it does not use it.
_IGNORED = re.compile(r".*_momentum|(fc1000|pred)_[wb]|conv1_b|lr|model_iter")
_CONV = re.compile(r"head\.class_tower\.\d+\.conv\.weight")

_STRIDES = (8, 16, 32, 64, 128)
_RATIOS = (1.0, 2.0, 0.5)
_SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))
_BGR_MEAN = (102.9801, 115.9465, 122.7717)

# The setting of each field that is a number, whether it is an integer, and its usual value.
_NUMBERS = {
    "max_size": ("TEST.MAX_SIZE", True, 1333),
    "size_divisor": ("FPN.COARSEST_STRIDE", True, 128),
    "score_threshold": ("RETINANET.INFERENCE_TH", False, 0.05),
    "pre_nms_top_k": ("RETINANET.PRE_NMS_TOP_N", True, 1000),
    "nms_threshold": ("TEST.NMS", False, 0.5),
    "max_detections": ("TEST.DETECTIONS_PER_IM", True, 100),
}

# What Detectron can do and focaldet cannot: a setting, and its only value that is supported.
_SUPPORTED: dict[str, object] = {
    "RETINANET.SOFTMAX": False,
    "RETINANET.CLASS_SPECIFIC_BBOX": False,
    "RETINANET.SHARE_CLS_BBOX_TOWER": False,
    "FPN.USE_GN": False,
    "FPN.RPN_MIN_LEVEL": 3,
    "FPN.RPN_MAX_LEVEL": 7,
    "RESNETS.RES5_DILATION": 1,
    "TEST.BBOX_REG": True,
    "TEST.SOFT_NMS.ENABLED": False,
    "TEST.BBOX_VOTE.ENABLED": False,
    "TEST.BBOX_AUG.ENABLED": False,
}


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a Detectron RetinaNet.

    Args:
        file: The blobs, with the run's settings as the entry "cfg". What they do not say is as in the
            project's published files.

    Raises:
        CheckpointError: If blobs belong to a different model, contradict the settings, or need an
            option that focaldet does not have.
    """
    settings = _settings_of(file)
    _check_settings(settings)
    renamed = _renamed(file)
    scales, ratios = _anchor_shapes(settings)
    num_classes = num_classes_of(renamed, NAME, len(scales) * len(ratios), remedy=OTHER_ANCHORS)
    said = settings.integer("MODEL.NUM_CLASSES")
    if said is not None and said != num_classes + 1:
        raise CheckpointError(
            f"MODEL.NUM_CLASSES in {settings.source} is {said}, which includes the background, but the "
            f"head has {num_classes} classes."
        )
    backbone = resnet_of(renamed, NAME)
    fields: dict[str, Any] = {}
    assumed = []
    names = class_names_of(num_classes)
    if names is not None:
        assumed.append("class_names")
    stride_in_1x1 = settings.flag("RESNETS.STRIDE_1X1")
    mean = _pixel_mean(settings)
    for field, value, usual in (
        ("stride_in_1x1", stride_in_1x1, not backbone.startswith("resnext")),
        ("image_mean", mean, _BGR_MEAN),
        ("min_size", _test_scale(settings), 800),
        *(
            (field, settings.integer(name) if integer else settings.number(name), usual)
            for field, (name, integer, usual) in _NUMBERS.items()
        ),
    ):
        fields[field] = usual if value is None else value
        if value is None:
            assumed.append(field)
    fields["image_mean"] = tuple(round(value / 255, 12) for value in fields["image_mean"][::-1])
    fields["nms_threshold"] = _just_below(fields["nms_threshold"])
    if settings.value("RETINANET.ASPECT_RATIOS") is None:
        assumed.append("aspect_ratios")
    config = RetinaNetConfig(
        num_classes=num_classes,
        class_names=names,
        backbone=backbone,
        backbone_norm_eps=0.0,
        fpn_channels=len(renamed["fpn.p7.weight"]),
        p6_from=p6_source_of(renamed),
        head_depth=sum(bool(_CONV.fullmatch(key)) for key in renamed),
        anchor_sizes=_STRIDES,
        octave_scales=scales,
        aspect_ratios=ratios,
        anchor_mode="rounded",
        force_match_floor=0.4,
        clip_to="original",
        inclusive_corners=True,
        uniform_rescale=True,
        last_level_threshold=0.0,
        size_rounding="round_before_limit",
        resize_by="factor",
        **fields,
    )
    return SuggestedConfig(config, tuple(assumed))


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a Detectron RetinaNet.

    Args:
        file: The blobs.
        config: The configuration to use. Its octave scales and aspect ratios are in the file's order.

    Raises:
        CheckpointError: If blobs belong to a different model, or have different anchors from the
            config's.
    """
    renamed = _renamed(file)
    num_scales, num_ratios = len(config.octave_scales), len(config.aspect_ratios)
    num_classes_of(renamed, NAME, num_scales * num_ratios, remedy=OTHER_ANCHORS)
    fold_bgr_input(renamed, config.image_std)
    # In Detectron the ratio varies fastest, in focaldet the scale.
    order = [s * num_ratios + r for r in range(num_ratios) for s in range(num_scales)]
    reorder_anchors(renamed, order)
    return with_norm_of(renamed, config)


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    shared = "retnet_bbox_pred_fpn3_w" in file.tensors and not any(
        key.startswith("retnet_bbox_conv_") for key in file.tensors
    )
    if shared and any(key.startswith("retnet_cls_conv_") for key in file.tensors):
        raise CheckpointError(
            f"The class and box layers of this {NAME} RetinaNet share a tower "
            "(RETINANET.SHARE_CLS_BBOX_TOWER), which is not supported."
        )
    renames = [(pattern, rf"{name}._\{pattern.groups}") for pattern, name in _BLOBS]
    renamed = {
        _full_name(key): value
        for key, value in rename(file.tensors, NAME, renames, _IGNORED).items()
    }
    for key in [key for key in renamed if _is_norm(key) and key.endswith(".weight")]:
        norm, scale = key.removesuffix(".weight"), renamed[key]
        renamed[f"{norm}.running_mean"] = torch.zeros_like(scale)
        renamed[f"{norm}.running_var"] = torch.ones_like(scale)
    return renamed


def _full_name(key: str) -> str:
    """Return the key of a tensor whose last part is "_" and the last letter of its blob."""
    layer, _, letter = key.rpartition("._")
    return f"{layer}.{'bias' if letter == 'b' else 'weight'}"


def _is_norm(key: str) -> bool:
    return re.fullmatch(r"backbone\.(.*\.)?(bn\d|downsample\.1)\.\w+", key) is not None


def _settings_of(file: CheckpointFile) -> Settings:
    text = file.extras.get("cfg")
    if text is None:
        return Settings({}, "the settings")
    if not isinstance(text, str):
        raise CheckpointError(
            f"The entry 'cfg' of a {NAME} file must be a text, got {shortened(text)}."
        )
    return read_settings(text, "the entry 'cfg'")


def _check_settings(settings: Settings) -> None:
    for name, supported in _SUPPORTED.items():
        value = settings.value(name)
        if value is not None and value != supported:
            raise CheckpointError(
                f"{name} in {settings.source} is {shortened(value)}, but only {supported} is supported."
            )


def _anchor_shapes(settings: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the scales, in strides, and the aspect ratios of the anchors."""
    ratios = settings.numbers("RETINANET.ASPECT_RATIOS") or _RATIOS
    count = settings.integer("RETINANET.SCALES_PER_OCTAVE") or len(_SCALES)
    size = settings.number("RETINANET.ANCHOR_SCALE") or 4
    return tuple(size * 2 ** (octave / count) for octave in range(min(count, 100))), ratios


def _test_scale(settings: Settings) -> int | None:
    """Return the length of the short side. Older versions have a list of one."""
    scales = settings.value("TEST.SCALES")
    if scales is None:
        return settings.integer("TEST.SCALE")
    (scale,) = settings.numbers("TEST.SCALES", 1) or (0,)
    return int(scale)


def _pixel_mean(settings: Settings) -> tuple[float, ...] | None:
    """Return the means of blue, green and red, which are written as a list or as a NumPy array."""
    value = settings.value("PIXEL_MEANS")
    if value is None:
        return None
    if isinstance(value, dict):  # arguments and state of a NumPy array
        state = value.get("state")
        data = state[-1] if isinstance(state, list) and state else None
        if isinstance(data, bytes) and len(data) == 24:
            return struct.unpack("<3d", data)
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, list) or len(value) != 3:
        raise CheckpointError(
            f"PIXEL_MEANS in {settings.source} must be three numbers, got {shortened(value)}."
        )
    return Settings({"PIXEL_MEANS": value}, settings.source).numbers("PIXEL_MEANS", 3)


def _just_below(threshold: float) -> float:
    """Return the float32 before a threshold: Detectron also suppresses boxes whose IoU equals it."""
    number = torch.tensor(threshold, dtype=torch.float32)
    return float(torch.nextafter(number, number.new_zeros(())))
