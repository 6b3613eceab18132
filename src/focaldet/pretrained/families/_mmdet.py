"""MMDetection RetinaNets, versions 1 to 3, with ResNets of either style or ResNeXts.

Folded into the weights: the caffe style's BGR images in [0, 255], and the factors of box deltas. Set in
the config: no ReLU before P7, box sizes clamped above and below, empty boxes dropped, anchors centred on
the corners of cells, sizes rounded to the nearest integer, OpenCV's resizing, and the caffe style's
strides in 1x1 convolutions. What the configuration in the file says differently replaces these. Models
of version 1 have other anchors, and boxes that include their last pixels.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import torch

from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import (
    NUM_ANCHORS,
    OTHER_ANCHORS,
    class_names_of,
    depth_of_head,
    fold_bgr_input,
    fold_delta_scales,
    num_classes_of,
    p6_source_of,
    rename,
    resnet_of,
    with_norm_of,
)
from focaldet.pretrained.families._mmdet_meta import Meta, Pixels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["NAME", "convert", "is_caffe_style", "missing", "suggest"]

_logger = logging.getLogger(__name__)

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
_BUFFERS_OF_LOSS = r"bbox_head\.loss_(?:cls|bbox)\.(?:edges|acc_sum)"  # of the GHM loss
_IGNORED = re.compile(rf".*\.num_batches_tracked|{_BUFFERS_OF_LOSS}")
_BASIC = ("resnet18", "resnet34")  # without 1x1 convolutions that could have the stride
_STRIDES = (8, 16, 32, 64, 128)
_CAFFE = Pixels(mean=(123.675, 116.28, 103.53), std=(1.0, 1.0, 1.0), to_rgb=False)
_VERSION_1 = {
    "anchor_offset": 0.5,
    "anchor_mode": "inclusive_rounded",
    "pre_nms_top_k_of": "anchors",
    "drop_empty": False,
    "inclusive_corners": True,
    "uniform_rescale": True,
    "scale_before_nms": True,
}


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def is_caffe_style(file: CheckpointFile) -> bool:
    """Return whether a file's ResNet is of the caffe style.

    Both styles have the same tensors. The style is read from the configuration in the file's ``meta``.
    Without one, it is caffe if the file's name contains "caffe", as in all published files of that
    style.
    """
    return _is_caffe(Meta(file), file)


def _is_caffe(meta: Meta, file: CheckpointFile) -> bool:
    style = meta.style
    return "caffe" in file.name if style is None else style == "caffe"


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of an MMDetection RetinaNet.

    Args:
        file: The state dict, with the ``meta`` entry, which has the configuration it was trained with,
            and the file name.

    Raises:
        CheckpointError: If tensors belong to a different model, or the configuration contradicts them or
            has an option without a counterpart.
    """
    renamed = rename(file.tensors, NAME, _RENAMES, _IGNORED)
    meta = Meta(file)
    _check_options(meta)
    said = _anchors_said(meta)
    num_anchors = NUM_ANCHORS
    if "octave_scales" in said or "aspect_ratios" in said:
        scales = said.get("octave_scales", RetinaNetConfig.octave_scales)
        num_anchors = len(scales) * len(said.get("aspect_ratios", RetinaNetConfig.aspect_ratios))
    num_classes = num_classes_of(renamed, NAME, num_anchors, remedy=OTHER_ANCHORS)
    depth = depth_of_head(renamed)
    _check_counts(meta, num_classes, depth)
    names = meta.class_names(num_classes)
    if names is not None:
        said["class_names"] = names
    said |= _input_said(meta, file) | _thresholds_said(meta) | _losses_said(meta)
    backbone = resnet_of(renamed, NAME)
    if meta.style is not None or backbone in _BASIC:
        said["stride_in_1x1"] = meta.style == "caffe" and backbone not in _BASIC
    fields: dict[str, Any] = {
        "num_classes": num_classes,
        "class_names": class_names_of(num_classes),
        "backbone": backbone,
        "stride_in_1x1": _is_caffe(meta, file) and backbone not in _BASIC,
        "fpn_channels": len(renamed["fpn.p7.weight"]),
        "p6_from": _p6_source(meta) or p6_source_of(renamed),
        "p7_relu": bool(meta.get("model.neck.relu_before_extra_convs")),
        "head_depth": depth,
        "anchor_offset": 0.0,
        "log_scale_clamp": "both",
        "box_loss": "l1",
        "drop_empty": True,
        "size_rounding": "round",
        "round_pixels": True,
    }
    if meta.is_version_1:
        fields |= _VERSION_1
    try:
        config = RetinaNetConfig(**fields | said)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The configuration in this MMDetection file cannot be represented: {error}"
        ) from error
    return SuggestedConfig(config, tuple(field for field in _SAID_BY_META if field not in said))


