"""The criterion: the losses of a batch, from head outputs, anchors and targets.

:class:`RetinaNetCriterion` takes what varies between detectors as parts: an
:class:`~focaldet.matching.Assigner`, which says what each anchor learns, and a
:class:`ClassificationLoss`. This module has three, and :class:`QualityFocalMapLoss`, which is an
:class:`IoUAwareClassificationLoss`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from focaldet._checks import check_choice, check_levels, check_number, check_range
from focaldet._deprecation import renamed_argument, warn_renamed
from focaldet.anchor_grid import grid_of
from focaldet.boxes import (
    as_xyxy,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
    paired_box_iou,
)
from focaldet.heads import flatten_maps, gather_from_map
from focaldet.losses import sigmoid_focal_loss_maps, softmax_focal_loss
from focaldet.losses._arguments import plain
from focaldet.matching import BACKGROUND, BETWEEN, matches_batches, runs_on_cpu
from focaldet.structures import pad_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import TypeIs

    from focaldet.anchor_grid import AnchorGrid
    from focaldet.box_coder import BoxCoder, CornerBoxCoder
    from focaldet.matching import Assigner
    from focaldet.structures import PaddedTargets, Target

__all__ = [
    "IGNORED",
    "ClassificationLoss",
    "CrossEntropyMapLoss",
    "FocalMapLoss",
    "IoUAwareClassificationLoss",
    "QualityFocalMapLoss",
    "RetinaNetCriterion",
    "SoftmaxFocalMapLoss",
]

IGNORED = -100
"""Class target of an anchor that is ignored by the classification loss."""

_EMA_START, _EMA_MOMENTUM = 100.0, 0.9
_BOX_IOUS = {"giou": generalized_box_iou, "diou": distance_box_iou, "ciou": complete_box_iou}


class ClassificationLoss(Protocol):
    """Classification loss of a batch, read from the maps of the head.

    Any callable with this signature will do: a function, or a module, whose parameters and buffers
    then belong to the criterion.

    .. versionadded:: 0.3.0
    """

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, *, num_classes: int, divisor: Tensor
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: ``[B, A * K, H, W]`` per level. Channel ``a * K + k`` is class k of anchor a.
            targets: ``[B, R]`` int64, the class of each anchor in 0 to K - 1, -1 for background or
                :data:`IGNORED`. Anchors are in level, row, column and anchor order.
            num_classes: Number of classes K.
            divisor: ``[B]``, the number to divide the losses of each image by before they are summed.
        """


