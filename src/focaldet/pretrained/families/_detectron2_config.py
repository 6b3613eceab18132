"""The fields of a config that Detectron2's tensors and settings describe."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

from focaldet._checks import shortened
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained.families._cell_anchors import anchor_fields, shapes_of_cell
from focaldet.pretrained.families._conversion import OTHER_ANCHORS
from focaldet.pretrained.families._settings import Settings, read_settings

if TYPE_CHECKING:
    from focaldet.pretrained._checkpoint import CheckpointFile
    from focaldet.pretrained.families._detectron2_pixels import Pixels

__all__ = [
    "Fields",
    "add_anchors",
    "add_numbers",
    "add_pixels",
    "check_settings",
    "class_names_in",
    "settings_of",
]

_logger = logging.getLogger(__name__)

_NUM_LEVELS = 5


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


class Fields:
    """Fields of the config, and the names of those that neither the file nor its settings say."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.assumed: list[str] = []

    def add(self, field: str, value: Any, usual: Any) -> None:
        """Add a value, or the usual one if it is None."""
        if value is None:
            self.assumed.append(field)
        self.values[field] = usual if value is None else value


def settings_of(file: CheckpointFile) -> Settings:
    """Return the settings of the run, which are empty if no file beside the tensors has them."""
    for name, text in file.beside.items():
        if name.lower().endswith((".yaml", ".yml")) and "RETINANET" in text:
            settings = read_settings(text, name)
            if isinstance(settings.content.get("MODEL"), dict):
                return settings
    return Settings({}, "the settings")


def check_settings(settings: Settings, num_classes: int) -> None:
    """Raise :class:`CheckpointError` if focaldet cannot follow a setting, or the head contradicts it."""
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
    said = settings.integer("MODEL.RETINANET.NUM_CLASSES")
    if said is not None and said != num_classes:
        raise CheckpointError(
            f"MODEL.RETINANET.NUM_CLASSES in {settings.source} is {said}, but the head has "
            f"{num_classes} classes. Keep only the settings of this model beside it."
        )


def class_names_in(file: CheckpointFile, num_classes: int) -> tuple[str, ...] | None:
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


def add_anchors(found: Fields, file: CheckpointFile, settings: Settings, num_anchors: int) -> None:
    """Add the anchors that the tensors or else the settings describe, or the usual ones."""
    stored = [f"anchor_generator.cell_anchors.{level}" for level in range(_NUM_LEVELS)]
    sizes = settings.value("MODEL.ANCHOR_GENERATOR.SIZES")
    ratios = settings.value("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS")
    offset = settings.number("MODEL.ANCHOR_GENERATOR.OFFSET")
    found.values["anchor_offset"] = 0.0 if offset is None else offset
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
            f"The head of this Detectron2 RetinaNet has {num_anchors} anchors per cell, whose sizes and "
            f"shapes neither the file nor a config.yaml beside it gives. {OTHER_ANCHORS}"
        )
    count = len(fields["octave_scales"]) * len(fields["aspect_ratios"])
    if count != num_anchors:
        raise CheckpointError(
            f"The head of this Detectron2 RetinaNet has {num_anchors} anchors per cell, but {count} are "
            "described."
        )
    found.values |= fields


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


def add_pixels(found: Fields, pixels: Pixels) -> None:
    """Add mean and standard deviation of the pixels."""
    mean = tuple(_tidied(value / 255) for value in pixels.mean)
    usual = RetinaNetConfig.image_std  # any value is exact, as it is folded into the weights
    std = usual if set(pixels.std) == {1.0} else tuple(_tidied(v / 255) for v in pixels.std)
    found.add("image_mean", mean if pixels.said else None, mean)
    found.add("image_std", std if pixels.said else None, std)


def _tidied(value: float) -> float:
    """Return the short number that a value stood for before it was stored in float32."""
    short = round(value, 4)
    return short if abs(short - value) < 1e-7 else value


def add_numbers(found: Fields, settings: Settings) -> None:
    """Add sizes, thresholds and what the settings say about training."""
    for field, (name, is_integer) in _NUMBERS.items():
        value = settings.integer(name) if is_integer else settings.number(name)
        if field not in _ONLY_FOR_TRAINING:
            found.add(field, value, getattr(RetinaNetConfig, field))
        elif value is not None:
            found.values[field] = value
    weights = settings.numbers("MODEL.RETINANET.BBOX_REG_WEIGHTS", 4)
    found.add("box_weights", weights, (1.0, 1.0, 1.0, 1.0))
    thresholds = settings.numbers("MODEL.RETINANET.IOU_THRESHOLDS", 2)
    if thresholds is not None:
        found.values["negative_threshold"], found.values["positive_threshold"] = thresholds
    frozen = settings.integer("MODEL.BACKBONE.FREEZE_AT")
    if frozen is not None:
        found.values["trainable_stages"] = min(max(5 - frozen, 0), 5)
    _add_box_loss(found, settings)


def _add_box_loss(found: Fields, settings: Settings) -> None:
    loss = settings.text("MODEL.RETINANET.BBOX_REG_LOSS_TYPE")
    beta = settings.number("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA")
    if loss == "giou":
        found.values["box_loss"] = "giou"
    elif loss not in (None, "smooth_l1"):
        _logger.warning(
            "%s trains with the box loss %s, which is not supported; the config says 'l1', which makes "
            "no difference to detections.",
            settings.source,
            shortened(loss),
        )
    elif beta:
        found.values |= {"box_loss": "smooth_l1", "smooth_l1_beta": beta}
