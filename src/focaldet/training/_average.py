"""An exponential average of the weights, through pytorch-lightning's callback."""

from __future__ import annotations

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from focaldet._checks import check_range

__all__ = ["AverageWeights"]


class AverageWeights(WeightAveraging):
    """Average the weights exponentially; validation and the models that are kept use the average.

    The decay rises with the number of updates t, as min(decay, (1 + t) / (10 + t)): with a constant
    one a short run's average would still hold the weights that it began with. pytorch-lightning's
    ``EMAWeightAveraging`` has the constant one.

    Buffers are averaged too, so that BatchNorm's statistics fit the averaged weights.

    Args:
        decay: the greatest, in [0, 1].

    Raises:
        ValueError: a decay out of its range.

    >>> round(float(AverageWeights(0.999).average(torch.tensor(1.0), torch.tensor(0.0), 0)), 2)
    0.1
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_range("decay", decay, 0, 1)
        self.decay = decay
        super().__init__(avg_fn=self.average)

    def average(self, averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        """Return a tensor's new average."""
        count = torch.as_tensor(updates, device=averaged.device)
        decay = torch.clamp((1 + count) / (10 + count), max=self.decay)
        if not averaged.is_floating_point():  # BatchNorm's counter
            return current
        return averaged.lerp(current, (1 - decay).to(averaged))
