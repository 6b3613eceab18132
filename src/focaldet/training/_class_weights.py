"""Weights of classes in the classification loss of a run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focaldet._checks import shortened
from focaldet.criterion import (
    ClassificationLoss,
    CrossEntropyMapLoss,
    FocalMapLoss,
    IoUAwareClassificationLoss,
    QualityFocalMapLoss,
    RetinaNetCriterion,
    SoftmaxFocalMapLoss,
    needs_ious,
    quality_focal,
)
from focaldet.heads import gather_from_map
from focaldet.losses import sigmoid_focal_loss, softmax_focal_loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

__all__ = ["WeightedClassLoss", "class_weight_tensor", "weighted_classes"]

_KINDS = (FocalMapLoss, CrossEntropyMapLoss, SoftmaxFocalMapLoss, QualityFocalMapLoss)


def class_weight_tensor(weights: Mapping[str, float], class_names: Sequence[str]) -> Tensor:
    """Return one weight per class, 1 for those that are not named.

    Raises:
        ValueError: If a name is not one of the classes.
    """
    unknown = [name for name in weights if name not in class_names]
    if unknown:
        raise ValueError(
            f"class_weights names {shortened(unknown)}, but the classes of the model are "
            f"{shortened(list(class_names))}."
        )
    return torch.tensor([float(weights.get(name, 1.0)) for name in class_names])


class WeightedClassLoss:
    """A classification loss in which the positive anchors of each class have a weight.

    The loss that a positive anchor contributes for its own class is multiplied by the weight of that
    class. The loss of background, and of the anchor's other classes, is that of the loss itself, which
    is computed by its own fast kernels.

    Args:
        loss: One of focaldet's classification losses.
        weights: ``[K]``, one weight per class.

    Raises:
        TypeError: If the loss is of a different kind.

    >>> targets, divisor = torch.tensor([[0]]), torch.ones(1)
    >>> loss = WeightedClassLoss(FocalMapLoss(), torch.tensor([2.0]))
    >>> loss([torch.zeros(1, 1, 1, 1)], targets, num_classes=1, divisor=divisor)  # 2 * 0.0433
    tensor(0.0866)
    """

    def __init__(
        self, loss: ClassificationLoss | IoUAwareClassificationLoss, weights: Tensor
    ) -> None:
        if not isinstance(loss, _KINDS):
            *names, last = [kind.__name__ for kind in _KINDS]
            raise TypeError(
                f"class_weights needs a {', '.join(names)} or {last} as the classification_loss of the "
                f"model's criterion, got {type(loss).__name__}. Put the weights into your own loss "
                "instead."
            )
        self.loss = loss
        self.weights = weights

    @property
    def needs_ious(self) -> bool:
        """Whether the weighted loss reads the IoUs of the predicted boxes."""
        return needs_ious(self.loss)

    def __call__(
        self,
        logits: Sequence[Tensor],
        targets: Tensor,
        *,
        num_classes: int,
        divisor: Tensor,
        ious: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; see :class:`focaldet.criterion.IoUAwareClassificationLoss`."""
        options: dict[str, Any] = {"num_classes": num_classes, "divisor": divisor}
        if ious is not None:
            options["ious"] = ious
        total = self.loss(logits, targets, **options)
        self.weights = self.weights.to(targets.device)
        start = 0
        for level in logits:
            num_anchors = level.shape[1] // num_classes
            stop = start + level.shape[2] * level.shape[3] * num_anchors
            images, anchors = (targets[:, start:stop] >= 0).nonzero(as_tuple=True)
            labels = targets[images, start + anchors]
            rows = gather_from_map(level, images, anchors, num_anchors)
            fits = None if ious is None else ious[images, start + anchors]
            losses = self._positive_losses(rows.float(), labels, fits)
            total = total + (losses * (self.weights[labels] - 1) / divisor[images]).sum()
            start = stop
        return total

    def _positive_losses(self, logits: Tensor, labels: Tensor, ious: Tensor | None) -> Tensor:
        """Return the loss of P positive anchors for their own class, from logits ``[P, K]``."""
        if isinstance(self.loss, SoftmaxFocalMapLoss):
            logits = torch.cat([logits, logits.new_zeros(len(logits), 1)], dim=1)  # background
            losses = softmax_focal_loss(
                logits, labels, alpha=None, gamma=self.loss.gamma, reduction="none"
            )
            return losses if self.loss.alpha is None else losses * self.loss.alpha
        alpha, gamma = None, 0.0
        if isinstance(self.loss, FocalMapLoss):
            alpha, gamma = self.loss.alpha, self.loss.gamma
        own = logits.gather(1, labels[:, None])
        if isinstance(self.loss, QualityFocalMapLoss) and ious is not None:
            return quality_focal(own[:, 0], ious, self.loss.beta)
        each = sigmoid_focal_loss(
            own, torch.zeros_like(labels), alpha=alpha, gamma=gamma, reduction="none"
        )
        return each[:, 0]


@contextlib.contextmanager
def weighted_classes(criterion: nn.Module, weights: Tensor | None) -> Iterator[None]:
    """Weight the classes in a criterion for as long as the context lasts.

    The criterion is itself again afterwards, because the weights belong to the run and not to the
    model: its config would otherwise have to call it custom.

    Raises:
        TypeError: If the criterion or its classification loss is of the caller's own kind.
    """
    if weights is None:
        yield
        return
    if not isinstance(criterion, RetinaNetCriterion):
        raise TypeError(
            f"class_weights needs a RetinaNetCriterion, but the model has a {type(criterion).__name__}. "
            "Put the weights into your own criterion instead."
        )
    loss = criterion.classification_loss
    criterion.classification_loss = WeightedClassLoss(loss, weights)
    try:
        yield
    finally:
        criterion.classification_loss = loss
