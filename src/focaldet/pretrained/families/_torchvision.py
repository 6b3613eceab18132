"""torchvision RetinaNets: state dicts of ``retinanet_resnet50_fpn``, its ``_v2`` and variants.

The backbone can be any ResNet, ResNeXt or MobileNet in :data:`focaldet.backbones.BACKBONES`. Both
spellings of the keys are supported, because the published V1 file and MLPerf's predate a renaming in
torchvision. A head of 91 classes is COCO's: its channels are numbered by category id, and those of the
80 actual classes are kept. A ``config.json`` of DeepForest next to the file gives classes and thresholds.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from focaldet.class_names import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._conversion import depth_of_head, resnet_of
from focaldet.pretrained.families._deepforest_config import read_description, with_thresholds
from focaldet.pretrained.families._mlperf_classes import MLPERF_CLASS_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

__all__ = ["NAME", "convert", "missing", "suggest"]

NAME = "torchvision"

_COCO_CHANNELS = 91
_CHARACTERISTIC = (
    "head.classification_head.cls_logits.weight",
    "head.regression_head.bbox_reg.weight",
)
_ASSUMED = (
    *("anchor_sizes", "octave_scales", "aspect_ratios"),
    *("min_size", "max_size", "keep_ratio", "image_mean", "image_std"),
    *("score_threshold", "nms_threshold", "pre_nms_top_k", "max_detections"),
)
# The usual octave scales and aspect ratios, by the number of anchors per cell.
_USUAL_SHAPES: dict[int, dict[str, tuple[float, ...]]] = {
    1: {"octave_scales": (1.0,), "aspect_ratios": (1.0,)},
    3: {"octave_scales": (1.0,)},
}
# last block -> backbone, channels of C1 to C5
_MOBILENETS: dict[int, tuple[str, tuple[int, ...]]] = {
    17: ("mobilenet_v2", (16, 24, 32, 96, 320)),
    15: ("mobilenet_v3_large", (16, 24, 40, 112, 160)),
}

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.body\.(\d+)\.", r"backbone.features.\1."),  # of a MobileNet
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
_IN_SEQUENCE = re.compile(r"^backbone\.(?=\d)")
# Before the renaming, convolutions and ReLUs were numbered together: 0, 2, 4, 6.
_OLD_TOWER = re.compile(r"head\.(classification|regression)_head\.conv\.(\d)\.(weight|bias)")


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration of a torchvision RetinaNet, as far as its tensors show it.

    The file does not record everything. With GroupNorm in a tower it is treated as a V2, otherwise as
    a V1. With batch counters its BatchNorm trains, otherwise it is frozen. The published V1 weights
    need an eps of 0 in their frozen BatchNorm, and every V1 with 91 classes and a frozen ResNet-50 is
    treated as one of them. The pyramid shows how many maps it takes, which must be the last ones. A
    ResNeXt-50 of 264 classes with the older key names is MLPerf's.

    Raises:
        CheckpointError: If the backbone is not in ``BACKBONES``, its maps are not the last ones or have no
            pyramid, or the ``config.json`` next to the file does not fit.
    """
    renamed = _renamed(file)
    if not _widths_of(renamed):
        if any(key.startswith("backbone.body.") for key in file.tensors):
            raise KeyError("fpn.lateral.0.weight")  # a damaged file
        raise CheckpointError(
            f"This {NAME} RetinaNet has no feature pyramid. To load it, pass its backbone as backbone= "
            "and config= with backbone='custom', levels=(5,), fpn_channels=None and its anchors. For "
            "the features of a MobileNetV2, the backbone is "
            "focaldet.backbones.MobileNet(mobilenet_v2(), (1, 3, 6, 13, 18), levels=(5,))."
        )
    num_anchors = _num_anchors(renamed)
    channels = len(renamed["head.class_logits.weight"]) // num_anchors
    described = read_description(file, channels)
    names = described.class_names
    backbone = _backbone_of(renamed)
    mlperf = _is_mlperfs(file, backbone, channels)
    if names is None and channels == _COCO_CHANNELS:
        names = COCO_CLASS_NAMES
    elif names is None and mlperf:
        names = MLPERF_CLASS_NAMES
    norm, box_norm = (_norm_of(renamed, tower) for tower in ("class_tower", "box_tower"))
    second = "group" in (norm, box_norm)
    preset = RetinaNetConfig.torchvision_v2 if second else RetinaNetConfig.torchvision_v1
    frozen = not any(map(_is_counter_of_backbone, renamed))
    changes: dict[str, Any] = dict(_USUAL_SHAPES.get(num_anchors, {}))
    changes |= _levels_of(renamed, backbone)
    if mlperf:
        changes |= {"keep_ratio": False, "max_size": 800}
    config = preset(len(names) if names else channels, names).replace(
        backbone=backbone,
        backbone_norm="frozen" if frozen else "batch",
        backbone_norm_eps=_eps_of(backbone, channels, published=not (norm or box_norm))
        if frozen
        else None,
        fpn_channels=len(renamed["fpn.p7.weight"]),
        p6_from=_p6_source_of(renamed),
        head_depth=depth_of_head(renamed),
        head_norm=norm,
        head_box_norm="same" if box_norm == norm else box_norm,
        **changes,
    )
    config, told = with_thresholds(config, file, described.thresholds)
    assumed = [field for field in _ASSUMED if field not in told]
    if frozen:
        assumed.append("backbone_norm_eps")
    if backbone in (name for name, _ in _MOBILENETS.values()):
        assumed.append("backbone")  # which of several blocks of one width gives C3 and C4
    return SuggestedConfig(config, tuple(assumed))


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:
    """Convert a torchvision RetinaNet's state dict.

    Args:
        file: The state dict.
        config: The configuration to use. With 91 classes it keeps all channels of a COCO head.

    Raises:
        CheckpointError: If focaldet has no counterpart of the pyramid or of the head, or the head has a
            different number of anchors per cell from the config.
    """
    renamed = _renamed(file)
    if not _widths_of(renamed) and config.fpn_channels is not None:
        raise CheckpointError(
            f"This {NAME} RetinaNet has no feature pyramid, but config.fpn_channels is "
            f"{config.fpn_channels}; it must be None."
        )
    num_anchors = _num_anchors(renamed)
    wanted = len(config.octave_scales) * len(config.aspect_ratios)
    if num_anchors != wanted:
        raise CheckpointError(
            f"The head of this {NAME} RetinaNet has {num_anchors} anchors per cell instead of {wanted} "
            f"({len(config.octave_scales)} octave_scales times {len(config.aspect_ratios)} "
            "aspect_ratios). Their shapes are not in the file. Pass the octave_scales= and "
            "aspect_ratios= that it was trained with, or config= with them."
        )
    if config.backbone_norm == "frozen":
        renamed = {k: v for k, v in renamed.items() if not _is_counter_of_backbone(k)}
    channels = len(renamed["head.class_logits.bias"])
    if channels == num_anchors * _COCO_CHANNELS and config.num_classes == len(COCO_CLASS_NAMES):
        for key in ("head.class_logits.weight", "head.class_logits.bias"):
            renamed[key] = _coco_rows(renamed[key], num_anchors)
    return renamed


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    """Return the tensors by focaldet's key names.

    Raises:
        CheckpointError: If focaldet has no counterpart of the pyramid or of the head.
    """
    renamed = {_rename(key): value for key, value in file.tensors.items()}
    if "backbone.0.0.weight" in file.tensors:  # the features of a MobileNet, without a pyramid
        renamed = {_IN_SEQUENCE.sub("backbone.features.", k): v for k, v in renamed.items()}
    _check_pyramid(renamed)
    _check_head(renamed)
    return renamed


