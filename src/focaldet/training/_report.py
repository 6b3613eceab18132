"""Lines that say how a run goes, for a log file or a terminal."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl

__all__ = ["Report", "watched"]

_LOG = logging.getLogger("focaldet.training")
_SECONDS = 60  # between lines within an epoch, where there is no progress bar
_SHOWN = (
    ("train/loss_epoch", "loss"),
    ("val/loss", "val loss"),
    ("val/AP", "AP"),
    ("val/AP50", "AP50"),
    ("val/AP75", "AP75"),
)


def watched() -> bool:
    """Whether a person looks on, and wants a progress bar."""
    return sys.stderr.isatty()


class Report(pl.Callback):
    """One line an epoch; and one a minute, where there is no progress bar."""

    def __init__(self) -> None:
        self._began = self._spoke = 0.0
        self._done = 0  # batches since then

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock, also for the rest of an epoch; give each epoch a row of losses."""
        updates = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        rows = trainer.log_every_n_steps  # type: ignore[attr-defined]
        trainer.log_every_n_steps = max(1, min(rows, updates))  # type: ignore[attr-defined]
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        del trainer, module
        self._began = self._spoke = time.monotonic()
        self._done = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far the epoch is, once a minute."""
        del module, batch
        now = time.monotonic()
        self._done += 1
        if watched() or now - self._spoke < _SECONDS or not trainer.is_global_zero:
            return
        self._spoke = now
        each = (now - self._began) / self._done
        _LOG.info(
            "epoch %d/%s  %d of %d batches  loss %.3f  %.2f s each",
            *(
                trainer.current_epoch + 1,
                trainer.max_epochs,
                batch_idx + 1,
                trainer.num_training_batches,
            ),
            *(float(outputs["loss"]), each),
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Say what the epoch came to."""
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        parts = [
            f"{label} {float(metrics[name]):.3f}"
            for name, label in _SHOWN
            if name in metrics and not (module.stopping and name.startswith("val/"))
        ]
        seconds = time.monotonic() - self._began
        _LOG.info(
            "epoch %d/%s  %s  %.0f s",
            *(trainer.current_epoch + 1, trainer.max_epochs, "  ".join(parts), seconds),
        )
