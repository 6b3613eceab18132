"""RetinaNetConfig: everything that describes a RetinaNet, in one value that is saved as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)

from focaldet._checks import check_choice, check_integer, check_names, check_range, shortened
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["FORMAT_VERSION", "RetinaNetConfig"]

FORMAT_VERSION = 1
"""Version of config.json. It increases when an older focaldet could not read what a newer one writes."""

_LAST_MAP = 5  # levels above C5 are computed from the pyramid
_HEAD_GROUPS = 32  # the default of RetinaNetHead


@dataclass(frozen=True, kw_only=True)
class RetinaNetConfig:
    """Architecture, losses, thresholds and preprocessing of a RetinaNet.

    The defaults are the detector of the paper (ResNet-50, 800 pixels). Types, choices, lengths and
    ranges are checked here. Some numbers have an upper limit that no detector needs, so that a damaged
    file cannot ask for a model that fills the memory.

    Args:
        num_classes: Number of foreground classes; labels are ``0 .. num_classes - 1``.
        class_names: A name for each class, or None.
        in_channels: Number of channels of the images: 3 for RGB, 1 for greyscale, or any other number.
            ``image_mean`` and ``image_std`` need as many values.
        backbone: A name in :data:`focaldet.backbones.BACKBONES`; ``"timm/NAME"`` for a network of
            timm, see :class:`focaldet.backbones.TimmBackbone`; or "custom" for a module that is
            passed as ``backbone=``.
        backbone_norm: "frozen" for BatchNorm with fixed statistics and scales, which needs
            pretrained weights, or "batch" for BatchNorm that trains, which training from scratch
            needs. Other norms are not affected.
        backbone_norm_eps: Number that is added to the variances. None uses the backbone's default.
        stride_in_1x1: See :func:`focaldet.backbones.build_backbone`; needed for Caffe's ResNets.
        trainable_stages: Number of stages of the backbone that train, out of five, counted from the
            last. A backbone that is built without weights trains completely, and the config of its
            model says 5. The first convolution is in the first stage, so set 5 if its weights were
            adapted to other ``in_channels``.
        levels: Pyramid levels to detect on, consecutive numbers in [1, 10] that begin at 5 or below.
            Level l has stride ``2**l`` with a backbone known by name. Levels up to 5 are computed from
            the backbone's maps, one from each; those above (P6, P7, ...) by convolutions of stride 2.
            ``(2, 3, 4, 5, 6, 7)`` adds a level for small objects.
        fpn_channels: Channels of every pyramid level and of the head's towers. None is for a model
            without a pyramid: the head reads the backbone's maps, which must all have the same number
            of channels, and ``levels`` must end at 5 or below.
        p6_from: "c5" or "p5"; see :class:`focaldet.FPN`.
        p7_relu: Whether P6 goes through a ReLU before P7 is computed from it.
        strided_padding: How the layers of stride 2 outside the residual blocks (the first convolution,
            the pooling, P6 and P7) pad maps with an even side: "symmetric", as in PyTorch, or "same",
            as in TensorFlow. See :func:`focaldet.backbones.build_backbone` and :class:`focaldet.FPN`.
            A custom backbone pads as it likes.
        head_depth: Number of convolutions in each tower.
        head_norm: None, "batch", or "group" or "group_with_bias", which need ``fpn_channels`` to be a
            multiple of 32; see :class:`focaldet.RetinaNetHead`.
        head_box_norm: "same" for a box tower like the class tower, or what ``head_norm`` is for the box
            tower alone.
        prior: Initial probability of each class at each anchor, in (0, 1).
        head_init: Initial weights of the head: "paper", or "fan_in", which suits pyramids with fewer than
            256 channels; see ``init`` of :class:`focaldet.RetinaNetHead`. It has no effect on a model
            whose weights are loaded.

            .. versionadded:: 0.3.0
        anchor_sizes: One per level. The default is for the default ``levels``.
        octave_scales, aspect_ratios, anchor_offset, anchor_mode, anchor_plus_one: See
            :class:`focaldet.AnchorGenerator`.
        box_encoding: "center" for :class:`focaldet.box_coder.BoxCoder`, or "corners" for
            :class:`focaldet.box_coder.CornerBoxCoder`.
        box_weights: See the box coders.
        log_scale_clamp: Limit the log of a box's size relative to its anchor's to log(1000 / 16) from
            "above", on "both" sides, or not at all (None). With ``box_encoding="corners"`` it has no
            effect.
        criterion: "retinanet" for a :class:`focaldet.criterion.RetinaNetCriterion` that the fields
            below describe, or "custom" for one that is passed in. The fields from ``assigner`` to
            ``normalizer`` then have no effect.
        assigner: "iou" for :class:`focaldet.matching.Matcher`, or "atss" for
            :class:`focaldet.matching.ATSSAssigner`.
        positive_threshold, negative_threshold, force_match_floor: See
            :class:`focaldet.matching.Matcher`; used by "iou".
        atss_top_k: See :class:`focaldet.matching.ATSSAssigner`; used by "atss".
        classification_loss: "focal" for :class:`focaldet.criterion.FocalMapLoss`, "cross_entropy" for
            :class:`focaldet.criterion.CrossEntropyMapLoss`, "softmax_focal" for
            :class:`focaldet.criterion.SoftmaxFocalMapLoss`, whose scores mean something else, or
            "quality_focal" for :class:`focaldet.criterion.QualityFocalMapLoss`, whose scores estimate
            how well the boxes fit.
        focal_alpha, focal_gamma: Options of "focal" and "softmax_focal"; see
            :class:`focaldet.FocalLoss`. With "quality_focal", ``focal_gamma`` is its ``beta`` and
            ``focal_alpha`` has no effect.
        box_loss: "smooth_l1", "l1", "giou", "diou" or "ciou".
        smooth_l1_beta: Difference at which smooth L1 turns from a parabola into a line.
        box_loss_weight: Factor on the box loss.
        normalizer: "batch", "image" or "ema"; see :class:`focaldet.criterion.RetinaNetCriterion`.
        score_threshold, pre_nms_top_k, nms_threshold, max_detections: See
            :class:`focaldet.postprocess.PostProcess`.
        suppression, soft_nms_sigma: See :class:`focaldet.postprocess.PostProcess`. Values of
            ``suppression`` other than "hard" cannot be combined with the tiles or the augmentation of
            ``predict``, nor be exported with post-processing.
        pre_nms_top_k_of, pre_nms_top_k_per_class, last_level_threshold: See
            :class:`focaldet.postprocess.PostProcess`.
        class_agnostic_nms, clip_to, drop_empty, inclusive_corners: See
            :class:`focaldet.postprocess.PostProcess`.
        uniform_rescale: Whether to scale boxes back by the one factor that images were meant to be
            resized by, instead of by that of each side; see ``resize_limits`` of
            :class:`focaldet.postprocess.PostProcess`.
        scale_before_nms: See :class:`focaldet.postprocess.PostProcess`.
        min_size, max_size, keep_ratio, image_mean, image_std, size_divisor: See
            :class:`focaldet.transforms.Preprocess`.
        size_rounding, resize_by, antialias, round_pixels, always_pad: See
            :class:`focaldet.transforms.Preprocess`.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a number is out of range, a choice is unknown, there is not one name per class,
            there is not one of ``anchor_sizes`` per level or there are not four ``box_weights``, or
            fields contradict each other.

    .. versionchanged:: 0.3.0
        Added ``in_channels``, ``levels``, ``strided_padding``, ``head_box_norm``, ``head_init``, ``box_encoding``,
        ``criterion``, ``assigner``, ``atss_top_k``, ``classification_loss``, ``pre_nms_top_k_of``, ``pre_nms_top_k_per_class``,
        ``suppression``, ``soft_nms_sigma``, ``scale_before_nms``, ``last_level_threshold``,
        ``keep_ratio``, ``resize_by`` and several values of other options. The ranges of all numbers are checked.

    >>> config = RetinaNetConfig(num_classes=2, class_names=("cat", "dog"))
    >>> RetinaNetConfig.from_json(config.to_json()) == config
    True
    """

    num_classes: int
    class_names: tuple[str, ...] | None = None

    in_channels: int = 3
    backbone: str = "resnet50"
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    backbone_norm_eps: float | None = None
    stride_in_1x1: bool = False
    trainable_stages: int = 3

    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    fpn_channels: int | None = 256
    p6_from: Literal["c5", "p5"] = "c5"
    p7_relu: bool = True
    strided_padding: Literal["symmetric", "same"] = "symmetric"

    head_depth: int = 4
    head_norm: Literal["group", "group_with_bias", "batch"] | None = None
    head_box_norm: Literal["same", "group", "group_with_bias", "batch"] | None = "same"
    prior: float = 0.01
    head_init: Literal["paper", "fan_in"] = "paper"

    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    octave_scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_offset: float = 0.5
    anchor_mode: Literal["exact", "rounded", "torchvision", "inclusive_rounded"] = "exact"
    anchor_plus_one: bool = False
    box_encoding: Literal["center", "corners"] = "center"
    box_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    log_scale_clamp: Literal["above", "both"] | None = "above"

    criterion: Literal["retinanet", "custom"] = "retinanet"
    assigner: Literal["iou", "atss"] = "iou"
    positive_threshold: float = 0.5
    negative_threshold: float = 0.4
    force_match_floor: float | None = 0.0
    atss_top_k: int = 9
    classification_loss: Literal["focal", "cross_entropy", "softmax_focal", "quality_focal"] = (
        "focal"
    )
    focal_alpha: float | None = 0.25
    focal_gamma: float = 2.0
    box_loss: Literal["smooth_l1", "l1", "giou", "diou", "ciou"] = "smooth_l1"
    smooth_l1_beta: float = 0.11
    box_loss_weight: float = 1.0
    normalizer: Literal["batch", "image", "ema"] = "batch"

    score_threshold: float = 0.05
    pre_nms_top_k: int | None = 1000
    pre_nms_top_k_of: Literal["pairs", "anchors"] = "pairs"
    pre_nms_top_k_per_class: int | None = None
    nms_threshold: float = 0.5
    suppression: Literal["hard", "linear", "gaussian"] = "hard"
    soft_nms_sigma: float = 0.5
    max_detections: int | None = 100
    class_agnostic_nms: bool = False
    clip_to: Literal["image", "batch", "image_after_nms", "original", "last_pixel"] | None = "image"
    drop_empty: bool = False
    inclusive_corners: bool = False
    uniform_rescale: bool = False
    scale_before_nms: bool = False
    last_level_threshold: float | None = None

    min_size: int = 800
    max_size: int = 1333
    keep_ratio: bool = True
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size_divisor: int = 32
    size_rounding: Literal[
        "floor", "round", "round_half_even", "round_two_step", "round_before_limit"
    ] = "floor"
    resize_by: Literal["size", "factor"] = "size"
    antialias: bool = False
    round_pixels: bool = False
    always_pad: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _allowed().items():
            value = getattr(self, name)
            if name == "class_names" and value is not None:
                value = check_names(name, value)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
            object.__setattr__(self, name, value)
            allowed.check(name, value)
        for name, limits in _LIMITS.items():
            _check_limits(name, getattr(self, name), limits)
        if not 0 < self.prior < 1:
            raise ValueError(f"prior must be in (0, 1), got {self.prior}.")
        self._check_channels()
        self._check_levels()
        self._check_combinations()
        self._check_lengths()

    def _check_lengths(self) -> None:
        for name in ("octave_scales", "aspect_ratios"):
            count = len(getattr(self, name))
            if not 1 <= count <= _MOST_SHAPES:
                raise ValueError(f"{name} must have 1 to {_MOST_SHAPES} entries, got {count}.")
        if len(self.box_weights) != 4:
            raise ValueError(
                f"box_weights must have 4 entries, one per delta, got {shortened(self.box_weights)}."
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            count = len(self.class_names)
            raise ValueError(
                f"class_names has {count} {'entry' if count == 1 else 'entries'}, but num_classes is "
                f"{self.num_classes}."
            )

    def _check_channels(self) -> None:
        for name in ("image_mean", "image_std"):
            count = len(getattr(self, name))
            if count != self.in_channels:
                raise ValueError(
                    f"{name} has {count} {'value' if count == 1 else 'values'}, but in_channels is "
                    f"{self.in_channels}; give one value per channel."
                )

    def _check_levels(self) -> None:
        if not self.levels or list(self.levels) != list(
            range(self.levels[0], self.levels[0] + len(self.levels))
        ):
            raise ValueError(
                f"levels must be consecutive numbers, such as (2, 3, 4, 5, 6, 7), got {self.levels}."
            )
        if self.levels[0] > _LAST_MAP:
            raise ValueError(
                f"levels must begin at {_LAST_MAP} or below, because the levels above are computed from "
                f"that one, got {self.levels}."
            )
        if self.fpn_channels is None and self.levels[-1] > _LAST_MAP:
            raise ValueError(
                "fpn_channels=None is for a model without a pyramid, so no levels above "
                f"{_LAST_MAP} can be computed; got levels={self.levels}."
            )
        if len(self.anchor_sizes) != len(self.levels):
            usual = tuple(4 * 2**level for level in self.levels)
            raise ValueError(
                f"anchor_sizes must have one entry per level, {len(self.levels)} for "
                f"levels={self.levels}, got {shortened(self.anchor_sizes)}. The usual sizes of these "
                f"levels are {usual}."
            )

    @property
    def map_levels(self) -> tuple[int, ...]:
        """The levels that are computed from the backbone's maps: those up to 5.

        .. versionadded:: 0.3.0

        >>> RetinaNetConfig(num_classes=2).map_levels
        (3, 4, 5)
        """
        return tuple(level for level in self.levels if level <= _LAST_MAP)

    def _check_combinations(self) -> None:
        for name in ("head_norm", "head_box_norm"):
            norm = getattr(self, name)
            if norm in ("group", "group_with_bias") and (self.fpn_channels or 0) % _HEAD_GROUPS:
                raise ValueError(
                    f"{name}={norm!r} divides the channels into {_HEAD_GROUPS} groups, so "
                    f"fpn_channels must be a multiple of {_HEAD_GROUPS}, got {self.fpn_channels}."
                )
        if self.uniform_rescale and not self.keep_ratio:
            raise ValueError(
                "uniform_rescale=True scales boxes back by one factor, but keep_ratio=False resizes each "
                "side by its own. Set one of the two to its default."
            )
        required = {"torchvision": 0, "inclusive_rounded": 0.5}
        offset = required.get(self.anchor_mode, self.anchor_offset)
        if self.anchor_offset != offset:
            raise ValueError(
                f"anchor_mode={self.anchor_mode!r} requires anchor_offset={offset}, got "
                f"anchor_offset={self.anchor_offset}."
            )
        if self.clip_to == "last_pixel" and self.inclusive_corners:
            raise ValueError("clip_to='last_pixel' requires inclusive_corners=False.")
        if self.anchor_mode == "inclusive_rounded" and self.anchor_plus_one:
            raise ValueError(
                "anchor_mode='inclusive_rounded' requires anchor_plus_one=False, because its anchors "
                "already include their last pixel."
            )
        if self.resize_by == "factor" and (self.antialias or not self.keep_ratio):
            raise ValueError(
                "resize_by='factor' requires antialias=False and keep_ratio=True, got "
                f"antialias={self.antialias} and keep_ratio={self.keep_ratio}."
            )
        if self.criterion == "retinanet" and self.assigner == "iou":
            check_range("negative_threshold", self.negative_threshold, 0, self.positive_threshold)

    @classmethod
    def paper(
        cls, num_classes: int = 80, class_names: Sequence[str] | None = None
    ) -> RetinaNetConfig:
        """Return the detector of the paper: ResNet-50, P6 from C5, exact anchors, smooth L1.

        References:
            Lin et al., Focal Loss for Dense Object Detection, sections 4 and 4.1. arXiv:1708.02002.
        """
        return cls(num_classes=num_classes, class_names=_names(class_names))

    @classmethod
    def torchvision_v1(
        cls, num_classes: int = 91, class_names: Sequence[str] | None = None
    ) -> RetinaNetConfig:
        """Return the equivalent of torchvision's ``retinanet_resnet50_fpn``.

        ``num_classes`` is the number of channels in the head, as in torchvision. Its 91 channels are
        the 80 classes of COCO, a background that never occurs, and ten ids without a class.
        """
        return cls(
            num_classes=num_classes,
            class_names=_names(class_names),
            p6_from="p5",
            anchor_offset=0.0,
            anchor_mode="torchvision",
            box_loss="l1",
            normalizer="image",
            max_detections=300,
        )

    @classmethod
    def torchvision_v2(
        cls, num_classes: int = 91, class_names: Sequence[str] | None = None
    ) -> RetinaNetConfig:
        """Return the equivalent of torchvision's ``retinanet_resnet50_fpn_v2``.

        P6 comes from C5, the head uses GroupNorm, BatchNorm trains, and the box loss is GIoU.
        """
        return dataclasses.replace(
            cls.torchvision_v1(num_classes, class_names),
            p6_from="c5",
            backbone_norm="batch",
            head_norm="group",
            box_loss="giou",
        )

    def replace(self, **changes: Any) -> RetinaNetConfig:
        """Return a copy with some fields changed.

        Raises:
            TypeError: If a name is not a field, or a value has the wrong type.
            ValueError: If a value is invalid.

        >>> RetinaNetConfig(num_classes=2).replace(backbone="resnet18").backbone
        'resnet18'
        """
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the text of a ``config.json``."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RetinaNetConfig:
        """Read the text of a ``config.json``.

        Fields that an older focaldet did not write have their defaults.

        Raises:
            focaldet.errors.CheckpointError: If the text is not JSON, is not the configuration of a
                RetinaNet, was written by a newer focaldet, or has unknown fields or invalid values.
                It is also a ValueError.
        """
        try:
            values = json.loads(text.removeprefix("\ufeff"))
        except RecursionError as error:
            raise CheckpointError("config.json is nested too deeply.") from error
        except ValueError as error:  # also from integers of more than 4,300 digits
            raise CheckpointError(f"config.json is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise CheckpointError(
                f"config.json must contain one JSON object, but contains {shortened(values)}."
            )
        if "num_classes" not in values:
            fields = _listed(values) or "nothing"
            raise CheckpointError(
                "config.json is not the configuration of a RetinaNet: it has no 'num_classes'. It "
                f"contains {fields}."
            )
        return cls._from_dict(values)

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> RetinaNetConfig:
        if "format_version" not in values:
            raise CheckpointError("config.json was not written by focaldet: no 'format_version'.")
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"config.json has format_version {shortened(version)}, but this focaldet reads "
                f"{FORMAT_VERSION}. Upgrade focaldet if a newer one wrote it."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known - {"format_version"})
        if unknown:
            raise CheckpointError(
                f"Unknown field{'s' * (len(unknown) > 1)} in config.json: {_listed(unknown)}."
            )
        try:
            return cls(**{name: values[name] for name in values.keys() & known})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"Invalid value in config.json: {error}") from error


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else check_names("class_names", names)


def _listed(fields: Iterable[str]) -> str:
    """Return the names of fields for a message, at most 8."""
    fields = sorted(fields)
    more = f" and {len(fields) - 8} more" if len(fields) > 8 else ""
    return ", ".join(shortened(field, 50) for field in fields[:8]) + more


class _Limits(NamedTuple):
    """The range of a number, or of each number in a tuple."""

    low: float
    high: float
    low_open: bool = False


_LARGE = 10**9  # float32 represents products of several of these
_LARGEST_INTEGER = 2**31 - 1
_MOST_SHAPES = 100  # of anchors; the head has K channels for each pair of scale and ratio
_FRACTION = _Limits(0, 1)
_COUNT = _Limits(1, _LARGEST_INTEGER)
_ABOVE_0 = _Limits(0, _LARGE, low_open=True)

_LIMITS = {
    "num_classes": _Limits(1, 10**6),
    "in_channels": _Limits(1, 2**16),
    "backbone_norm_eps": _Limits(0, _LARGE),
    "trainable_stages": _Limits(0, 5),
    "levels": _Limits(1, 10),
    "fpn_channels": _Limits(1, 2**14),
    "head_depth": _Limits(0, 64),
    "anchor_sizes": _ABOVE_0,
    "octave_scales": _ABOVE_0,
    "aspect_ratios": _ABOVE_0,
    "anchor_offset": _FRACTION,
    "box_weights": _ABOVE_0,
    "positive_threshold": _Limits(0, 1, low_open=True),
    "negative_threshold": _FRACTION,
    "force_match_floor": _FRACTION,
    "atss_top_k": _COUNT,
    "focal_alpha": _FRACTION,
    "focal_gamma": _Limits(0, _LARGE),
    "smooth_l1_beta": _ABOVE_0,
    "box_loss_weight": _Limits(0, _LARGE),
    "score_threshold": _FRACTION,
    "last_level_threshold": _FRACTION,
    "pre_nms_top_k": _COUNT,
    "pre_nms_top_k_per_class": _COUNT,
    "nms_threshold": _FRACTION,
    "soft_nms_sigma": _ABOVE_0,
    "max_detections": _COUNT,
    "min_size": _Limits(1, 2**16),
    "max_size": _COUNT,
    "image_mean": _Limits(-_LARGE, _LARGE),
    "image_std": _ABOVE_0,
    "size_divisor": _Limits(1, 2**12),
}


def _check_limits(name: str, value: float | tuple[float, ...] | None, limits: _Limits) -> None:
    if isinstance(value, tuple):
        for i, entry in enumerate(value):
            check_range(f"{name}[{i}]", entry, limits.low, limits.high, low_open=limits.low_open)
    elif value is not None:
        check_range(name, value, limits.low, limits.high, low_open=limits.low_open)


class _Allowed(NamedTuple):
    """What a field's annotation allows: values of a type, or choices, and None if it is optional."""

    kind: type
    optional: bool
    choices: tuple[object, ...] = ()
    of_entries: _Allowed | None = None

    def check(self, name: str, value: object) -> None:
        if value is None and self.optional:
            return
        if self.choices:
            check_choice(name, value, self.choices + (None,) * self.optional)
        elif self.kind is int:
            check_integer(name, value)
        elif not isinstance(value, (int, float) if self.kind is float else self.kind) or (
            isinstance(value, bool) and self.kind is not bool
        ):
            raise TypeError(f"{name} must be {_DESCRIBED[self.kind]}, got {shortened(value)}.")
        elif self.of_entries is not None and isinstance(value, tuple):
            for i, entry in enumerate(value):
                self.of_entries.check(f"{name}[{i}]", entry)


_DESCRIBED = {float: "a number", bool: "True or False", str: "a string", tuple: "a list or tuple"}


@functools.cache
def _allowed() -> dict[str, _Allowed]:
    return {name: _parse(hint) for name, hint in get_type_hints(RetinaNetConfig).items()}


def _parse(hint: Any) -> _Allowed:
    origin, arguments = get_origin(hint), get_args(hint)
    if type(None) in arguments:  # each union is of something and None
        [something] = (argument for argument in arguments if argument is not type(None))
        return _parse(something)._replace(optional=True)
    if origin is Literal:
        return _Allowed(str, optional=False, choices=arguments)
    if origin is tuple:
        return _Allowed(tuple, optional=False, of_entries=_parse(arguments[0]))
    return _Allowed(hint, optional=False)
