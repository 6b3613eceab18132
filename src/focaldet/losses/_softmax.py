"""The softmax focal loss: exactly one of K classes is true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._checks import check_number, check_range
from focaldet.losses import _arguments as arguments
from focaldet.losses._formula import focal, one_hot_mask
from focaldet.losses._reduction import reduce

if TYPE_CHECKING:
    from focaldet.losses._arguments import Reduction


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | float | None = None,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the focal loss of mutually exclusive classes, from the softmax of the logits.

    The loss is ``-alpha_t (1 - p_t)^gamma log(p_t)``, where ``p_t`` is the probability of the true
    class. With gamma 0 and alpha None, it equals `torch.nn.functional.cross_entropy` for every
    reduction, also with label smoothing.

    Convention: there is no background, so ``alpha`` weights classes, like the weights of
    `torch.nn.CrossEntropyLoss`. The mean, however, divides by the number of places instead of the
    sum of their weights. MONAI and kornia give class 0 the weight ``1 - alpha`` and all others
    ``alpha``; pass ``torch.tensor([1 - alpha] + [alpha] * (K - 1))`` for the same.

    Args:
        logits: Floating-point logits of K classes, ``[N, K]``, ``[N, K, d1, ...]`` or ``[K]``.
        targets: Class indices ``[N]``, ``[N, d1, ...]`` or ``[]`` in [0, K), or ``ignore_index``;
            there is no index for background. Alternatively, class probabilities in the shape of
            ``logits``: the loss is then the sum over classes, weighted by their probabilities.
        alpha: A number, or K class weights >= 0. None disables weighting.
        gamma: Focusing parameter, >= 0.
        reduction: "mean" over the places that are not ignored (0 if there are none), "sum" or
            "none".
        normalizer: Divisor of the losses, > 0: a number or a tensor with one element.
        ignore_index: Index of places to ignore, whose logits may have any values, including NaN.
        label_smoothing: Fraction of each target to spread evenly over the K classes, in [0, 1].

    Returns:
        The loss as a scalar, which is float32 for half-precision logits. For reduction "none", the
        losses in the shape of class indices and the dtype of the logits.

    Raises:
        TypeError: If an argument has an unsupported type or dtype.
        ValueError: If an option or a target is out of range, or if shapes do not match.

    Examples:
        >>> logits, targets = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
        >>> loss = softmax_focal_loss(logits, targets, reduction="none")
        >>> [round(x, 4) for x in loss.tolist()]  # easy, hard
        [0.0109, 0.9635]

    References:
        Lin et al. Focal Loss for Dense Object Detection. ICCV 2017, equation 5, with p_t from
        a softmax (the paper uses a sigmoid). arXiv:1708.02002.
    """
    _check_options(
        alpha, gamma, reduction, normalizer, ignore_index, label_smoothing=label_smoothing
    )
    arguments.check_logits("logits", logits)
    arguments.check_targets(logits, targets)
    K, dim = arguments.count_classes(logits), arguments.class_axis(logits)
    arguments.check_alpha_size(alpha, K)
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    soft = targets.is_floating_point()
    count: Tensor | int = x.numel() // max(K, 1)
    ignored = None
    if not soft:
        arguments.check_indices(targets, K, ignore_index, background=False)
        ignored = targets == ignore_index
        count = (~ignored).sum()
        x = x.masked_fill(ignored.unsqueeze(dim), 0.0)
        targets = targets.masked_fill(ignored, 0)
    t = targets.to(x.dtype) if soft else one_hot_mask(targets, K, dim).to(x.dtype)
    if label_smoothing:
        t = t * (1 - label_smoothing) + label_smoothing / K
    if alpha is not None:
        t = t * arguments.align_alpha(alpha, x)  # type: ignore[operator]
    if soft or label_smoothing:
        losses = focal(_odds_against_each(x, dim).masked_fill(t == 0, 0.0), gamma)
        losses = (losses * t).sum(dim)
    else:
        losses = focal(_odds_against(x, one_hot_mask(targets, K, dim), dim), gamma) * t.sum(dim)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    if normalizer is not None:
        losses = losses / normalizer
    return reduce(losses, reduction, count, logits.dtype)


def _odds_against(x: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Compute ``log((1 - p) / p)`` of the chosen class, reducing axis ``dim``.

    It is the log-sum-exp of the other classes minus the logit of this one, which is accurate even
    if p is close to 1. The softmax focal loss is `focal` of it.
    """
    others = x.masked_fill(chosen, -torch.inf)
    # If all others are at -inf, or there are none, p is 1 and the gradient is 0.
    alone = (others == -torch.inf).all(dim, keepdim=True)
    others = others.masked_fill(alone, 0.0).logsumexp(dim)
    own = x.masked_fill(~chosen, 0.0).sum(dim)
    return (others - own).masked_fill(alone.squeeze(dim), -torch.inf)


def _odds_against_each(x: Tensor, dim: int) -> Tensor:
    """Compute ``log((1 - p) / p)`` of every class."""
    top = one_hot_mask(x.argmax(dim), x.shape[dim], dim)
    of_top = _odds_against(x, top, dim).unsqueeze(dim)
    log_p = x.log_softmax(dim)
    p = log_p.exp().masked_fill(top, 0.0)  # of the other classes, so at most 1/2
    return torch.where(top, of_top, torch.log1p(-p) - log_p.masked_fill(top, 0.0))


def _check_options(
    alpha: Tensor | float | None,
    gamma: float,
    reduction: Reduction,
    normalizer: Tensor | float | None,
    ignore_index: int,
    *,
    label_smoothing: float,
) -> None:
    """Raise if an option is invalid."""
    arguments.check_class_weights(alpha)
    arguments.check_gamma(gamma)
    arguments.check_own_normalizer(normalizer)
    arguments.check_reduction(reduction, normalizer)
    arguments.check_whole_number("ignore_index", ignore_index)
    check_number("label_smoothing", label_smoothing)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)


class SoftmaxFocalLoss(nn.Module):
    """Module form of `softmax_focal_loss`, with the same arguments and defaults.

    A tensor ``alpha`` or ``normalizer`` moves with the module but is not in its state dict.

    Args:
        alpha: A number, or K class weights >= 0. None disables weighting.
        gamma: Focusing parameter, >= 0.
        reduction: "none", "mean" or "sum".
        normalizer: Divisor of the losses, > 0: a number or a tensor with one element.
        ignore_index: Index of places to ignore.
        label_smoothing: Fraction of each target to spread evenly over the classes, in [0, 1].

    Raises:
        TypeError: If an option has an unsupported type.
        ValueError: If an option is out of range.

    Examples:
        >>> SoftmaxFocalLoss(gamma=0.0)(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)

    References:
        Lin et al. Focal Loss for Dense Object Detection. ICCV 2017. arXiv:1708.02002.
    """

    alpha: Tensor | float | None
    normalizer: Tensor | float | None

    def __init__(
        self,
        alpha: Tensor | float | None = None,
        gamma: float = 2.0,
        *,
        reduction: Reduction = "mean",
        normalizer: Tensor | float | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_options(
            alpha, gamma, reduction, normalizer, ignore_index, label_smoothing=label_smoothing
        )
        arguments.set_option(self, "alpha", alpha)
        arguments.set_option(self, "normalizer", normalizer)
        self.gamma = gamma
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of ``logits`` against ``targets``; see `softmax_focal_loss`."""
        return softmax_focal_loss(
            logits,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction,
            normalizer=self.normalizer,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}, "
            f"normalizer={self.normalizer!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
