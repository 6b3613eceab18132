"""The loss on a CPU where nearly all entries are background: the kernels on whole tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet.losses._layout import Layout, from_memory, in_memory_order, memory_of
from focaldet.losses._sparse import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.losses._layout import Special


@dataclass(frozen=True, slots=True)
class SparseLoss:
    """The loss of one or several tensors of logits, as `_autograd` wants it.

    Attributes:
        special: For each tensor, which of its places are not background.
        alpha: As in `sigmoid_focal_loss`.
        gamma: As in `sigmoid_focal_loss`.
        scales: Factors of the loss, one for each of as many equal spans of a tensor's blocks: one
            in all, or one an image.
        formula: The same loss by operations that autograd differentiates.
        layouts: How each tensor lies in memory, where it is not what `memory_of` finds.
    """

    special: Sequence[Special]
    alpha: float | Tensor | None
    gamma: float
    scales: Sequence[float]
    formula: Callable[[Sequence[Tensor]], Tensor]
    layouts: Sequence[Layout] | None = None

    def total(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float, *, inplace: bool
    ) -> tuple[float, list[Tensor | None]]:
        """Return ``factor`` times the sum of the scaled losses and its gradient where wanted."""
        value, gradients = 0.0, []
        for i, (x, want) in enumerate(zip(tensors, wanted, strict=True)):
            memory, layout = self._memory_of(x, i)
            gradient = None
            if want:
                gradient = memory if inplace else torch.empty_like(memory)
            step = layout.blocks // len(self.scales)
            for j, scale in enumerate(self.scales):
                span = range(j * step, (j + 1) * step)
                run = self._run(i, memory, layout, span, scale * factor, gradient=gradient)
                value += scale * run
            gradients.append(None if gradient is None else from_memory(gradient, x))
        return value * factor, gradients

    def entries(self, x: Tensor) -> Tensor:
        """Return the scaled loss of each entry."""
        memory, layout = self._memory_of(x, 0)
        losses, span = torch.empty_like(memory), range(layout.blocks)
        self._run(0, memory, layout, span, self.scales[0], losses=losses)
        return from_memory(losses, x)

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""
        memory, layout = self._memory_of(x, 0)
        gradient, span = torch.empty_like(memory), range(layout.blocks)
        flat = in_memory_order(upstream, x)
        self._run(0, memory, layout, span, self.scales[0], gradient=gradient, upstream=flat)
        return from_memory(gradient, x)

    def _memory_of(self, x: Tensor, index: int) -> tuple[Tensor, Layout]:
        memory, layout = memory_of(x)
        return memory, layout if self.layouts is None else self.layouts[index]

    def _run(
        self,
        index: int,
        memory: Tensor,
        layout: Layout,
        span: range,
        scale: float,
        *,
        gradient: Tensor | None = None,
        upstream: Tensor | None = None,
        losses: Tensor | None = None,
    ) -> float:
        """Run the kernel over some blocks; the sum it returns is not scaled."""
        return sparse(
            memory,
            layout,
            self.special[index],
            span=span,
            alpha=self.alpha,
            gamma=self.gamma,
            gradient=gradient,
            scale=scale,
            upstream=upstream,
            losses=losses,
        )
