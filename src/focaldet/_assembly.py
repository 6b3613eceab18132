"""From a configuration to the parts that it describes."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, TypedDict

from focaldet._checks import check_choice, shortened
from focaldet.anchors import AnchorGenerator
from focaldet.backbones import (
    FrozenBatchNorm2d,
    build_backbone,
    freeze_stages,
    load_backbone_weights,
)
from focaldet.box_coder import BoxCoder
from focaldet.criterion import RetinaNetCriterion
from focaldet.fpn import FPN
from focaldet.heads import RetinaNetHead
from focaldet.matching import Matcher
from focaldet.postprocess import PostProcess
from focaldet.transforms import Preprocess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from focaldet.backbones import NamedBackbone
    from focaldet.config import RetinaNetConfig

__all__ = [
    "Parts",
    "build_anchor_generator",
    "build_named_backbone",
    "build_parts",
    "build_preprocess",
    "name_backbone",
    "warn_of_frozen_random_norms",
]

_MAX_LOG_SCALE = math.log(1000 / 16)
_CUSTOM = "custom"  # config.backbone for a module of the caller's own
_RANDOM_FROZEN = (
    "The backbone is randomly initialised but its BatchNorm is frozen, so it will barely train. Use "
    "backbone_norm='batch', backbone_weights or from_pretrained."
)


class Parts(TypedDict):
    """The parts of a RetinaNet but its backbone, by the names of its constructor's arguments."""

    preprocess: Preprocess
    fpn: FPN
    head: RetinaNetHead
    anchor_generator: AnchorGenerator
    criterion: RetinaNetCriterion
    postprocess: PostProcess


def build_parts(config: RetinaNetConfig, backbone: nn.Module) -> Parts:
    """Build all parts but the backbone.

    Args:
        config: describes them.
        backbone: its ``channels`` and ``strides`` shape the pyramid and the anchors.

    Raises:
        TypeError: a backbone without ``channels`` or ``strides``.
        ValueError: an option out of its range.
    """
    channels, strides = _levels_of(backbone)
    box_coder = _build_box_coder(config)
    anchor_generator = build_anchor_generator(config, strides)
    return Parts(
        preprocess=build_preprocess(config),
        fpn=FPN(channels, config.fpn_channels, p6_from=config.p6_from, p7_relu=config.p7_relu),
        head=RetinaNetHead(
            config.fpn_channels,
            anchor_generator.num_anchors,
            config.num_classes,
            depth=config.head_depth,
            norm=config.head_norm,
            prior=config.prior,
        ),
        anchor_generator=anchor_generator,
        criterion=RetinaNetCriterion(
            Matcher(
                config.positive_threshold,
                config.negative_threshold,
                force_match_floor=config.force_match_floor,
            ),
            box_coder,
            focal_alpha=config.focal_alpha,
            focal_gamma=config.focal_gamma,
            box_loss=config.box_loss,
            smooth_l1_beta=config.smooth_l1_beta,
            box_loss_weight=config.box_loss_weight,
            normalizer=config.normalizer,
        ),
        postprocess=PostProcess(
            box_coder,
            score_threshold=config.score_threshold,
            pre_nms_top_k=config.pre_nms_top_k,
            nms_threshold=config.nms_threshold,
            max_detections=config.max_detections,
            class_agnostic_nms=config.class_agnostic_nms,
            clip_to=config.clip_to,
            drop_empty=config.drop_empty,
            inclusive_corners=config.inclusive_corners,
            resize_limits=(config.min_size, config.max_size) if config.uniform_rescale else None,
            first_stride=strides[0],
        ),
    )


def _build_box_coder(config: RetinaNetConfig) -> BoxCoder:
    check_choice("log_scale_clamp", config.log_scale_clamp, ("above", "both", None))
    high = math.inf if config.log_scale_clamp is None else _MAX_LOG_SCALE
    low = -_MAX_LOG_SCALE if config.log_scale_clamp == "both" else -math.inf
    return BoxCoder(config.box_weights, max_log_scale=high, min_log_scale=low)


def build_preprocess(config: RetinaNetConfig) -> Preprocess:
    """Build what brings images to the model's input size.

    Raises:
        ValueError: an option out of its range.
    """
    return Preprocess(
        min_size=config.min_size,
        max_size=config.max_size,
        mean=config.image_mean,
        std=config.image_std,
        size_divisor=config.size_divisor,
        size_rounding=config.size_rounding,
        antialias=config.antialias,
        round_pixels=config.round_pixels,
        always_pad=config.always_pad,
    )


def build_anchor_generator(config: RetinaNetConfig, strides: Sequence[int]) -> AnchorGenerator:
    """Build the anchors of P3..P7.

    Args:
        config: describes them.
        strides: of the backbone's C3, C4 and C5, in pixels.

    Raises:
        ValueError: an option out of its range.
    """
    return AnchorGenerator(
        config.anchor_sizes,
        octave_scales=config.octave_scales,
        aspect_ratios=config.aspect_ratios,
        strides=(*strides, 2 * strides[-1], 4 * strides[-1]),
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
    config: RetinaNetConfig, weights: Mapping[str, Tensor] | None
) -> NamedBackbone:
    """Build the backbone that a config names, with ``config.trainable_stages`` stages that train.

    Args:
        config: Describes the backbone.
        weights: The classifier's state dict that the caller passed as ``backbone_weights``, or None.

    Raises:
        ImportError: If the config names a network of timm and timm is not installed.
        ValueError: If the name is unknown, an option is out of range, or the weights do not fit.
    """
    backbone = build_backbone(
        config.backbone,
        norm=config.backbone_norm,
        norm_eps=config.backbone_norm_eps,
        stride_in_1x1=config.stride_in_1x1,
        in_channels=config.in_channels,
    )
    if weights is not None:
        load_backbone_weights(backbone, config.backbone, weights, argument="backbone_weights")
    freeze_stages(backbone, config.trainable_stages)
    return backbone


def warn_of_frozen_random_norms(backbone: nn.Module) -> None:
    """Warn if a backbone that starts at random has frozen BatchNorm, with which it barely trains."""
    if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
        warnings.warn(_RANDOM_FROZEN, UserWarning, stacklevel=3)


def _levels_of(backbone: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = []
    for name in ("channels", "strides"):
        values = getattr(backbone, name, None)
        if not isinstance(values, tuple | list) or len(values) != 3:
            raise TypeError(
                f"backbone must have three {name}, those of C3, C4 and C5; "
                f"{type(backbone).__name__}.{name} is {shortened(values)}."
            )
        found.append(tuple(int(value) for value in values))
    return found[0], found[1]
