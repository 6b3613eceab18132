"""Conversion of a RetinaNet to torchvision's, with the same weights and the same detections."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from focaldet._torchvision import torchvision
from focaldet.backbones import BACKBONES, MobileNet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

__all__ = ["build_torchvision"]

_logger = logging.getLogger(__name__)

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.features\.", "backbone.body."),
        (r"backbone\.", "backbone.body."),
        (r"fpn\.lateral\.(\d)\.", r"backbone.fpn.inner_blocks.\1.0."),
        (r"fpn\.output\.(\d)\.", r"backbone.fpn.layer_blocks.\1.0."),
        (r"fpn\.", "backbone.fpn.extra_blocks."),
        (r"head\.class_tower\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
        (r"head\.class_tower\.(\d)\.norm\.", r"head.classification_head.conv.\1.1."),
        (r"head\.box_tower\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
        (r"head\.box_tower\.(\d)\.norm\.", r"head.regression_head.conv.\1.1."),
        (r"head\.class_logits\.", "head.classification_head.cls_logits."),
        (r"head\.box_deltas\.", "head.regression_head.bbox_reg."),
    )
)

# The fields of the config that torchvision's model has, too.
_CARRIED = frozenset(
    (
        *("num_classes", "class_names", "in_channels"),
        *("backbone", "backbone_norm", "backbone_norm_eps", "trainable_stages"),
        *("levels", "fpn_channels", "p6_from", "prior", "head_init"),
        *("anchor_sizes", "octave_scales", "aspect_ratios"),
        *("positive_threshold", "negative_threshold", "smooth_l1_beta", "atss_top_k"),
        *("score_threshold", "pre_nms_top_k", "nms_threshold", "max_detections"),
        "soft_nms_sigma",  # only used by soft suppression, which is rejected
        *("min_size", "max_size", "keep_ratio", "image_mean", "image_std", "size_divisor"),
    )
)
# The values that torchvision's losses have, where they differ from the defaults.
_LOSSES: dict[str, tuple[object, ...]] = {
    "criterion": ("retinanet",),
    "assigner": ("iou",),
    "force_match_floor": (0.0,),
    "classification_loss": ("focal",),
    "focal_alpha": (0.25,),
    "focal_gamma": (2.0,),
    "box_loss": ("l1", "smooth_l1", "giou", "diou", "ciou"),
    "box_loss_weight": (1.0,),
    "normalizer": ("image",),
}
# The values that torchvision has of the other fields, where they differ from the defaults.
_FIXED: dict[str, object] = {"anchor_mode": "torchvision", "anchor_offset": 0.0}
_LAST_LEVEL = 7  # of its pyramid, from LastLevelP6P7
_SMOOTH_L1_BETA = 1.0
# The layers after the convolutions of a tower, by the values of the head's norms.
_NORMS: dict[str | None, Callable[[int], nn.Module] | None] = {
    None: None,
    "group": functools.partial(nn.GroupNorm, 32),
    "batch": nn.BatchNorm2d,
}
_NO_LIMIT = 2**31 - 1  # for counts that torchvision compares with other numbers


def build_torchvision(model: nn.Module, config: RetinaNetConfig) -> nn.Module:
    """Build torchvision's RetinaNet with copies of a model's weights.

    Args:
        model: A RetinaNet.
        config: The configuration that describes the model as it is now.

    Returns:
        A ``torchvision.models.detection.RetinaNet`` in the mode of the model (training or evaluation),
        with its dtype and device. Parameters that are frozen in the model are frozen in it.

    Raises:
        ValueError: If options that affect the detections have no counterpart in torchvision. The
            message names all of them.
    """
    state = model.state_dict()
    problems = _without_counterpart(config, state)
    if problems:
        raise ValueError(
            f"torchvision's RetinaNet has no counterpart of {', '.join(problems)}. Only models with the "
            "detection options of RetinaNetConfig.torchvision_v1 or torchvision_v2 can be converted."
        )
    _warn_of_losses(config)
    peer = _build(config, state)
    tensors = {_renamed(key): value for key, value in state.items() if not _of_criterion(key)}
    peer.load_state_dict({key: value.clone() for key, value in tensors.items()}, assign=True)
    for key, parameter in model.named_parameters():
        if not _of_criterion(key):
            peer.get_parameter(_renamed(key)).requires_grad_(parameter.requires_grad)
    return peer.train(model.training)


def _of_criterion(key: str) -> bool:
    return key.startswith("criterion.")


def _renamed(key: str) -> str:
    """Return torchvision's name of a parameter or buffer."""
    for pattern, name in _RENAMES:
        renamed, count = pattern.subn(name, key, count=1)
        if count:
            return renamed
    return key


