"""Build the parts that a configuration describes, and find the configuration of given parts."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn, TypedDict

import torch
from torch import nn

from focaldet import pretrained
from focaldet._checks import shortened
from focaldet.anchors import AnchorGenerator
from focaldet.backbones import (
    FrozenBatchNorm2d,
    build_backbone,
    freeze_stages,
    imagenet_weights,
    load_backbone_weights,
)
from focaldet.box_coder import BoxCoder, CornerBoxCoder
from focaldet.criterion import (
    CrossEntropyMapLoss,
    FocalMapLoss,
    QualityFocalMapLoss,
    RetinaNetCriterion,
    SoftmaxFocalMapLoss,
)
from focaldet.fpn import FPN
from focaldet.heads import RetinaNetHead
from focaldet.matching import ATSSAssigner, Matcher
from focaldet.postprocess import PostProcess
from focaldet.transforms import Preprocess

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.backbones import NamedBackbone
    from focaldet.config import RetinaNetConfig
    from focaldet.criterion import ClassificationLoss, IoUAwareClassificationLoss
    from focaldet.matching import Assigner

__all__ = [
    "Parts",
    "build_anchor_generator",
    "build_named_backbone",
    "build_parts",
    "build_preprocess",
    "current_config",
    "name_backbone",
    "warn_of_frozen_random_norms",
]

_logger = logging.getLogger(__name__)

_MAX_LOG_SCALE = math.log(1000 / 16)
_CUSTOM = "custom"  # config.backbone for a module of the caller's own
_IMAGENET = "imagenet"
_RANDOM_FROZEN = (
    "The backbone is randomly initialised but its BatchNorm is frozen, so it will barely train. Use "
    "backbone_norm='batch', backbone_weights or from_pretrained."
)


class Parts(TypedDict):
    """The parts of a RetinaNet except its backbone, by the names of its constructor's arguments."""

    preprocess: Preprocess
    fpn: nn.Module
    head: RetinaNetHead
    anchor_generator: AnchorGenerator
    criterion: nn.Module
    postprocess: PostProcess


def build_parts(
    config: RetinaNetConfig, backbone: nn.Module, criterion: nn.Module | None = None
) -> Parts:
    """Build all parts except the backbone.

    Args:
        config: Describes the parts.
        backbone: Its ``channels`` and ``strides`` determine the pyramid and the anchors. It has one of
            each for every level up to 5.
        criterion: Used instead of the one that the config describes. If it is None and
            ``config.criterion`` is "custom", computing losses is an error that asks for it.

    Raises:
        TypeError: If the backbone lacks ``channels`` or ``strides``.
        ValueError: If an option is out of range, or the backbone does not have the maps of the config.
    """
    channels, strides = _maps_of(backbone, config)
    box_coder = _build_box_coder(config)
    anchor_generator = build_anchor_generator(config, strides)
    if criterion is None:
        custom = config.criterion == "custom"
        criterion = _MissingCriterion() if custom else _build_criterion(config, box_coder)
    return Parts(
        preprocess=build_preprocess(config),
        fpn=_build_fpn(config, channels),
        head=RetinaNetHead(
            channels[0] if config.fpn_channels is None else config.fpn_channels,
            anchor_generator.num_anchors,
            config.num_classes,
            depth=config.head_depth,
            norm=config.head_norm,
            box_norm=config.head_box_norm,
            prior=config.prior,
            init=config.head_init,
        ),
        anchor_generator=anchor_generator,
        criterion=criterion,
        postprocess=PostProcess(
            box_coder,
            score_threshold=config.score_threshold,
            pre_nms_top_k=config.pre_nms_top_k,
            pre_nms_top_k_of=config.pre_nms_top_k_of,
            pre_nms_top_k_per_class=config.pre_nms_top_k_per_class,
            nms_threshold=config.nms_threshold,
            suppression=config.suppression,
            soft_nms_sigma=config.soft_nms_sigma,
            max_detections=config.max_detections,
            class_agnostic_nms=config.class_agnostic_nms,
            clip_to=config.clip_to,
            drop_empty=config.drop_empty,
            inclusive_corners=config.inclusive_corners,
            resize_limits=(config.min_size, config.max_size) if config.uniform_rescale else None,
            scale_before_nms=config.scale_before_nms,
            size_rounding=config.size_rounding,
            last_level_threshold=config.last_level_threshold,
            first_stride=strides[0],
        ),
    )


