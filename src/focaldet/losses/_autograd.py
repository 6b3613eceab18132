"""The bridge from the CPU kernels, which make loss and gradient in one pass, to autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from focaldet._checks import must_be

if TYPE_CHECKING:
    from collections.abc import Sequence

    Gradients = list[Tensor | None]


class Kernel(Protocol):
    """A loss of one or several tensors, in the forms that autograd needs."""

    def total(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float, *, inplace: bool
    ) -> tuple[float, Gradients]:
        """Return ``factor`` times the reduced loss and its gradient for the tensors wanted."""

    def entries(self, x: Tensor) -> Tensor:
        """Return the loss of each entry, in the shape and type of ``x``."""

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""

    def formula(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the same loss by operations that autograd differentiates."""


class TotalLoss(torch.autograd.Function):
    """A reduced loss whose gradient is made in the forward pass, while the logits are in cache.

    The first backward hands that gradient out; a second one makes it anew, and a backward that is
    itself to be differentiated goes through the formula.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, targets: Tensor, *tensors: Tensor) -> Tensor:
        """Compute the loss and, where it will be wanted, the gradient."""
        ctx.kernel = kernel
        ctx.save_for_backward(targets, *tensors)  # so that a change in place is noticed
        # A gradient rounded to half precision cannot be scaled without rounding twice, and a loss
        # scaler would come too late for what has underflown: float16 waits for the backward.
        wanted = ctx.needs_input_grad[2:]
        early = any(wanted) and tensors[0].dtype != torch.float16
        value, gradients = kernel.total(
            tensors, wanted if early else [False] * len(tensors), 1.0, inplace=False
        )
        ctx.gradients = gradients if early else None
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out the gradient times ``upstream``."""
        _, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx.kernel.formula, tensors, wanted, upstream)
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
        # Not saved for backward: autograd would complain of the change just made. Writing through
        # a view has raised the version of the logits, so that others who saved them do complain.
        ctx.gradient, ctx.version = logits.detach(), logits._version  # noqa: SLF001
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor]:
        """Hand out the gradient times ``upstream``, once."""
        gradient: Tensor | None = ctx.gradient
        ctx.gradient = None
        if gradient is None:
            raise RuntimeError(
                must_be(
                    "inplace_gradient",
                    "off for a second backward",
                    "True",
                    "The one copy of the gradient went to the first.",
                )
            )
        if gradient._version != ctx.version:  # noqa: SLF001
            raise RuntimeError(
                must_be(
                    "logits",
                    "left alone between forward and backward",
                    "a change in place",
                    "With inplace_gradient they hold the gradient.",
                )
            )
        factor = upstream.item()
        return None, None, gradient if factor == 1 else gradient.mul_(factor)


class EntryLosses(torch.autograd.Function):
    """The losses of all entries; the gradient is made in the backward pass."""

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
            return None, None, *_differentiable(ctx.kernel.formula, [x], [True], upstream)
        return None, None, ctx.kernel.entries_gradient(x, upstream)


def _differentiable(
    formula: Any, tensors: Sequence[Tensor], wanted: Sequence[bool], upstream: Tensor
) -> Gradients:
    """Gradients that can be differentiated in turn."""
    inputs = [t for t, w in zip(tensors, wanted, strict=True) if w]
    made = iter(torch.autograd.grad(formula(tensors), inputs, upstream, create_graph=True))
    return [next(made) if w else None for w in wanted]
