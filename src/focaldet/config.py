"""RetinaNetConfig: everything that describes a RetinaNet, in one value that is written to JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from focaldet._checks import check_integer, check_range, must_be

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FORMAT_VERSION", "RetinaNetConfig"]

FORMAT_VERSION = 1
"""Of config.json; raised when an older focaldet could not read what a newer one writes."""

_NUM_LEVELS = 5  # P3..P7


@dataclass(frozen=True, kw_only=True)
class RetinaNetConfig:
    """A RetinaNet's architecture, losses, thresholds and preprocessing.

    The defaults are the paper's detector (ResNet-50, 800 pixels). The parts check what they are
    given when the model is built.

    Args:
        num_classes: foreground classes; labels are ``0 .. num_classes - 1``.
        class_names: a name for each class, or None.
        in_channels: The number of channels of the images: 3 for RGB, 1 for greyscale, or any other
            number. ``image_mean`` and ``image_std`` need as many values.

            .. versionadded:: 0.3.0
        backbone: A name of :data:`focaldet.backbones.BACKBONES`; ``"timm/NAME"`` for a network of
            timm, see :class:`focaldet.backbones.TimmBackbone`; or "custom" for a module that is
            passed as ``backbone=``.
        backbone_norm: "frozen" for BatchNorm with fixed statistics and scales, which needs
            pretrained weights; "batch" for BatchNorm that trains, which training from scratch needs.
            Other norms are not affected.
        backbone_norm_eps: The constant added to variances by BatchNorm. None uses the backbone's own
            default.
        stride_in_1x1: See :func:`focaldet.backbones.build_backbone`; Caffe's ResNets need it.
        trainable_stages: How many of the backbone's five stages train, counted from the last one
            back. A backbone built without weights trains completely, and its model's config says 5.
            The first convolution is in the first stage, so set 5 if its weights were adapted to
            other ``in_channels``.
        fpn_channels: channels of every pyramid level and of the head's towers.
        p6_from: "c5" or "p5"; see :class:`focaldet.FPN`.
        p7_relu: whether a ReLU stands before P7.
        head_depth: convolutions of each tower.
        head_norm: None or "group"; see :class:`focaldet.RetinaNetHead`.
        prior: initial probability of "object".
        anchor_sizes, octave_scales, aspect_ratios, anchor_offset, anchor_mode, anchor_plus_one: see
            :class:`focaldet.AnchorGenerator`.
        box_weights: see :class:`focaldet.box_coder.BoxCoder`.
        log_scale_clamp: hold the log of a box's size relative to its anchor's within log(1000 / 16)
            from "above", from "both" sides, or not at all (None).
        positive_threshold, negative_threshold, force_match_floor: see
            :class:`focaldet.matching.Matcher`.
        focal_alpha, focal_gamma: of the focal loss; see :class:`focaldet.FocalLoss`.
        box_loss: "smooth_l1", "l1" or "giou".
        smooth_l1_beta: where smooth L1 turns from a parabola into a line.
        box_loss_weight: factor on the box loss.
        normalizer: "batch", "image" or "ema"; see :class:`focaldet.criterion.RetinaNetCriterion`.
        score_threshold, pre_nms_top_k, nms_threshold, max_detections: see
            :class:`focaldet.postprocess.PostProcess`.
        class_agnostic_nms, clip_to, drop_empty, inclusive_corners: likewise.
        uniform_rescale: scale boxes back by the factor that images were to be resized by, instead of
            each side's own; see ``resize_limits`` of :class:`focaldet.postprocess.PostProcess`.
        min_size, max_size, image_mean, image_std, size_divisor: see
            :class:`focaldet.transforms.Preprocess`.
        size_rounding, antialias, round_pixels, always_pad: likewise.

    Raises:
        TypeError: ``num_classes`` that is no integer.
        ValueError: ``num_classes`` below 1, other than one name a class, or other than five
            ``anchor_sizes``.

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

    fpn_channels: int = 256
    p6_from: Literal["c5", "p5"] = "c5"
    p7_relu: bool = True

    head_depth: int = 4
    head_norm: Literal["group"] | None = None
    prior: float = 0.01

    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    octave_scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_offset: float = 0.5
    anchor_mode: Literal["exact", "rounded", "torchvision"] = "exact"
    anchor_plus_one: bool = False
    box_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    log_scale_clamp: Literal["above", "both"] | None = "above"

    positive_threshold: float = 0.5
    negative_threshold: float = 0.4
    force_match_floor: float | None = 0.0
    focal_alpha: float | None = 0.25
    focal_gamma: float = 2.0
    box_loss: Literal["smooth_l1", "l1", "giou"] = "smooth_l1"
    smooth_l1_beta: float = 0.11
    box_loss_weight: float = 1.0
    normalizer: Literal["batch", "image", "ema"] = "batch"

    score_threshold: float = 0.05
    pre_nms_top_k: int | None = 1000
    nms_threshold: float = 0.5
    max_detections: int | None = 100
    class_agnostic_nms: bool = False
    clip_to: Literal["image", "batch", "image_after_nms"] = "image"
    drop_empty: bool = False
    inclusive_corners: bool = False
    uniform_rescale: bool = False

    min_size: int = 800
    max_size: int = 1333
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size_divisor: int = 32
    size_rounding: Literal["floor", "round"] = "floor"
    antialias: bool = False
    round_pixels: bool = False
    always_pad: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON knows no tuples
                object.__setattr__(self, field.name, tuple(value))
        if not isinstance(self.num_classes, int):
            raise TypeError(must_be("num_classes", "an integer", repr(self.num_classes)))
        check_range("num_classes", self.num_classes, 1)
        self._check_channels()
        if len(self.anchor_sizes) != _NUM_LEVELS:
            condition = f"{_NUM_LEVELS} numbers, one a pyramid level"
            raise ValueError(must_be("anchor_sizes", condition, self.anchor_sizes))
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            condition = f"one name a class (num_classes={self.num_classes})"
            raise ValueError(must_be("class_names", condition, f"{len(self.class_names)} names"))

    def _check_channels(self) -> None:
        check_integer("in_channels", self.in_channels)
        check_range("in_channels", self.in_channels, 1)
        for name in ("image_mean", "image_std"):
            count = len(getattr(self, name))
            if count != self.in_channels:
                raise ValueError(
                    f"{name} has {count} {'value' if count == 1 else 'values'}, but in_channels is "
                    f"{self.in_channels}; give one value per channel."
                )

    @classmethod
    def paper(
        cls, num_classes: int = 80, class_names: Sequence[str] | None = None
    ) -> RetinaNetConfig:
        """Return the paper's own detector: ResNet-50, P6 from C5, exact anchors, smooth L1.

        References:
            Lin et al., Focal Loss for Dense Object Detection, sections 4 and 4.1. arXiv:1708.02002.
        """
        return cls(num_classes=num_classes, class_names=_names(class_names))

    @classmethod
    def torchvision_v1(
        cls, num_classes: int = 91, class_names: Sequence[str] | None = None
    ) -> RetinaNetConfig:
        """Return the equal of torchvision's ``retinanet_resnet50_fpn``.

        ``num_classes`` counts the head's channels, as torchvision's argument does: 91 there are 80
        classes of COCO, a background that never occurs, and ten ids without a class.
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
        """Return the equal of torchvision's ``retinanet_resnet50_fpn_v2``.

        P6 comes from C5, GroupNorm stands in the head, BatchNorm trains, the box loss is GIoU.
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
            TypeError: a name that is not a field.

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

        Raises:
            ValueError: not JSON, written by a later focaldet, or with fields that are missing or
                unknown.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(must_be("config.json", "valid JSON", f"an error: {error}")) from error
        if not isinstance(values, dict) or "num_classes" not in values:
            condition = "a RetinaNet's configuration, with 'num_classes'"
            got = sorted(values)[:8] if isinstance(values, dict) else type(values).__name__
            raise ValueError(must_be("config.json", condition, got))
        return cls._from_dict(values)

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> RetinaNetConfig:
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            remedy = "A newer focaldet wrote it: upgrade." if version else ""
            raise ValueError(must_be("format_version", str(FORMAT_VERSION), version, remedy))
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known - {"format_version"})
        if unknown:
            raise ValueError(must_be("config.json", "made of known fields", unknown))
        try:
            return cls(**{name: values[name] for name in values.keys() & known})
        except TypeError as error:
            raise ValueError(
                must_be("config.json", "made of values of the right types", error)
            ) from error


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
