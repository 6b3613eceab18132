"""A drop-in for torchvision's RetinaNet: the same class to other code, with focaldet's parts inside.

Change one import, and code that was written for torchvision keeps working::

    from focaldet.torchvision import RetinaNet, retinanet_resnet50_fpn

:class:`RetinaNet` is a subclass of torchvision's, with the same constructor, attributes, state dict and
return values. Images are prepared, anchors matched, losses computed and detections chosen by focaldet,
which takes less time where images have many objects. Where a method of torchvision was overridden, or an
option has no equal in focaldet, torchvision's own code runs; :attr:`RetinaNet.uses_focaldet` says where
and why.

.. versionadded:: 0.3.0
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from focaldet._torchvision import torchvision  # first: it explains a broken installation
from focaldet.backbones import BACKBONES
from focaldet.box_coder import BoxCoder
from focaldet.boxes import scale_boxes
from focaldet.criterion import RetinaNetCriterion
from focaldet.matching import Matcher
from focaldet.postprocess import PostProcess
from focaldet.pretrained import CheckpointFile
from focaldet.pretrained.families import _torchvision as family
from focaldet.retinanet import RetinaNet as FocaldetRetinaNet
from focaldet.structures import ImageBatch, Target, check_targets
from focaldet.transforms import Preprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections
    from focaldet.retinanet import OptimizedRetinaNet as FocaldetOptimizedRetinaNet

from torchvision.models.detection import _utils as _tv_utils
from torchvision.models.detection import retinanet as _tv
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import (
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.transform import GeneralizedRCNNTransform

__all__ = [
    "AnchorGenerator",
    "OptimizedRetinaNet",
    "RetinaNet",
    "RetinaNetClassificationHead",
    "RetinaNetHead",
    "RetinaNetRegressionHead",
    "RetinaNet_ResNet50_FPN_V2_Weights",
    "RetinaNet_ResNet50_FPN_Weights",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
]

_BOX_LOSSES = ("l1", "smooth_l1", "giou", "diou", "ciou")


class RetinaNet(_tv.RetinaNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's RetinaNet, computed by focaldet's parts.

    See :class:`torchvision.models.detection.RetinaNet` for the arguments, and for what the model takes
    and returns: a dictionary of losses in training, and a list of dictionaries in evaluation.
    Attributes are read at every call, so they can be changed at any time: ``score_thresh``,
    ``nms_thresh``, ``detections_per_img``, ``topk_candidates``, ``transform``, ``anchor_generator``,
    ``proposal_matcher`` and ``head`` with its parts.

    Detections, losses and gradients are torchvision's up to rounding, with these deviations:

    - Detections with exactly equal scores can be in a different order.
    - An object that overlaps no anchor has no positive anchor. In torchvision it makes every anchor
      of the image positive.
    - Under autocast and with half-precision weights, anchors and boxes are float32.
    - TorchScript is not supported.

    Attributes:
        validate: Whether to check images and targets as :class:`focaldet.RetinaNet` does: for example,
            that every box is inside its image. False, the default, accepts what torchvision does.

    >>> from focaldet.torchvision import retinanet_resnet50_fpn
    >>> model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    >>> model.uses_focaldet
    {'preprocessing': 'yes', 'head': 'yes', 'losses': 'yes', 'detections': 'yes'}
    >>> model.transform.fixed_size = (64, 64)
    >>> model.uses_focaldet["preprocessing"]
    'no: transform.fixed_size is set'
    """

    validate: bool = False

    @classmethod
    def from_torchvision(cls, model: _tv.RetinaNet) -> RetinaNet:
        """Return a model of this class that shares the modules and weights of a torchvision model."""
        converted: RetinaNet = copy.copy(model)
        converted.__class__ = cls
        return converted

    def to_focaldet(self) -> FocaldetRetinaNet:
        """Return a :class:`focaldet.RetinaNet` that shares the weights.

        Nothing is copied, so training either changes both. Thresholds, sizes, anchors and the other
        settings are those that this model has now; later changes have no effect on the other.

        Raises:
            ValueError: If the architecture or a setting has no counterpart in focaldet. The message
                names it.

        >>> model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
        >>> model.score_thresh = 0.3
        >>> model.to_focaldet().config.score_threshold
        0.3
        """
        file = CheckpointFile(dict(self.state_dict(keep_vars=True)))
        config = self._config(file)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of random weights, which are replaced
            model = FocaldetRetinaNet.from_config(config)
        trains = {parameter: parameter.requires_grad for parameter in self.parameters()}
        model.load_state_dict(family.convert(file, config), assign=True)
        for parameter, flag in trains.items():  # assigning changes it
            parameter.requires_grad_(flag)
        model.config = config  # from_config takes weights for random ones, which all train
        return model.train(self.training)

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        *,
        winograd: bool | None = None,
        allow_tf32: bool = True,
        cuda_graphs: bool = False,
    ) -> OptimizedRetinaNet:
        """Return a faster copy that only predicts, with the settings that this model has now.

        Args:
            dtype: See :meth:`focaldet.RetinaNet.optimize_for_inference`.
            winograd: See :meth:`focaldet.RetinaNet.optimize_for_inference`.
            allow_tf32: See :meth:`focaldet.RetinaNet.optimize_for_inference`.
            cuda_graphs: See :meth:`focaldet.RetinaNet.optimize_for_inference`.

        Raises:
            ValueError: If the dtype is not supported, or the architecture or a setting has no
                counterpart in focaldet.
        """
        detector = self.to_focaldet().optimize_for_inference(
            dtype, winograd=winograd, allow_tf32=allow_tf32, cuda_graphs=cuda_graphs
        )
        return OptimizedRetinaNet(detector)

    def _config(self, file: CheckpointFile) -> RetinaNetConfig:
        """Return the configuration of this model in focaldet.

        Raises:
            ValueError: If there is none.
        """
        steps = self._why_not()
        fixed = self.transform.fixed_size
        square = fixed is not None and len(set(fixed)) == 1
        if square:  # torchvision's transform runs, but focaldet can do it, too
            steps.pop("preprocessing")
        reasons = [reason for reason in steps.values() if reason]
        if self.head.regression_head.box_coder.weights != self.box_coder.weights:
            reasons.append("box_coder and head.regression_head.box_coder have different weights")
        groups = {norm.num_groups for norm in self.head.modules() if isinstance(norm, nn.GroupNorm)}
        if groups - {32}:
            reasons.append(f"the head's GroupNorm has {max(groups - {32})} groups instead of 32")
        if reasons:
            raise ValueError(f"The model has no counterpart in focaldet: {'; '.join(reasons)}.")
        config = family.suggest(file).config
        transform, matcher = self.transform, self.proposal_matcher
        box_loss = self.head.regression_head._loss_type
        return config.replace(
            num_classes=self.head.classification_head.num_classes,
            class_names=None,
            in_channels=len(transform.image_mean),
            backbone_norm_eps=_norm_eps(self.backbone, config.backbone),
            trainable_stages=_trainable_stages(self.backbone, config.trainable_stages),
            box_weights=tuple(float(weight) for weight in self.box_coder.weights),
            positive_threshold=matcher.high_threshold,
            negative_threshold=matcher.low_threshold,
            force_match_floor=0.0 if matcher.allow_low_quality_matches else None,
            box_loss=box_loss,
            **({"smooth_l1_beta": 1.0} if box_loss == "smooth_l1" else {}),
            score_threshold=min(max(self.score_thresh, 0.0), 1.0),
            pre_nms_top_k=self.topk_candidates,
            nms_threshold=min(max(self.nms_thresh, 0.0), 1.0),
            max_detections=self.detections_per_img,
            min_size=fixed[0] if square else transform.min_size[-1],
            max_size=transform.max_size,
            keep_ratio=not square,
            image_mean=tuple(transform.image_mean),
            image_std=tuple(transform.image_std),
            size_divisor=transform.size_divisible,
            **_anchor_fields(self.anchor_generator),
        )

    @property
    def uses_focaldet(self) -> dict[str, str]:
        """Whether each step is computed by focaldet: "yes", or "no: " with the reason.

        "preprocessing", "losses" and "detections" are otherwise computed by torchvision's own code.
        "head" is "no" if its output is rearranged by torchvision before focaldet reads it, which costs
        memory and time.
        """
        return {
            step: f"no: {reason}" if reason else "yes" for step, reason in self._why_not().items()
        }

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses of images and targets in training, and detections in evaluation.

        Args:
            images: ``[C, H, W]`` tensors of any sizes, floating-point in [0, 1].
            targets: One dictionary per image with ``boxes``, ``[G, 4]``, xyxy in pixels of the image,
                and ``labels``, ``[G]``. Required in training.

        Returns:
            In training, a dictionary with the scalars "classification" and "bbox_regression". In
            evaluation, one dictionary per image with ``boxes`` ``[D, 4]``, ``scores`` ``[D]`` and
            ``labels`` ``[D]``, best score first.

        Raises:
            AssertionError: If targets are missing or malformed, as in torchvision.
        """
        if torchvision._is_tracing():
            return super().forward(images, targets)  # type: ignore[no-any-return]
        if self.training:
            _check_form(targets)
        if self.validate and targets is not None:
            sizes = [_size(image) for image in images]
            num_classes = self.head.classification_head.num_classes
            check_targets(targets, sizes, num_classes)  # type: ignore[arg-type]
        batch, scaled = self._batch(images, targets)
        if scaled is not None:
            _check_areas(scaled)
        features = self.backbone(batch.tensor)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        if self.training and scaled is not None:
            return self.eager_outputs(self._losses(features, batch, scaled), [])  # type: ignore[no-any-return]
        return self.eager_outputs({}, self._detections(features, batch))  # type: ignore[no-any-return]

    def _batch(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None
    ) -> tuple[ImageBatch, list[dict[str, Tensor]] | None]:
        """Resize, normalise and pad the images, and scale the targets with them."""
        transform = self.transform
        shapes = any("masks" in target or "keypoints" in target for target in targets or ())
        if self._why_not_preprocessing() or shapes:
            original_sizes = [_size(image) for image in images]
            batched, scaled = transform(images, targets)
            return ImageBatch(batched.tensors, batched.image_sizes, original_sizes), scaled
        for image in images:
            if image.dim() != 3:
                raise ValueError(
                    "images is expected to be a list of 3d tensors of shape [C, H, W], got "
                    f"{image.shape}"
                )
            if not image.is_floating_point():
                raise TypeError(
                    "Expected input images to be of floating type (in range [0, 1]), but found type "
                    f"{image.dtype} instead"
                )
        preprocess = Preprocess(
            min_size=transform.min_size[-1],
            max_size=transform.max_size,
            mean=transform.image_mean,
            std=transform.image_std,
            size_divisor=transform.size_divisible,
        )
        resize = not (self.training and transform._skip_resize)
        batch = preprocess(list(images), resize=resize, validate=self.validate)
        if targets is None:
            return batch, None
        return batch, [
            {**target, "boxes": scale_boxes(_floating(target["boxes"]), original_size, size)}
            for target, original_size, size in zip(
                targets, batch.original_sizes, batch.sizes, strict=True
            )
        ]

    def _losses(
        self, features: list[Tensor], batch: ImageBatch, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if self._why_not_losses():
            images = ImageList(batch.tensor, batch.sizes)
            return self.compute_loss(  # type: ignore[no-any-return]
                targets, self.head(features), self.anchor_generator(images, features)
            )
        logits, box_deltas = self._maps(features)
        _check_labels(targets, logits[0].shape[1] * 4 // box_deltas[0].shape[1])
        matcher, regression = self.proposal_matcher, self.head.regression_head
        criterion = RetinaNetCriterion(
            Matcher(
                matcher.high_threshold,
                matcher.low_threshold,
                force_match_floor=0.0 if matcher.allow_low_quality_matches else None,
            ),
            _box_coder(regression.box_coder),
            box_loss=regression._loss_type,
            smooth_l1_beta=1.0,
            normalizer="image",
        )
        losses = criterion(
            logits,
            box_deltas,
            self._anchors(features, batch),
            [Target(boxes=one["boxes"], labels=one["labels"]) for one in targets],
        )
        return {
            "classification": losses["classification"],
            "bbox_regression": losses["box_regression"],
        }

    def _detections(self, features: list[Tensor], batch: ImageBatch) -> list[dict[str, Tensor]]:
        if self._why_not_detections():
            return self._torchvision_detections(features, batch)
        logits, box_deltas = self._maps(features)
        postprocess = PostProcess(
            _box_coder(self.box_coder),
            score_threshold=min(max(self.score_thresh, 0.0), 1.0),
            pre_nms_top_k=self.topk_candidates,
            nms_threshold=min(max(self.nms_thresh, 0.0), 1.0),
            max_detections=self.detections_per_img,
        )
        found = postprocess(
            logits,
            box_deltas,
            self._anchors(features, batch),
            batch.sizes,
            batch.original_sizes,
        )
        return [_as_dictionary(one) for one in found]

    def _torchvision_detections(
        self, features: list[Tensor], batch: ImageBatch
    ) -> list[dict[str, Tensor]]:
        outputs = self.head(features)
        anchors = self.anchor_generator(ImageList(batch.tensor, batch.sizes), features)
        found = self.postprocess_detections(
            {name: _by_level(rows, features, dim=1) for name, rows in outputs.items()},
            [_by_level(rows, features, dim=0) for rows in anchors],
            batch.sizes,
        )
        return self.transform.postprocess(found, batch.sizes, batch.original_sizes)  # type: ignore[no-any-return]

    def _maps(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return class logits and box deltas as maps, ``[B, A * K, H, W]`` and ``[B, A * 4, H, W]``."""
        if self._why_not_head():
            outputs = self.head(features)
            return (
                _as_maps(outputs["cls_logits"], features),
                _as_maps(outputs["bbox_regression"], features),
            )
        classes, boxes = self.head.classification_head, self.head.regression_head
        return (
            [classes.cls_logits(classes.conv(feature)) for feature in features],
            [boxes.bbox_reg(boxes.conv(feature)) for feature in features],
        )

    def _anchors(self, features: list[Tensor], batch: ImageBatch) -> list[Tensor]:
        """Return the anchors of every level, at least in float32."""
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        # The generator reads only the shape, the dtype and the device.
        shapes = [feature.new_empty(1, dtype=dtype).expand(feature.shape) for feature in features]
        [anchors] = self.anchor_generator(ImageList(batch.tensor, batch.sizes[:1]), shapes)
        return _by_level(anchors, features, dim=0)

    def _why_not(self) -> dict[str, str | None]:
        """Return why focaldet does not compute each step, or None for each that it does."""
        return {
            "preprocessing": self._why_not_preprocessing(),
            "head": self._why_not_head(),
            "losses": self._why_not_losses(),
            "detections": self._why_not_detections(),
        }

    def _why_not_preprocessing(self) -> str | None:
        transform = self.transform
        methods = ("forward", "normalize", "resize", "batch_images", "torch_choice", "max_by_axis")
        changed = _changed(transform, GeneralizedRCNNTransform, "transform", methods)
        if changed:
            return changed
        if transform.fixed_size is not None:
            return "transform.fixed_size is set"
        if self.training and len(transform.min_size) > 1 and not transform._skip_resize:
            return "transform.min_size has several values to choose from in training"
        return None

    def _why_not_head(self) -> str | None:
        classes = getattr(self.head, "classification_head", None)
        boxes = getattr(self.head, "regression_head", None)
        return (
            _changed(self.head, RetinaNetHead, "head", ("forward",))
            or _changed(
                classes, RetinaNetClassificationHead, "head.classification_head", ("forward",)
            )
            or _changed(boxes, RetinaNetRegressionHead, "head.regression_head", ("forward",))
        )

    def _why_not_losses(self) -> str | None:
        classes = getattr(self.head, "classification_head", None)
        boxes = getattr(self.head, "regression_head", None)
        method = ("compute_loss",)
        changed = (
            _overridden(self, _tv.RetinaNet, "model", method)
            or _overridden(self.head, RetinaNetHead, "head", method)
            or _overridden(classes, RetinaNetClassificationHead, "head.classification_head", method)
            or _overridden(boxes, RetinaNetRegressionHead, "head.regression_head", method)
            or _other_type(self.proposal_matcher, _tv_utils.Matcher, "proposal_matcher")
            or _other_type(boxes.box_coder, _tv_utils.BoxCoder, "head.regression_head.box_coder")  # type: ignore[union-attr]
        )
        if changed:
            return changed
        loss = boxes._loss_type  # type: ignore[union-attr]
        if loss not in _BOX_LOSSES:
            return f"head.regression_head._loss_type is {loss!r}"
        matcher = self.proposal_matcher
        if not 0 <= matcher.low_threshold <= matcher.high_threshold <= 1:
            return "the thresholds of proposal_matcher are not in [0, 1]"
        return None

    def _why_not_detections(self) -> str | None:
        changed = (
            _overridden(self, _tv.RetinaNet, "model", ("postprocess_detections",))
            or _overridden(self.transform, GeneralizedRCNNTransform, "transform", ("postprocess",))
            or _other_type(self.box_coder, _tv_utils.BoxCoder, "box_coder")
        )
        if changed:
            return changed
        for name in ("topk_candidates", "detections_per_img"):
            count = getattr(self, name)
            if count is not None and count < 1:
                return f"{name} is {count}"
        return None


