"""Detectron2 RetinaNets: the pickles of its model zoo and the files that its training writes.

Folded into the weights: BGR images in [0, 255], and anchors whose ratio varies fastest. Set in the
config: strides in the 1x1 convolutions of the ResNet, anchors centred on the corners of cells, clipping
after suppression, sizes rounded after two steps, and Pillow's resizing. What the tensors do not show is
read from the ``config.yaml`` that training writes, if it lies beside the file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from focaldet._checks import shortened
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig
from focaldet.pretrained.families._cell_anchors import anchor_fields, shapes_of_cell
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

NAME = "Detectron2"

_logger = logging.getLogger(__name__)

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
_NUM_LEVELS = 5

_BGR_MEAN = (103.53, 116.28, 123.675)
_RGB_MEAN = _BGR_MEAN[::-1]
_STDS = {"resnext101_32x8d": (57.375, 57.12, 58.395)}  # blue, green, red; others are not divided
_FIRST_CONV = "backbone.conv1.weight"

# The anchors of a cell that are usual for a number of them.
_OCTAVES = {9: tuple(2 ** (octave / 3) for octave in range(3)), 3: (1.0,), 1: (1.0,)}
_RATIOS = {9: (0.5, 1.0, 2.0), 3: (0.5, 1.0, 2.0), 1: (1.0,)}

# The setting of each field that is a number, and whether it is an integer.
_NUMBERS = {
    "min_size": ("INPUT.MIN_SIZE_TEST", True),
    "max_size": ("INPUT.MAX_SIZE_TEST", True),
    "score_threshold": ("MODEL.RETINANET.SCORE_THRESH_TEST", False),
    "pre_nms_top_k": ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", True),
    "nms_threshold": ("MODEL.RETINANET.NMS_THRESH_TEST", False),
    "max_detections": ("TEST.DETECTIONS_PER_IMAGE", True),
    "prior": ("MODEL.RETINANET.PRIOR_PROB", False),
    "focal_alpha": ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", False),
    "focal_gamma": ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", False),
}
_ONLY_FOR_TRAINING = ("prior", "focal_alpha", "focal_gamma")

# What Detectron2 can do and focaldet cannot: a setting, and its values that are supported.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "MODEL.META_ARCHITECTURE": ("RetinaNet",),
    "MODEL.RETINANET.NORM": ("", "GN"),
    "MODEL.RETINANET.IN_FEATURES": (["p3", "p4", "p5", "p6", "p7"],),
    "MODEL.RESNETS.NORM": ("FrozenBN", "BN", "SyncBN"),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.FPN.NORM": ("",),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "INPUT.FORMAT": ("BGR", "RGB"),
}


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
    settings = _settings_of(file)
    renamed = _renamed(file)
    _check_settings(settings)
    num_anchors = renamed["head.box_deltas.weight"].shape[0] // 4
    num_classes = num_classes_of(renamed, NAME, num_anchors)
    _check_classes(settings, num_classes)
    backbone = resnet_of(renamed, NAME)
    names = _class_names(file, num_classes)
    found = _Found()
    coco = class_names_of(num_classes)
    if names is None and coco is not None:
        found.add("class_names", None, coco)
    else:
        found.fields["class_names"] = names
    _add_anchors(found, file, settings, num_anchors)
    _add_pixels(found, _pixels_of(file, settings, backbone))
    bottleneck = "backbone.layer1.0.conv3.weight" in renamed
    stride_in_1x1 = settings.flag("MODEL.RESNETS.STRIDE_IN_1X1")
    if bottleneck:
        found.add("stride_in_1x1", stride_in_1x1, not backbone.startswith("resnext"))
    if "head.class_tower.0.norm.weight" in renamed:
        norm = "group_with_bias" if settings.text("MODEL.RETINANET.NORM") else None
        found.add("head_norm", norm, "group_with_bias")
    _add_numbers(found, settings)
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
            **{"box_loss": "l1", **found.fields},
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
    pixels = _pixels_of(file, _settings_of(file), resnet_of(renamed, NAME))
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


class _Found:
    """Fields of the config, and the names of those that neither the file nor its settings say."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.assumed: list[str] = []

    def add(self, field: str, value: Any, usual: Any) -> None:
        """Add a value, or the usual one if it is None."""
        if value is None:
            self.assumed.append(field)
        self.fields[field] = usual if value is None else value


_CLASS_CONV = re.compile(r"head\.class_tower\.\d+\.conv\.weight")


