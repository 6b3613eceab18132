"""The sigmoid focal loss: every class an independent yes or no."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._checks import must_be
from focaldet.losses import _arguments as arguments
from focaldet.losses import _cuda
from focaldet.losses._arguments import Options
from focaldet.losses._autograd import EntryLosses, TotalLoss, TotalLossInPlace
from focaldet.losses._cpu_dense import FEW, DenseLoss
from focaldet.losses._cpu_sparse import SparseLoss
from focaldet.losses._formula import alpha_for, sigmoid_focal_entries, soft_focal
from focaldet.losses._layout import Special, find_special
from focaldet.losses._reduction import count_positives, divisor, reduce

if TYPE_CHECKING:
    from collections.abc import Callable

    from focaldet.losses._arguments import Normalizer, Reduction

    Formula = Callable[[Tensor], Tensor]


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    ignore_index: int = -100,
    inplace_gradient: bool = False,
) -> Tensor:
    """Focal loss of independent classes, ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    ``p_t`` is the probability that the logit gives to what is true of its class: ``sigmoid(x)``
    where the class is the target, ``1 - sigmoid(x)`` everywhere else. The paper's setting is
    ``reduction="sum", normalizer="num_pos"``.

    Convention: ``alpha`` weighs the positive side and ``1 - alpha`` the background. With the
    default of 0.25 a positive counts a third of what a background entry of the same error counts:
    at logit 0 the two losses are 0.0433 and 0.1300.

    Args:
        logits: ``[N, K]`` or ``[N, K, d1, ...]`` (or ``[K]``): floating-point, K classes.
        targets: Class indices ``[N]`` or ``[N, d1, ...]`` (or ``[]``) in [0, K), as in
            `torch.nn.CrossEntropyLoss`; -1 says "none of the classes" (background) and
            ``ignore_index`` "takes no part". Or floats in [0, 1] of the logits' shape, of any
            number of axes: 0 and 1 for several classes at once, values between for soft targets,
            which interpolate ``p_t`` and ``alpha_t`` linearly and multiply the cross-entropy of
            the soft target. torchvision, fvcore and mmdet read them alike; MONAI, kornia and
            segmentation_models_pytorch do not.
        alpha: Weight of the positives in [0, 1]; ``None`` weighs both sides with 1; a tensor of K
            numbers gives each class its own ``alpha``, and its background ``1 - alpha``.
        gamma: Focusing parameter, >= 0. 0 gives the (weighted) binary cross-entropy.
        reduction: "mean" over the entries that take part (0 if there are none), "sum", or "none".
        normalizer: Divides the losses: a number or a tensor of one element, > 0; "num_pos" for the
            number of positives, at least 1 (for floating-point targets their sum); or
            "num_pos_all_ranks" for the mean number of positives of the ranks of
            `torch.distributed`, so that gradients averaged over ranks are those of the whole batch.
        ignore_index: The index of places that take no part; their logits may be anything, NaN too.
            If it is -1 or a class, places with that index are ignored.
        inplace_gradient: Let the gradient overwrite the logits, which saves its memory. They must
            not be needed by anything else, nor be a leaf, and there is one backward only. Where
            the kernels for a CPU do not apply (see Notes), or nothing is differentiated, the option
            changes nothing.

    Returns:
        The loss: a scalar (float32 for half-precision logits), or of the logits' shape and type
        for reduction "none".

    Raises:
        TypeError: If the logits are no floating-point tensor, or the targets neither that nor
            indices.
        ValueError: If an option or a target is out of its range or shapes don't fit. Values of
            tensors are looked at on a CPU outside `torch.compile` and `torch.func`; elsewhere that
            would cost a synchronisation.

    Notes:
        Plain CPU tensors of float32, bfloat16 and float16 have their gradient made together with
        the loss, in pieces that stay in cache. The same on a CUDA device, where Triton is
        installed, go through its kernels if they are contiguous rows ``[N, K]`` with class indices,
        alpha is no tensor and the reduction is not "none". float64, `torch.compile`, `torch.func`, forward-mode
        differentiation, a second derivative, everything else on other devices and differentiable
        targets or options take the same formula in operations of PyTorch. None of them gives NaN
        for gamma in (0, 1).

    Examples:
        >>> logits = torch.tensor([[0.0, -4.0], [-3.0, -5.0], [9.0, 9.0]])
        >>> targets = torch.tensor([0, -1, -100])  # class 0, background, ignored
        >>> loss = sigmoid_focal_loss(logits, targets, reduction="sum", normalizer="num_pos")
        >>> round(loss.item(), 5)
        0.04341

    References:
        Lin, Goyal, Girshick, He, Dollár. Focal Loss for Dense Object Detection. ICCV 2017,
        equation 5 and appendix B. arXiv:1708.02002. The paper's normaliser is "num_pos".
    """
    options = Options(alpha, gamma, reduction, normalizer, ignore_index).check()
    arguments.check_one_number(normalizer)
    arguments.check_logits("logits", logits)
    arguments.check_targets(logits, targets)
    arguments.check_alpha_size(alpha, arguments.count_classes(logits))
    inplace = inplace_gradient and logits.requires_grad and torch.is_grad_enabled()
    if inplace:
        _check_overwritable(logits, reduction)
    if _cuda.applies(logits, targets, options):
        return _cuda.rows_loss(logits, targets, options)
    if not kernels_apply(logits, targets, alpha, normalizer):
        return _formula(logits, targets, options)
    shape = logits.shape
    if logits.ndim < 2:  # [K] with an index, or any floats: a batch of one row
        soft = targets.is_floating_point()
        logits, targets = logits.reshape(1, -1), targets.reshape(1, -1) if soft else targets.view(1)

    def formula(x: Tensor) -> Tensor:
        return _formula(x, targets, options)

    kernel = _kernel(logits, targets, options, formula)
    if reduction == "none":
        return EntryLosses.apply(kernel, targets, logits).view(shape)  # type: ignore[no-any-return]
    function = TotalLossInPlace if inplace else TotalLoss
    return function.apply(kernel, targets, logits)  # type: ignore[no-any-return]


def kernels_apply(
    logits: Tensor, targets: Tensor, alpha: Tensor | float | None, normalizer: Normalizer
) -> bool:
    """Whether the CPU kernels can take these: plain tensors, only the logits differentiated."""
    others = [targets]
    if isinstance(alpha, Tensor):
        others.append(alpha)
    if isinstance(normalizer, Tensor):
        others.append(normalizer)
    return (
        arguments.plain_cpu(logits, *others)
        and logits.numel() > 0
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits.layout == torch.strided
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in others))
        and torch.autograd.forward_ad._current_level < 0  # noqa: SLF001 (nothing public tells)
    )


def _check_overwritable(logits: Tensor, reduction: str) -> None:
    """Raise unless the gradient can take the place of the logits."""
    if reduction == "none":
        remedy = "The losses one by one leave nothing to overwrite with."
        condition = "'mean' or 'sum' with inplace_gradient"
        raise ValueError(must_be("reduction", condition, repr(reduction), remedy))
    base = logits._base  # noqa: SLF001 (nothing public tells)
    base = logits if base is None else base
    if base.is_leaf:
        remedy = "Its values would be lost: leave inplace_gradient off."
        raise ValueError(
            must_be("logits", "computed from other tensors with inplace_gradient", "a leaf", remedy)
        )
    if not (logits.is_contiguous() or logits.movedim(1, -1).is_contiguous()):
        condition = "contiguous or channels_last with inplace_gradient"
        raise ValueError(must_be("logits", condition, f"strides {list(logits.stride())}"))


def _kernel(
    logits: Tensor, targets: Tensor, options: Options, formula: Formula
) -> DenseLoss | SparseLoss:
    """Choose the kernel that suits the targets, and tell it what they are."""
    alpha, gamma, reduction, normalizer, ignore_index = options
    special: Special | None = None
    mask: Tensor | None = None
    entries = logits.numel()
    if not targets.is_floating_point():
        K = logits.shape[1]
        if entries > FEW:
            special = find_special(targets.reshape(-1), K, ignore_index)
            entries -= len(special.ignored) * K
        if special is None or len(special.positive) * 40 > entries:
            # Where calls or positives are what costs, all entries are treated alike.
            special = None
            targets, mask = arguments.set_apart_ignored(targets, K, ignore_index)
            entries = logits.numel() - (0 if mask is None else int(mask.sum()) * K)

    def positives() -> Tensor:
        if special is None:
            return count_positives(targets)
        return torch.tensor(len(special.positive), device="cpu")

    scale = 1.0
    if normalizer is not None:
        scale /= float(divisor(normalizer, positives))
    if reduction == "mean":
        scale /= max(entries, 1)
    if special is not None:
        return SparseLoss([special], alpha, gamma, [scale], lambda xs: formula(xs[0]))
    return DenseLoss(targets, mask, alpha, gamma, scale, lambda xs: formula(xs[0]))


def _formula(logits: Tensor, targets: Tensor, options: Options) -> Tensor:
    """The loss by operations that autograd, functorch and compilers know."""
    alpha, gamma, reduction, normalizer, ignore_index = options
    dim, K = arguments.class_axis(logits), arguments.count_classes(logits)
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    alpha = arguments.align_alpha(alpha, x)
    count: Tensor | int = x.numel()
    if targets.is_floating_point():
        t = targets.to(x.dtype)
        losses = soft_focal(x, t, gamma)
        if alpha is not None:
            losses = losses * alpha_for(t, alpha)
    else:
        arguments.check_indices(targets, K, ignore_index)
        losses = sigmoid_focal_entries(
            x, targets, alpha=alpha, gamma=gamma, ignore_index=ignore_index, dim=dim
        )
        count = (targets != ignore_index).sum() * K
    if normalizer is not None:
        losses = losses / divisor(normalizer, lambda: count_positives(targets, ignore_index))
    return reduce(losses, reduction, count, logits.dtype)


class FocalLoss(nn.Module):
    """`sigmoid_focal_loss` as a module, with the same names, order and defaults.

    A tensor ``alpha`` or ``normalizer`` moves with the module but is not part of its state.

    Args:
        alpha: Weight of the positives in [0, 1], None for none, or a tensor ``[K]``.
        gamma: Focusing parameter, >= 0.
        reduction: "none", "mean" or "sum".
        normalizer: A number or tensor > 0, "num_pos", "num_pos_all_ranks" or None.
        ignore_index: The index of places that take no part.
        inplace_gradient: Let the gradient overwrite the logits.

    Raises:
        ValueError: If an option is out of its range.

    Examples:
        >>> FocalLoss(reduction="sum", normalizer="num_pos")(
        ...     torch.zeros(2, 3), torch.tensor([1, -1])
        ... )
        tensor(0.6931)

    References:
        Lin et al. Focal Loss for Dense Object Detection. ICCV 2017. arXiv:1708.02002.
    """

    alpha: Tensor | float | None
    normalizer: Normalizer

    def __init__(
        self,
        alpha: Tensor | float | None = 0.25,
        gamma: float = 2.0,
        *,
        reduction: Reduction = "mean",
        normalizer: Normalizer = None,
        ignore_index: int = -100,
        inplace_gradient: bool = False,
    ) -> None:
        super().__init__()
        Options(alpha, gamma, reduction, normalizer, ignore_index).check()
        arguments.check_one_number(normalizer)
        arguments.set_option(self, "alpha", alpha)
        arguments.set_option(self, "normalizer", normalizer)
        self.gamma = gamma
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.inplace_gradient = inplace_gradient

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of ``logits`` against ``targets``; see `sigmoid_focal_loss`."""
        return sigmoid_focal_loss(
            logits,
            targets,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction,
            normalizer=self.normalizer,
            ignore_index=self.ignore_index,
            inplace_gradient=self.inplace_gradient,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}, "
            f"normalizer={self.normalizer!r}, ignore_index={self.ignore_index}, "
            f"inplace_gradient={self.inplace_gradient}"
        )
