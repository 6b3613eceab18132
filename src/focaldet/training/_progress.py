"""Progress of a run: a line in the log per epoch, and per minute if there is no progress bar."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from focaldet._checks import printable
from focaldet.training._coco_ap import CocoAP
from focaldet.training._data_module import DetectionDataModule
from focaldet.training._logging import LOG

__all__ = ["EpochBar", "ProgressLog", "on_terminal"]

_SECONDS = 60  # between log lines within an epoch
_MAX_CLASSES = 10  # whose AP the line of an epoch shows
_SHOWN = (
    ("train/loss_epoch", "loss"),
    ("val/loss", "validation loss"),
    ("val/AP", "AP"),
    ("val/AP50", "AP50"),
    ("val/AP75", "AP75"),
)


def on_terminal() -> bool:
    """Return whether stderr is a terminal, where a progress bar makes sense."""
    return sys.stderr.isatty()


class EpochBar(TQDMProgressBar):
    """Lightning's progress bar, with epochs counted as in the log and without a version number.

    On a GPU, it is refreshed as often as losses are logged, because showing a loss waits for the GPU.
    """

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Choose how often the bar is refreshed."""
        super().on_train_start(trainer, *_)
        if trainer.strategy.root_device.type != "cpu":
            self._refresh_rate = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Return the values shown. The version of a logger's files is not one that a run changes."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Reset the bar, and count epochs from 1."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(
            f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        )


class ProgressLog(pl.Callback):
    """Log a line after each epoch, and one per minute if there is no progress bar."""

    def __init__(self) -> None:
        self._epoch_start = self._last_line = 0.0
        self._done = 0  # batches since the start of the epoch

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock, and make sure that each epoch logs its losses at least once."""
        updates = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        rows = trainer.log_every_n_steps  # type: ignore[attr-defined]
        trainer.log_every_n_steps = max(1, min(rows, updates))  # type: ignore[attr-defined]
        # Lightning does not call this for the rest of an epoch that is resumed.
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        del trainer, module
        self._epoch_start = self._last_line = time.monotonic()
        self._done = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the progress within the epoch, once per minute."""
        del module, batch
        now = time.monotonic()
        self._done += 1
        if on_terminal() or now - self._last_line < _SECONDS or not trainer.is_global_zero:
            return
        self._last_line = now
        LOG.info(
            "Epoch %d/%s, batch %d/%s: loss %.3f, %.2f s per batch",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            batch_idx + 1,
            trainer.num_training_batches,
            float(outputs["loss"]),
            (now - self._epoch_start) / self._done,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Log the results of the epoch."""
        skipped = _skipped_images(trainer)
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        parts = [
            f"{label} {float(metrics[name]):.3f}"
            for name, label in _SHOWN
            if name in metrics and not (module.stopping and name.startswith("val/"))
        ]
        if not module.stopping:
            parts += _ap_per_class(trainer)
        if skipped:
            parts.append(f"{skipped} images skipped")
        seconds = time.monotonic() - self._epoch_start
        LOG.info(
            "Epoch %d/%s: %s, %.0f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            ", ".join(parts),
            seconds,
        )


def _ap_per_class(trainer: pl.Trainer) -> list[str]:
    """Return the AP of each class in the last validation, if there are only a few classes."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CocoAP) and callback.result is not None:
            classes = callback.result.classes
            if not 2 <= len(classes) <= _MAX_CLASSES:
                return []
            each = ", ".join(
                f"{printable(one.name)} {f'{one.ap:.3f}' if one.objects else '-'}"
                for one in classes
            )
            return [f"AP per class ({each})"]
    return []


def _skipped_images(trainer: pl.Trainer) -> int:
    """Return how many images all ranks have skipped in this epoch."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DetectionDataModule) or data.on_error != "skip":
        return 0
    data.collect_skipped()
    return data.num_skipped
