"""Post-processing: from what the head said of every anchor to the objects in the image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._checks import check_range
from focaldet._torchvision import torchvision
from focaldet.boxes import clip_boxes, scale_boxes
from focaldet.detections import Detections
from focaldet.heads import gather_from_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.box_coder import BoxCoder

__all__ = ["PostProcess"]

_LOGIT_MARGIN = 1e-3  # rounding of sigmoid and logit near the threshold stays far below


class PostProcess(nn.Module):
    """Threshold, best of each level, decode, clip, non-maximum suppression, best of the image.

    It reads the head's maps as they lie and works on logits: the sigmoid is taken of the survivors
    only, and only their boxes are decoded. Suppression is computed in float32 whatever the dtype of
    the maps.

    Args:
        box_coder: decodes the deltas.
        score_threshold: scores must be greater than this, in [0, 1].
        pre_nms_top_k: how many best (anchor, class) pairs of each level go on.
        nms_threshold: of two boxes with a greater IoU the worse one goes, in [0, 1].
        max_detections: how many best detections of an image are kept.
        class_agnostic_nms: suppress across classes, too.

    Raises:
        ValueError: an option out of its range.

    References:
        Lin et al., Focal Loss for Dense Object Detection, section 4 "Inference". arXiv:1708.02002.
        (The 100 detections are COCO's limit, not the paper's; torchvision keeps 300.)

    >>> from focaldet.box_coder import BoxCoder
    >>> anchors = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
    >>> logits = [torch.tensor([-9.0, 2.0]).view(1, 2, 1, 1)]  # one cell, one anchor, two classes
    >>> PostProcess(BoxCoder())(logits, [torch.zeros(1, 4, 1, 1)], anchors, [(6, 9)])
    [Detections(1 in 6x9: 1 0.88)]
    """

    def __init__(
        self,
        box_coder: BoxCoder,
        *,
        score_threshold: float = 0.05,
        pre_nms_top_k: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        class_agnostic_nms: bool = False,
    ) -> None:
        super().__init__()
        check_range("score_threshold", score_threshold, 0, 1)
        check_range("pre_nms_top_k", pre_nms_top_k, 1)
        check_range("nms_threshold", nms_threshold, 0, 1)
        check_range("max_detections", max_detections, 1)
        self.box_coder = box_coder
        self.score_threshold = score_threshold
        self.pre_nms_top_k = pre_nms_top_k
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.class_agnostic_nms = class_agnostic_nms

    @torch.no_grad()
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
    ) -> list[Detections]:
        """Return the detections of every image.

        Args:
            logits: ``[B, A * K, H, W]`` a level, contiguous or channels_last.
            box_deltas: ``[B, A * 4, H, W]`` a level.
            anchors: ``[H * W * A, 4]`` a level.
            sizes: ``(height, width)`` of each image in the batch, to which boxes are clipped.
            original_sizes: ``(height, width)`` of each image as given; boxes are scaled to it, after
                suppression. None leaves them.
            score_threshold: instead of the module's own.
            class_names: for the detections.

        Returns:
            One :class:`~focaldet.Detections` an image, best score first.
        """
        threshold = self.score_threshold if score_threshold is None else score_threshold
        check_range("score_threshold", threshold, 0, 1)
        found = []
        for image, size in enumerate(sizes):
            levels = [
                self._level_candidates(*maps, image=image, threshold=threshold)
                for maps in zip(logits, box_deltas, anchors, strict=True)
            ]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
            boxes = clip_boxes(boxes, size)
            keep = self._suppress(boxes, scores, labels)
            boxes, original = boxes[keep], size
            if original_sizes is not None:
                original = original_sizes[image]
                boxes = scale_boxes(boxes, size, original)
            found.append(
                Detections(boxes, scores[keep], labels[keep], original, class_names=class_names)
            )
        return found

    def _level_candidates(
        self,
        logits_BCHW: Tensor,
        box_deltas_BCHW: Tensor,
        anchors: Tensor,
        *,
        image: int,
        threshold: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels of the best of one level of one image."""
        _, _, height, width = logits_BCHW.shape
        num_anchors = len(anchors) // (height * width)
        num_classes = logits_BCHW.shape[1] // num_anchors
        values, channel, cell = _best_of_map(
            logits_BCHW[image], _logit(threshold) - _LOGIT_MARGIN, self.pre_nms_top_k
        )
        scores = values.float().sigmoid()
        sure = scores > threshold
        scores, channel, cell = scores[sure], channel[sure], cell[sure]
        anchor_idxs = cell * num_anchors + channel // num_classes
        deltas = gather_from_map(
            box_deltas_BCHW, torch.full_like(anchor_idxs, image), anchor_idxs, num_anchors
        )
        boxes = self.box_coder.decode(deltas.float(), anchors[anchor_idxs].float())
        return boxes, scores, channel % num_classes

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        if self.class_agnostic_nms:
            labels = torch.zeros_like(labels)
        keep: Tensor = torchvision.ops.batched_nms(boxes, scores, labels, self.nms_threshold)
        return keep[: self.max_detections]

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return (
            f"{self.box_coder}, score_threshold={self.score_threshold}, "
            f"pre_nms_top_k={self.pre_nms_top_k}, nms_threshold={self.nms_threshold}, "
            f"max_detections={self.max_detections}, class_agnostic_nms={self.class_agnostic_nms}"
        )


def _best_of_map(values_CHW: Tensor, floor: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the at most ``k`` greatest values above ``floor``, with their channels and cells.

    The map is searched in the order in which it lies in memory, so that nothing is copied.
    """
    channels, height, width = values_CHW.shape
    last = values_CHW.stride(0) == 1 and channels > 1  # channels_last: cell by cell
    flat = values_CHW.permute(1, 2, 0).reshape(-1) if last else values_CHW.reshape(-1)
    index = (flat > floor).nonzero()[:, 0]
    values = flat[index]
    values, best = values.topk(min(k, len(values)))
    index = index[best]
    if last:
        return values, index % channels, index // channels
    return values, index // (height * width), index % (height * width)


def _logit(probability: float) -> float:
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))
