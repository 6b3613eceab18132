"""What a run saves: the state to resume from, and its best model."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO

from focaldet._atomic import atomic_write
from focaldet._checks import check_range, is_number, shortened
from focaldet.pretrained import Checkpoint as Weights
from focaldet.pretrained import save_checkpoint
from focaldet.pretrained.families._focaldet import CONFIG_KEY
from focaldet.training._data_module import DetectionDataModule
from focaldet.training._logging import LOG
from focaldet.training._resuming import check_count, explain_damage

if TYPE_CHECKING:
    import os
    from types import FrameType

__all__ = [
    "AtomicCheckpointIO",
    "BestModel",
    "LastCheckpoint",
    "weights_to_save",
]

_ASK_EVERY = 10  # batches; in distributed training, ranks ask each other only so often about a stop


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints to a temporary file and rename it, so that none is ever incomplete.

    Lightning's ``TorchCheckpointIO`` writes to the system's temporary folder first. If that is on
    another disk, the file is then copied over the previous checkpoint, which a full disk or a killed
    process leaves truncated.

    .. versionchanged:: 0.3.0
        Renamed from ``WholeFiles``.
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

    def load_checkpoint(
        self, path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If it does not exist.
            TrainingError: If it is damaged.
        """
        with explain_damage(path):
            return super().load_checkpoint(Path(path), *args, **kwargs)


class LastCheckpoint(Checkpoint):
    """Save the state of the run after each epoch, every few updates, and when it is stopped.

    After SIGTERM or Ctrl-C, the current step is finished, the state is saved and the process exits
    with status 128 + signal; a second signal ends the process at once. In distributed training all
    ranks stop after the same step. A validation in progress is abandoned and its results are not
    used.

    Args:
        path: Path of the checkpoint file, which is overwritten each time.
        every: Number of updates between checkpoints within an epoch. None saves only after each
            epoch.

    Raises:
        ValueError: If ``every`` is less than 1.
        SystemExit: After a signal, once the state has been saved.
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
        """Install the signal handlers; Lightning restores the previous ones after training."""
        del trainer, module

        def stop(number: int, frame: FrameType | None) -> None:
            del frame
            if self._signal is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._signal = number
            LOG.info("Received %s; stopping after this step.", signal.Signals(number).name)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the state if a checkpoint is due or the run is to stop."""
        del module, outputs, batch
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            # After the last batch, on_train_epoch_end saves. Between updates, a checkpoint would
            # lose the gradients accumulated so far.
            return
        ask = (batch_idx + 1) % _ASK_EVERY == 0 or trainer.world_size == 1
        if ask and self._asked_to_stop(trainer):
            self._save_and_leave(trainer)
        elif self.every is not None and trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Abandon the validation if the run is to stop."""
        del batch
        if batch_idx % _ASK_EVERY == 0 or trainer.world_size == 1:
            module.stopping = module.stopping or self._asked_to_stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Save the state."""
        del module
        if self._asked_to_stop(trainer):
            self._save_and_leave(trainer)
        else:
            self._save(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Exit if the run is to stop; by now the metrics of the last step have been logged."""
        if self._leaving:
            raise SystemExit(128 + (self._signal or signal.SIGTERM))

    def on_train_epoch_start(self, *_: Any) -> None:
        """Exit if the run is to stop."""
        self.on_train_batch_start()

    def on_train_end(self, *_: Any) -> None:
        """Exit if the run is to stop."""
        self.on_train_batch_start()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add the model's configuration, so that ``RetinaNet.from_pretrained`` can read the file."""
        del trainer
        with contextlib.suppress(ValueError):  # a part that no config describes
            checkpoint[CONFIG_KEY] = pl_module.model.current_config().to_json()

    def _asked_to_stop(self, trainer: pl.Trainer) -> bool:
        asked: bool = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        return asked

    def _save(self, trainer: pl.Trainer) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, DetectionDataModule):
            data.collect_skipped()  # only the first rank's state is saved
        trainer.save_checkpoint(self.path)

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        self._save(trainer)
        self._leaving = True
        LOG.info(
            "Stopped by %s; saved the state after update %d to %r. Resume the run to continue.",
            signal.Signals(self._signal or signal.SIGTERM).name,
            trainer.global_step,
            str(self.path),
        )


class BestModel(pl.Callback):
    """Save the model with the highest validation AP, to be read by ``RetinaNet.from_pretrained``.

    If the run averages the weights, the averaged weights are saved.

    Args:
        folder: Folder to save the model to, as ``config.json`` and ``model.safetensors``.
        monitor: Name of the logged value to maximise.

    Attributes:
        best: Highest value so far, or None before the first validation.
        epoch: Epoch of the highest value, counted from 1, or None before the first validation.
    """

    def __init__(self, folder: str | os.PathLike[str], *, monitor: str = "val/AP") -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.best: float | None = None
        self.epoch: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Save the model if it is better than all before."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or module.stopping or (self.best is not None and value <= self.best):
            return
        self.best, self.epoch = float(value), trainer.current_epoch + 1
        if trainer.is_global_zero:
            save_checkpoint(
                Weights(module.model.current_config(), weights_to_save(trainer, module)),
                self.folder,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the highest value and its epoch."""
        return {"best": self.best, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the highest value and its epoch."""
        best, epoch = state_dict["best"], state_dict["epoch"]
        if best is not None:
            check_count("epoch of the best model", epoch)
            if not is_number(best) or not math.isfinite(best):
                raise ValueError(f"the highest value so far is {shortened(best)}")
        self.best, self.epoch = best, epoch


def weights_to_save(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return the state dict of the model, with averaged weights if the run averages them."""
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
