"""The sigmoid focal loss: any number of K independent classes is true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet.losses import _arguments as arguments
from focaldet.losses import _cuda
from focaldet.losses._arguments import KernelOptions, Options
from focaldet.losses._autograd import EntryLosses, TotalLoss, TotalLossInPlace
from focaldet.losses._cpu_dense import FEW, DenseLoss
from focaldet.losses._cpu_sparse import SparseLoss
from focaldet.losses._formula import alpha_for, sigmoid_focal_entries, soft_focal
from focaldet.losses._layout import Special, dense, find_keys, find_special, level_of
from focaldet.losses._pieces import EntryPieces
from focaldet.losses._reduction import count_positives, divisor, reduce

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.losses._arguments import Normalizer, Reduction

    Formula = Callable[[Tensor], Tensor]

SPARSE = 40
"""Entries per positive from which the sparse kernel is faster than the dense one."""


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
    """Compute the focal loss of independent classes, ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    ``p_t`` is the probability of the true label: ``sigmoid(x)`` where the class is the target and
    ``1 - sigmoid(x)`` elsewhere. The paper uses ``reduction="sum", normalizer="num_pos"``.

    Convention: ``alpha`` weights positives and ``1 - alpha`` weights background. With the default
    of 0.25, a positive has a third of the loss of a background entry with the same error: at logit
    0, the losses are 0.0433 and 0.1300.

    Args:
        logits: Floating-point logits of K classes, ``[N, K]``, ``[N, K, d1, ...]`` or ``[K]``.
        targets: Class indices ``[N]``, ``[N, d1, ...]`` or ``[]`` in [0, K), as in
            `torch.nn.CrossEntropyLoss`; -1 is background (none of the classes) and
            ``ignore_index`` is ignored. Alternatively, floats in [0, 1] in the shape of ``logits``,
            with any number of axes: 0 and 1 for multi-label targets, or values between them for
            soft targets. A soft target multiplies its cross-entropy by ``alpha_t`` and
            ``(1 - p_t)^gamma``, in which ``alpha_t`` and ``p_t`` are interpolated linearly. This
            agrees with torchvision, fvcore and mmdet, but not with MONAI, kornia and
            segmentation_models_pytorch.
        alpha: Weight of positives in [0, 1]. A tensor of K numbers gives each class its own
            ``alpha`` and its background ``1 - alpha``. None weights both with 1.
        gamma: Focusing parameter, >= 0. 0 gives the (weighted) binary cross-entropy.
        reduction: "mean" over the entries that are not ignored (0 if there are none), "sum" or
            "none".
        normalizer: Divisor of the losses: a number or a tensor with one element, > 0; "num_pos" for
            the number of positives (for floating-point targets, their sum), but at least 1; or
            "num_pos_all_ranks" for the mean number of positives over the ranks of
            `torch.distributed`, so that gradients averaged over ranks are those of the whole batch.
        ignore_index: Index of places to ignore, whose logits may have any values, including NaN. It
            may be -1 or a class.
        inplace_gradient: Whether the gradient overwrites the logits, which saves its memory. They
            must not be a leaf or be needed elsewhere, and only one backward pass is possible. The
            option has no effect if the CPU kernels do not apply (see Notes) or if nothing is
            differentiated.

    Returns:
        The loss as a scalar, which is float32 for half-precision logits. For reduction "none", the
        losses in the shape and dtype of the logits.

    Raises:
        TypeError: If an argument has an unsupported type or dtype.
        ValueError: If an option or a target is out of range, or if shapes do not match. Values of
            tensors are checked on CPUs only, outside `torch.compile` and `torch.func`; elsewhere
            checking would cost a synchronisation.

    Notes:
        For plain float32, bfloat16 and float16 tensors on a CPU, kernels compute the gradient
        together with the loss, in pieces that fit in the cache. On CUDA devices, Triton kernels are
        used for logits ``[N, K, ...]`` of these dtypes with class indices, if Triton is installed
        and the reduction is not "none". Otherwise, PyTorch operations compute one piece of the
        logits at a time. Both read contiguous and channels_last logits as they are stored, copy
        others to contiguous ones, save nothing else for the backward pass, and recompute there.
        Everything else uses the same formula with PyTorch operations: float64, `torch.compile`,
        `torch.func`, forward-mode differentiation, second derivatives, differentiable targets or
        options, and other devices. None of these returns NaN gradients for gamma in (0, 1).

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
    if _cuda.applies([logits], targets, options, arguments.count_classes(logits)):
        return _on_cuda(logits, targets, options)
    if _cuda.applies_to_entries(logits, targets, options):
        return _in_pieces(logits, targets, options)
    if not kernels_apply(logits, targets, alpha, normalizer):
        return _formula(logits, targets, options)
    shape = logits.shape
    if logits.ndim < 2:  # one row [K] with an index, or any floating-point targets
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
    """Return whether the CPU kernels apply: to plain tensors, differentiating only the logits."""
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
        and torch.autograd.forward_ad._current_level < 0  # noqa: SLF001 (no public equivalent)
    )