def _build_fpn(config: RetinaNetConfig, channels: Sequence[int]) -> nn.Module:
    """Build the pyramid, or nothing in its place if the config has none."""
    if config.fpn_channels is None:
        return nn.Identity()
    return FPN(
        channels,
        config.fpn_channels,
        num_extra=len(config.levels) - len(channels),
        p6_from=config.p6_from,
        p7_relu=config.p7_relu,
        strided_padding=config.strided_padding,
    )


def _build_box_coder(config: RetinaNetConfig) -> BoxCoder | CornerBoxCoder:
    if config.box_encoding == "corners":
        return CornerBoxCoder(config.box_weights)
    high = math.inf if config.log_scale_clamp is None else _MAX_LOG_SCALE
    low = -_MAX_LOG_SCALE if config.log_scale_clamp == "both" else -math.inf
    return BoxCoder(config.box_weights, max_log_scale=high, min_log_scale=low)


def _build_criterion(
    config: RetinaNetConfig, box_coder: BoxCoder | CornerBoxCoder
) -> RetinaNetCriterion:
    return RetinaNetCriterion(
        _build_assigner(config),
        box_coder,
        classification_loss=_build_classification_loss(config),
        box_loss=config.box_loss,
        smooth_l1_beta=config.smooth_l1_beta,
        box_loss_weight=config.box_loss_weight,
        normalizer=config.normalizer,
    )


def _build_assigner(config: RetinaNetConfig) -> Assigner:
    if config.assigner == "atss":
        return ATSSAssigner(config.atss_top_k)
    return Matcher(
        config.positive_threshold,
        config.negative_threshold,
        force_match_floor=config.force_match_floor,
    )


def _build_classification_loss(
    config: RetinaNetConfig,
) -> ClassificationLoss | IoUAwareClassificationLoss:
    if config.classification_loss == "cross_entropy":
        return CrossEntropyMapLoss()
    if config.classification_loss == "softmax_focal":
        return SoftmaxFocalMapLoss(config.focal_alpha, config.focal_gamma)
    if config.classification_loss == "quality_focal":
        return QualityFocalMapLoss(config.focal_gamma)
    return FocalMapLoss(config.focal_alpha, config.focal_gamma)


class _MissingCriterion(nn.Module):
    """Stands for a custom criterion that was not passed in. The model can predict without it."""

    def forward(self, *_: object) -> NoReturn:
        raise ValueError(
            "This model was trained with a custom criterion, which config.json cannot describe, so "
            "computing losses requires it: RetinaNet.from_pretrained(..., criterion=...)."
        )


def build_preprocess(config: RetinaNetConfig) -> Preprocess:
    """Build the part that normalises, resizes and pads images.

    Raises:
        ValueError: If an option is out of range.
    """
    return Preprocess(
        min_size=config.min_size,
        max_size=config.max_size,
        keep_ratio=config.keep_ratio,
        mean=config.image_mean,
        std=config.image_std,
        size_divisor=config.size_divisor,
        size_rounding=config.size_rounding,
        antialias=config.antialias,
        round_pixels=config.round_pixels,
        always_pad=config.always_pad,
        resize_by=config.resize_by,
    )


def build_anchor_generator(config: RetinaNetConfig, strides: Sequence[int]) -> AnchorGenerator:
    """Build the anchors of all levels.

    Args:
        config: Describes the anchors.
        strides: Strides of the backbone's maps, in pixels.

    Raises:
        ValueError: If an option is out of range.
    """
    return AnchorGenerator(
        config.anchor_sizes,
        octave_scales=config.octave_scales,
        aspect_ratios=config.aspect_ratios,
        strides=(
            *strides,
            *(strides[-1] * 2**i for i in range(1, len(config.levels) - len(strides) + 1)),
        ),
        offset=config.anchor_offset,
        mode=config.anchor_mode,
        plus_one=config.anchor_plus_one,
    )


def name_backbone(config: RetinaNetConfig, backbone: nn.Module | None) -> RetinaNetConfig:
    """Return the config that says "custom" if a backbone of the caller's own was passed.

    The config may also name the default backbone, since that cannot be told from a field that was
    left out.

    Args:
        config: Describes the model.
        backbone: The caller's own backbone, or None.

    Raises:
        TypeError: If ``config.backbone`` is "custom" and no backbone was passed, or if it names a
            backbone other than the default and one was passed.
    """
    if backbone is None:
        if config.backbone == _CUSTOM:
            raise TypeError("config.backbone is 'custom', so backbone= is required.")
        return config
    default = type(config).backbone
    if config.backbone not in (_CUSTOM, default):
        raise TypeError(
            f"config.backbone is {config.backbone!r}, but backbone= was also given "
            f"({type(backbone).__name__}). Set config.backbone to 'custom', or leave out backbone=."
        )
    return config.replace(backbone=_CUSTOM)


