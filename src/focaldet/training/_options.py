"""How to train: everything but the model and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from focaldet._checks import check_choice, check_range

__all__ = ["TrainingOptions"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train.

    The defaults are the paper's, but for its fixed batch of 16 on 8 devices and 90,000 steps.

    Args:
        epochs: times that every image is seen.
        batch_size: images a step on each device.
        accumulate: steps whose gradients make one update. The real batch is ``batch_size *
            accumulate * devices * nodes``; the loss is normalised within each step.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        lr: learning rate of the real batch, after the warm-up. None takes 0.01 (SGD; AdamW 1e-4)
            for 16 images and scales it linearly with the real batch.
        weight_decay: of the optimiser.
        decay_norm_and_bias: whether norms and biases decay too, as in the paper.
        schedule: "step" divides the rate by 10 after 2/3 and after 8/9 of all updates, "cosine"
            brings it to 0, "constant" leaves it.
        warmup_steps: updates in which the rate rises linearly; None takes 500, or a tenth of all
            updates where that is less.
        clip_norm: greatest norm of the gradient; None does not clip.
        ema_decay: average the weights exponentially with this decay, validate and keep the
            average; None does not. 0.999 to 0.9998 are common.
        precision: of pytorch-lightning, as "32-true" or "bf16-mixed".
        accelerator: "auto", "cpu", "gpu" ...
        devices: how many of them on each machine, or "auto" for all.
        nodes: how many machines.
        workers: processes a device that read images; 0 reads them between steps.
        seed: all that is random follows from it.
        checkpoint_every: updates between checkpoints within an epoch; None writes them at an
            epoch's end only.
        log_every: updates between rows of ``metrics.csv``; each epoch has one at least.
        pictures: validation images of which pictures are drawn; 0 draws none.

    Deviation: the paper does not clip, average, or give a warm-up; its authors' code warms up for
    500 steps.

    Raises:
        ValueError: an option out of its range.

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
        if self.devices != "auto":
            check_range("devices", self.devices, 1)
        check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        check_choice("schedule", self.schedule, ("step", "cosine", "constant"))
        precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
        check_choice("precision", self.precision, precisions)