_SAID_BY_META = (
    *("class_names", "stride_in_1x1", "anchor_sizes", "octave_scales", "aspect_ratios"),
    *("score_threshold", "pre_nms_top_k", "nms_threshold", "max_detections"),
    *("min_size", "max_size", "image_mean", "image_std", "size_divisor"),
)
"""The fields that tensors don't show, so that they are assumed if the configuration is missing."""


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert an MMDetection RetinaNet.

    Args:
        file: The state dict, with the ``meta`` entry, which has the scale of pixels and box deltas, and
            the file name.
        config: The configuration to use. If the file does not say how pixels are normalised, its
            ``stride_in_1x1`` decides whether the file is treated as caffe style.

    Raises:
        CheckpointError: If tensors belong to a different model.
    """
    renamed = rename(file.tensors, NAME, _RENAMES, _IGNORED)
    buffers = [key for key in file.tensors if re.fullmatch(_BUFFERS_OF_LOSS, key)]
    if buffers:
        _logger.info("Dropped %d buffers of the loss: %s.", len(buffers), ", ".join(buffers))
    meta = Meta(file)
    meta.warn_if_unreadable()
    pixels = meta.pixels
    if pixels is None and (
        _is_caffe(meta, file) if config.backbone in _BASIC else config.stride_in_1x1
    ):
        pixels = _CAFFE
    if pixels is not None and not pixels.to_rgb:
        if config.in_channels == len(pixels.std):
            std = [ours / theirs for ours, theirs in zip(config.image_std, pixels.std, strict=True)]
            fold_bgr_input(renamed, std)
        else:
            fold_bgr_input(renamed, config.image_std)  # raises the error for other channels
    scales, shifts = meta.delta_scales
    if any(scale != 1 for scale in scales):
        fold_delta_scales(renamed, scales)
    if any(shifts):
        bias = renamed["head.box_deltas.bias"]
        renamed["head.box_deltas.bias"] = bias + torch.tensor(shifts).to(bias).repeat(
            len(bias) // 4
        )
    return with_norm_of(renamed, config)


# --- What the configuration says -----------------------------------------------------------------


_ALLOWED: dict[str, tuple[object, ...]] = {
    "model.type": ("RetinaNet", "mmdet.RetinaNet"),
    "model.backbone.type": ("ResNet", "ResNeXt", "mmdet.ResNet", "mmdet.ResNeXt"),
    "model.backbone.strides": ((1, 2, 2, 2),),
    "model.backbone.dilations": ((1, 1, 1, 1),),
    "model.backbone.out_indices": ((0, 1, 2, 3),),
    "model.backbone.deep_stem": (False,),
    "model.backbone.avg_down": (False,),
    "model.neck.type": ("FPN", "mmdet.FPN"),
    "model.neck.start_level": (1,),
    "model.neck.num_outs": (len(_STRIDES),),
    "model.neck.upsample_cfg.mode": ("nearest",),
    "model.neck.act_cfg": (None,),
    "model.neck.activation": (None,),
    "model.bbox_head.type": ("RetinaHead", "FreeAnchorRetinaHead", "PISARetinaHead"),
    "model.bbox_head.anchor_generator.type": ("AnchorGenerator", "mmdet.AnchorGenerator"),
    "model.bbox_head.anchor_generator.scale_major": (True,),
    "model.bbox_head.anchor_generator.centers": (None,),
    "model.bbox_head.bbox_coder.type": ("DeltaXYWHBBoxCoder", "mmdet.DeltaXYWHBBoxCoder"),
    "model.bbox_head.bbox_coder.clip_border": (True,),
    "model.bbox_head.bbox_coder.add_ctr_clamp": (False,),
    "model.bbox_head.loss_cls.use_sigmoid": (True,),
    "model.test_cfg.nms.type": ("nms",),
    "model.test_cfg.min_bbox_size": (0, -1),
    "test_cfg.nms.type": ("nms",),
    "test_cfg.min_bbox_size": (0, -1),
}
"""The values of options that can be represented. Other options are read, or only matter in training."""

_REASONS = {
    # Files of version 1 itself name neither; see Meta.is_version_1.
    "LegacyAnchorGenerator": "Boxes of version 1 in later versions of MMDetection cannot be loaded, "
    "because they are half a pixel off those of version 1.",
    "LegacyDeltaXYWHBBoxCoder": "Boxes of version 1 in later versions of MMDetection cannot be loaded, "
    "because they are half a pixel off those of version 1.",
}


def _check_options(meta: Meta) -> None:
    """Raise if an option has no counterpart in focaldet."""
    for path, allowed in _ALLOWED.items():
        value = meta.get(path)
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed))
            remedy = _REASONS.get(str(value), f"Only {expected} can be loaded.")
            raise meta.error(path, value, remedy)


def _check_counts(meta: Meta, num_classes: int, depth: int) -> None:
    """Raise if the configuration has other numbers of classes or layers than the tensors."""
    background = 1 if meta.is_version_1 else 0
    path = "model.bbox_head.num_classes"
    said = meta.number(path)
    if said is not None and said != num_classes + background:
        raise meta.error(path, said, f"The head has {num_classes} classes.")
    path = "model.bbox_head.stacked_convs"
    said = meta.number(path)
    if said is not None and said != depth:
        raise meta.error(path, said, f"The head has {depth} layers.")


def _p6_source(meta: Meta) -> str | None:
    path = "model.neck.add_extra_convs"
    added = meta.get(path)
    if added is None:
        return None
    if added is True:
        added = "on_output" if meta.get("model.neck.extra_convs_on_inputs") is False else "on_input"
    sources = {"on_input": "c5", "on_output": "p5"}
    if added not in sources:
        raise meta.error(path, added, f"Only {' or '.join(map(repr, sources))} can be loaded.")
    return sources[added]


def _anchors_said(meta: Meta) -> dict[str, Any]:
    """Return the fields of the anchors."""
    new, old = "model.bbox_head.anchor_generator.", "model.bbox_head."
    strides = meta.numbers(new + "strides", old + "anchor_strides")
    if strides not in (None, _STRIDES):
        raise meta.error("the strides of anchors", strides, f"Only {_STRIDES} can be loaded.")
    fields: dict[str, Any] = {}
    sides = meta.numbers(new + "base_sizes", old + "anchor_base_sizes", count=len(_STRIDES))
    offset = meta.number(new + "center_offset")
    if offset and sides not in (None, _STRIDES):
        raise meta.error(new + "center_offset", offset, "With base_sizes, only 0 can be loaded.")
    if offset is not None:
        fields["anchor_offset"] = float(offset)
    base = meta.number(new + "octave_base_scale", old + "octave_base_scale")
    per_octave = meta.number(new + "scales_per_octave", old + "scales_per_octave")
    scales = meta.numbers(new + "scales", old + "anchor_scales")
    if base is not None and per_octave is not None:
        fields["anchor_sizes"] = tuple(side * base for side in sides or _STRIDES)
        count = range(min(int(per_octave), 101))  # a config refuses more than 100
        fields["octave_scales"] = tuple(2 ** (i / per_octave) for i in count)
    elif scales is not None:
        fields |= {"anchor_sizes": sides or _STRIDES, "octave_scales": scales}
    ratios = meta.numbers(new + "ratios", old + "anchor_ratios")
    if ratios is not None:
        fields["aspect_ratios"] = ratios
    return fields


def _input_said(meta: Meta, file: CheckpointFile) -> dict[str, Any]:
    """Return the fields of preprocessing."""
    fields: dict[str, Any] = {}
    sizes = meta.input_sizes
    if sizes is not None:
        fields |= sizes
    elif "openimages" in file.name:  # the published model
        fields |= {"min_size": 800, "max_size": 1024}
    divisor = meta.size_divisor
    if divisor is not None:
        fields["size_divisor"] = divisor
    pixels = meta.pixels
    if pixels is not None:
        mean = tuple(value / 255 for value in pixels.mean)
        std = tuple(value / 255 for value in pixels.std)
        if not pixels.to_rgb and pixels.std == _CAFFE.std:
            std = RetinaNetConfig.image_std  # folded into the weights
        fields["image_mean"] = _usual_if_close(mean, RetinaNetConfig.image_mean)
        fields["image_std"] = _usual_if_close(std, RetinaNetConfig.image_std)
    return fields


def _usual_if_close(values: tuple[float, ...], usual: tuple[float, ...]) -> tuple[float, ...]:
    close = all(abs(a - b) < 1e-9 for a, b in zip(values, usual, strict=True))
    return usual if close else values


def _thresholds_said(meta: Meta) -> dict[str, Any]:
    """Return the fields of post-processing."""
    new, old = "model.test_cfg.", "test_cfg."
    fields: dict[str, Any] = {}
    for field, names in (
        ("score_threshold", ("score_thr",)),
        ("nms_threshold", ("nms.iou_threshold", "nms.iou_thr")),
        ("pre_nms_top_k", ("nms_pre",)),
        ("max_detections", ("max_per_img",)),
    ):
        paths = [prefix + name for prefix in (new, old) for name in names]
        value = meta.number(*paths)
        if value is not None:
            fields[field] = value
    for field in ("pre_nms_top_k", "max_detections"):
        if fields.get(field, 1) <= 0:
            fields[field] = None
    if isinstance(meta.get(new[:-1], old[:-1]), dict):  # options with defaults
        fields.setdefault("pre_nms_top_k", None)
        if not meta.is_version_1:  # which does not drop boxes
            side = meta.number(new + "min_bbox_size", old + "min_bbox_size")
            fields["drop_empty"] = side is not None and side >= 0
    agnostic = meta.get(new + "nms.class_agnostic", old + "nms.class_agnostic")
    if agnostic is not None:
        fields["class_agnostic_nms"] = agnostic
    return fields


def _losses_said(meta: Meta) -> dict[str, Any]:
    """Return the fields of the losses, for training on."""
    fields: dict[str, Any] = {}
    loss = "model.bbox_head.loss_cls."
    if meta.get(loss + "type") == "FocalLoss":
        for field, name in (("focal_alpha", "alpha"), ("focal_gamma", "gamma")):
            value = meta.number(loss + name)
            if value is not None:
                fields[field] = value
    loss = "model.bbox_head.loss_bbox."
    kind = meta.get(loss + "type")
    if kind in ("L1Loss", "SmoothL1Loss", "GIoULoss"):
        fields["box_loss"] = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1"}.get(kind, "giou")
        fields["box_loss_weight"] = meta.number(loss + "loss_weight") or 1.0
        if kind == "SmoothL1Loss":
            fields["smooth_l1_beta"] = meta.number(loss + "beta") or 1.0
    return fields
