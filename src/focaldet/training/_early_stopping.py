"""Stop a run whose validation AP no longer rises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from focaldet.training._logging import log_on_rank_zero

if TYPE_CHECKING:
    from focaldet.training._checkpoints import BestModel

__all__ = ["StopEarly"]


class StopEarly(pl.Callback):
    """Stop a run after some epochs without a higher validation AP.

    Lightning's ``EarlyStopping`` counts for itself, takes its patience from the checkpoint when a run
    is resumed, and stops a run that has not detected anything yet. This callback counts from the epoch
    of the best model instead, which a checkpoint holds already. Until the AP is above 0 for the first
    time, it waits.

    Args:
        best: The callback that knows the best epoch. It must come first in the list of callbacks.
        patience: Number of epochs to wait for a higher AP.

    Attributes:
        stopped: Whether this callback has stopped the run.
    """

    def __init__(self, best: BestModel, patience: int) -> None:
        self.best = best
        self.patience = patience
        self.stopped = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Stop at once if a run that is resumed has waited long enough already."""
        del module
        self._stop_if_due(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Stop if the AP has not risen for long enough."""
        if not module.stopping:
            self._stop_if_due(trainer, trainer.current_epoch + 1)

    def _stop_if_due(self, trainer: pl.Trainer, done: int) -> None:
        best, epoch = self.best.best, self.best.epoch
        if not best or epoch is None or done - epoch < self.patience:
            return
        trainer.should_stop = True
        self.stopped = True
        log_on_rank_zero(
            f"Stopping early after epoch {done}: the AP has not risen above {best:.3f} since epoch "
            f"{epoch} (patience={self.patience})."
        )
