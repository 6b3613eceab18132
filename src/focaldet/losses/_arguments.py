"""Checks of the arguments of all focal losses, and the errors they raise."""

from __future__ import annotations

import math
import numbers
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from focaldet._checks import check_choice, check_number, check_range, is_number, shortened

Reduction: TypeAlias = Literal["none", "mean", "sum"]
Normalizer: TypeAlias = float | Tensor | Literal["num_pos", "num_pos_all_ranks"] | None

_LAYOUT = (
    "As in CrossEntropyLoss, logits [N, K] need class indices [N], and logits [N, K, d1, ...] need "
    "[N, d1, ...]. One-hot or soft targets are floating-point and have the shape of the logits."
)
_PLAIN = (Tensor, nn.Parameter)
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch cannot compare these


def plain_cpu(*tensors: Tensor) -> bool:
    """Return whether these are ordinary CPU tensors, whose values can be read immediately.

    Reading values on a device would wait for it; traces, transforms and subclasses have none.
    """
    return plain("cpu", *tensors)


def plain(device: str, *tensors: Tensor) -> bool:
    """Return whether these are ordinary tensors on this type of device, outside transforms."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor.device.type != device or type(tensor) not in _PLAIN:
            return False
    return (
        torch._C._functorch.peek_interpreter_stack() is None  # noqa: SLF001 (no public equivalent)
        and torch._C._len_torch_dispatch_stack() == 0  # noqa: SLF001 (no public equivalent)
    )


def class_axis(logits: Tensor) -> int:
    """Return the axis of the classes: 1, or 0 for a single row of logits ``[K]``."""
    return 1 if logits.ndim > 1 else 0


def count_classes(logits: Tensor) -> int:
    """Return the number of classes, which is 1 for a single logit."""
    return logits.shape[class_axis(logits)] if logits.ndim else 1


class Options(NamedTuple):
    """The options that the sigmoid focal losses share."""

    alpha: Tensor | float | None
    gamma: float
    reduction: Reduction
    normalizer: Normalizer
    ignore_index: int

    def check(self) -> Options:
        """Raise if an option is invalid."""
        check_alpha(self.alpha)
        check_gamma(self.gamma)
        check_reduction(self.reduction, self.normalizer)
        check_whole_number("ignore_index", self.ignore_index)
        return self


MOST_FACTORS = 8
"""The highest power of the error that kernels compute as a product."""


class KernelOptions(NamedTuple):
    """The options of a reduced loss on a device, in the form of arguments of a kernel."""

    alpha: Tensor | float | None  # float32 and contiguous if a tensor
    gamma: float
    ignore_index: int

    @classmethod
    def of(cls, options: Options) -> KernelOptions:
        """Convert options of the loss."""
        alpha = options.alpha
        if isinstance(alpha, Tensor):
            alpha = alpha.float().contiguous()
        return cls(alpha, float(options.gamma), int(options.ignore_index))

    @property
    def class_weights(self) -> Tensor | None:
        """The weights of positives by class, which replace `weights`, if there are any."""
        return self.alpha if isinstance(self.alpha, Tensor) else None

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of positives and of background."""
        if self.alpha is None or isinstance(self.alpha, Tensor):
            return 1.0, 1.0
        return float(self.alpha), 1.0 - float(self.alpha)

    @property
    def whole(self) -> int:
        """The number of factors ``p`` of ``p ** gamma`` that are multiplied."""
        return min(math.floor(self.gamma), MOST_FACTORS)

    @property
    def rest(self) -> float:
        """The remaining exponent."""
        return self.gamma - self.whole


def check_gamma(gamma: float) -> None:
    """Raise unless ``gamma`` is a finite number >= 0."""
    check_number("gamma", gamma)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}. The paper uses 2.")


def check_alpha(alpha: Tensor | float | None) -> None:
    """Raise unless ``alpha`` is None, a number in [0, 1] or a vector of such numbers."""
    if isinstance(alpha, Tensor):
        _check_vector(alpha)
        if plain_cpu(alpha):
            _check_unit_interval("alpha", alpha)
        return
    _check_number(alpha)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}. Pass None to disable it.")


