"""Exponential moving average of the weights, as a PyTorch Lightning callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from focaldet._checks import check_range
from focaldet.training._resuming import check_count

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import nn

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average, whose updates are counted on the host."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Update the average after each update of the weights."""
        if trainer.global_step > self._latest_update_step:
            self._update(pl_module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def _update(self, module: nn.Module) -> None:
        """Update the average with one operation for all tensors, without reading a value on a device."""
        average: Any = self._average_model
        old = [*average.module.parameters(), *average.module.buffers()]
        new = [
            value.detach().to(before.device)
            for value, before in zip([*module.parameters(), *module.buffers()], old, strict=True)
        ]
        if not average.n_averaged:
            torch._foreach_copy_(old, new)
        else:
            floats = [i for i, before in enumerate(old) if before.is_floating_point()]
            torch._foreach_lerp_(
                [old[i] for i in floats], [new[i] for i in floats], self._weight(average.n_averaged)
            )
            for before, value in zip(old, new, strict=True):
                if not before.is_floating_point():  # BatchNorm's batch counter
                    before.copy_(value)
        average.n_averaged += 1

    def _weight(self, updates: Tensor | int) -> float:
        """Return the weight of the current tensors, rounded to float32."""
        count = torch.as_tensor(updates, device="cpu")
        return float(1 - torch.clamp((1 + count) / (10 + count), max=self.decay))

    def average(self, averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        """Return the new average of one tensor."""
        if not averaged.is_floating_point():  # BatchNorm's batch counter
            return current
        return averaged.lerp(current, self._weight(updates))