class OptimizedRetinaNet(nn.Module):
    """A faster copy of a :class:`RetinaNet` that only predicts and is called in the same way.

    Created by :meth:`RetinaNet.optimize_for_inference`.

    Attributes:
        detector: The :class:`focaldet.retinanet.OptimizedRetinaNet` that does the work. Its ``predict``
            takes files, too.
    """

    def __init__(self, detector: FocaldetOptimizedRetinaNet) -> None:
        super().__init__()
        self.detector = detector

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return one dictionary per image with ``boxes``, ``scores`` and ``labels``.

        Args:
            images: ``[C, H, W]`` tensors of any sizes, floating-point in [0, 1].
        """
        output = self.detector(list(images), validate=False)
        return [_as_dictionary(found) for found in self.detector.detections(output)]


def _as_dictionary(found: Detections) -> dict[str, Tensor]:
    return {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}


def _anchor_fields(generator: AnchorGenerator) -> dict[str, Any]:
    """Return the fields of the config that describe anchors.

    Raises:
        ValueError: If there are none: focaldet has the same shapes, scaled, on every level.
    """
    sizes, ratios = generator.sizes, generator.aspect_ratios
    usual = tuple(2 ** (i / 3) for i in range(3))
    for scales in (usual, tuple(size / sizes[0][0] for size in sizes[0])):
        firsts = tuple(float(level[0]) for level in sizes)
        expected = tuple(tuple(int(first * scale) for scale in scales) for first in firsts)
        same_sizes = tuple(tuple(level) for level in sizes) == expected
        if type(generator) is AnchorGenerator and same_sizes and len(set(ratios)) == 1:
            return {
                "anchor_sizes": firsts,
                "octave_scales": scales,
                "aspect_ratios": tuple(float(ratio) for ratio in ratios[0]),
            }
    raise ValueError(
        "The anchors have no counterpart in focaldet, where every level has the same shapes, scaled: "
        f"{type(generator).__name__} with sizes {sizes} and aspect_ratios {ratios}."
    )


def _norm_eps(backbone: nn.Module, name: str) -> float | None:
    """Return the eps of the BatchNorm layers, None for the usual one of the named backbone."""
    found: list[float] = [
        module.eps
        for module in backbone.modules()
        if isinstance(module, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d)
    ]
    return None if not found or found[0] == BACKBONES[name].norm_eps else found[0]


def _trainable_stages(backbone: nn.Module, default: int) -> int:
    """Return how many stages of a ResNet train, counted from the last."""
    body = getattr(backbone, "body", backbone)
    stages = [getattr(body, name, None) for name in ("layer4", "layer3", "layer2", "layer1")]
    if not all(isinstance(stage, nn.Module) for stage in stages):
        return default
    flags = [any(p.requires_grad for p in stage.parameters()) for stage in (*stages, body.conv1)]  # type: ignore[union-attr]
    return flags.index(False) if False in flags else len(flags)


def _overridden(part: Any, base: type, name: str, methods: Sequence[str]) -> str | None:
    """Return which method of a part is not torchvision's, or None."""
    if not isinstance(part, base):
        return f"{name} is a {type(part).__name__}"
    for method in methods:
        if method in vars(part) or getattr(type(part), method) is not getattr(base, method):
            return f"{name}.{method} is overridden"
    return None