def build_named_backbone(
    config: RetinaNetConfig, weights: Mapping[str, Tensor] | str | os.PathLike[str] | None
) -> NamedBackbone:
    """Build the backbone that a config names, with ``config.trainable_stages`` stages that train.

    Args:
        config: Describes the backbone.
        weights: What the caller passed as ``backbone_weights``: a classifier's state dict, its file,
            "imagenet", or None.

    Raises:
        ImportError: If the config names a network of timm and timm is not installed.
        FileNotFoundError: If there is no such file.
        DownloadError: If the published weights could not be downloaded.
        ValueError: If the name is unknown, an option is out of range, or the weights do not fit.
    """
    if weights is not None and not isinstance(weights, Mapping):
        weights = _read_backbone_weights(config, weights)
    backbone = build_backbone(
        config.backbone,
        norm=config.backbone_norm,
        norm_eps=config.backbone_norm_eps,
        stride_in_1x1=config.stride_in_1x1,
        in_channels=config.in_channels,
        strided_padding=config.strided_padding,
        levels=config.map_levels,
    )
    if weights is not None:
        load_backbone_weights(backbone, config.backbone, weights, argument="backbone_weights")
    freeze_stages(backbone, config.trainable_stages)
    return backbone


def _read_backbone_weights(
    config: RetinaNetConfig, source: str | os.PathLike[str]
) -> Mapping[str, Tensor]:
    """Read a classifier's state dict from a file, or from the published one for "imagenet"."""
    if source != _IMAGENET:
        return pretrained.read_tensors(source)
    published = imagenet_weights(config.backbone)
    if config.stride_in_1x1:
        raise ValueError(
            "backbone_weights='imagenet' does not fit config.stride_in_1x1=True, because "
            f"{published.name} was trained with the stride in the 3x3 convolutions. Set "
            "stride_in_1x1=False, or pass a file of Caffe's weights."
        )
    for name in ("image_mean", "image_std"):
        trained, used = getattr(published, name), getattr(config, name)
        if config.in_channels == 3 and trained != used:
            _logger.warning(
                "%s was trained with %s=%s, but the config has %s.",
                *(published.name, name, trained, used),
            )
    return pretrained.read_tensors(pretrained.fetch(published))


def warn_of_frozen_random_norms(backbone: nn.Module) -> None:
    """Warn if a backbone that starts at random has frozen BatchNorm, with which it barely trains."""
    if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
        warnings.warn(_RANDOM_FROZEN, UserWarning, stacklevel=3)