def check_class_weights(alpha: Tensor | float | None) -> None:
    """Raise unless ``alpha`` is None, a number >= 0 or a vector of such numbers."""
    if isinstance(alpha, Tensor):
        _check_vector(alpha)
        if plain_cpu(alpha):
            wrong = (~(alpha >= 0)).nonzero().view(-1)
            if len(wrong):
                k = int(wrong[0])
                raise ValueError(f"Class weights must be at least 0, but alpha[{k}] is {alpha[k]}.")
        return
    _check_number(alpha)
    if alpha is not None:
        check_range("alpha", alpha, 0.0)


def _check_number(alpha: object) -> None:
    if alpha is not None and not is_number(alpha):
        several = isinstance(alpha, (list, tuple)) or type(alpha).__name__ == "ndarray"
        remedy = " Pass it as torch.tensor(alpha)." if several else ""
        raise TypeError(
            "alpha must be None, a number or a floating-point tensor of shape [K], "
            f"got {shortened(alpha)}.{remedy}"
        )


def _check_vector(alpha: Tensor) -> None:
    if alpha.ndim != 1 or not alpha.is_floating_point():
        raise ValueError(
            "A tensor alpha must be floating-point and have shape [K], "
            f"got {alpha.dtype} of shape {list(alpha.shape)}."
        )


def check_alpha_size(alpha: Tensor | float | None, num_classes: int) -> None:
    """Raise if ``alpha`` is a tensor that does not have exactly one value per class."""
    if isinstance(alpha, Tensor) and alpha.shape[0] != num_classes:
        raise ValueError(
            f"alpha needs one value per class: its shape is {list(alpha.shape)}, but the number of "
            f"classes is {num_classes}."
        )


def check_reduction(reduction: str, normalizer: Normalizer) -> None:
    """Raise unless ``reduction`` is known and can be combined with ``normalizer``."""
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, ("num_pos", "num_pos_all_ranks"))
        if reduction == "mean":
            raise ValueError(
                f"normalizer={normalizer!r} requires reduction='sum' or 'none', got 'mean', which "
                "already divides by the number of entries. The paper uses 'sum'."
            )
    elif isinstance(normalizer, Tensor):
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"A tensor normalizer must have real numbers, got {normalizer.dtype}.")
        if plain_cpu(normalizer) and not bool((normalizer > 0).all()):
            raise ValueError(f"normalizer must be greater than 0, got {normalizer.tolist()}.")
    elif normalizer is not None and not is_number(normalizer):
        array = type(normalizer).__name__ == "ndarray"
        remedy = " Pass it as torch.tensor(normalizer)." if array else ""
        raise TypeError(
            f"normalizer must be None, a number or a tensor, got {shortened(normalizer)}.{remedy}"
        )
    elif normalizer is not None and not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be finite and greater than 0, got {normalizer}.")