def _check_pyramid(renamed: Mapping[str, Tensor]) -> None:
    if any(re.fullmatch(r"fpn\.(lateral|output)\.\d\.1\.\w+", key) for key in renamed):
        raise CheckpointError(
            f"The pyramid of this {NAME} RetinaNet has norms after its convolutions, which focaldet's "
            "FPN does not have."
        )
    count = len(_widths_of(renamed))
    if count and not any(key.startswith(("fpn.p6.", "fpn.p7.")) for key in renamed):
        raise CheckpointError(
            f"The pyramid of this {NAME} RetinaNet has {count} level{'s' * (count != 1)} from the "
            "backbone and a max-pooled one, but focaldet's has convolutions for P6 and P7. Only models "
            "whose backbone was built with extra_blocks=LastLevelP6P7(...) can be loaded, which is not "
            "the default of resnet_fpn_backbone and mobilenet_backbone."
        )


def _widths_of(renamed: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the channels of the maps that the pyramid takes; none if there is no pyramid."""
    layers = (re.match(r"fpn\.(?:lateral|output)\.(\d)\.", key) for key in renamed)
    count = 1 + max((int(layer[1]) for layer in layers if layer), default=-1)
    return tuple(renamed[f"fpn.lateral.{i}.weight"].shape[1] for i in range(count))


def _levels_of(renamed: Mapping[str, Tensor], backbone: str) -> dict[str, tuple[int, ...]]:
    """Return the levels and their usual anchor sizes, if they are not P3 to P7.

    Raises:
        CheckpointError: If the pyramid does not take the last maps of the backbone.
    """
    widths = _widths_of(renamed)
    maps = dict(_MOBILENETS.values()).get(backbone) or _widths_of_resnet(renamed)
    if widths != maps[-len(widths) :]:
        raise CheckpointError(
            f"The pyramid of this {NAME} RetinaNet takes maps of {_listed(widths)} channels, but only "
            f"those with the last maps of the {backbone}, of {_listed(maps)} channels, can be loaded."
        )
    levels = tuple(range(6 - len(widths), 8))
    if levels == RetinaNetConfig.levels:
        return {}
    return {"levels": levels, "anchor_sizes": tuple(4 * 2**level for level in levels)}


def _widths_of_resnet(renamed: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the channels of C1 to C5: those of the widest convolution of each stage."""
    return tuple(
        max(
            len(value)
            for key, value in renamed.items()
            if key.startswith(f"backbone.{stage}") and value.ndim == 4
        )
        for stage in ("conv1.", "layer1.", "layer2.", "layer3.", "layer4.")
    )


def _listed(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def _check_head(renamed: Mapping[str, Tensor]) -> None:
    if "head.regression_head.bbox_ctrness.weight" in renamed:
        raise CheckpointError(f"This {NAME} model is an FCOS, not a RetinaNet.")
    for tower in ("class_tower", "box_tower"):
        norm = f"head.{tower}.0.norm."
        if f"{norm}running_mean" in renamed and f"{norm}num_batches_tracked" not in renamed:
            raise CheckpointError(
                f"The head of this {NAME} RetinaNet has BatchNorm with fixed statistics, but focaldet's "
                "only supports BatchNorm that trains (head_norm='batch'), GroupNorm ('group') or no norm."
            )


def _norm_of(renamed: Mapping[str, Tensor], tower: str) -> str | None:
    """Return the norm of a tower: None, "group" or "batch"."""
    norm = f"head.{tower}.0.norm."
    if f"{norm}weight" not in renamed:
        return None
    return "batch" if f"{norm}running_mean" in renamed else "group"


def _is_counter_of_backbone(key: str) -> bool:
    return key.startswith("backbone.") and key.endswith("num_batches_tracked")


def _num_anchors(renamed: Mapping[str, Tensor]) -> int:
    """Return the number of anchors per cell.

    Raises:
        CheckpointError: If the channels of the head are not multiples of it.
    """
    boxes = len(renamed["head.box_deltas.weight"])
    classes = len(renamed["head.class_logits.weight"])
    num_anchors = boxes // 4
    if not num_anchors or boxes % 4 or not classes or classes % num_anchors:
        raise CheckpointError(
            f"The head of this {NAME} RetinaNet has {classes} class channels and {boxes} box channels, "
            "which do not belong to the same number of anchors per cell."
        )
    return num_anchors


def _backbone_of(renamed: Mapping[str, Tensor]) -> str:
    blocks = {int(key.split(".")[2]) for key in renamed if key.startswith("backbone.features.")}
    if not blocks:
        return resnet_of(renamed, NAME)
    widths = _widths_of(renamed)
    name, maps = _MOBILENETS.get(max(blocks), ("", ()))
    if widths != maps[-len(widths) :]:
        raise CheckpointError(
            f"The backbone of this {NAME} RetinaNet is not a known MobileNet: the pyramid takes maps of "
            f"{_listed(widths)} channels, and the last block is {max(blocks)}. "
            "focaldet's take the last map of each stride (mobilenet_v2: 32, 96 and 320 channels, "
            "mobilenet_v3_large: 40, 112 and 160), but torchvision's mobilenet_backbone takes the first "
            "ones. To load it, pass backbone=focaldet.backbones.MobileNet(network, ends), with the "
            "indices of the blocks in ends, and config= with backbone='custom'."
        )
    return name


def _is_mlperfs(file: CheckpointFile, backbone: str, num_classes: int) -> bool:
    return (
        backbone == "resnext50_32x4d"
        and num_classes == len(MLPERF_CLASS_NAMES)
        and "head.classification_head.conv.0.weight" in file.tensors
    )


def _eps_of(backbone: str, num_classes: int, *, published: bool) -> float | None:
    """Return the eps of frozen BatchNorm, None for the default of the backbone."""
    if published and backbone == "resnet50" and num_classes == _COCO_CHANNELS:
        return 0.0
    # FrozenBatchNorm2d has 1e-5, although MobileNetV3's own BatchNorm has 1e-3.
    return 1e-5 if backbone == "mobilenet_v3_large" else None


def _p6_source_of(renamed: Mapping[str, Tensor]) -> str:
    """Return the source of P6. torchvision takes P5 if the layer has as many inputs as outputs."""
    if "fpn.p6.weight" not in renamed:
        return "p5"  # a damaged file, whose missing tensors are named later
    channels_out, channels_in = renamed["fpn.p6.weight"].shape[:2]
    return "p5" if channels_in == channels_out else "c5"


def _rename(key: str) -> str:
    old = _OLD_TOWER.fullmatch(key)
    if old:
        key = f"head.{old[1]}_head.conv.{int(old[2]) // 2}.0.{old[3]}"
    for pattern, name in _RENAMES:
        key, count = pattern.subn(name, key)
        if count:
            break
    return key


def _coco_rows(values: Tensor, num_anchors: int) -> Tensor:
    rows = values.view(num_anchors, _COCO_CHANNELS, *values.shape[1:])
    return rows[:, list(COCO_CATEGORY_IDS)].flatten(0, 1).clone()
