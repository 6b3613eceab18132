"""What a checkpoint's tensors must be: dense, real, of the right kind of number, and finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["unsupported_kind", "unsupported_values"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported_kind(tensor: Tensor) -> str | None:
    """Return what makes a tensor unfit to hold weights, or None.

    >>> unsupported_kind(torch.empty(2, device="meta"))
    'a meta tensor, which has no values'
    """
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_complex():
        return "a complex tensor"
    return None


def unsupported_values(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe the tensors that a model could only load wrongly.

    Args:
        wanted: The model's own state dict.
        tensors: The tensors to load, with the same keys.
    """
    found = ((key, _unsupported_value(tensors[key], own)) for key, own in wanted.items())
    return [f"{key} {problem}" for key, problem in found if problem]


def _unsupported_value(tensor: Tensor, own: Tensor) -> str | None:
    if tensor.is_meta and own.is_meta:
        return None  # only the shapes are compared
    kind = unsupported_kind(tensor)
    if kind:
        return f"is {kind}"
    if not own.is_floating_point():
        return None
    if tensor.dtype not in _FLOATS:
        return f"has the dtype {tensor.dtype}, but must be floating-point"
    # A sum costs a fraction of isfinite, and can only be finite if all values are.
    if tensor.sum().isfinite():
        return None
    count = int((~tensor.isfinite()).sum())
    return f"contains NaN or infinity ({count} of {tensor.numel()} values)" if count else None