def _renamed(file: CheckpointFile) -> dict[str, Tensor]:
    other = [k for k in file.tensors if re.match(r"head\.(cls|bbox)_subnet\..*running_mean", k)]
    if other:
        raise CheckpointError(
            f"The head of this {NAME} RetinaNet has BatchNorm ({other[0]!r}), but only GroupNorm "
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


def _settings_of(file: CheckpointFile) -> Settings:
    """Return the settings of the run, which are empty if no file beside the tensors has them."""
    for name, text in file.beside.items():
        if name.lower().endswith((".yaml", ".yml")) and "RETINANET" in text:
            settings = read_settings(text, name)
            if isinstance(settings.content.get("MODEL"), dict):
                return settings
    return Settings({}, "the settings")


def _check_settings(settings: Settings) -> None:
    for name, supported in _SUPPORTED.items():
        value = settings.value(name)
        if value is not None and value not in supported:
            raise CheckpointError(
                f"{name} in {settings.source} is {shortened(value)}, but only "
                f"{' or '.join(map(repr, supported))} is supported."
            )
    if settings.value("INPUT.MIN_SIZE_TEST") == 0:
        raise CheckpointError(
            f"INPUT.MIN_SIZE_TEST in {settings.source} is 0, which does not resize images, but a config "
            "needs the size of the short side. Pass config= with the min_size to use."
        )


def _check_classes(settings: Settings, num_classes: int) -> None:
    said = settings.integer("MODEL.RETINANET.NUM_CLASSES")
    if said is not None and said != num_classes:
        raise CheckpointError(
            f"MODEL.RETINANET.NUM_CLASSES in {settings.source} is {said}, but the head has "
            f"{num_classes} classes. Keep only the settings of this model beside it."
        )


def _class_names(file: CheckpointFile, num_classes: int) -> tuple[str, ...] | None:
    """Return the names that the file or a JSON file beside it lists as "thing_classes"."""
    sources: dict[str, Any] = {file.name or "the file": file.extras}
    for name, text in file.beside.items():
        if name.lower().endswith(".json") and "thing_classes" in text:
            try:
                sources[name] = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                raise CheckpointError(f"{name} is not valid JSON: {reason}.") from error
    for source, content in sources.items():
        for part in (content, *_entries(content, "metadata")):
            for names in _entries(part, "thing_classes"):
                return _checked_names(names, num_classes, source)
    return None


def _entries(content: Any, key: str) -> list[Any]:
    """Return the entry of a mapping, in a list of at most one."""
    return [content[key]] if hasattr(content, "keys") and key in content else []


def _checked_names(names: Any, num_classes: int, source: str) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"thing_classes in {source} must be a list of names, got {shortened(names)}."
        )
    if len(names) != num_classes:
        raise CheckpointError(
            f"thing_classes in {source} has {len(names)} names, but the head has {num_classes} classes."
        )
    return tuple(names)


def _add_anchors(found: _Found, file: CheckpointFile, settings: Settings, num_anchors: int) -> None:
    stored = [f"anchor_generator.cell_anchors.{level}" for level in range(_NUM_LEVELS)]
    sizes = settings.value("MODEL.ANCHOR_GENERATOR.SIZES")
    ratios = settings.value("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS")
    offset = settings.number("MODEL.ANCHOR_GENERATOR.OFFSET")
    found.fields["anchor_offset"] = 0.0 if offset is None else offset
    if any(key in file.tensors for key in stored):
        absent = [key for key in stored if key not in file.tensors]
        if absent:
            raise CheckpointError(
                f"The file has anchors of some levels only, without {', '.join(absent)}. {OTHER_ANCHORS}"
            )
        shapes = [shapes_of_cell(key, file.tensors[key]) for key in stored]
        fields = anchor_fields([s for s, _ in shapes], [r for _, r in shapes], file.name)
    elif _is_nested_numbers(sizes) and _is_nested_numbers(ratios):
        fields = anchor_fields(_for_each_level(sizes), _for_each_level(ratios), settings.source)
    elif num_anchors in _OCTAVES:
        if sizes is not None:
            _logger.warning(
                "MODEL.ANCHOR_GENERATOR.SIZES in %s is not a list of lists of numbers but %s; "
                "the usual anchors are assumed.",
                settings.source,
                shortened(sizes),
            )
        found.add("anchor_sizes", None, (32, 64, 128, 256, 512))
        found.add("octave_scales", None, _OCTAVES[num_anchors])
        found.add("aspect_ratios", None, _RATIOS[num_anchors])
        return
    else:
        raise CheckpointError(
            f"The head of this {NAME} RetinaNet has {num_anchors} anchors per cell, whose sizes and "
            f"shapes neither the file nor a config.yaml beside it gives. {OTHER_ANCHORS}"
        )
    count = len(fields["octave_scales"]) * len(fields["aspect_ratios"])
    if count != num_anchors:
        raise CheckpointError(
            f"The head of this {NAME} RetinaNet has {num_anchors} anchors per cell, but {count} are "
            "described."
        )
    found.fields |= fields


def _is_nested_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (1, _NUM_LEVELS)
        and all(
            isinstance(row, list)
            and row
            and all(type(one) in (int, float) and math.isfinite(one) and one > 0 for one in row)
            for row in value
        )
    )