def _without_counterpart(config: RetinaNetConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Return the options of a config that torchvision's detections cannot follow, with their values."""
    found = []
    if config.backbone not in BACKBONES:
        found.append(f"backbone={config.backbone!r}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        expected = _FIXED.get(field.name, field.default)
        if field.name in ("head_norm", "head_box_norm"):
            unknown = value != "same" and value not in _NORMS
        else:
            known = field.name in _CARRIED or field.name in _LOSSES
            unknown = not known and value != expected
        if unknown:
            found.append(f"{field.name}={value!r}")
    if config.levels[-1] != _LAST_LEVEL:
        found.append(f"levels={config.levels!r}, which do not end at {_LAST_LEVEL}")
    if config.fpn_channels is None:
        found.append("fpn_channels=None")
        return found
    channels = state[f"fpn.lateral.{len(config.map_levels) - 1}.weight"].shape[1]
    if config.p6_from == "c5" and channels == config.fpn_channels:
        # torchvision's block takes P5 if it has as many input as output channels.
        found.append(f"p6_from='c5' with fpn_channels={channels}, as many as C5 has")
    return found


def _warn_of_losses(config: RetinaNetConfig) -> None:
    differing = [
        f"{name}={getattr(config, name)!r}"
        for name, values in _LOSSES.items()
        if getattr(config, name) not in values
    ]
    if config.box_loss == "smooth_l1" and config.smooth_l1_beta != _SMOOTH_L1_BETA:
        differing.append(f"smooth_l1_beta={config.smooth_l1_beta!r}")
    if differing:
        _logger.warning(
            "The torchvision model has the same detections but other losses: it has no counterpart of %s.",
            ", ".join(differing),
        )


def _build(config: RetinaNetConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Build torchvision's model, whose parameters are on the meta device."""
    detection: Any = torchvision.models.detection
    anchor_generator = detection.anchor_utils.AnchorGenerator(
        sizes=tuple(
            tuple(int(size * scale) for scale in config.octave_scales)
            for size in config.anchor_sizes
        ),
        aspect_ratios=(config.aspect_ratios,) * len(config.anchor_sizes),
    )
    with torch.device("meta"):
        num_anchors = anchor_generator.num_anchors_per_location()[0]
        norm, box_norm = config.head_norm, config.head_box_norm
        head = detection.retinanet.RetinaNetHead(
            config.fpn_channels, num_anchors, config.num_classes, norm_layer=_NORMS[norm]
        )
        if box_norm != "same":
            head.regression_head = detection.retinanet.RetinaNetRegressionHead(
                config.fpn_channels, num_anchors, norm_layer=_NORMS[box_norm]
            )
        # As torchvision's builder of the second RetinaNet does.
        head.regression_head._loss_type = config.box_loss  # noqa: SLF001
        peer: nn.Module = detection.RetinaNet(
            _build_backbone(config, state),
            config.num_classes,
            min_size=config.min_size,
            max_size=config.max_size,
            fixed_size=None if config.keep_ratio else (config.min_size, config.min_size),
            size_divisible=config.size_divisor,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            anchor_generator=anchor_generator,
            head=head,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections or _NO_LIMIT,
            topk_candidates=config.pre_nms_top_k or _NO_LIMIT,
            fg_iou_thresh=config.positive_threshold,
            bg_iou_thresh=config.negative_threshold,
        )
    return peer


def _build_backbone(config: RetinaNetConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Build torchvision's backbone with its pyramid."""
    spec = BACKBONES[config.backbone]
    eps = spec.norm_eps if config.backbone_norm_eps is None else config.backbone_norm_eps
    if config.backbone_norm == "frozen":
        norm_layer = functools.partial(torchvision.ops.FrozenBatchNorm2d, eps=eps)
    else:
        norm_layer = functools.partial(nn.BatchNorm2d, eps=eps, momentum=spec.norm_momentum)
    network = spec.network(norm_layer=norm_layer)
    if config.in_channels != 3:
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.in_channels = config.in_channels
        first.weight = nn.Parameter(
            first.weight.new_empty(len(first.weight), config.in_channels, *first.kernel_size)
        )
    levels = config.map_levels
    names = ["relu" if level == 1 else f"layer{level - 1}" for level in levels]
    extracted = spec(network)
    if isinstance(extracted, MobileNet):
        network = network.get_submodule("features")
        names = [str(extracted.ends[level - 1]) for level in levels]
    widths = [state[f"fpn.lateral.{i}.weight"].shape[1] for i in range(len(levels))]
    p6_channels = widths[-1] if config.p6_from == "c5" else config.fpn_channels
    backbone: nn.Module = torchvision.models.detection.backbone_utils.BackboneWithFPN(
        network,
        return_layers={name: str(i) for i, name in enumerate(names)},
        in_channels_list=widths,
        out_channels=config.fpn_channels,
        extra_blocks=torchvision.ops.feature_pyramid_network.LastLevelP6P7(
            p6_channels, config.fpn_channels
        ),
    )
    return backbone
