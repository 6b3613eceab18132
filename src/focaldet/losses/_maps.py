"""The sigmoid focal loss of the maps of a dense head, in their own memory layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet._checks import check_range, shortened
from focaldet.losses import _arguments as arguments
from focaldet.losses import _cuda
from focaldet.losses._arguments import Options
from focaldet.losses._autograd import TotalLoss
from focaldet.losses._cpu_sparse import SparseLoss
from focaldet.losses._formula import sigmoid_focal_entries
from focaldet.losses._layout import Layout, Special, dense, find_special, levels_of_maps
from focaldet.losses._reduction import count_positives, divisor
from focaldet.losses._sigmoid import kernels_apply, sigmoid_focal_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.losses._arguments import Normalizer, Reduction


def sigmoid_focal_loss_maps(
    maps: Sequence[Tensor],
    targets: Tensor,
    *,
    num_classes: int,
    alpha: Tensor | float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Normalizer = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute the sigmoid focal loss of a dense head's maps without concatenating them.

    Loss and gradient are those of `sigmoid_focal_loss` for logits ``[B, R, K]``. Permuting and
    concatenating the maps to obtain these takes longer than the loss itself.

    Args:
        maps: One floating-point tensor ``[B, A*K, H, W]`` per level, contiguous or channels_last;
            other layouts are copied. Channel ``a * K + k`` is class k of anchor a.
        targets: Class indices ``[B, R]`` with ``R = sum(H * W * A)``, ordered by level, row, column
            and anchor. -1 is background.
        num_classes: Number of classes, K.
        alpha: As in `sigmoid_focal_loss`.
        gamma: As in `sigmoid_focal_loss`.
        reduction: As in `sigmoid_focal_loss`.
        normalizer: As in `sigmoid_focal_loss`, or a tensor ``[B]`` with one divisor per image,
            applied before the losses are summed. torchvision's RetinaNet divides the loss of each
            image by its number of positives; the paper divides by the positives of the batch.
        ignore_index: As in `sigmoid_focal_loss`.

    Returns:
        The loss. For reduction "none", a tensor ``[B, R, K]`` in the order of ``targets``, for
        which the maps are permuted and concatenated.

    Notes:
        On CUDA devices, Triton kernels are used as for `sigmoid_focal_loss`.

    Raises:
        TypeError: If an argument has an unsupported type or dtype.
        ValueError: If an option or a target is out of range, or if shapes do not match.

    Examples:
        >>> maps = [torch.zeros(1, 2 * 3, 4, 4), torch.zeros(1, 2 * 3, 2, 2)]  # A = 2, K = 3
        >>> targets = torch.full((1, 2 * (16 + 4)), -1)
        >>> targets[0, 5] = 2  # level 0, row 0, column 2, anchor 1
        >>> loss = sigmoid_focal_loss_maps(
        ...     maps, targets, num_classes=3, reduction="sum", normalizer="num_pos"
        ... )
        >>> round(loss.item(), 4)
        15.5092

    References:
        Lin et al. Focal Loss for Dense Object Detection. ICCV 2017, section 4 and equation 5.
        arXiv:1708.02002.
    """
    if not isinstance(maps, Iterable):
        raise TypeError(f"maps must be a sequence of tensors, got {shortened(maps)}.")
    maps = list(maps)
    options = Options(alpha, gamma, reduction, normalizer, ignore_index).check()
    arguments.check_whole_number("num_classes", num_classes)
    arguments.check_alpha_size(alpha, num_classes)
    _check_maps(maps, targets, num_classes, normalizer)

    def formula(tensors: Sequence[Tensor]) -> Tensor:
        return _formula(tensors, targets, num_classes, options)

    def image_totals(tensors: Sequence[Tensor]) -> Tensor:
        losses = _entries(tensors, targets, num_classes, options)
        return torch.stack([level.flatten(1).sum(1) for level in losses]).sum(0)

    if reduction == "none":
        return _each(maps, targets, num_classes, options)
    if _cuda.applies(maps, targets, options, num_classes):
        maps = [dense(m) for m in maps]
        return _cuda.reduced_loss(
            maps, levels_of_maps(maps, num_classes), targets, options, image_totals
        )
    if not all(kernels_apply(m, targets, alpha, normalizer) for m in maps):
        arguments.check_indices(targets, num_classes, ignore_index)
        return formula(maps)
    special = find_special(targets.reshape(-1), num_classes, ignore_index)
    divided = divisor(normalizer, lambda: torch.tensor(len(special.positive), device="cpu"))
    scales = [1 / d for d in torch.as_tensor(divided, device="cpu").view(-1).tolist()]
    if reduction == "mean":
        count = (targets.numel() - len(special.ignored)) * num_classes
        scales = [scale / max(count, 1) for scale in scales]
    layouts = [_layout_of(m, num_classes) for m in maps]
    parts = _special_of_maps(special, maps, layouts, targets.shape[1], num_classes)
    kernel = SparseLoss(parts, alpha, gamma, scales, formula, layouts)
    return TotalLoss.apply(kernel, targets, *maps)  # type: ignore[no-any-return]


