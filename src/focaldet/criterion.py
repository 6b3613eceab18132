"""The criterion: what the head said, against what it should have said."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from focaldet._checks import check_choice, check_range
from focaldet.anchor_grid import AnchorGrid
from focaldet.boxes import generalized_box_iou
from focaldet.heads import gather_from_map
from focaldet.losses import sigmoid_focal_loss_maps
from focaldet.matching import BETWEEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.box_coder import BoxCoder
    from focaldet.matching import Matcher
    from focaldet.structures import Target

__all__ = ["RetinaNetCriterion"]

_IGNORED = -100
_EMA_START, _EMA_MOMENTUM = 100.0, 0.9


class RetinaNetCriterion(nn.Module):
    """Focal loss over all anchors, box loss over the positive ones.

    Args:
        matcher: assigns anchors to ground truths.
        box_coder: encodes boxes relative to anchors.
        focal_alpha: weight of the positives in the focal loss, or None.
        focal_gamma: focusing exponent, >= 0.
        box_loss: "smooth_l1" or "l1" of the deltas, or "giou", 1 - GIoU of the decoded boxes.
        smooth_l1_beta: where smooth L1 turns from a parabola into a line, > 0.
        box_loss_weight: factor on the box loss, >= 0.
        normalizer: what both losses are divided by. "batch": the batch's positives, as in the
            paper, averaged over ranks in distributed training. "image": each image's losses by its
            own positives, then the mean over images, as in torchvision. "ema": an exponential
            average of the batch's positives, as in Detectron2, kept in ``state_dict`` (and, unlike
            there, averaged over ranks); it moves in training mode only. Counts are at least 1, so
            an image without objects is an ordinary negative.

    Deviation: the paper says "standard smooth L1" without a beta; 0.11 is that of its authors' code.

    Raises:
        ValueError: an option out of its range.

    References:
        Lin et al., Focal Loss for Dense Object Detection, sections 3 and 4.1. arXiv:1708.02002.

    >>> from focaldet.box_coder import BoxCoder
    >>> from focaldet.matching import Matcher
    >>> criterion = RetinaNetCriterion(Matcher(), BoxCoder())
    >>> anchors = [torch.tensor([[0.0, 0.0, 10.0, 10.0]])]
    >>> target = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([0])}
    >>> logits, box_deltas = [torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 4, 1, 1)]
    >>> criterion(logits, box_deltas, anchors, [target])["classification"]  # 0.25 * 0.5**2 * log(2)
    tensor(0.0433)
    """

    positives_average: Tensor

    def __init__(
        self,
        matcher: Matcher,
        box_coder: BoxCoder,
        *,
        focal_alpha: float | None = 0.25,
        focal_gamma: float = 2.0,
        box_loss: Literal["smooth_l1", "l1", "giou"] = "smooth_l1",
        smooth_l1_beta: float = 0.11,
        box_loss_weight: float = 1.0,
        normalizer: Literal["batch", "image", "ema"] = "batch",
    ) -> None:
        super().__init__()
        if focal_alpha is not None:
            check_range("focal_alpha", focal_alpha, 0, 1)
        check_range("focal_gamma", focal_gamma, 0)
        check_choice("box_loss", box_loss, ("smooth_l1", "l1", "giou"))
        check_range("smooth_l1_beta", smooth_l1_beta, 0, low_open=True)
        check_range("box_loss_weight", box_loss_weight, 0)
        check_choice("normalizer", normalizer, ("batch", "image", "ema"))
        self.matcher = matcher
        self.box_coder = box_coder
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.box_loss = box_loss
        self.smooth_l1_beta = smooth_l1_beta
        self.box_loss_weight = box_loss_weight
        self.normalizer = normalizer
        if normalizer == "ema":
            self.register_buffer("positives_average", torch.tensor(_EMA_START))

    def forward(
        self,
        logits: Sequence[Tensor],
        box_deltas: Sequence[Tensor],
        anchors: Sequence[Tensor],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            logits: ``[B, A * K, H, W]`` a level.
            box_deltas: ``[B, A * 4, H, W]`` a level.
            anchors: ``[H * W * A, 4]`` a level.
            targets: one an image, in the pixels of the anchors; see
                :func:`focaldet.structures.check_targets`.

        Returns:
            ``classification`` and ``box_regression``, each a scalar.
        """
        num_anchors = box_deltas[0].shape[1] // 4
        grid = AnchorGrid(anchors, [(level.shape[2], level.shape[3]) for level in box_deltas])
        boxes_of = [target["boxes"].to(grid.anchors) for target in targets]
        labels = torch.cat([target["labels"].to(grid.anchors.device) for target in targets])
        matched_idxs_BR = torch.stack([self.matcher(boxes, grid) for boxes in boxes_of])
        positive_BR = matched_idxs_BR >= 0
        divisor_B = self._divisors(positive_BR.sum(dim=1))
        images, positives = positive_BR.nonzero(as_tuple=True)
        # Boxes and labels of all images in a row: where the first of each image stands.
        firsts = list(accumulate((len(boxes) for boxes in boxes_of[:-1]), initial=0))
        objects = matched_idxs_BR[images, positives] + matched_idxs_BR.new_tensor(firsts)[images]
        # BACKGROUND is the loss's -1 already.
        class_targets_BR = matched_idxs_BR.masked_fill(matched_idxs_BR == BETWEEN, _IGNORED)
        class_targets_BR[images, positives] = labels[objects]
        classification = sigmoid_focal_loss_maps(
            logits,
            class_targets_BR,
            num_classes=logits[0].shape[1] // num_anchors,
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
            reduction="sum",
            normalizer=divisor_B,
            ignore_index=_IGNORED,
        )
        deltas = _gather_deltas(box_deltas, images, positives, num_anchors)
        box_losses = self._box_losses(deltas, grid.anchors[positives], torch.cat(boxes_of)[objects])
        box_regression = (box_losses.sum(dim=1) / divisor_B[images]).sum() * self.box_loss_weight
        return {"classification": classification, "box_regression": box_regression}

    def _divisors(self, positives_B: Tensor) -> Tensor:
        """Return what the losses of each image are divided by."""
        counts = positives_B.float()
        if self.normalizer == "image":
            return counts.clamp(min=1) * len(counts)
        count = counts.sum()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        if self.normalizer == "ema":
            if self.training:
                self.positives_average.lerp_(count.to(self.positives_average), 1 - _EMA_MOMENTUM)
            count = self.positives_average.float()
        return count.clamp(min=1).expand(len(counts))

    def _box_losses(self, box_deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the box loss of every positive, ``[P, 4]`` or ``[P, 1]``."""
        deltas = box_deltas.to(anchors.dtype)  # geometry stays float32 under autocast
        if self.box_loss == "giou":
            return 1 - generalized_box_iou(self.box_coder.decode(deltas, anchors), boxes)[:, None]
        wanted = self.box_coder.encode(boxes, anchors)
        if self.box_loss == "l1":
            return F.l1_loss(deltas, wanted, reduction="none")
        return F.smooth_l1_loss(deltas, wanted, reduction="none", beta=self.smooth_l1_beta)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return (
            f"{self.matcher}, {self.box_coder}, focal_alpha={self.focal_alpha}, "
            f"focal_gamma={self.focal_gamma}, box_loss={self.box_loss!r}, "
            f"smooth_l1_beta={self.smooth_l1_beta}, box_loss_weight={self.box_loss_weight}, "
            f"normalizer={self.normalizer!r}"
        )


def _gather_deltas(
    box_deltas: Sequence[Tensor], images: Tensor, anchors: Tensor, num_anchors: int
) -> Tensor:
    """Pick ``[P, 4]`` deltas, by image and by anchor counted over all levels."""
    picked = []
    order = []
    start = 0
    for level in box_deltas:
        count = level.shape[2] * level.shape[3] * num_anchors
        here = ((anchors >= start) & (anchors < start + count)).nonzero()[:, 0]
        picked.append(gather_from_map(level, images[here], anchors[here] - start, num_anchors))
        order.append(here)
        start += count
    return torch.cat(picked)[torch.cat(order).argsort()]
