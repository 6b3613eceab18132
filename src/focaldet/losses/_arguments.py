"""What every focal loss asks of its arguments, and how it says that one is wrong."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from focaldet._checks import check_choice, check_range, must_be

Reduction: TypeAlias = Literal["none", "mean", "sum"]
Normalizer: TypeAlias = float | Tensor | Literal["num_pos", "num_pos_all_ranks"] | None

LAYOUT = (
    "As in CrossEntropyLoss, logits [N, K] go with class indices [N] and logits [N, K, d1, ...] "
    "with [N, d1, ...]; one-hot or soft targets are floating-point, of the logits' shape."
)


_PLAIN = (Tensor, nn.Parameter)


def plain_cpu(*tensors: Tensor) -> bool:
    """Whether these are ordinary CPU tensors whose values can be read here and now.

    A device would have to be waited for; a trace, a transform or a tensor subclass has no values.
    """
    return plain("cpu", *tensors)


def plain(device: str, *tensors: Tensor) -> bool:
    """Whether these are ordinary tensors of this type of device, outside traces and transforms."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor.device.type != device or type(tensor) not in _PLAIN:
            return False
    return (
        torch._C._functorch.peek_interpreter_stack() is None  # noqa: SLF001 (nothing public tells)
        and torch._C._len_torch_dispatch_stack() == 0  # noqa: SLF001 (nothing public tells)
    )


def class_axis(logits: Tensor) -> int:
    """The axis of the classes: 1, or 0 for a single row of logits ``[K]``."""
    return 1 if logits.ndim > 1 else 0


def count_classes(logits: Tensor) -> int:
    """The number of classes; a single logit is one."""
    return logits.shape[class_axis(logits)] if logits.ndim else 1


class Options(NamedTuple):
    """The options that the sigmoid focal losses share."""

    alpha: Tensor | float | None
    gamma: float
    reduction: Reduction
    normalizer: Normalizer
    ignore_index: int

    def check(self) -> Options:
        """Raise unless each option is in its range."""
        check_alpha(self.alpha)
        check_gamma(self.gamma)
        check_reduction(self.reduction, self.normalizer)
        return self


def check_gamma(gamma: float) -> None:
    """Raise unless ``gamma`` is a finite number >= 0."""
    if not 0 <= gamma < math.inf:
        raise ValueError(must_be("gamma", "finite and >= 0", gamma, "The paper uses 2."))


def check_alpha(alpha: Tensor | float | None) -> None:
    """Raise unless ``alpha`` is None, a number in [0, 1] or a vector of such numbers."""
    if isinstance(alpha, Tensor):
        _check_vector(alpha)
        if plain_cpu(alpha):
            _check_unit_interval("alpha", alpha)
        return
    _check_number(alpha)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(must_be("alpha", "in [0, 1]", alpha, "None turns the weights off."))


def check_class_weights(alpha: Tensor | float | None) -> None:
    """Raise unless ``alpha`` is None, a number >= 0 or a vector of such numbers."""
    if isinstance(alpha, Tensor):
        _check_vector(alpha)
        if plain_cpu(alpha) and not bool((alpha >= 0).all()):
            raise ValueError(must_be("alpha", ">= 0 everywhere", alpha.min().item()))
        return
    _check_number(alpha)
    if alpha is not None:
        check_range("alpha", alpha, 0.0)


def _check_number(alpha: object) -> None:
    if alpha is not None and not isinstance(alpha, (int, float)):
        condition = "a number, None or a floating-point tensor of shape [K]"
        raise TypeError(must_be("alpha", condition, repr(alpha)))


def _check_vector(alpha: Tensor) -> None:
    if alpha.ndim != 1 or not alpha.is_floating_point():
        condition = "a number, None or a floating-point tensor of shape [K]"
        raise ValueError(must_be("alpha", condition, f"{alpha.dtype} {list(alpha.shape)}"))


def check_alpha_size(alpha: Tensor | float | None, num_classes: int) -> None:
    """Raise if ``alpha`` is a tensor without exactly one weight a class."""
    if isinstance(alpha, Tensor) and alpha.shape[0] != num_classes:
        condition = f"of shape [{num_classes}], one weight a class"
        raise ValueError(must_be("alpha", condition, list(alpha.shape)))


def check_reduction(reduction: str, normalizer: Normalizer) -> None:
    """Raise unless ``reduction`` is known and ``normalizer`` is one that goes with it."""
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, ("num_pos", "num_pos_all_ranks"))
        if reduction == "mean":
            remedy = "The mean has a count of its own: use 'sum', as the paper does."
            raise ValueError(
                must_be("reduction", f"'sum' or 'none' with {normalizer!r}", "'mean'", remedy)
            )
    elif isinstance(normalizer, Tensor):
        if plain_cpu(normalizer) and not bool((normalizer > 0).all()):
            raise ValueError(must_be("normalizer", "> 0", normalizer.tolist()))
    elif normalizer is not None and not 0 < normalizer < math.inf:
        raise ValueError(must_be("normalizer", "finite and > 0", normalizer))