def _layout_of(m: Tensor, num_classes: int) -> Layout:
    """Return the memory layout of a map: planes of an anchor's classes, or rows of classes."""
    B, C, H, W = m.shape
    if m.is_contiguous() or not m.movedim(1, -1).is_contiguous():
        return Layout(B * (C // num_classes), num_classes, H * W)
    return Layout(m.numel() // num_classes, num_classes, 1)


def _special_of_maps(
    special: Special,
    maps: Sequence[Tensor],
    layouts: Sequence[Layout],
    rows: int,
    num_classes: int,
) -> list[Special]:
    """Divide the special places of ``[B, R]`` among the maps, as keys of each map's layout."""
    parts, start = [], 0
    for m, layout in zip(maps, layouts, strict=True):
        places = m.shape[1:].numel() // num_classes  # of one image, H * W * A
        positive, order = _keys(special.positive - start, rows, places, layout)
        ignored, _ = _keys(special.ignored - start, rows, places, layout)
        parts.append(Special(positive, special.classes[order], ignored))
        start += places
    return parts


def _keys(keys: Tensor, rows: int, places: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Convert keys of ``[B, rows]`` with a row below ``places`` to sorted keys of a map's layout.

    Returns:
        The new keys, and the indices of the old ones.
    """
    image, row = keys.div(rows, rounding_mode="floor"), keys.remainder(rows)
    which = (row < places).nonzero().view(-1)
    image, row = image[which], row[which]
    if layout.inner == 1:
        return image * places + row, which
    anchors = places // layout.inner
    block = image * anchors + row % anchors
    ordered = (block * layout.inner + row // anchors).sort()
    return ordered.values, which[ordered.indices]


def _formula(maps: Sequence[Tensor], targets: Tensor, num_classes: int, options: Options) -> Tensor:
    """Compute the loss with operations that autograd can differentiate."""
    divided = divisor(options.normalizer, lambda: count_positives(targets, options.ignore_index))
    if isinstance(divided, Tensor) and divided.ndim:
        divided = divided.view(-1, 1, 1, 1, 1)
    levels = _entries(maps, targets, num_classes, options)
    total = torch.stack([(losses / divided).sum() for losses in levels]).sum()
    if options.reduction == "mean":
        total = total / ((targets != options.ignore_index).sum() * num_classes).clamp(min=1)
    return total


def _entries(
    maps: Sequence[Tensor], targets: Tensor, num_classes: int, options: Options
) -> Iterator[Tensor]:
    """Compute the losses of all entries level by level, ``[B, A, K, H, W]``."""
    alpha, start = options.alpha, 0
    for m in maps:
        x = _by_anchor(m.float() if m.dtype in (torch.float16, torch.bfloat16) else m, num_classes)
        B, A, _, H, W = x.shape
        level = targets[:, start : start + H * W * A].reshape(B, H, W, A).permute(0, 3, 1, 2)
        weights = alpha.to(x.dtype).view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
        yield sigmoid_focal_entries(
            x,
            level,
            alpha=weights,
            gamma=options.gamma,
            ignore_index=options.ignore_index,
            dim=2,
        )
        start += H * W * A


def _each(maps: Sequence[Tensor], targets: Tensor, num_classes: int, options: Options) -> Tensor:
    """Compute the losses without reduction, ``[B, R, K]``."""
    alpha, gamma, _, normalizer, ignore_index = options
    rows = [_by_anchor(m, num_classes).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
    images = isinstance(normalizer, Tensor) and normalizer.ndim > 0
    losses = sigmoid_focal_loss(
        torch.cat(rows, 1).movedim(-1, 1),
        targets,
        alpha=alpha,
        gamma=gamma,
        reduction="none",
        normalizer=None if images else normalizer,
        ignore_index=ignore_index,
    ).movedim(1, -1)
    if isinstance(normalizer, Tensor) and images:
        losses = losses / normalizer.to(losses.dtype).view(-1, 1, 1)
    return losses


def _by_anchor(m: Tensor, num_classes: int) -> Tensor:
    """View ``[B, A*K, H, W]`` as ``[B, A, K, H, W]``."""
    B, C, H, W = m.shape
    return m.view(B, C // num_classes, num_classes, H, W)


def _check_maps(
    maps: Sequence[Tensor], targets: Tensor, num_classes: int, normalizer: Normalizer
) -> None:
    """Raise if shapes, dtypes or devices of the maps, targets or normalizer do not match."""
    if not maps:
        raise ValueError("maps is empty; pass one tensor per level.")
    check_range("num_classes", num_classes, 1)
    first = maps[0]
    for i, m in enumerate(maps):
        arguments.check_logits(f"maps[{i}]", m)
        fits = m.ndim == 4 and m.shape[0] == first.shape[0] and m.shape[1] % num_classes == 0
        if not fits or m.shape[1] == 0:
            batch = first.shape[0] if first.ndim == 4 else "B"
            raise ValueError(
                f"maps[{i}] must have shape [{batch}, A * num_classes, H, W] with "
                f"num_classes={num_classes}, got {list(m.shape)}."
            )
        if m.dtype != first.dtype or m.device != first.device:
            raise ValueError(
                f"All maps must have the same dtype and device, but maps[0] is {first.dtype} on "
                f"{first.device} and maps[{i}] is {m.dtype} on {m.device}."
            )
    arguments.check_target_type(first, targets)
    if targets.is_floating_point():
        raise TypeError(
            f"targets must be class indices (int64), got {targets.dtype}. For soft targets, use "
            "sigmoid_focal_loss."
        )
    B = first.shape[0]
    shape = [B, sum(m.shape[1] // num_classes * m.shape[2] * m.shape[3] for m in maps)]
    if list(targets.shape) != shape:
        raise ValueError(
            f"targets must have shape {shape}, with one index per anchor of the maps, "
            f"got {list(targets.shape)}."
        )
    if isinstance(normalizer, Tensor) and normalizer.shape not in ((), (1,), (B,)):
        raise ValueError(
            f"A tensor normalizer must have one element, or one per image (shape [{B}]), "
            f"got a tensor of shape {list(normalizer.shape)}."
        )