class IoUAwareClassificationLoss(Protocol):
    """Classification loss whose targets depend on how well the predicted boxes fit.

    The criterion recognises such a loss by its attribute ``needs_ious``, which must be True, and
    computes the IoUs for it. A loss without the attribute is a :class:`ClassificationLoss`, and no
    IoUs are computed.

    .. versionadded:: 0.3.0
    """

    @property
    def needs_ious(self) -> bool:
        """Whether to pass ``ious``."""

    def __call__(
        self,
        logits: Sequence[Tensor],
        targets: Tensor,
        *,
        num_classes: int,
        divisor: Tensor,
        ious: Tensor,
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: As in :class:`ClassificationLoss`.
            targets: As in :class:`ClassificationLoss`.
            num_classes: As in :class:`ClassificationLoss`.
            divisor: As in :class:`ClassificationLoss`.
            ious: ``[B, R]`` without gradient. For each positive anchor, the IoU in [0, 1] of the box
                that it predicts, not clipped to the image, with its ground truth; otherwise 0.
        """


def needs_ious(
    loss: ClassificationLoss | IoUAwareClassificationLoss,
) -> TypeIs[IoUAwareClassificationLoss]:
    """Return whether a classification loss is to be given the IoUs of the predicted boxes."""
    return bool(getattr(loss, "needs_ious", False))


@dataclass(frozen=True)
class FocalMapLoss:
    """Sigmoid focal loss of the maps, RetinaNet's own classification loss.

    Args:
        alpha: Weight of the positives in [0, 1]; negatives have ``1 - alpha``. None weighs both 1.
        gamma: Focusing exponent, at least 0.

    Raises:
        ValueError: If an option is out of range.

    References:
        Lin et al., Focal Loss for Dense Object Detection, equation 5. arXiv:1708.02002.

    .. versionadded:: 0.3.0

    >>> targets, divisor = torch.tensor([[0]]), torch.ones(1)
    >>> FocalMapLoss()([torch.zeros(1, 1, 1, 1)], targets, num_classes=1, divisor=divisor)
    tensor(0.0433)
    """

    alpha: float | None = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _check_focal("alpha", self.alpha, "gamma", self.gamma)

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, *, num_classes: int, divisor: Tensor
    ) -> Tensor:
        """Return the loss; see :class:`ClassificationLoss`."""
        return sigmoid_focal_loss_maps(
            logits,
            targets,
            num_classes=num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction="sum",
            normalizer=divisor,
            ignore_index=IGNORED,
        )


@dataclass(frozen=True)
class CrossEntropyMapLoss:
    """Sigmoid cross entropy of the maps: every class of every anchor counts alike.

    It is the focal loss with ``gamma=0`` and ``alpha=None``, for baselines. For the alpha-balanced
    cross entropy of the paper use ``FocalMapLoss(alpha, gamma=0)``.

    References:
        Lin et al., Focal Loss for Dense Object Detection, equations 1 and 3. arXiv:1708.02002.

    .. versionadded:: 0.3.0

    >>> targets, divisor = torch.tensor([[0]]), torch.ones(1)
    >>> CrossEntropyMapLoss()([torch.zeros(1, 1, 1, 1)], targets, num_classes=1, divisor=divisor)
    tensor(0.6931)
    """

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, *, num_classes: int, divisor: Tensor
    ) -> Tensor:
        """Return the loss; see :class:`ClassificationLoss`."""
        return FocalMapLoss(None, 0.0)(logits, targets, num_classes=num_classes, divisor=divisor)


@dataclass(frozen=True)
class SoftmaxFocalMapLoss:
    """Softmax focal loss of the maps: each anchor shows one class, or background.

    The head has no background channel, so the logit of background is fixed at 0. The K logits of an
    anchor are then log-odds against background, and the softmax is over K + 1 probabilities::

        p_k = exp(x_k) / (1 + sum_j exp(x_j))    p_background = 1 / (1 + sum_j exp(x_j))

    This loses nothing, because adding a number to all K + 1 logits does not change a softmax.

    Scores: :class:`focaldet.postprocess.PostProcess` takes the sigmoid of each logit, which for this
    loss is ``p_k / (p_k + p_background)``, the probability of class k if the anchor shows class k or
    background. It is never below ``p_k``, and the scores of an anchor can add up to more than 1.
    Detections are ranked correctly within an anchor, but choose new score thresholds.

    Prior: with the usual ``prior=0.01`` of :class:`focaldet.RetinaNetHead`, an untrained anchor shows
    some object with probability K * 0.0101 / (1 + K * 0.0101), which is 0.45 for 80 classes. Use
    ``prior = 0.01 / K`` to start from about 0.01.

    It is slower than :class:`FocalMapLoss` and needs memory for several copies of the logits.

    Args:
        alpha: Weight of the classes in [0, 1]; background has ``1 - alpha``. None weighs both 1.
        gamma: Focusing exponent, at least 0.

    Raises:
        ValueError: If an option is out of range.

    References:
        Lin et al., Focal Loss for Dense Object Detection, equation 5, with the p_t of a softmax.
        arXiv:1708.02002.

    .. versionadded:: 0.3.0

    >>> targets, divisor = torch.tensor([[0]]), torch.ones(1)
    >>> loss = SoftmaxFocalMapLoss(alpha=None, gamma=0.0)
    >>> loss([torch.zeros(1, 2, 1, 1)], targets, num_classes=2, divisor=divisor)  # log(3)
    tensor(1.0986)
    """

    alpha: float | None = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _check_focal("alpha", self.alpha, "gamma", self.gamma)

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, *, num_classes: int, divisor: Tensor
    ) -> Tensor:
        """Return the loss; see :class:`ClassificationLoss`."""
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        weights = None
        if self.alpha is not None:
            weights = logits[0].new_full((num_classes + 1,), self.alpha, dtype=dtype)
            weights[num_classes] = 1 - self.alpha
        targets = targets.masked_fill(targets == BACKGROUND, num_classes)
        per_image = []
        start = 0
        for level in logits:
            B, channels, H, W = level.shape
            A = channels // num_classes
            x = F.pad(level.to(dtype).reshape(B * A, num_classes, H, W), (0, 0, 0, 0, 0, 1))
            classes = targets[:, start : start + H * W * A].view(B, H, W, A).permute(0, 3, 1, 2)
            start += H * W * A
            losses = softmax_focal_loss(
                x,
                classes.reshape(B * A, H, W),
                alpha=weights,
                gamma=self.gamma,
                reduction="none",
                ignore_index=IGNORED,
            )
            per_image.append(losses.view(B, -1).sum(dim=1))
        return (torch.stack(per_image).sum(dim=0) / divisor).sum()


@dataclass(frozen=True)
class QualityFocalMapLoss:
    """Quality focal loss of the maps: the score of a positive anchor learns the IoU of its box.

    In :class:`FocalMapLoss`, a positive anchor has target 1 for its class, however well its predicted
    box fits, so that the scores do not rank detections by their boxes. Here the target is the quality
    y, which is the IoU of the predicted box with the ground truth. With p, the sigmoid of a logit::

        QFL = |y - p|^beta * -((1 - y) log(1 - p) + y log(p))

    All other entries have y = 0: background anchors, and the other classes of a positive anchor. Their
    loss is that of ``FocalMapLoss(alpha=None, gamma=beta)``. There is no alpha. Gradients do not reach
    the boxes through the quality.

    Unlike a branch that predicts the IoU or the centreness, this needs no additional parameters: the
    network, its exports and the cost of inference stay the same. Scores estimate the IoU, so they are
    lower than those of the focal loss; choose new score thresholds.

    In addition to the memory of :class:`FocalMapLoss`, it needs that of a few numbers per anchor.

    Args:
        beta: Exponent of the difference between score and quality, at least 0.

    Raises:
        ValueError: If ``beta`` is out of range.

    References:
        Li et al., Generalized Focal Loss, equation 2. NeurIPS 2020. arXiv:2006.04388.

    .. versionadded:: 0.3.0

    >>> targets, divisor, ious = torch.tensor([[0]]), torch.ones(1), torch.tensor([[0.8]])
    >>> logits = [torch.zeros(1, 1, 1, 1)]
    >>> loss = QualityFocalMapLoss()  # 0.3**2 * log(2)
    >>> loss(logits, targets, num_classes=1, divisor=divisor, ious=ious)
    tensor(0.0624)
    """

    needs_ious: ClassVar[bool] = True
    beta: float = 2.0

    def __post_init__(self) -> None:
        _check_focal("alpha", None, "beta", self.beta)

    def __call__(
        self,
        logits: Sequence[Tensor],
        targets: Tensor,
        *,
        num_classes: int,
        divisor: Tensor,
        ious: Tensor,
    ) -> Tensor:
        """Return the loss; see :class:`IoUAwareClassificationLoss`."""
        tapped, own = _tap(logits, targets, num_classes)
        # Alpha 0 gives the entries of the positives the weight 0 and all others 1. Computing the positives
        # as background and subtracting them again would be inaccurate for large logits.
        total = sigmoid_focal_loss_maps(
            tapped,
            targets,
            num_classes=num_classes,
            alpha=0.0,
            gamma=self.beta,
            reduction="sum",
            normalizer=divisor,
            ignore_index=IGNORED,
        )
        unassigned = targets < 0
        own = own.masked_fill(unassigned, 0.0)
        losses = quality_focal(own, ious, self.beta).masked_fill(unassigned, 0.0)
        return total + (losses.sum(dim=1) / divisor).sum()


def quality_focal(logits: Tensor, ious: Tensor, beta: float) -> Tensor:
    """Return the quality focal loss of logits, of any shape, for IoUs of the same shape."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    y = ious.to(x.dtype)
    # |y - p|, without rounding p to 1. At 0, the power has an infinite slope if beta is below 1.
    gap = (y * torch.sigmoid(-x) - (1 - y) * torch.sigmoid(x)).abs()
    gap = gap.clamp(min=torch.finfo(x.dtype).tiny)
    return gap.pow(beta) * F.binary_cross_entropy_with_logits(x, y, reduction="none")


def _tap(
    logits: Sequence[Tensor], targets: Tensor, num_classes: int
) -> tuple[list[Tensor], Tensor]:
    """Return the maps, and the logit of each anchor for its class, ``[B, R]``.

    Anchors without a class have the logit of class 0, so that no shape depends on a value. A CPU would
    gain little from skipping them, because there is only one logit per anchor.
    """
    # Compilers and the transforms of torch.func need operations that they can differentiate themselves.
    ordinary = plain(targets.device.type, *logits, targets)
    tap = _Tap.apply if ordinary else _gather_classes
    maps, own = [], []
    start = 0
    for level in logits:
        B, channels, H, W = level.shape
        A = channels // num_classes
        stop = start + H * W * A
        classes = targets[:, start:stop].clamp(min=0).view(B, H, W, A).permute(0, 3, 1, 2)
        same, rows = tap(level, classes[:, :, None], num_classes)
        maps.append(same)
        own.append(rows[:, :, 0].permute(0, 2, 3, 1).flatten(1))
        start = stop
    return maps, torch.cat(own, dim=1)


def _by_class(level: Tensor, num_classes: int) -> Tensor:
    """View ``[B, A * K, H, W]`` as ``[B, A, K, H, W]``."""
    return level.view(len(level), -1, num_classes, *level.shape[2:])


def _gather_classes(level: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return a map, and one of the K logits of each anchor: ``[B, A, 1, H, W]``, like the classes."""
    return level, _by_class(level, num_classes).gather(2, classes)


class _Tap(torch.autograd.Function):
    """:func:`_gather_classes`, whose gradients are added up in the memory of the map's own gradient.

    The gradient of a gather alone is a tensor of the size of the map, nearly all of it zeros, and its
    sum with the map's other gradient is one more.
    """

    @staticmethod
    def forward(level: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        same, rows = _gather_classes(level, classes, num_classes)
        return same.view_as(same), rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
        _, classes, ctx.num_classes = inputs
        ctx.save_for_backward(classes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_map, of_rows = gradients
        [classes] = ctx.saved_tensors
        by_class = _by_class(of_map, ctx.num_classes)
        if torch.is_grad_enabled():  # the gradient is differentiated itself
            return by_class.scatter_add(2, classes, of_rows).view_as(of_map), None, None
        # The only other use of the map is the focal loss, which does not keep its gradient.
        by_class.scatter_add_(2, classes, of_rows)
        return of_map, None, None


def _check_focal(alpha_name: str, alpha: float | None, gamma_name: str, gamma: float) -> None:
    if alpha is not None:
        check_number(alpha_name, alpha)
        check_range(alpha_name, alpha, 0, 1)
    check_number(gamma_name, gamma)
    check_range(gamma_name, gamma, 0)


class RetinaNetCriterion(nn.Module):
    """Classification loss of all anchors and box loss of the positive ones.

    Args:
        assigner: Assigns anchors to ground truths, such as a :class:`~focaldet.matching.Matcher`. On a
            GPU, a :class:`~focaldet.matching.BatchAssigner` matches all images at once.
        box_coder: Encodes boxes relative to anchors.
        classification_loss: Loss of the class logits, a :class:`ClassificationLoss` or an
            :class:`IoUAwareClassificationLoss`. None uses ``FocalMapLoss(focal_alpha, focal_gamma)``.
        focal_alpha: Weight of the positives in the default focal loss, in [0, 1], or None.
        focal_gamma: Focusing exponent of the default focal loss, at least 0.
        box_loss: "smooth_l1" or "l1" of the deltas; or "giou", "diou" or "ciou": 1 minus the
            generalised, distance or complete IoU of the decoded boxes.
        smooth_l1_beta: Difference at which smooth L1 turns from a parabola into a line, above 0.
        box_loss_weight: Factor on the box loss, at least 0.
        normalizer: What both losses are divided by. "batch" is the number of positives in the batch,
            as in the paper, averaged over ranks in distributed training. "image" divides the losses
            of each image by its own number of positives and averages over images, as in torchvision.
            "ema" is an exponential average of the batch's positives, as in Detectron2; it changes in
            training mode only and is kept in ``state_dict`` and, unlike there, averaged over ranks.
            Numbers are at least 1, so an image without objects trains as background.

    On a CPU, the box loss is computed for the positive anchors alone. On other devices and in compiled
    graphs, all anchors are computed and masked, so that the host never waits for the device. The results
    are equal except for rounding.

    Deviation: the paper says "standard smooth L1" without a beta; 0.11 is from the authors' code.

    Raises:
        ValueError: If an option is out of range, or ``classification_loss`` is given together with
            ``focal_alpha`` or ``focal_gamma``.

    References:
        Lin et al., Focal Loss for Dense Object Detection, sections 3 and 4.1. arXiv:1708.02002.

    .. versionchanged:: 0.3.0
        ``matcher`` is called ``assigner``, and ``classification_loss`` was added.

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

    @renamed_argument("matcher", "assigner")
    def __init__(
        self,
        assigner: Assigner,
        box_coder: BoxCoder | CornerBoxCoder,
        *,
        classification_loss: ClassificationLoss | IoUAwareClassificationLoss | None = None,
        focal_alpha: float | None = 0.25,
        focal_gamma: float = 2.0,
        box_loss: Literal["smooth_l1", "l1", "giou", "diou", "ciou"] = "smooth_l1",
        smooth_l1_beta: float = 0.11,
        box_loss_weight: float = 1.0,
        normalizer: Literal["batch", "image", "ema"] = "batch",
    ) -> None:
        super().__init__()
        _check_focal("focal_alpha", focal_alpha, "focal_gamma", focal_gamma)
        if classification_loss is not None and (focal_alpha, focal_gamma) != (0.25, 2.0):
            raise ValueError(
                f"focal_alpha={focal_alpha} and focal_gamma={focal_gamma} are options of the default "
                "loss; set them in classification_loss instead."
            )
        check_choice("box_loss", box_loss, ("smooth_l1", "l1", *_BOX_IOUS))
        check_range("smooth_l1_beta", smooth_l1_beta, 0, low_open=True)
        check_range("box_loss_weight", box_loss_weight, 0)
        check_choice("normalizer", normalizer, ("batch", "image", "ema"))
        self.assigner = assigner
        self.box_coder = box_coder
        self.classification_loss = (
            FocalMapLoss(focal_alpha, focal_gamma)
            if classification_loss is None
            else classification_loss
        )
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
            logits: ``[B, A * K, H, W]`` per level.
            box_deltas: ``[B, A * 4, H, W]`` per level.
            anchors: ``[H * W * A, 4]`` per level.
            targets: One per image, in the pixels of the anchors; see
                :func:`focaldet.structures.check_targets`.

        Returns:
            ``classification`` and ``box_regression``, each a scalar.

        Raises:
            ValueError: If the maps and anchors of a level do not fit each other, there is not one
                target per image, or the assigner does not return one match per anchor.
        """
        check_levels(logits, box_deltas, anchors)
        if not len(targets) == len(logits[0]) > 0:
            raise ValueError(
                f"targets must have one target per image, got {len(targets)} for a batch of "
                f"{len(logits[0])}."
            )
        grid = grid_of(anchors, [(level.shape[2], level.shape[3]) for level in box_deltas])
        # A CPU skips what is empty. A GPU would have to wait to know what is.
        losses = self._losses_of_positives if runs_on_cpu(grid.anchors) else self._losses_of_all
        return losses(logits, box_deltas, grid, targets)

    def _losses_of_positives(
        self,
        logits: Sequence[Tensor],
        box_deltas: Sequence[Tensor],
        grid: AnchorGrid,
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Compute the losses with the positive anchors alone, whose number the host must know."""
        num_anchors = box_deltas[0].shape[1] // 4
        boxes_of = [as_xyxy(target["boxes"]).to(grid.anchors) for target in targets]
        labels = torch.cat([target["labels"].to(grid.anchors.device) for target in targets])
        matched_idxs_BR = torch.stack([self._match(boxes, grid) for boxes in boxes_of])
        positive_BR = matched_idxs_BR >= 0
        count = _Count(positive_BR, self.normalizer)
        images, positives = positive_BR.nonzero(as_tuple=True)
        # Boxes and labels of all images are concatenated; these are the first rows of each image.
        firsts = list(accumulate((len(boxes) for boxes in boxes_of[:-1]), initial=0))
        objects = matched_idxs_BR[images, positives] + matched_idxs_BR.new_tensor(firsts)[images]
        # BACKGROUND is -1 in the matches and in the class targets.
        class_targets_BR = matched_idxs_BR.masked_fill(matched_idxs_BR == BETWEEN, IGNORED)
        class_targets_BR[images, positives] = labels[objects]
        deltas = _gather_deltas(box_deltas, images, positives, num_anchors)
        anchors, boxes = grid.anchors[positives], torch.cat(boxes_of)[objects]
        box_losses = self._box_losses(deltas, anchors, boxes)
        ious_BR = None
        if needs_ious(self.classification_loss):
            ious_BR = torch.zeros_like(positive_BR, dtype=anchors.dtype)
            ious_BR[images, positives] = self._ious(deltas, anchors, boxes)
        divisor_B = self._divisors(count)
        classification = self._classification(
            logits, class_targets_BR, num_anchors, divisor_B, ious_BR
        )
        box_regression = (box_losses.sum(dim=1) / divisor_B[images]).sum() * self.box_loss_weight
        return {"classification": classification, "box_regression": box_regression}

    def _classification(
        self,
        logits: Sequence[Tensor],
        targets_BR: Tensor,
        num_anchors: int,
        divisor_B: Tensor,
        ious_BR: Tensor | None,
    ) -> Tensor:
        num_classes = logits[0].shape[1] // num_anchors
        options: dict[str, Any] = {"num_classes": num_classes, "divisor": divisor_B}
        if ious_BR is not None:
            options["ious"] = ious_BR
        return self.classification_loss(logits, targets_BR, **options)

    def _losses_of_all(
        self,
        logits: Sequence[Tensor],
        box_deltas: Sequence[Tensor],
        grid: AnchorGrid,
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Compute the losses with all anchors, masked, so that no shape depends on a value.

        There is no safe bound on the number of positives that would be much smaller: it depends on the
        boxes, the thresholds and the assigner.
        """
        num_anchors = box_deltas[0].shape[1] // 4
        padded = pad_targets(targets, grid.anchors)
        matched_idxs_BR = self._match_images(padded, grid)
        positive_BR = matched_idxs_BR >= 0
        count = _Count(positive_BR, self.normalizer)
        object_BR = matched_idxs_BR.clamp(min=0)
        class_targets_BR = torch.where(
            positive_BR,
            padded.labels.gather(1, object_BR),
            matched_idxs_BR.masked_fill(matched_idxs_BR == BETWEEN, IGNORED),
        )
        # Anchors without an object learn nothing from a unit box, whose losses and gradients are finite.
        positive_BR1 = positive_BR[..., None]
        unit_4 = (torch.arange(4, device=positive_BR.device) >= 2).to(grid.anchors)
        boxes_BR4 = padded.boxes.gather(1, object_BR[..., None].expand(-1, -1, 4))
        boxes_BR4 = torch.where(positive_BR1, boxes_BR4, unit_4)
        anchors_BR4 = torch.where(positive_BR1, grid.anchors, unit_4)
        deltas_BR4 = torch.where(positive_BR1, flatten_maps(box_deltas, num_anchors), 0.0)
        rows = (deltas_BR4.flatten(0, 1), anchors_BR4.flatten(0, 1), boxes_BR4.flatten(0, 1))
        box_losses = self._box_losses(*rows)
        box_losses_BR = box_losses.sum(dim=1).view_as(positive_BR)
        box_losses_B = torch.where(positive_BR, box_losses_BR, 0.0).sum(dim=1)
        ious_BR = None
        if needs_ious(self.classification_loss):
            ious_BR = self._ious(*rows).view_as(positive_BR).masked_fill(~positive_BR, 0.0)
        divisor_B = self._divisors(count)
        classification = self._classification(
            logits, class_targets_BR, num_anchors, divisor_B, ious_BR
        )
        box_regression = (box_losses_B / divisor_B).sum() * self.box_loss_weight
        return {"classification": classification, "box_regression": box_regression}

    def _match_images(self, padded: PaddedTargets, grid: AnchorGrid) -> Tensor:
        """Return the matches of all images, ``[B, R]``."""
        if not matches_batches(self.assigner):
            images = zip(padded.boxes, padded.counts, strict=True)
            return torch.stack([self._match(boxes[:count], grid) for boxes, count in images])
        matched_idxs = self.assigner.match_batch(padded.boxes, padded.valid, grid)
        self._check_matches(matched_idxs, [len(padded.counts), len(grid.anchors)])
        return matched_idxs

    def _match(self, boxes: Tensor, grid: AnchorGrid) -> Tensor:
        matched_idxs = self.assigner(boxes, grid)
        self._check_matches(matched_idxs, [len(grid.anchors)])
        return matched_idxs

    def _check_matches(self, matched_idxs: Tensor, shape: list[int]) -> None:
        if list(matched_idxs.shape) != shape:
            raise ValueError(
                f"The assigner must return one match per anchor, of shape {shape}, but "
                f"{self.assigner!r} returned shape {list(matched_idxs.shape)}."
            )

    def _divisors(self, count: _Count) -> Tensor:
        """Return the number to divide the losses of each image by, ``[B]``."""
        if self.normalizer == "image":
            return count.of_images.clamp(min=1) * len(count.of_images)
        mean = count.mean_of_ranks()
        if self.normalizer == "ema":
            if self.training:
                self.positives_average.lerp_(mean.to(self.positives_average), 1 - _EMA_MOMENTUM)
            mean = self.positives_average.float()
        return mean.clamp(min=1).expand(len(count.of_images))

    def _box_losses(self, box_deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the box loss of each positive anchor, ``[P, 4]`` or ``[P, 1]``."""
        deltas = box_deltas.to(anchors.dtype)  # geometry is float32 under autocast
        if self.box_loss in _BOX_IOUS:
            iou = _BOX_IOUS[self.box_loss](self.box_coder.decode(deltas, anchors), boxes)
            return 1 - iou[:, None]
        wanted = self.box_coder.encode(boxes, anchors)
        if self.box_loss == "l1":
            return F.l1_loss(deltas, wanted, reduction="none")
        return F.smooth_l1_loss(deltas, wanted, reduction="none", beta=self.smooth_l1_beta)

    @torch.no_grad()
    def _ious(self, box_deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the IoU of each predicted box with its ground truth, ``[P]``."""
        decoded = self.box_coder.decode(box_deltas.to(anchors.dtype), anchors)
        return paired_box_iou(decoded, boxes).clamp(max=1)  # rounding can exceed 1

    @property
    def matcher(self) -> Assigner:
        """The assigner, under its old name."""
        warn_renamed("RetinaNetCriterion.matcher", "assigner")
        return self.assigner

    @property
    def focal_alpha(self) -> float | None:
        """The alpha of the focal loss, under its old name."""
        warn_renamed("RetinaNetCriterion.focal_alpha", "classification_loss.alpha")
        return self._focal_loss().alpha

    @property
    def focal_gamma(self) -> float:
        """The gamma of the focal loss, under its old name."""
        warn_renamed("RetinaNetCriterion.focal_gamma", "classification_loss.gamma")
        return self._focal_loss().gamma

    def _focal_loss(self) -> FocalMapLoss | SoftmaxFocalMapLoss:
        loss = self.classification_loss
        if not isinstance(loss, FocalMapLoss | SoftmaxFocalMapLoss):
            raise TypeError(f"classification_loss is {loss!r}, which has no alpha and gamma.")
        return loss

    def __setattr__(self, name: str, value: Any) -> None:
        # Not by setters of the properties, which nn.Module passes by for modules.
        if name == "matcher":
            warn_renamed("RetinaNetCriterion.matcher", "assigner")
            name = "assigner"
        elif name in ("focal_alpha", "focal_gamma"):
            option = name.removeprefix("focal_")
            warn_renamed(f"RetinaNetCriterion.{name}", f"classification_loss.{option}")
            name, value = "classification_loss", replace(self._focal_loss(), **{option: value})
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return (
            f"{self.assigner}, {self.box_coder}, {self.classification_loss}, "
            f"box_loss={self.box_loss!r}, smooth_l1_beta={self.smooth_l1_beta}, "
            f"box_loss_weight={self.box_loss_weight}, normalizer={self.normalizer!r}"
        )


class _Count:
    """Numbers of positives, of each image and of the batch averaged over ranks.

    Adding them up over ranks starts here. It takes place while the box losses are computed, which do
    not depend on it.

    Args:
        positive_BR: Which anchors are positive.
        normalizer: That of the criterion.
    """

    def __init__(self, positive_BR: Tensor, normalizer: str) -> None:
        self.of_images = positive_BR.sum(dim=1).float()
        self._total = self.of_images.sum()
        self._ranks = 1
        self._work: dist.Work | None = None
        if normalizer != "image" and dist.is_available() and dist.is_initialized():
            self._work = dist.all_reduce(self._total, async_op=True)
            self._ranks = dist.get_world_size()

    def mean_of_ranks(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._total / self._ranks


def _gather_deltas(
    box_deltas: Sequence[Tensor], images: Tensor, anchors: Tensor, num_anchors: int
) -> Tensor:
    """Return the deltas of P anchors, ``[P, 4]``, by image and by index over all levels."""
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
