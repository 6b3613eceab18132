"""Exponential moving average of the weights, as a PyTorch Lightning callback."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from focaldet._checks import check_range
from focaldet.training._resuming import check_count

__all__ = ["AverageWeights"]


class AverageWeights(WeightAveraging):
    """Keep an exponential moving average of the weights, which is validated and saved.

    The decay grows with the number of updates t, as min(decay, (1 + t) / (10 + t)). With a constant
    decay, such as that of Lightning's ``EMAWeightAveraging``, the average of a short run would still
    contain much of the initial weights.

    Buffers are averaged too, so that the BatchNorm statistics match the averaged weights.

    Args:
        decay: Maximum decay, in [0, 1].

    Raises:
        ValueError: If ``decay`` is out of range.

    >>> round(float(AverageWeights(0.999).average(torch.tensor(1.0), torch.tensor(0.0), 0)), 2)
    0.1
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_range("decay", decay, 0, 1)
        self.decay = decay
        super().__init__(avg_fn=self.average)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        check_count("latest_update_step", state_dict["latest_update_step"])
        super().load_state_dict(state_dict)

    def average(self, averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        """Return the new average of one tensor."""
        count = torch.as_tensor(updates, device=averaged.device)
        decay = torch.clamp((1 + count) / (10 + count), max=self.decay)
        if not averaged.is_floating_point():  # BatchNorm's batch counter
            return current
        return averaged.lerp(current, (1 - decay).to(averaged))
