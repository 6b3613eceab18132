"""Autograd functions around the CPU kernels, which compute loss and gradient in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    Gradients = list[Tensor | None]


class Kernel(Protocol):
    """A loss of one or more tensors, in the forms that autograd needs."""

    def total(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float, *, inplace: bool
    ) -> tuple[float, Gradients]:
        """Return ``factor`` times the reduced loss, and its gradient for the wanted tensors."""

    def entries(self, x: Tensor) -> Tensor:
        """Return the loss of each entry in the shape and dtype of ``x``, or a sum of them."""

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""

    def formula(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the same loss, computed with operations that autograd can differentiate."""


class TotalLoss(torch.autograd.Function):
    """A reduced loss that computes its gradient in the forward pass, while logits are in cache.

    The first backward pass returns that gradient and a second one recomputes it. A backward pass
    that is differentiated itself (``create_graph=True``) uses the formula.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, targets: Tensor, *tensors: Tensor) -> Tensor:
        """Compute the loss and, if it will be needed, the gradient."""
        ctx.kernel = kernel
        ctx.save_for_backward(targets, *tensors)  # so that autograd detects in-place changes
        # Scaling a gradient in half precision would round it twice, and a loss scaler could not
        # recover what has already underflowed. So float16 computes its gradient in backward.
        wanted = ctx.needs_input_grad[2:]
        early = any(wanted) and tensors[0].dtype != torch.float16
        value, gradients = kernel.total(
            tensors, wanted if early else [False] * len(tensors), 1.0, inplace=False
        )
        ctx.gradients = gradients if early else None
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient times ``upstream``."""
        _, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *differentiable(ctx.kernel.formula, tensors, wanted, upstream)
        factor = upstream.item()
        gradients: Gradients | None = ctx.gradients
        ctx.gradients = None
        if gradients is None or (factor != 1 and tensors[0].dtype != torch.float32):
            _, gradients = ctx.kernel.total(tensors, wanted, factor, inplace=False)
        elif factor != 1:
            gradients = [None if g is None else g.mul_(factor) for g in gradients]
        return None, None, *gradients


class TotalLossInPlace(torch.autograd.Function):
    """`TotalLoss` whose gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, _targets: Tensor, logits: Tensor) -> Tensor:
        """Compute the loss and turn the logits into its gradient."""
        value, _ = kernel.total([logits], [True], 1.0, inplace=True)
        # The logits are not saved for backward, since autograd would object to the change made
        # here. Writing through a view has increased their version, so autograd still raises if
        # another operation has saved them.
        ctx.gradient, ctx.version = logits.detach(), logits._version  # noqa: SLF001
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor]:
        """Return the gradient times ``upstream``, once."""
        gradient: Tensor | None = ctx.gradient
        ctx.gradient = None
        if gradient is None:
            raise RuntimeError(
                "inplace_gradient=True allows only one backward pass, because it keeps no copy of "
                "the gradient. Turn it off to call backward again."
            )
        if gradient._version != ctx.version:  # noqa: SLF001
            raise RuntimeError(
                "logits was modified in place between forward and backward, but holds the gradient "
                "because of inplace_gradient=True. Do not modify it, or turn inplace_gradient off."
            )
        factor = upstream.item()
        return None, None, gradient if factor == 1 else gradient.mul_(factor)


class EntryLosses(torch.autograd.Function):
    """The losses of all entries or their sum, whose gradient is computed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, targets: Tensor, x: Tensor) -> Tensor:
        """Compute the losses."""
        ctx.kernel = kernel
        ctx.save_for_backward(targets, x)
        return kernel.entries(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient."""
        _, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *differentiable(ctx.kernel.formula, [x], [True], upstream)
        return None, None, ctx.kernel.entries_gradient(x, upstream)


def differentiable(
    formula: Any, tensors: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor
) -> Gradients:
    """Return gradients that can be differentiated again."""
    inputs = [t for t, w in zip(tensors, wanted, strict=True) if w]
    made = iter(torch.autograd.grad(formula(tensors), inputs, upstream, create_graph=True))
    return [next(made) if w else None for w in wanted]
