"""Post-processing: from the head outputs of all anchors to the detections of an image."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from focaldet._checks import check_choice, check_integer, check_levels, check_range, check_size
from focaldet._fixed_shape import (
    AnchorsAt,
    FixedShapeDetections,
    Places,
    RunAsGraph,
    Scaling,
    fixed_shape_detections,
)
from focaldet._torchvision import torchvision
from focaldet._uploads import upload
from focaldet.box_coder import BoxCoder, CornerBoxCoder
from focaldet.boxes import at_least_float32, box_iou, clip_boxes, scale_boxes
from focaldet.detections import Detections, with_tensors
from focaldet.heads import gather_from_map
from focaldet.transforms import SIZE_ROUNDINGS, resize_factor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet._cuda_graphs import GraphCache
    from focaldet.transforms import SizeRounding

__all__ = ["AnchorsAt", "FixedShapeDetections", "Places", "PostProcess", "soft_nms"]

_SUPPRESSION = ("hard", "linear", "gaussian")
_CLIP_TO = ("image", "batch", "image_after_nms", "original", "last_pixel", None)
_LOGIT_MARGIN = 1e-3  # far above the rounding of sigmoid and logit near the threshold
_BLOCK = 64  # values of a map that are skipped together if their maximum is too low
_DENSE = 4  # blocks do not pay off if more than one in four has a value above the threshold
_FEW_BOXES = 1000  # up to this number, torchvision suppresses all classes at once on the CPU


class PostProcess(nn.Module):
    """Filter, decode, clip and suppress predictions, and keep the best of each image.

    The steps are: keep predictions above the score threshold, keep the best of each level, decode
    their boxes, clip them, apply non-maximum suppression, and keep the best of the image. The maps of
    the head are read in their memory layout, and only predictions that pass the first steps are
    decoded. Boxes and scores are float32, or float64 if the maps are.

    Args:
        box_coder: Decodes the deltas.
        score_threshold: Keep predictions that score above this, in [0, 1].
        pre_nms_top_k: Number of (anchor, class) pairs to keep per level. None keeps all.
        pre_nms_top_k_of: What ``pre_nms_top_k`` counts. "pairs" is (anchor, class) pairs; "anchors" is
            anchors by the score of their best class, each with all its classes above the threshold,
            as in PaddleDetection and older versions of MMDetection.

            .. versionadded:: 0.3.0
        pre_nms_top_k_per_class: Number of predictions to keep per class, over all levels, after
            clipping and before suppression, as in PaddleDetection. None keeps all.

            .. versionadded:: 0.3.0
        nms_threshold: Remove a box whose IoU with a higher-scoring box is above this, in [0, 1]. With
            ``suppression="linear"``, its score is lowered instead; "gaussian" does not use it.
        suppression: What happens to a box that overlaps a higher-scoring box of its class. "hard"
            removes it. "linear" and "gaussian" lower its score by :func:`soft_nms`, which finds more
            objects in crowds and leaves more duplicates, and a box is kept while its score is above
            the lowest score threshold of the levels.

            .. versionadded:: 0.3.0
        soft_nms_sigma: The ``sigma`` of :func:`soft_nms`, greater than 0. Only used with
            ``suppression="gaussian"``.

            .. versionadded:: 0.3.0
        max_detections: Number of detections to keep per image. None keeps all.
        class_agnostic_nms: Whether boxes also suppress boxes of other classes.
        clip_to: "image" clips boxes to the image before suppression, as in torchvision and
            MMDetection; "batch" to the padded batch, as in ODTK and yhenon's RetinaNet;
            "image_after_nms" to the image after suppression, as in Detectron2; "last_pixel" to the
            index of the image's last pixel, one less than its size, before suppression, as in
            keras-retinanet; and "original" scales boxes to the input image before they are clipped to
            it and suppressed, as in Detectron, which only makes a difference with
            ``inclusive_corners``. None does not clip, as in PaddleDetection.

            .. versionchanged:: 0.3.0
                Added "original", "last_pixel" and None.
        drop_empty: Whether to drop boxes that have no area after clipping.
        inclusive_corners: Whether boxes include their last pixels, as in ODTK. Clipping then leaves
            at least one pixel of each, and the last pixels are scaled, ``(x2 - 1) / factor + 1``.
        resize_limits: ``(min_size, max_size)`` that images were resized to, to scale boxes back by
            the one intended factor, as in ODTK and yhenon's RetinaNet. None scales each side by its
            actual factor, which differs because sides are rounded to whole pixels.
        scale_before_nms: Whether to suppress boxes after they are scaled to the input image, as in
            MMDetection 1.x. This only makes a difference with ``inclusive_corners``, where areas depend
            on the size of a pixel.

            .. versionadded:: 0.3.0
        size_rounding: How the sizes of resized images were rounded; see
            :func:`focaldet.transforms.resize_factor`. Only used with ``resize_limits``.

            .. versionadded:: 0.3.0
        last_level_threshold: The ``score_threshold`` of the last level, in [0, 1], as in Detectron,
            where it is 0, so that there are always some detections. None uses that of the others.

            .. versionadded:: 0.3.0
        first_stride: Stride of the first level in pixels, from which the size of the batch is
            computed.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If an option is out of range, or ``clip_to`` is "last_pixel" and
            ``inclusive_corners`` is True.

    References:
        Lin et al., Focal Loss for Dense Object Detection, section 4 "Inference". arXiv:1708.02002.
        (The limit of 100 detections is COCO's, not the paper's; torchvision keeps 300.)

    >>> from focaldet.box_coder import BoxCoder
    >>> anchors = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
    >>> logits = [torch.tensor([-9.0, 2.0]).view(1, 2, 1, 1)]  # one cell, one anchor, two classes
    >>> PostProcess(BoxCoder())(logits, [torch.zeros(1, 4, 1, 1)], anchors, [(6, 9)])
    [Detections(1 in 6x9: 1 0.88)]
    """

    _graphs: GraphCache | None = None  # only in copies for inference

    def __init__(
        self,
        box_coder: BoxCoder | CornerBoxCoder,
        *,
        score_threshold: float = 0.05,
        pre_nms_top_k: int | None = 1000,
        pre_nms_top_k_of: Literal["pairs", "anchors"] = "pairs",
        pre_nms_top_k_per_class: int | None = None,
        nms_threshold: float = 0.5,
        suppression: Literal["hard", "linear", "gaussian"] = "hard",
        soft_nms_sigma: float = 0.5,
        max_detections: int | None = 100,
        class_agnostic_nms: bool = False,
        clip_to: (
            Literal["image", "batch", "image_after_nms", "original", "last_pixel"] | None
        ) = "image",
        drop_empty: bool = False,
        inclusive_corners: bool = False,
        resize_limits: tuple[int, int] | None = None,
        scale_before_nms: bool = False,
        size_rounding: SizeRounding = "floor",
        last_level_threshold: float | None = None,
        first_stride: int = 8,
    ) -> None:
        super().__init__()
        check_range("score_threshold", score_threshold, 0, 1)
        check_range("nms_threshold", nms_threshold, 0, 1)
        check_choice("suppression", suppression, _SUPPRESSION)
        check_range("soft_nms_sigma", soft_nms_sigma, 0, low_open=True)
        if last_level_threshold is not None:
            check_range("last_level_threshold", last_level_threshold, 0, 1)
        for name, count in (
            ("pre_nms_top_k", pre_nms_top_k),
            ("pre_nms_top_k_per_class", pre_nms_top_k_per_class),
            ("max_detections", max_detections),
        ):
            if count is not None:
                check_integer(name, count)
                check_range(name, count, 1)
        check_choice("pre_nms_top_k_of", pre_nms_top_k_of, ("pairs", "anchors"))
        check_choice("clip_to", clip_to, _CLIP_TO)
        if clip_to == "last_pixel" and inclusive_corners:
            raise ValueError(
                "clip_to='last_pixel' contradicts inclusive_corners=True, which already clips boxes so "
                "that they include the last pixel. Use clip_to='image'."
            )
        check_choice("size_rounding", size_rounding, SIZE_ROUNDINGS)
        check_range("first_stride", first_stride, 1)
        self.box_coder = box_coder
        self.score_threshold = score_threshold
        self.pre_nms_top_k = pre_nms_top_k
        self.pre_nms_top_k_of = pre_nms_top_k_of
        self.pre_nms_top_k_per_class = pre_nms_top_k_per_class
        self.nms_threshold = nms_threshold
        self.suppression = suppression
        self.soft_nms_sigma = soft_nms_sigma
        self.max_detections = max_detections
        self.class_agnostic_nms = class_agnostic_nms
        self.clip_to = clip_to
        self.drop_empty = drop_empty
        self.inclusive_corners = inclusive_corners
        self.resize_limits = resize_limits
        self.scale_before_nms = scale_before_nms
        self.size_rounding = size_rounding
        self.last_level_threshold = last_level_threshold
        self.first_stride = first_stride

    def forward(
        self,
        logits: Sequence[Tensor],
        box_deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
        *,
        score_threshold: float | None = None,
        class_names: tuple[str, ...] | None = None,
        labels: Sequence[int] | None = None,
        max_detections: int | None = None,
        device: torch.device | str | None = None,
    ) -> list[Detections]:
        """Return the detections of every image.

        Boxes and scores carry gradients to the maps if gradients are enabled. Which predictions are
        kept, their order, and the factors by which soft suppression lowers scores have none.

        Args:
            logits: ``[B, A * K, H, W]`` per level, contiguous or channels_last.
            box_deltas: ``[B, A * 4, H, W]`` per level.
            anchors: ``[H * W * A, 4]`` per level.
            sizes: ``(height, width)`` of each image in the batch, without padding. Boxes are clipped
                to it.
            original_sizes: ``(height, width)`` of each input image. Boxes are scaled to it after
                suppression. None does not scale them.
            score_threshold: Used instead of the module's thresholds, for all levels.
            class_names: Class names to store in the detections.
            labels: Labels to keep. The predictions of other classes are ignored from the start, so
                they count towards no limit. None keeps all.

                .. versionadded:: 0.3.0
            max_detections: Used instead of the module's limit. None uses the module's.

                .. versionadded:: 0.3.0
            device: Device of the detections. None uses that of the maps. If the maps are on a GPU,
                "cpu" costs no additional wait, unlike :meth:`focaldet.Detections.to`.

                .. versionadded:: 0.3.0

        Returns:
            One :class:`~focaldet.Detections` per image, best score first.

        Raises:
            ValueError: If ``score_threshold`` is not in [0, 1], ``labels`` contains a label that does
                not exist, ``max_detections`` is below 1, the maps and anchors of a level do not
                belong together, or there is not one size above 0 per image.
        """
        thresholds = self.level_thresholds(len(logits))
        if score_threshold is not None:
            check_range("score_threshold", score_threshold, 0, 1)
            thresholds = [score_threshold] * len(logits)
        if max_detections is None:
            max_detections = self.max_detections
        else:
            check_integer("max_detections", max_detections)
            check_range("max_detections", max_detections, 1)
        check_choice("suppression", self.suppression, _SUPPRESSION)  # it can be changed
        check_levels(logits, box_deltas, anchors)
        wanted = None if labels is None else _channels_of(labels, logits[0], anchors[0])
        _check_sizes("sizes", sizes, len(logits[0]))
        if original_sizes is not None:
            _check_sizes("original_sizes", original_sizes, len(logits[0]))
        batch = _Batch(
            logits,
            box_deltas,
            anchors,
            sizes,
            original_sizes,
            thresholds,
            wanted,
            max_detections,
            class_names,
        )
        has_candidates = len(sizes) > 0 and (wanted is None or len(wanted) > 0)
        if has_candidates and self._prefers_fixed_shape(logits[0].device):
            return self._detect_batch(batch, device or logits[0].device)
        found = [self._detect_image(batch, image) for image in range(len(sizes))]
        return found if device is None else [one.to(device) for one in found]

    def _prefers_fixed_shape(self, device: torch.device) -> bool:
        """Return whether to use the formulation for accelerators, if it supports the options."""
        return device.type != "cpu" and self._has_fixed_shape()

    def _has_fixed_shape(self) -> bool:
        by_anchor = self.pre_nms_top_k_of == "anchors" and self.pre_nms_top_k is not None
        hard = self.suppression == "hard"
        return hard and not by_anchor and self.pre_nms_top_k_per_class is None

    def _detect_image(self, batch: _Batch, image: int) -> Detections:
        """Return the detections of one image. Predictions that score too low are skipped."""
        levels = [
            self._level_candidates(*maps, image=image, threshold=threshold, wanted=batch.wanted)
            for *maps, threshold in zip(
                batch.logits, batch.box_deltas, batch.anchors, batch.thresholds, strict=True
            )
        ]
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*levels, strict=True))
        size, original = batch.sizes[image], batch.original_size(image)
        rescaling = None if batch.original_sizes is None else (size, original)
        canvas = size
        if self.clip_to == "batch":
            height, width = batch.logits[0].shape[-2:]
            canvas = (height * self.first_stride, width * self.first_stride)
        elif self.clip_to == "original":
            canvas = original
            if rescaling is not None:
                boxes = self.scale_to_original(boxes, *rescaling)
                rescaling = None
        boxes, scores, classes = self._choose(
            *(boxes, scores, classes, canvas, rescaling),
            max_detections=batch.max_detections,
            score_threshold=min(batch.thresholds),
        )
        if rescaling is not None:
            boxes = self.scale_to_original(boxes, *rescaling)
        return Detections(boxes, scores, classes, original, class_names=batch.class_names)

    def _detect_batch(self, batch: _Batch, device: torch.device | str) -> list[Detections]:
        """Return the detections of all images.

        The host waits for a GPU twice: for suppression, and for one copy of everything.
        """
        maps = batch.logits[0]
        dtype = torch.promote_types(maps.dtype, torch.float32)
        canvas = batch.sizes if self.clip_to != "original" else batch.all_original_sizes
        numbers = [
            [*size, *self._factors(batch.sizes[image], batch.original_size(image))]
            for image, size in enumerate(canvas)
        ]
        numbers_B4 = upload(torch.tensor(numbers, dtype=dtype), maps.device)
        scale = None
        if batch.original_sizes is not None:
            scale = Scaling(self._scale_batch, numbers_B4[:, 2:])
        thresholds: Sequence[float] | Tensor = batch.thresholds
        run = self._run_as_graph(is_scaled=scale is not None)
        if run is not None:
            thresholds = upload(torch.tensor(thresholds, dtype=dtype), maps.device)
        found, incomplete = fixed_shape_detections(
            self,
            batch.logits,
            batch.box_deltas,
            batch.anchors,
            numbers_B4[:, :2],
            thresholds=thresholds,
            max_detections=batch.max_detections,
            labels=batch.wanted,
            scale=scale,
            find_incomplete=True,
            run=run,
        )
        return [
            self._detect_image(batch, image).to(device) if one is None else one
            for image, one in enumerate(_to_detections(found, incomplete, batch, device))
        ]

    def _run_as_graph(self, *, is_scaled: bool) -> RunAsGraph | None:
        """Return what runs the steps before suppression as a graph, or None to run them directly."""
        coder = self.box_coder
        # The tensors that a different coder uses are not known.
        if self._graphs is None or not isinstance(coder, BoxCoder | CornerBoxCoder):
            return None
        # The options that these steps use, because a graph does not follow later changes.
        options = (
            *(
                coder,
                repr(vars(coder)),
                is_scaled,
                self.pre_nms_top_k,
                self.clip_to,
                self.drop_empty,
            ),
            *(self.inclusive_corners, self.scale_before_nms, self.first_stride),
            *(self.class_agnostic_nms, self.resize_limits is None),
        )
        return partial(self._graphs, key=("the post-processing", *options))

    def _factors(
        self, size: tuple[int, int], original_size: tuple[int, int]
    ) -> tuple[float, float]:
        """Return what the ``(y, x)`` of an image are multiplied by, or divided with ``resize_limits``."""
        if self.resize_limits is None:
            return original_size[0] / size[0], original_size[1] / size[1]
        factor = resize_factor(original_size, *self.resize_limits, rounding=self.size_rounding)
        return factor, factor

    def _scale_batch(self, boxes: Tensor, factors_BYX: Tensor) -> Tensor:
        """Scale ``[B, N, 4]`` as :meth:`scale_to_original` scales the boxes of one image."""
        factors = factors_BYX.flip(1).repeat(1, 2)[:, None]
        last_pixel = (torch.arange(4, device=boxes.device) > 1) * int(self.inclusive_corners)
        boxes = boxes - last_pixel
        return (boxes * factors if self.resize_limits is None else boxes / factors) + last_pixel

    def fixed_shape(
        self,
        logits: Sequence[Tensor],
        box_deltas: Sequence[Tensor],
        anchors: Sequence[Tensor] | AnchorsAt,
        sizes: Tensor,
        *,
        score_threshold: float | Tensor | None = None,
        labels: Tensor | None = None,
        max_detections: int | None = None,
        min_cells: Sequence[int] | None = None,
    ) -> FixedShapeDetections:
        """Return the detections of a batch in tensors whose shapes do not depend on their values.

        ``torch.export`` and ``torch.compile(fullgraph=True)`` can trace this, and only non-maximum
        suppression makes the host wait for a GPU. The module itself works like this on accelerators.
        The detections are the same except for rounding and the order of equal scores, and boxes are not
        scaled to the input images.

        Deviation:
            The module suppresses each class on its own, or offsets the classes along a line. Here a
            single suppression handles the whole batch: the boxes of each class and image are moved to
            their own cell of a nearly square grid, which keeps offsets small enough for float32. It
            takes memory that is quadratic in the number of candidates of the batch, so that in a large
            batch only the best candidates of each image take part: ``46340 // B`` of them, for 256 MiB.
            This may miss detections if the candidates overlap each other so much that fewer than
            ``max_detections`` of these are kept. The module processes such images again.

        Args:
            logits: ``[B, A * K, H, W]`` per level, contiguous or channels_last.
            box_deltas: ``[B, A * 4, H, W]`` per level.
            anchors: ``[H * W * A, 4]`` per level, or a function that computes them where they are
                needed, for sizes that are dynamic.
            sizes: ``[B, 2]``, the (height, width) of each image in the batch, without padding.
            score_threshold: Used instead of the module's thresholds, for all levels, or ``[L]`` for
                each level.
            labels: ``[K']``, int64, the labels to keep. None keeps all.
            max_detections: Number of rows per image, D. None uses the module's, or the number of
                candidates if that is None too. If there are fewer candidates, D is their number.
            min_cells: The minimum number of cells of each level if sizes are dynamic. A level that may
                have fewer values than ``pre_nms_top_k`` is padded. None assumes one cell.

        Returns:
            Boxes in pixels of the batch, scores, labels, and the number of filled rows.

        Raises:
            ValueError: If ``suppression`` is not "hard", or if ``pre_nms_top_k`` counts anchors or
                ``pre_nms_top_k_per_class`` is set, for which the number of candidates has no useful
                bound.

        .. versionadded:: 0.3.0

        >>> from focaldet.box_coder import BoxCoder
        >>> anchors = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
        >>> logits = [
        ...     torch.tensor([-9.0, 2.0]).view(1, 2, 1, 1)
        ... ]  # one cell, one anchor, two classes
        >>> found = PostProcess(BoxCoder()).fixed_shape(
        ...     logits, [torch.zeros(1, 4, 1, 1)], anchors, torch.tensor([[6, 9]])
        ... )
        >>> found.scores, found.labels, found.counts
        (tensor([[0.8808, 0.0000]]), tensor([[ 1, -1]]), tensor([1]))
        """
        if self.suppression != "hard":
            raise ValueError(
                f"fixed_shape does not support suppression={self.suppression!r}, which decides box by "
                "box. Use suppression='hard'."
            )
        if not self._has_fixed_shape():
            raise ValueError(
                "fixed_shape does not support pre_nms_top_k_of='anchors' or a pre_nms_top_k_per_class, "
                "because each anchor would be a candidate for every class. Use pre_nms_top_k_of='pairs' "
                "and pre_nms_top_k_per_class=None."
            )
        thresholds: Sequence[float] | Tensor = self.level_thresholds(len(logits))
        if isinstance(score_threshold, Tensor):
            thresholds = score_threshold.expand(len(logits))
        elif score_threshold is not None:
            check_range("score_threshold", score_threshold, 0, 1)
            thresholds = [score_threshold] * len(logits)
        return fixed_shape_detections(
            self,
            logits,
            box_deltas,
            anchors,
            sizes,
            thresholds=thresholds,
            max_detections=self.max_detections if max_detections is None else max_detections,
            labels=labels,
            min_cells=min_cells,
        )[0]

    def level_thresholds(self, num_levels: int) -> list[float]:
        """Return the score threshold of each level.

        .. versionadded:: 0.3.0

        >>> from focaldet.box_coder import BoxCoder
        >>> PostProcess(BoxCoder(), last_level_threshold=0.0).level_thresholds(3)
        [0.05, 0.05, 0.0]
        """
        check_range("score_threshold", self.score_threshold, 0, 1)
        last = self.last_level_threshold
        return [self.score_threshold] * (num_levels - 1) + [
            self.score_threshold if last is None else last
        ]

    def _choose(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        rescaling: tuple[tuple[int, int], tuple[int, int]] | None,
        *,
        max_detections: int | None,
        score_threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clip and suppress boxes, in the order that ``clip_to`` requires."""
        clip_last = self.clip_to == "image_after_nms"
        if not clip_last:
            boxes, scores, labels = self._clip(boxes, scores, labels, size)
        if self.pre_nms_top_k_per_class is not None:
            best = _best_of_each_class(scores, labels, self.pre_nms_top_k_per_class)
            boxes, scores, labels = boxes[best], scores[best], labels[best]
        compared = boxes
        if self.scale_before_nms and rescaling is not None:
            compared = self.scale_to_original(boxes, *rescaling)
        if self.suppression == "hard":
            keep = self._suppress(compared, scores, labels, max_detections)
            scores = scores[keep]
        else:
            keep, scores = self._lower(compared, scores, labels, max_detections, score_threshold)
        boxes, labels = boxes[keep], labels[keep]
        return self._clip(boxes, scores, labels, size) if clip_last else (boxes, scores, labels)

    def _clip(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.clip_to is not None:
            boxes = self._clipped(boxes, size)
        if self.drop_empty:
            some = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, scores, labels = boxes[some], scores[some], labels[some]
        return boxes, scores, labels

    def _clipped(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        last_pixel = (size[0] - 1, size[1] - 1)
        if self.inclusive_corners:
            one = boxes.new_tensor((0, 0, 1, 1))
            return clip_boxes(boxes - one, last_pixel) + one
        return clip_boxes(boxes, last_pixel if self.clip_to == "last_pixel" else size)

    def scale_to_original(
        self, boxes: Tensor, size: tuple[int, int], original_size: tuple[int, int]
    ) -> Tensor:
        """Scale boxes from a resized image to the input image.

        Args:
            boxes: ``[N, 4]``, xyxy in pixels of the resized image.
            size: ``(height, width)`` of the resized image.
            original_size: ``(height, width)`` of the input image.

        Returns:
            ``[N, 4]``, xyxy in pixels of the input image.

        .. versionadded:: 0.3.0

        >>> from focaldet.box_coder import BoxCoder
        >>> boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
        >>> PostProcess(BoxCoder()).scale_to_original(boxes, (50, 100), (100, 200))
        tensor([[20., 40., 60., 80.]])
        """
        last_pixel = boxes.new_tensor((0, 0, 1, 1)) if self.inclusive_corners else 0
        if self.resize_limits is None:
            return scale_boxes(boxes - last_pixel, size, original_size) + last_pixel
        factor = resize_factor(original_size, *self.resize_limits, rounding=self.size_rounding)
        return (boxes - last_pixel) / factor + last_pixel

    def _level_candidates(
        self,
        logits_BCHW: Tensor,
        box_deltas_BCHW: Tensor,
        anchors: Tensor,
        *,
        image: int,
        threshold: float,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels of the best predictions of one level of one image.

        Of each anchor, only the classes ``wanted`` are read, or all if it is None.
        """
        _, num_channels, height, width = logits_BCHW.shape
        num_anchors = len(anchors) // (height * width)
        num_classes = num_channels // num_anchors
        logits_CHW = logits_BCHW[image]
        if wanted is not None:
            first = torch.arange(0, num_channels, num_classes, device=wanted.device)
            logits_CHW = logits_CHW[(first[:, None] + wanted).flatten()]
            num_classes = len(wanted)
        if self.pre_nms_top_k_of == "anchors" and self.pre_nms_top_k is not None:
            scores, channel, cell = _best_anchors_of_map(
                logits_CHW, threshold, self.pre_nms_top_k, num_anchors
            )
        else:
            scores, channel, cell = _best_of_map(logits_CHW, threshold, self.pre_nms_top_k)
        anchor_idxs = cell * num_anchors + channel // num_classes
        deltas = gather_from_map(
            box_deltas_BCHW, torch.full_like(anchor_idxs, image), anchor_idxs, num_anchors
        )
        boxes = self.box_coder.decode(
            at_least_float32(deltas), at_least_float32(anchors[anchor_idxs])
        )
        labels = channel % num_classes
        return boxes, scores, labels if wanted is None else wanted[labels]

    @torch.no_grad()
    def _suppress(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, max_detections: int | None
    ) -> Tensor:
        if self.class_agnostic_nms:
            labels = torch.zeros_like(labels)
        if max_detections is None or len(boxes) <= _FEW_BOXES or boxes.device.type != "cpu":
            keep: Tensor = torchvision.ops.batched_nms(boxes, scores, labels, self.nms_threshold)
            return keep[:max_detections]
        return _best_kept(boxes, scores, labels, self.nms_threshold, max_detections)

    def _lower(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        max_detections: int | None,
        score_threshold: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the indices of the boxes that soft suppression keeps, and their lowered scores."""
        keep, lowered = soft_nms(
            boxes.detach(),
            scores.detach(),
            torch.zeros_like(labels) if self.class_agnostic_nms else labels,
            method="linear" if self.suppression == "linear" else "gaussian",
            iou_threshold=self.nms_threshold,
            sigma=self.soft_nms_sigma,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
        if scores.requires_grad:
            return keep, scores[keep] * (lowered / scores[keep].detach())
        return keep, lowered

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        soft = f", suppression={self.suppression!r}" if self.suppression != "hard" else ""
        if self.suppression == "gaussian":
            soft += f", soft_nms_sigma={self.soft_nms_sigma}"
        return (
            f"{self.box_coder}, score_threshold={self.score_threshold}, "
            f"pre_nms_top_k={self.pre_nms_top_k}, pre_nms_top_k_of={self.pre_nms_top_k_of!r}, "
            f"pre_nms_top_k_per_class={self.pre_nms_top_k_per_class}, nms_threshold={self.nms_threshold}, "
            f"max_detections={self.max_detections}, class_agnostic_nms={self.class_agnostic_nms}, "
            f"clip_to={self.clip_to!r}, drop_empty={self.drop_empty}, "
            f"inclusive_corners={self.inclusive_corners}, resize_limits={self.resize_limits}, "
            f"size_rounding={self.size_rounding!r}, last_level_threshold={self.last_level_threshold}"
            f"{', scale_before_nms=True' if self.scale_before_nms else ''}{soft}"
        )


class _Batch(NamedTuple):
    """What post-processing is called with."""

    logits: Sequence[Tensor]
    box_deltas: Sequence[Tensor]
    anchors: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]]
    original_sizes: Sequence[tuple[int, int]] | None
    thresholds: Sequence[float]
    wanted: Tensor | None
    max_detections: int | None
    class_names: tuple[str, ...] | None

    @property
    def all_original_sizes(self) -> Sequence[tuple[int, int]]:
        """The sizes that boxes are scaled to."""
        return self.sizes if self.original_sizes is None else self.original_sizes

    def original_size(self, image: int) -> tuple[int, int]:
        return self.all_original_sizes[image]


def _to_detections(
    found: FixedShapeDetections,
    incomplete: Tensor | None,
    batch: _Batch,
    device: torch.device | str,
) -> list[Detections | None]:
    """Return the detections of each image, or None if it is incomplete.

    One copy brings everything to the host, where the values are checked.
    """
    boxes, scores, labels, counts = found
    assert incomplete is not None  # noqa: S101  # it was asked for
    flags = torch.stack((counts, incomplete), dim=1).to(scores)
    rows = torch.cat((boxes, scores[..., None], labels[..., None].to(scores)), dim=2)
    host = torch.cat((flags, rows.flatten(1)), dim=1).cpu()
    numbers = host[:, 0].int().tolist()
    is_incomplete = host[:, 1].bool().tolist()
    host_rows = host[:, 2:].view(rows.shape)
    results: list[Detections | None] = []
    for image, number in enumerate(numbers):
        if is_incomplete[image]:
            results.append(None)
            continue
        here = host_rows[image, :number]
        one = Detections(
            here[:, :4],
            here[:, 4],
            here[:, 5].long(),
            batch.original_size(image),
            class_names=batch.class_names,
        )
        if torch.device(device).type != "cpu":
            one = with_tensors(
                one, boxes[image, :number], scores[image, :number], labels[image, :number]
            )
        results.append(one)
    return results


def _check_sizes(name: str, sizes: Sequence[tuple[int, int]], count: int) -> None:
    """Raise unless there is one size per image, and none of them is 0."""
    if len(sizes) != count:
        raise ValueError(
            f"{name} must have one (height, width) per image, got {len(sizes)} for {count} images."
        )
    for image, size in enumerate(sizes):
        check_size(f"{name}[{image}]", size)


def _channels_of(labels: Sequence[int], logits_BCHW: Tensor, anchors: Tensor) -> Tensor:
    """Return the sorted labels as a tensor, or raise unless all of them exist."""
    num_anchors = len(anchors) // (logits_BCHW.shape[2] * logits_BCHW.shape[3])
    num_classes = logits_BCHW.shape[1] // num_anchors
    for label in labels:
        check_integer("labels", label)
        if not 0 <= label < num_classes:
            raise ValueError(
                f"labels contains {label}, but the maps have labels 0 to {num_classes - 1}."
            )
    wanted = torch.tensor(sorted(set(labels)), dtype=torch.int64)
    return upload(wanted, logits_BCHW.device)


def _best_of_map(
    logits_CHW: Tensor, threshold: float, k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``k`` highest scores above the threshold, or fewer, with their channels and cells.

    The map is searched in memory order, so that nothing is copied.
    """
    channels, height, width = logits_CHW.shape
    last = logits_CHW.stride(0) == 1 and channels > 1  # channels_last: cell by cell
    flat = logits_CHW.permute(1, 2, 0).reshape(-1) if last else logits_CHW.reshape(-1)
    index = _indices_above(flat.detach(), _floor(threshold, flat.dtype))
    logits = at_least_float32(flat[index])
    scores = logits.sigmoid()
    sure = scores > threshold
    logits, scores, index = logits[sure], scores[sure], index[sure]
    best = logits.topk(len(logits) if k is None else min(k, len(logits))).indices
    scores, index = scores[best], index[best]
    if last:
        return scores, index % channels, index // channels
    return scores, index // (height * width), index % (height * width)


def _best_anchors_of_map(
    logits_CHW: Tensor, threshold: float, k: int, num_anchors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores above the threshold of the ``k`` anchors with the best class, as above."""
    channels, height, width = logits_CHW.shape
    num_classes = channels // num_anchors
    logits_AKHW = logits_CHW.view(num_anchors, num_classes, height, width)
    best = logits_AKHW.detach().amax(dim=1).flatten()
    index = _indices_above(best, _floor(threshold, best.dtype))
    index = index[best[index].topk(min(k, len(index))).indices]
    anchor, cell = index // (height * width), index % (height * width)
    scores_NK = at_least_float32(logits_AKHW[anchor, :, cell // width, cell % width]).sigmoid()
    row, label = (scores_NK > threshold).nonzero(as_tuple=True)
    return scores_NK[row, label], anchor[row] * num_classes + label, cell[row]


def _best_of_each_class(scores: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` highest scores of each class."""
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    sorted_labels = labels[order]
    first = torch.searchsorted(sorted_labels, sorted_labels)  # of the same class
    rank = torch.arange(len(order), device=order.device) - first
    return order[rank < count]


def _indices_above(flat: Tensor, floor: float) -> Tensor:
    """Return the indices where ``flat > floor``, in order.

    Only blocks whose maximum is above the floor are searched, if they are few.
    """
    whole = len(flat) // _BLOCK * _BLOCK
    blocks = flat[:whole].view(-1, _BLOCK)
    # Not "> floor": the maximum of a block with a NaN is NaN.
    alive = (blocks.amax(dim=1) <= floor).logical_not_().nonzero()[:, 0]
    if len(alive) * _DENSE > len(blocks):
        return (flat > floor).nonzero()[:, 0]
    block, place = (blocks[alive] > floor).nonzero(as_tuple=True)
    rest = (flat[whole:] > floor).nonzero()[:, 0] + whole
    return torch.cat((alive[block] * _BLOCK + place, rest))


def _best_kept(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, count: int
) -> Tensor:
    """Return the first ``count`` boxes that suppression within each class keeps, best score first.

    Whether a box is kept depends only on boxes with higher scores. So only the best few are
    processed at first, and more if too few of them are kept.
    """
    order = scores.argsort(descending=True, stable=True)
    num_best = 4 * count
    while True:
        best = order[:num_best]
        kept = _kept_in_each_class(boxes[best], scores[best], labels[best], iou_threshold)
        if len(kept) >= count or num_best >= len(order):
            return best[kept[:count]]
        num_best *= 4


def _kept_in_each_class(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float
) -> Tensor:
    """Return the indices of the boxes that suppression within each class keeps, in order."""
    labels, by_class = labels.sort(stable=True)
    boxes, scores = boxes[by_class], scores[by_class]
    keep = torch.zeros_like(labels, dtype=torch.bool)
    start = 0
    for size in torch.unique_consecutive(labels, return_counts=True)[1].tolist():
        here = slice(start, start + size)
        keep[start + torchvision.ops.nms(boxes[here], scores[here], iou_threshold)] = True
        start += size
    return by_class[keep].sort().values


def _floor(threshold: float, dtype: torch.dtype) -> float:
    """Return a number below every logit whose score is above the threshold."""
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    logit = math.log(threshold / (1 - threshold))
    # A comparison in half precision rounds this number too.
    return logit - max(_LOGIT_MARGIN, abs(logit) * torch.finfo(dtype).eps)


@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: Literal["linear", "gaussian"] = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of boxes that overlap higher-scoring boxes of their class.

    The box with the highest score is kept, the scores of the others in its class are multiplied by a
    factor that depends on their IoU with it, and this is repeated with the boxes that are left.
    Non-maximum suppression would remove them instead. To use it for the detections of a model, load it
    with ``suppression="gaussian"`` or "linear"; see :class:`PostProcess`.

    Args:
        boxes: ``[N, 4]``, xyxy.
        scores: ``[N]`` in [0, 1].
        labels: ``[N]``, int64.
        method: "linear" multiplies by ``1 - iou`` where the IoU is above ``iou_threshold``; "gaussian"
            multiplies by ``exp(-iou**2 / sigma)``.
        iou_threshold: In [0, 1]. Only used with "linear".
        sigma: Greater than 0. Only used with "gaussian".
        score_threshold: Keep boxes whose lowered score is above this, in [0, 1].
        max_detections: Number of boxes to keep. None keeps all.

    Returns:
        The indices of the boxes that are kept and their lowered scores, highest score first. They
        carry no gradients.

    Raises:
        TypeError: If ``max_detections`` is not an integer.
        ValueError: If an option is out of range or unknown, or shapes do not match.

    References:
        Bodla et al., Soft-NMS: Improving Object Detection With One Line of Code, equations 2 and 3.
        ICCV 2017. arXiv:1704.04503.

    .. versionadded:: 0.3.0

    >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]])  # their IoU is 0.5
    >>> scores, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    >>> soft_nms(boxes, scores, labels, method="linear")
    (tensor([0, 1]), tensor([0.9000, 0.4000]))
    """
    check_choice("method", method, ("linear", "gaussian"))
    check_range("iou_threshold", iou_threshold, 0, 1)
    check_range("sigma", sigma, 0, low_open=True)
    check_range("score_threshold", score_threshold, 0, 1)
    if max_detections is not None:
        check_integer("max_detections", max_detections)
        check_range("max_detections", max_detections, 1)
    for name, values in (("scores", scores), ("labels", labels)):
        if values.shape != boxes.shape[:1]:
            raise ValueError(
                f"{name} must have shape [{len(boxes)}], one entry per box, got "
                f"{list(values.shape)}."
            )
    left = (scores > score_threshold).nonzero()[:, 0]
    lowered = at_least_float32(scores)[left]
    kept, kept_scores = [left[:0]], [lowered[:0]]
    while len(left) and (max_detections is None or len(kept) <= max_detections):
        best = lowered.argmax()
        kept.append(left[best, None])
        kept_scores.append(lowered[best, None])
        iou = box_iou(boxes[left[best], None], boxes[left])[0].to(lowered)
        if method == "linear":
            factor = torch.where(iou > iou_threshold, 1 - iou, 1.0)
        else:
            factor = torch.exp(-(iou**2) / sigma)
        lowered = torch.where(labels[left] == labels[left[best]], lowered * factor, lowered)
        remaining = lowered > score_threshold
        remaining[best] = False
        left, lowered = left[remaining], lowered[remaining]
    return torch.cat(kept), torch.cat(kept_scores)