def check_own_normalizer(normalizer: object) -> None:
    """Raise unless ``normalizer`` is a number, a tensor of one or None."""
    if isinstance(normalizer, str):
        remedy = "With exclusive classes every place is a positive; the mean counts them."
        raise ValueError(must_be("normalizer", "a number or None", repr(normalizer), remedy))
    if isinstance(normalizer, Tensor):
        check_one_number(normalizer)


def check_one_number(normalizer: Normalizer) -> None:
    """Raise if ``normalizer`` is a tensor of more than one element."""
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(must_be("normalizer", "one number", list(normalizer.shape)))


def check_logits(name: str, logits: Tensor) -> None:
    """Raise unless ``logits`` is a floating-point tensor with an axis for the classes."""
    if not logits.is_floating_point():
        raise TypeError(must_be(name, "floating-point", logits.dtype, "Call .float() first."))


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise unless ``targets`` fits ``logits`` in device, type and shape.

    The values of floating-point targets are looked at where that is possible: see `plain_cpu`.
    """
    check_target_type(logits, targets)
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            condition = f"of the logits' shape {list(logits.shape)} when floating-point"
            raise ValueError(must_be("targets", condition, list(targets.shape), LAYOUT))
        if plain_cpu(targets):
            _check_unit_interval("targets", targets)
        return
    shape = list(logits.shape)
    if logits.ndim == 0:
        raise ValueError(must_be("logits", "of at least one axis", shape, LAYOUT))
    del shape[class_axis(logits)]
    if list(targets.shape) != shape:
        condition = f"of shape {shape} for logits {list(logits.shape)}"
        raise ValueError(must_be("targets", condition, list(targets.shape), LAYOUT))


def check_target_type(logits: Tensor, targets: Tensor) -> None:
    """Raise unless ``targets`` is numeric and on the logits' device."""
    if targets.dtype == torch.bool or targets.is_complex():
        condition = "class indices (int64) or floating-point"
        raise TypeError(must_be("targets", condition, targets.dtype, "Call .float() on a mask."))
    if targets.device != logits.device:
        raise ValueError(must_be("targets", f"on {logits.device}", targets.device))


def out_of_range(targets: Tensor, num_classes: int, lowest: int = -1) -> bool:
    """Whether some index is outside ``[lowest, num_classes)``."""
    if targets.numel() == 0:
        return False
    low, high = targets.aminmax()
    return low.item() < lowest or high.item() >= num_classes


def check_indices(
    targets: Tensor, num_classes: int, ignore_index: int, *, background: bool = True
) -> None:
    """Raise unless each index is a class, ``ignore_index`` or, with ``background``, -1.

    Nothing is raised where the values cannot be read at once: see `plain_cpu`.
    """
    if not plain_cpu(targets):
        return
    lowest = -1 if background else 0
    if not out_of_range(targets, num_classes, lowest):
        return
    wrong = targets[(targets < lowest) | (targets >= num_classes)]
    wrong = wrong[wrong != ignore_index]
    if len(wrong):
        others = "-1 (background) or ignore_index" if background else "or ignore_index"
        condition = f"in [0, {num_classes}), {others} {ignore_index}"
        remedy = "A two-class problem with one logit takes floating-point targets."
        got = int(wrong[0])
        raise ValueError(must_be("targets", condition, got, remedy if num_classes == 1 else ""))


def set_apart_ignored(
    targets: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Turn ignored places into background; raise if an index is out of range.

    Returns:
        The indices, and a mask of the ignored places or None if there are none.
    """
    unlike = ignore_index < -1 or ignore_index >= num_classes
    if unlike and not out_of_range(targets, num_classes):
        return targets, None
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, -1)
    check_indices(targets, num_classes, ignore_index)
    return targets, ignored


def _check_unit_interval(name: str, values: Tensor) -> None:
    if values.numel() == 0:
        return
    low, high = (float(v) for v in values.detach().aminmax())
    if not (low >= 0 and high <= 1):
        got = low if not low >= 0 else high
        raise ValueError(must_be(name, "in [0, 1] everywhere", got))


def align_alpha(alpha: Tensor | float | None, logits: Tensor) -> Tensor | float | None:
    """A tensor of class weights in a shape and type that broadcast against ``logits``."""
    if not isinstance(alpha, Tensor):
        return alpha
    return alpha.to(logits.dtype).view(-1, *[1] * (logits.ndim - class_axis(logits) - 1))


def set_option(module: nn.Module, name: str, value: object) -> None:
    """Set an option of a loss: a tensor as a buffer that is no part of the state."""
    if isinstance(value, Tensor):
        module.register_buffer(name, value, persistent=False)
    else:
        setattr(module, name, value)
