"""What a run keeps: its state, to go on with, and its best model."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO

from focaldet._atomic import atomic_write
from focaldet._checks import check_range
from focaldet.pretrained import Checkpoint as Weights
from focaldet.pretrained import save_checkpoint

if TYPE_CHECKING:
    import os
    from types import FrameType

__all__ = ["BestModel", "LastCheckpoint", "WholeFiles", "kept_weights"]

_LOG = logging.getLogger("focaldet.training")
_ASK_EVERY = 10  # batches between the questions to other ranks whether to stop


class WholeFiles(TorchCheckpointIO):
    """Write checkpoints beside their place and rename them: a failure leaves the last one whole.

    pytorch-lightning's own way goes through the system's temporary folder; where that is another
    disk, the file is copied over the old one, and a full disk or a kill leaves a part of it.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint."""
        del storage_options
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            torch.save(checkpoint, temporary)


class LastCheckpoint(Checkpoint):
    """Keep the run's last state: at an epoch's end, every so many updates, and before it is stopped.

    SIGTERM and Ctrl-C let the step end, write the state and end the process with the exit status
    128 + signal; a second one ends it at once. In distributed training all ranks stop after the same
    step. A validation that is going on is cut short, and left out.

    Args:
        path: the file.
        every: updates between two of them within an epoch; None writes none there.

    Raises:
        ValueError: ``every`` below 1.
        SystemExit: after a signal, once the state is written.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int | None = None) -> None:
        super().__init__()
        if every is not None:
            check_range("every", every, 1)
        self.path = Path(path)
        self.every = every
        self._signal: int | None = None
        self._leaving = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Listen to signals; pytorch-lightning gives them back their old meaning at the end."""
        del trainer, module

        def stop(number: int, frame: FrameType | None) -> None:
            del frame
            if self._signal is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._signal = number
            _LOG.info("%s: stopping after this step.", signal.Signals(number).name)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the state if it is time to, or if the run is to stop."""
        del module, outputs, batch
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # soon on_train_epoch_end does; gradients of half an update would be lost
        stop = (batch_idx + 1) % _ASK_EVERY == 0 or trainer.world_size == 1
        if stop and self._asked_to_stop(trainer):
            self._save_and_leave(trainer)
        elif self.every is not None and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Cut the validation short if the run is to stop."""
        del batch
        if batch_idx % _ASK_EVERY == 0 or trainer.world_size == 1:
            module.stopping = module.stopping or self._asked_to_stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Write the state."""
        del module
        if self._asked_to_stop(trainer):
            self._save_and_leave(trainer)
        else:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, *_: Any) -> None:
        """End the process if it is to stop; what was logged in the last step is written by now."""
        if self._leaving:
            raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def on_train_epoch_start(self, *_: Any) -> None:
        """The same between epochs."""
        self.on_train_batch_start()

    def on_train_end(self, *_: Any) -> None:
        """The same at the end."""
        self.on_train_batch_start()

    def _asked_to_stop(self, trainer: pl.Trainer) -> bool:
        asked: bool = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        return asked

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._leaving = True
        _LOG.info(
            "%s: saved %s after update %d; the run goes on from there if it is resumed.",
            signal.Signals(self._signal or signal.SIGTERM).name,
            self.path,
            trainer.global_step,
        )


class BestModel(pl.Callback):
    """Keep the model with the highest validation AP, as ``RetinaNet.from_pretrained`` takes it.

    Where weights are averaged, it is their average.

    Args:
        folder: written by ``save_pretrained``: ``config.json`` and ``model.safetensors``.
        monitor: what is logged and to be highest.

    Attributes:
        best: the highest value, None before the first validation.
        epoch: of which it is, from 1.
    """

    def __init__(self, folder: str | os.PathLike[str], *, monitor: str = "val/AP") -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.best: float | None = None
        self.epoch: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Write the model if it is better than any before."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or module.stopping or (self.best is not None and value <= self.best):
            return
        self.best, self.epoch = float(value), trainer.current_epoch + 1
        if trainer.is_global_zero:
            save_checkpoint(
                Weights(module.model.current_config(), kept_weights(trainer, module)), self.folder
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best so far."""
        return {"best": self.best, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best so far."""
        self.best, self.epoch = state_dict["best"], state_dict["epoch"]


def kept_weights(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return the model's state dict, averaged where the run averages."""
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_save_checkpoint(trainer, module, checkpoint)
    prefix = "model."
    return {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
