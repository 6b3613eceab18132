"""Settings of a training run, other than the model and the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from focaldet._checks import check_choice, check_names, check_number, check_range, shortened

__all__ = ["TrainingOptions"]

_CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "on_error": ("raise", "skip"),
    "schedule": ("step", "cosine", "constant"),
    "sampler": ("shuffle", "repeat_factor"),
    "precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true"),
    "channels_last": (True, False),
}
_MAX_WEIGHT = 1e4  # of a class; no dataset needs more


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
        backbone_lr_decay: Factor in (0, 1] between the learning rates of neighbouring stages of the
            backbone. Its last stage trains with ``lr * backbone_lr_decay``, the one before it with
            ``lr * backbone_lr_decay ** 2``, and so on; the rest of the model trains with ``lr``. See
            :func:`parameter_groups`. 1 means one rate for everything.
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
        channels_last: Whether the weights of convolutions are in the channels_last memory format during
            training, and with them the maps of the network. Losses are equal except for rounding, and
            checkpoints do not depend on it. On two CPU cores in float32 it was slower for a ResNet-50
            and as fast for a MobileNetV2. On a GPU with half precision it is often faster, but this
            was not measured.
        accelerator: Lightning's name of the accelerator, such as "auto", "cpu" or "gpu".
        devices: Number of devices per machine, or "auto" for all.
        nodes: Number of machines.
        workers: Number of processes per device that read images. 0 reads them between the steps.
        on_error: "raise" stops the run at an image file that is missing or unreadable. "skip" logs it
            once and trains on another image instead; see :class:`DetectionDataModule`.
        check_images: Whether to open every image file at its header before the first step. It takes
            about 5 minutes per million images on a fast disk and finds missing and unreadable files,
            and files whose size differs from the annotated one.
        patience: Number of epochs without a higher validation AP after which the run stops. Epochs
            before the AP is above 0 for the first time do not count. None trains all epochs.
        class_weights: Weights of classes by name, for classes that are rare or important; those not
            named have weight 1. The classification loss of the objects of a class, at the anchors
            assigned to them, is multiplied by its weight. The loss of background and the box loss do
            not change, and neither does what the losses are divided by.
        sampler: "shuffle" takes every image once per epoch. "repeat_factor" repeats images with rare
            classes: one with a class that occurs in a share f of the images occurs
            ``sqrt(repeat_threshold / f)`` times per epoch, if that is more than 1.
        repeat_threshold: Share of the images below which a class counts as rare, in (0, 1]. The
            default is for datasets such as LVIS with a thousand classes; for a few classes, 0.1 to 0.5
            is useful.
        freeze: Parts of the model that do not train, in addition to those that
            ``config.trainable_stages`` has frozen: names of submodules, such as ``("backbone",)``,
            ``("backbone", "fpn")`` or ``("head.class_tower",)``; or a number of stages of the backbone,
            counted from the first. Norms in frozen parts keep their statistics. None freezes nothing
            more.
        seed: Seed of everything that is random.
        checkpoint_every: Number of updates between checkpoints within an epoch. None saves only after
            each epoch.
        log_every: Number of updates between rows of ``metrics.csv``. Each epoch has at least one row.
        pictures: Number of validation images to draw after each epoch. 0 draws none.

    .. versionadded:: 0.3.0
        ``on_error``, ``check_images``, ``patience``, ``class_weights``, ``sampler``,
        ``repeat_threshold``, ``freeze``, ``channels_last`` and ``backbone_lr_decay``.

    Raises:
        ValueError: If an option is out of range or unknown.
        TypeError: If an option has the wrong type.

    >>> TrainingOptions(epochs=24, ema_decay=0.999).schedule
    'step'
    """

    epochs: int = 12
    batch_size: int = 16
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    backbone_lr_decay: float = 1.0
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    schedule: Literal["step", "cosine", "constant"] = "step"
    warmup_steps: int | None = None
    clip_norm: float | None = None
    ema_decay: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    channels_last: bool = False
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    workers: int = 2
    on_error: Literal["raise", "skip"] = "raise"
    check_images: bool = True
    patience: int | None = None
    class_weights: Mapping[str, float] | None = None
    sampler: Literal["shuffle", "repeat_factor"] = "shuffle"
    repeat_threshold: float = 0.001
    freeze: Sequence[str] | int | None = None
    seed: int = 0
    checkpoint_every: int | None = None
    log_every: int = 10
    pictures: int = 4

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "nodes", "log_every"):
            check_range(name, getattr(self, name), 1)
        for name in ("weight_decay", "workers", "seed", "pictures"):
            check_range(name, getattr(self, name), 0)
        for name, low in (("warmup_steps", 0), ("checkpoint_every", 1), ("patience", 1)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low)
        for name in ("lr", "clip_norm"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, low_open=True)
        if self.ema_decay is not None:
            check_range("ema_decay", self.ema_decay, 0, 1)
        check_range("repeat_threshold", self.repeat_threshold, 0, 1, low_open=True)
        check_range("backbone_lr_decay", self.backbone_lr_decay, 0, 1, low_open=True)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        _check_devices(self.devices)
        if self.class_weights is not None:
            object.__setattr__(self, "class_weights", _checked_weights(self.class_weights))
        object.__setattr__(self, "freeze", _checked_freeze(self.freeze))


def _check_devices(devices: object) -> None:
    if not isinstance(devices, str):
        check_range("devices", devices, 1)  # type: ignore[arg-type]  # reports other types
    elif devices != "auto":
        raise ValueError(f"devices must be a number of devices or 'auto', got {devices!r}.")


def _checked_freeze(freeze: Sequence[str] | int | None) -> tuple[str, ...] | int | None:
    if freeze is None:
        return None
    if isinstance(freeze, int):
        check_range("freeze", freeze, 0)
        return freeze
    return check_names("freeze", (freeze,) if isinstance(freeze, str) else freeze)


def _checked_weights(weights: object) -> dict[str, float]:
    if not isinstance(weights, Mapping):
        raise TypeError(
            "class_weights must map class names to weights, such as {'owl': 3.0}, got "
            f"{shortened(weights)}."
        )
    for name, weight in weights.items():
        check_number(f"class_weights[{name!r}]", weight)
        check_range(f"class_weights[{name!r}]", weight, 0, _MAX_WEIGHT)
    return {name: float(weight) for name, weight in weights.items()}
