"""The sigmoid focal loss of class indices on a CPU: the kernels put to work on whole tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet.losses import _kernels as kernels
from focaldet.losses._layout import from_memory, in_memory_order, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.losses._layout import Layout, Special


@dataclass(frozen=True, slots=True)
class SparseLoss:
    """The loss of tensors of logits, given which of their entries are not background.

    ``special`` has one item a tensor. ``scales`` are the factors of the loss, one for each of as
    many equal spans of a tensor's blocks: one in all, or one an image.
    """

    special: Sequence[Special]
    alpha: float | Tensor | None
    gamma: float
    scales: Sequence[float]
    formula: Callable[[Sequence[Tensor]], Tensor]
    memory_of: Callable[[Tensor], tuple[Tensor, Layout]] = memory_of
    from_memory: Callable[[Tensor, Tensor], Tensor] = from_memory

    def total(
        self, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float, *, inplace: bool
    ) -> tuple[float, list[Tensor | None]]:
        """Return the sum of the scaled losses, and ``factor`` times its gradient where wanted."""
        value, gradients = 0.0, []
        for x, special, want in zip(tensors, self.special, wanted, strict=True):
            memory, layout = self.memory_of(x)
            gradient = (memory if inplace else torch.empty_like(memory)) if want else None
            step = layout.blocks // len(self.scales)
            for i, scale in enumerate(self.scales):
                span = range(i * step, (i + 1) * step)
                value += scale * self._span(
                    memory, layout, special, span, gradient=gradient, scale=scale * factor
                )
            gradients.append(None if gradient is None else self.from_memory(gradient, x))
        return value, gradients

    def entries(self, x: Tensor) -> Tensor:
        """Return the scaled loss of each entry."""
        memory, layout = self.memory_of(x)
        losses = torch.empty_like(memory)
        self._span(
            memory,
            layout,
            self.special[0],
            range(layout.blocks),
            losses=losses,
            scale=self.scales[0],
        )
        return self.from_memory(losses, x)

    def entries_gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of ``(entries(x) * upstream).sum()``."""
        memory, layout = self.memory_of(x)
        gradient = torch.empty_like(memory)
        self._span(
            memory,
            layout,
            self.special[0],
            range(layout.blocks),
            gradient=gradient,
            upstream=in_memory_order(upstream, x),
            scale=self.scales[0],
        )
        return self.from_memory(gradient, x)

    def _span(
        self,
        memory: Tensor,
        layout: Layout,
        special: Special,
        span: range,
        *,
        scale: float,
        gradient: Tensor | None = None,
        upstream: Tensor | None = None,
        losses: Tensor | None = None,
    ) -> float:
        """Run both kernels over some blocks; return the sum of the losses, not scaled."""
        if len(span) < layout.blocks:
            special = special.within(range(span.start * layout.inner, span.stop * layout.inner))
        entries = layout.entry(special.positive, special.classes)
        logits = memory[entries]
        positive_weight: float | Tensor = 1.0
        background_weight: float | Tensor = 1.0
        if isinstance(self.alpha, Tensor):
            positive_weight, background_weight = self.alpha[special.classes], 1 - self.alpha
        elif self.alpha is not None:
            positive_weight, background_weight = self.alpha, 1 - self.alpha
        where = {"gradient": gradient, "upstream": upstream, "losses": losses}
        total = kernels.background(
            memory,
            layout,
            special,
            span=span,
            weight=background_weight,
            gamma=self.gamma,
            scale=scale,
            **where,
        )
        return total + kernels.positives(
            logits, entries, weight=positive_weight, gamma=self.gamma, scale=scale, **where
        )