def _maps_of(
    backbone: nn.Module, config: RetinaNetConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the channels and strides of a backbone's maps."""
    found = []
    kind, maps = type(backbone).__name__, config.map_levels
    for name in ("channels", "strides"):
        values = getattr(backbone, name, None)
        if not isinstance(values, tuple | list) or not values:
            raise TypeError(
                f"backbone must have an attribute {name!r} with one number per map. {kind}.{name} is "
                f"{shortened(values)}."
            )
        if len(values) != len(maps):
            raise ValueError(
                f"config.levels is {config.levels}, of which the {len(maps)} up to 5 are computed from "
                f"the backbone's maps, one from each, but {kind}.{name} is {shortened(values)}. Set "
                f"config.levels to a range with {len(values)} up to 5."
            )
        found.append(tuple(int(value) for value in values))
    if config.fpn_channels is None and len(set(found[0])) > 1:
        raise ValueError(
            "config.fpn_channels is None, so the head reads the backbone's maps, which must have the "
            f"same number of channels, but {kind}.channels is {found[0]}."
        )
    return found[0], found[1]


def current_config(config: RetinaNetConfig, parts: Parts, backbone: nn.Module) -> RetinaNetConfig:
    """Return the config that describes parts as they are now.

    Parts can be changed after they were built, as by ``model.postprocess.score_threshold = 0.3``.
    The config takes over what it has a field for. A criterion that it cannot describe makes it
    "custom".

    Args:
        config: The config that the parts were built from.
        parts: The parts.
        backbone: The backbone of the model, which is not compared.

    Raises:
        ValueError: If a part other than the criterion differs from every config. The message names
            what differs.
    """
    config = config.replace(**_changed_fields(config, parts))
    with torch.device("meta"):  # without memory for weights, and without random numbers
        described = build_parts(config, backbone)
    differences = {
        name: _differences(name, part, described[name])  # type: ignore[literal-required]
        for name, part in parts.items()
    }
    if differences.pop("criterion") and config.criterion != "custom":
        config = config.replace(criterion="custom")
    found = [difference for part in differences.values() for difference in part]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            "The model's config cannot describe its parts, so a saved model would load as a different "
            f"one: {'; '.join(found[:3])}{more}. Build the model from a config that describes the "
            "parts, or save model.state_dict() yourself."
        )
    return config


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_FIELDS: dict[type, dict[str, str]] = {
    Preprocess: _same(
        *("min_size", "max_size", "keep_ratio", "size_divisor", "size_rounding"),
        *("resize_by", "antialias", "round_pixels", "always_pad"),
    ),
    PostProcess: _same(
        *("score_threshold", "pre_nms_top_k", "nms_threshold", "max_detections"),
        *("suppression", "soft_nms_sigma"),
        *("pre_nms_top_k_of", "pre_nms_top_k_per_class", "last_level_threshold"),
        *("class_agnostic_nms", "clip_to", "drop_empty", "inclusive_corners", "scale_before_nms"),
    ),
    RetinaNetCriterion: _same("box_loss", "smooth_l1_beta", "box_loss_weight", "normalizer"),
    Matcher: _same("positive_threshold", "negative_threshold", "force_match_floor"),
    ATSSAssigner: {"top_k": "atss_top_k"},
    FocalMapLoss: {"alpha": "focal_alpha", "gamma": "focal_gamma"},
    SoftmaxFocalMapLoss: {"alpha": "focal_alpha", "gamma": "focal_gamma"},
    QualityFocalMapLoss: {"beta": "focal_gamma"},
}
"""The attributes of parts that can be changed after they are built, with their fields in the config."""

_KINDS: dict[type, dict[str, object]] = {
    Matcher: {"assigner": "iou"},
    ATSSAssigner: {"assigner": "atss"},
    FocalMapLoss: {"classification_loss": "focal"},
    CrossEntropyMapLoss: {"classification_loss": "cross_entropy"},
    SoftmaxFocalMapLoss: {"classification_loss": "softmax_focal"},
    QualityFocalMapLoss: {"classification_loss": "quality_focal"},
}


def _changed_fields(config: RetinaNetConfig, parts: Parts) -> dict[str, object]:
    """Return the fields of the config that the parts have other values for."""
    criterion = parts["criterion"]
    described: list[object] = [parts["preprocess"], parts["postprocess"], criterion]
    if isinstance(criterion, RetinaNetCriterion):
        described += [criterion.assigner, criterion.classification_loss]
    found: dict[str, object] = {}
    for part in described:
        found |= _KINDS.get(type(part), {})
        for name, field in _FIELDS.get(type(part), {}).items():
            found[field] = getattr(part, name)
    return {field: value for field, value in found.items() if value != getattr(config, field)}


def _differences(path: str, part: object, described: object) -> list[str]:
    """Return how a part differs from the one that the config describes, by attribute."""
    if type(part) is not type(described):
        return [f"{path} is of type {type(part).__name__} instead of {type(described).__name__}"]
    found = []
    own, expected = _settings(part), _settings(described)
    for name, value in expected.items():
        if name not in own:
            found.append(f"{path}.{name} is missing")
        elif _is_simple(value):
            if not _is_simple(own[name]) or own[name] != value:
                found.append(f"{path}.{name} is {own[name]!r} instead of {value!r}")
        else:
            found += _differences(f"{path}.{name}", own[name], value)
    if isinstance(part, nn.Module):
        weights = {*dict(part.named_children()), *dict(part.named_parameters(recurse=False))}
        found += [f"{path} has an extra {name!r}" for name in sorted(weights - expected.keys())]
    return found


def _settings(part: object) -> dict[str, object]:
    """Return the public attributes of a part, and the shapes of its tensors."""
    found = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in getattr(part, "__dict__", {}).items()
        if not name.startswith("_") and name != "training"
    }
    if isinstance(part, nn.Module):
        found |= dict(part.named_children())
        for named in (part.named_parameters, part.named_buffers):
            found |= {name: tuple(value.shape) for name, value in named(recurse=False)}
    return found


def _is_simple(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)