def _for_each_level(values: list[list[float]]) -> list[list[float]]:
    """Repeat what is given once, for all levels."""
    return values * _NUM_LEVELS if len(values) == 1 else values


class _Pixels(NamedTuple):
    """How a network's images are normalised: (value in [0, 255] - mean) / std, in RGB order here."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_rgb: bool  # whether the network itself takes RGB
    said: bool  # whether the file or its settings give mean and std


def _pixels_of(file: CheckpointFile, settings: Settings, backbone: str) -> _Pixels:
    mean = _three(file, settings, "pixel_mean", "MODEL.PIXEL_MEAN")
    std = _three(file, settings, "pixel_std", "MODEL.PIXEL_STD")
    said = mean is not None and std is not None
    order = settings.text("INPUT.FORMAT")
    usual_rgb = order == "RGB"
    if mean is None:
        mean = _RGB_MEAN if usual_rgb else _BGR_MEAN
    if std is None:
        std = _STDS.get(backbone, (1.0, 1.0, 1.0))
        std = std[::-1] if usual_rgb else std
    if order is None:
        order = "RGB" if _close(mean, _RGB_MEAN) else "BGR"
        if not _close(mean, _RGB_MEAN) and not _close(mean, _BGR_MEAN):
            _logger.warning(
                "%s has pixel_mean %s, and no config.yaml gives INPUT.FORMAT; BGR images are assumed.",
                file.name or "The file",
                [round(value, 3) for value in mean],
            )
    step = 1 if order == "RGB" else -1
    return _Pixels(mean[::step], std[::step], order == "RGB", said)


def _three(
    file: CheckpointFile, settings: Settings, key: str, name: str
) -> tuple[float, ...] | None:
    """Return the mean or standard deviation of the pixels, from the tensors or else the settings."""
    written = settings.numbers(name, 3)
    if key not in file.tensors:
        values = written
    else:
        values = tuple(file.tensors[key].detach().cpu().double().flatten().tolist())
        if written is not None and not _close(values, written):
            raise CheckpointError(
                f"{key} is {list(values)}, but {name} in {settings.source} is {list(written)}. Keep "
                "only the settings of this model beside it."
            )
    if values is None:
        return None
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise CheckpointError(
            f"{key} is {shortened(list(values))}, but must be three numbers, one per colour."
        )
    if key == "pixel_std" and min(values) <= 0:
        raise CheckpointError(f"{key} is {list(values)}, but must be above 0.")
    return values


def _close(values: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return len(values) == len(others) and all(
        math.isclose(a, b, rel_tol=0, abs_tol=1e-2) for a, b in zip(values, others, strict=True)
    )


def _add_pixels(found: _Found, pixels: _Pixels) -> None:
    mean = tuple(_tidied(value / 255) for value in pixels.mean)
    usual = RetinaNetConfig.image_std  # any value is exact, as it is folded into the weights
    std = usual if set(pixels.std) == {1.0} else tuple(_tidied(v / 255) for v in pixels.std)
    found.add("image_mean", mean if pixels.said else None, mean)
    found.add("image_std", std if pixels.said else None, std)


def _tidied(value: float) -> float:
    """Return the short number that a value stood for before it was stored in float32."""
    short = round(value, 4)
    return short if abs(short - value) < 1e-7 else value


def _add_numbers(found: _Found, settings: Settings) -> None:
    for field, (name, is_integer) in _NUMBERS.items():
        value = settings.integer(name) if is_integer else settings.number(name)
        if field not in _ONLY_FOR_TRAINING:
            found.add(field, value, getattr(RetinaNetConfig, field))
        elif value is not None:
            found.fields[field] = value
    weights = settings.numbers("MODEL.RETINANET.BBOX_REG_WEIGHTS", 4)
    found.add("box_weights", weights, (1.0, 1.0, 1.0, 1.0))
    thresholds = settings.numbers("MODEL.RETINANET.IOU_THRESHOLDS", 2)
    if thresholds is not None:
        found.fields["negative_threshold"], found.fields["positive_threshold"] = thresholds
    frozen = settings.integer("MODEL.BACKBONE.FREEZE_AT")
    if frozen is not None:
        found.fields["trainable_stages"] = min(max(5 - frozen, 0), 5)
    _add_box_loss(found, settings)


def _add_box_loss(found: _Found, settings: Settings) -> None:
    loss = settings.text("MODEL.RETINANET.BBOX_REG_LOSS_TYPE")
    beta = settings.number("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA")
    if loss == "giou":
        found.fields["box_loss"] = "giou"
    elif loss not in (None, "smooth_l1"):
        _logger.warning(
            "%s trains with the box loss %s, which is not supported; the config says 'l1', which makes "
            "no difference to detections.",
            settings.source,
            shortened(loss),
        )
    elif beta:
        found.fields |= {"box_loss": "smooth_l1", "smooth_l1_beta": beta}