def _check_overwritable(logits: Tensor, reduction: str) -> None:
    """Raise unless the gradient can overwrite the logits."""
    if reduction == "none":
        raise ValueError("inplace_gradient=True requires reduction='mean' or 'sum', got 'none'.")
    base = logits._base  # noqa: SLF001 (no public equivalent)
    base = logits if base is None else base
    if base.is_leaf:
        raise ValueError(
            "inplace_gradient=True would overwrite logits, which is a leaf tensor (or a view of "
            "one). Use it with computed logits only."
        )
    if not (logits.is_contiguous() or logits.movedim(1, -1).is_contiguous()):
        raise ValueError(
            "inplace_gradient=True requires contiguous or channels_last logits, got strides "
            f"{list(logits.stride())} for shape {list(logits.shape)}. Call .contiguous() first."
        )


def _kernel(
    logits: Tensor, targets: Tensor, options: Options, formula: Formula
) -> DenseLoss | SparseLoss:
    """Create the kernel that suits the targets."""
    alpha, gamma, reduction, normalizer, ignore_index = options
    special: Special | None = None
    mask: Tensor | None = None
    entries = logits.numel()
    if not targets.is_floating_point():
        K = logits.shape[1]
        if entries > FEW:
            flat = targets.reshape(-1)
            keys = find_keys(flat, ignore_index)
            # Counting is cheap. With many positives it saves listing them in vain.
            if (
                len(keys) * SPARSE <= entries
                or count_positives(flat, ignore_index) * SPARSE <= entries
            ):
                special = find_special(flat, K, ignore_index, keys)
                entries -= len(special.ignored) * K
        if special is None or len(special.positive) * SPARSE > entries:
            # The sparse kernel does not pay off for few entries or many positives.
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


def _on_cuda(logits: Tensor, targets: Tensor, options: Options) -> Tensor:
    """Compute the reduced loss for class indices where `_cuda.applies`."""
    logits = dense(logits)
    level = level_of(logits)

    def image_totals(tensors: Sequence[Tensor]) -> Tensor:
        x = tensors[0].float()
        losses = sigmoid_focal_entries(
            x,
            targets,
            alpha=arguments.align_alpha(options.alpha, x),
            gamma=options.gamma,
            ignore_index=options.ignore_index,
            dim=1,
        )
        return losses.flatten(1).sum(1) if level.planes else losses.sum().view(1)

    return _cuda.reduced_loss(
        [logits], [level], targets.reshape(level.images, -1), options, image_totals
    )


def _in_pieces(logits: Tensor, targets: Tensor, options: Options) -> Tensor:
    """Compute the loss where `_cuda.applies_to_entries`."""
    shape, ignore_index = logits.shape, options.ignore_index
    if logits.ndim < 2:
        soft = targets.is_floating_point()
        logits, targets = logits.reshape(1, -1), targets.reshape(1, -1) if soft else targets.view(1)
    logits = dense(logits)
    reduced = options.reduction != "none"
    divided = divisor(options.normalizer, lambda: count_positives(targets, ignore_index))
    if isinstance(divided, Tensor):
        divided = divided.float().view(())
    same = options._replace(reduction="sum" if reduced else "none", normalizer=divided)

    def formula(tensors: Sequence[Tensor]) -> Tensor:
        return _formula(tensors[0], targets, same)

    kernel = EntryPieces(targets, KernelOptions.of(options), divided, reduced, formula)
    losses: Tensor = EntryLosses.apply(kernel, targets, logits)
    if not reduced:
        return losses.view(shape)
    count: Tensor | int = logits.numel()
    if not targets.is_floating_point():
        count = (targets != ignore_index).sum() * logits.shape[1]
    return reduce(losses, options.reduction, count, logits.dtype)


def _formula(logits: Tensor, targets: Tensor, options: Options) -> Tensor:
    """Compute the loss with operations that autograd, functorch and compilers support."""
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
    """Module form of `sigmoid_focal_loss`, with the same arguments and defaults.

    A tensor ``alpha`` or ``normalizer`` moves with the module but is not in its state dict.

    Args:
        alpha: Weight of positives in [0, 1], or a tensor ``[K]`` of them. None disables weighting.
        gamma: Focusing parameter, >= 0.
        reduction: "none", "mean" or "sum".
        normalizer: Divisor of the losses: a number or tensor > 0, "num_pos" or "num_pos_all_ranks".
        ignore_index: Index of places to ignore.
        inplace_gradient: Whether the gradient overwrites the logits.

    Raises:
        TypeError: If an option has an unsupported type.
        ValueError: If an option is out of range.

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
