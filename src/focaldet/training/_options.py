"""Settings of a training run, other than the model and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from focaldet._checks import check_choice, check_range

__all__ = ["TrainingOptions"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Settings of a training run.

    The defaults are the paper's, except that the paper fixes a total batch of 16 images on 8 devices
    and 90,000 steps. It mentions neither gradient clipping nor weight averaging nor a warm-up; its
    authors' code warms up for 500 steps.

    Args:
        epochs: Number of passes over the training data.
        batch_size: Images per step on each device.
        accumulate: Number of steps whose gradients are accumulated into one update. An update uses
            ``batch_size * accumulate * devices * nodes`` images. The loss is normalised within each
            step.
        optimizer: "sgd" (with momentum 0.9) or "adamw".
        lr: Learning rate after the warm-up. None uses 0.01 for "sgd" and 1e-4 for "adamw", both for
            16 images per update, and scales it linearly with the images per update.
        weight_decay: Weight decay of the optimiser.
        decay_norm_and_bias: Whether normalisation parameters and biases have weight decay, as in the
            paper.
        schedule: "step" divides the learning rate by 10 after 2/3 and after 8/9 of all updates,
            "cosine" lowers it to 0, and "constant" leaves it unchanged.
        warmup_steps: Number of updates over which the learning rate rises linearly. None uses 500, or
            a tenth of all updates if that is less.
        clip_norm: Maximum gradient norm. None disables clipping.
        ema_decay: Decay of the exponential moving average of the weights, usually 0.999 to 0.9998.
            The average is validated and saved. None disables averaging.
        precision: Lightning's name of the precision: "32-true", "bf16-mixed", "16-mixed" or
            "bf16-true".
        accelerator: Lightning's name of the accelerator, such as "auto", "cpu" or "gpu".
        devices: Number of devices per machine, or "auto" for all.
        nodes: Number of machines.
        workers: Number of processes per device that read images. 0 reads them between the steps.
        on_error: "raise" stops the run at an image file that is missing or unreadable. "skip" logs it
            once and trains on another image instead; see :class:`DetectionDataModule`.
        seed: Seed of everything that is random.
        checkpoint_every: Number of updates between checkpoints within an epoch. None saves only after
            each epoch.
        log_every: Number of updates between rows of ``metrics.csv``. Each epoch has at least one row.
        pictures: Number of validation images to draw after each epoch. 0 draws none.

    .. versionadded:: 0.3.0
        ``on_error``.

    Raises:
        ValueError: If an option is out of range or unknown.

    >>> TrainingOptions(epochs=24, ema_decay=0.999).schedule
    'step'
    """

    epochs: int = 12
    batch_size: int = 16
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    schedule: Literal["step", "cosine", "constant"] = "step"
    warmup_steps: int | None = None
    clip_norm: float | None = None
    ema_decay: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    workers: int = 2
    on_error: Literal["raise", "skip"] = "raise"
    seed: int = 0
    checkpoint_every: int | None = None
    log_every: int = 10
    pictures: int = 4

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "nodes", "log_every"):
            check_range(name, getattr(self, name), 1)
        for name in ("weight_decay", "workers", "seed", "pictures"):
            check_range(name, getattr(self, name), 0)
        if self.lr is not None:
            check_range("lr", self.lr, 0, low_open=True)
        if self.warmup_steps is not None:
            check_range("warmup_steps", self.warmup_steps, 0)
        if self.clip_norm is not None:
            check_range("clip_norm", self.clip_norm, 0, low_open=True)
        if self.ema_decay is not None:
            check_range("ema_decay", self.ema_decay, 0, 1)
        if self.checkpoint_every is not None:
            check_range("checkpoint_every", self.checkpoint_every, 1)
        if isinstance(self.devices, str):
            if self.devices != "auto":
                raise ValueError(
                    f"devices must be a number of devices or 'auto', got {self.devices!r}."
                )
        else:
            check_range("devices", self.devices, 1)
        check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        check_choice("on_error", self.on_error, ("raise", "skip"))
        check_choice("schedule", self.schedule, ("step", "cosine", "constant"))
        precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
        check_choice("precision", self.precision, precisions)