def check_whole_number(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer of Python or NumPy."""
    if type(value) is int:  # faster than asking the abstract class
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {shortened(value)}.")


def check_own_normalizer(normalizer: object) -> None:
    """Raise unless ``normalizer`` is a number, a tensor with one element or None."""
    if isinstance(normalizer, str):
        raise ValueError(
            f"The softmax focal loss takes a number or None as normalizer, got {normalizer!r}. Every "
            "place has a class there, so reduction='mean' already divides by the number of positives."
        )
    if isinstance(normalizer, Tensor):
        check_one_number(normalizer)


def check_one_number(normalizer: Normalizer) -> None:
    """Raise if ``normalizer`` is a tensor that does not have exactly one element."""
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(
            "A tensor normalizer must have exactly one element, "
            f"got a tensor of shape {list(normalizer.shape)}."
        )


def check_logits(name: str, logits: Tensor) -> None:
    """Raise unless ``logits`` is a floating-point tensor."""
    _check_tensor(name, logits)
    if not logits.is_floating_point():
        raise TypeError(f"Expected floating-point {name}, got {logits.dtype}. Call .float() first.")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        got = type(value).__name__
        remedy = " Convert it with torch.from_numpy." if got == "ndarray" else ""
        raise TypeError(f"{name} must be a tensor, got {got}.{remedy}")


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise unless the device, dtype and shape of ``targets`` fit ``logits``.

    The values of floating-point targets are checked where `plain_cpu` is true.
    """
    check_target_type(logits, targets)
    shape = list(logits.shape)
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise ValueError(
                f"Floating-point targets must have the shape of logits, {shape}, "
                f"got {list(targets.shape)}. {_LAYOUT}"
            )
        if plain_cpu(targets):
            _check_unit_interval("targets", targets)
        return
    if logits.ndim == 0:
        raise ValueError(
            f"Class indices need logits with an axis of classes, got shape {shape}. {_LAYOUT}"
        )
    expected = list(shape)
    del expected[class_axis(logits)]
    if list(targets.shape) != expected:
        raise ValueError(
            f"targets must have shape {expected} for logits of shape {shape}, "
            f"got {list(targets.shape)}. {_LAYOUT}"
        )


def check_target_type(logits: Tensor, targets: Tensor) -> None:
    """Raise unless ``targets`` is a numeric tensor on the device of ``logits``."""
    _check_tensor("targets", targets)
    if targets.dtype == torch.bool or targets.is_complex() or targets.dtype in _WIDE_UNSIGNED:
        remedy = " Call .float() on a mask." if targets.dtype == torch.bool else ""
        if targets.dtype in _WIDE_UNSIGNED:
            remedy = " Call .long() first."
        raise TypeError(
            f"targets must be class indices (int64) or floating-point, got {targets.dtype}.{remedy}"
        )
    if targets.device != logits.device:
        raise ValueError(
            f"logits and targets must be on the same device, got {logits.device} and "
            f"{targets.device}."
        )


def out_of_range(targets: Tensor, num_classes: int, lowest: int = -1) -> bool:
    """Return whether any index is outside ``[lowest, num_classes)``."""
    if targets.numel() == 0:
        return False
    low, high = targets.aminmax()
    return low.item() < lowest or high.item() >= num_classes


def check_indices(
    targets: Tensor, num_classes: int, ignore_index: int, *, background: bool = True
) -> None:
    """Raise unless each index is a class, ``ignore_index`` or, with ``background``, -1.

    Nothing is checked where values cannot be read immediately: see `plain_cpu`.
    """
    if not plain_cpu(targets):
        return
    lowest = -1 if background else 0
    if not out_of_range(targets, num_classes, lowest):
        return
    wrong = targets[(targets < lowest) | (targets >= num_classes)]
    wrong = wrong[wrong != ignore_index]
    if len(wrong) == 0:
        return
    got = int(wrong[0])
    classes = f"classes 0 to {num_classes - 1}" if num_classes > 1 else f"{num_classes} classes"
    if num_classes == 1:
        classes = "only class 0"
    others = "-1: background, " if background and ignore_index != -1 else ""
    message = f"targets contains {got}, but logits has {classes} ({others}{ignore_index}: ignored)."
    if num_classes == 1:
        message += " Pass floating-point targets for a two-class problem with one logit."
    elif got == -1 and not background:
        message += " The softmax focal loss has no background: give it a class of its own."
    raise ValueError(message)


def set_apart_ignored(
    targets: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Turn ignored places into background; raise if an index is out of range.

    Returns:
        The indices, and a mask of the ignored places or None if there are none.
    """
    distinct = ignore_index < -1 or ignore_index >= num_classes
    if distinct and not out_of_range(targets, num_classes):
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
        raise ValueError(f"All values of {name} must be in [0, 1], got {got:g}.")


def align_alpha(alpha: Tensor | float | None, logits: Tensor) -> Tensor | float | None:
    """Give a tensor ``alpha`` a shape and dtype that broadcast against ``logits``."""
    if not isinstance(alpha, Tensor):
        return alpha
    return alpha.to(logits.dtype).view(-1, *[1] * (logits.ndim - class_axis(logits) - 1))


def set_option(module: nn.Module, name: str, value: object) -> None:
    """Set an attribute of a loss module: a tensor as a buffer that is not in the state dict."""
    if isinstance(value, Tensor):
        module.register_buffer(name, value, persistent=False)
    else:
        setattr(module, name, value)