def _changed(part: Any, base: type, name: str, methods: Sequence[str]) -> str | None:
    """Return how calling a module differs from torchvision's, or None."""
    hooked = isinstance(part, nn.Module) and (part._forward_hooks or part._forward_pre_hooks)
    return _overridden(part, base, name, methods) or (f"{name} has hooks" if hooked else None)


def _other_type(part: Any, base: type, name: str) -> str | None:
    return None if type(part) is base else f"{name} is a {type(part).__name__}"


def _by_level(rows: Tensor, features: list[Tensor], dim: int) -> list[Tensor]:
    """Split what has one entry per anchor along a dimension, ordered by level."""
    cells = [feature.shape[-2] * feature.shape[-1] for feature in features]
    per_cell = rows.shape[dim] // sum(cells)
    return list(torch.split(rows, [count * per_cell for count in cells], dim=dim))


def _as_maps(rows: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Return ``[B, R, N]`` as one ``[B, A * N, H, W]`` per level."""
    return [
        level.reshape(len(rows), *feature.shape[-2:], -1).permute(0, 3, 1, 2).contiguous()
        for level, feature in zip(_by_level(rows, features, dim=1), features, strict=True)
    ]


def _box_coder(coder: _tv_utils.BoxCoder) -> BoxCoder:
    return BoxCoder(coder.weights, max_log_scale=coder.bbox_xform_clip)


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return int(height), int(width)


def _floating(boxes: Tensor) -> Tensor:
    return boxes if boxes.is_floating_point() else boxes.float()


def _check_form(targets: Sequence[dict[str, Tensor]] | None) -> None:
    """Raise as torchvision does if targets are missing or not of the right form."""
    if targets is None:
        raise AssertionError("targets should not be none when in training mode")
    for target in targets:
        boxes = target["boxes"]
        if not isinstance(boxes, Tensor):
            raise AssertionError("Expected target boxes to be of type Tensor.")
        if boxes.dim() != 2 or boxes.shape[-1] != 4:
            raise AssertionError("Expected target boxes to be a tensor of shape [N, 4].")


def _check_areas(targets: Sequence[dict[str, Tensor]]) -> None:
    """Raise as torchvision does if a box has no area, with one look at the boxes of all images."""
    boxes = torch.cat([target["boxes"] for target in targets]) if targets else torch.empty(0, 4)
    if not (boxes[:, 2:] <= boxes[:, :2]).any():
        return
    for index, target in enumerate(targets):
        flat = (target["boxes"][:, 2:] <= target["boxes"][:, :2]).any(dim=1)
        if flat.any():
            raise AssertionError(
                "All bounding boxes should have positive height and width. Found invalid box "
                f"{target['boxes'][flat][0].tolist()} for target at index {index}."
            )


def _check_labels(targets: Sequence[dict[str, Tensor]], num_classes: int) -> None:
    """Raise if a label is not a class. Labels on a GPU are not looked at, which would wait for it."""
    for index, target in enumerate(targets):
        labels = target["labels"]
        if labels.device.type != "cpu" or not len(labels):
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise IndexError(
                f"targets[{index}]['labels'] contains {wrong}, but the head has {num_classes} classes, "
                f"0 to {num_classes - 1}."
            )


def _with_this_class(build: Callable[..., _tv.RetinaNet]) -> Callable[..., RetinaNet]:
    @functools.wraps(build)
    def build_drop_in(*args: Any, **kwargs: Any) -> RetinaNet:
        model: RetinaNet = build(*args, **kwargs)
        model.__class__ = RetinaNet
        return model

    build_drop_in.__module__ = __name__
    del build_drop_in.__wrapped__
    build_drop_in.__doc__ = f"""Build torchvision's ``{build.__name__}`` with focaldet's parts.

    Takes the arguments of :func:`torchvision.models.detection.{build.__name__}`, such as
    ``weights="DEFAULT"``, ``num_classes``, ``weights_backbone`` and ``trainable_backbone_layers``, and
    builds the same model with the same weights, as a :class:`RetinaNet` of this module.
    """
    return build_drop_in


retinanet_resnet50_fpn = _with_this_class(torchvision.models.detection.retinanet_resnet50_fpn)
retinanet_resnet50_fpn_v2 = _with_this_class(torchvision.models.detection.retinanet_resnet50_fpn_v2)
