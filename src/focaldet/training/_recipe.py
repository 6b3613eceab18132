"""Recipes: a model, training options and a transform that go together, chosen for a dataset."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from focaldet._checks import check_choice, check_range, printable, shortened
from focaldet.config import RetinaNetConfig
from focaldet.datasets import AnnotationTable, train_transform
from focaldet.datasets._anchor_fit import fit_anchors, share_reached
from focaldet.datasets.checks._anchors import objects_at_input
from focaldet.training._optimisation import PAPER_BATCH
from focaldet.training._options import TrainingOptions
from focaldet.training._runs import read_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from focaldet.datasets import DetectionDataset

__all__ = ["RECIPES", "Recipe", "recipe"]

RECIPES = ("paper", "small_data")
"""The names of the recipes."""

_OF_THE_MACHINE = {"accelerator", "devices", "nodes"}
_MANY_IMAGES = 10_000
_UPDATES = 1800  # of "small_data"; docs/accuracy.md: 25 epochs of 292 images, 4 per update
_EPOCHS = (12, 100)
_BATCH = 4
_LONG_SIDE = 1333 / 800  # of the paper, relative to the short one
_SHORT_SIDES = {"cpu": 320, "gpu": 800}  # the largest that "small_data" chooses by itself
_SIZE_STEP = 32
_STAGES = 5  # of a backbone
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of the name of a class, such as LeftHand or left_hand
_FEWEST_OBJECTS = 20  # from which anchors are chosen
_GB_PER_IMAGE = 2.0  # GPU memory that a ResNet-50 needs at 800 x 1333 in float32, rounded up


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, training options and a transform that go together.

    Attributes:
        name: "paper" or "small_data".
        config: The model. Build it with ``RetinaNet.from_config(config, backbone_weights="imagenet")``.
        options: The options for :func:`~focaldet.training.train`.
        train_transform: The transform for the training dataset. It takes its sizes from the config.
        transform_options: The options that it was built with, other than sizes.
        reasons: What was chosen and why, a sentence each.

    .. versionadded:: 0.3.0
    """

    name: str
    config: RetinaNetConfig
    options: TrainingOptions
    train_transform: Any = field(repr=False)
    transform_options: dict[str, Any]
    reasons: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(self.reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return the name, the transform's options and the reasons, for ``train(..., recipe=...)``."""
        return {
            "name": self.name,
            "transform_options": self.transform_options,
            "reasons": list(self.reasons),
        }


def recipe(
    name: Literal["paper", "small_data"] | None = None,
    data: AnnotationTable | DetectionDataset | None = None,
    *,
    start: RetinaNetConfig | None = None,
    like: str | os.PathLike[str] | None = None,
    device: str | None = None,
    devices: int = 1,
    backbone: str | None = None,
    min_size: int | None = None,
    epochs: int | None = None,
    config_changes: Mapping[str, Any] | None = None,
    option_changes: Mapping[str, Any] | None = None,
    transform_options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Choose a model, training options and a transform for a dataset.

    "paper" is the detector and the training of the paper: ResNet-50, images of 800 pixels, SGD with
    16 images per update, 12 epochs, one scale, horizontal flips. "small_data" is what did best on a
    few hundred photos in the comparison of the documentation (Accuracy): GroupNorm in the head, the
    GIoU loss, AdamW with a cosine schedule, clipped gradients, averaged weights, and about 1,800
    updates. Its anchors follow from the objects of the data at the input size, and the images are not
    mirrored if the name of a class says left or right. ``Recipe.reasons`` explains each choice.

    Args:
        name: "paper" or "small_data". None chooses "paper" for 10,000 images or more on a GPU, and
            otherwise "small_data".
        data: The training data. Its classes become those of the model.
        start: The config of a detector that is fine-tuned. Its architecture, losses and sizes are kept,
            except for ``config_changes``. Load it with
            ``RetinaNet.from_pretrained(..., class_names=recipe.config.class_names)``.
        like: Folder of a run whose model, options and transform are used instead of a recipe's. The
            machine's options (``accelerator``, ``devices``, ``nodes``) are not taken from it, and
            ``name`` and ``start`` cannot be combined with it.
        device: Device to train on, such as "cpu" or "cuda". None means "cuda" if it is available,
            otherwise "cpu".
        devices: Number of devices of all machines together.
        backbone: Name of the backbone. None means "resnet50", or "mobilenet_v2" for "small_data" on a
            CPU.
        min_size: Length of the short side of an image, in pixels. None means 800 for "paper". For
            "small_data", it means the median short side of the images, at most 800, or 320 on a CPU.
        epochs: Number of passes over the training data. None means 12 for "paper", and otherwise as
            many as give about 1,800 updates, from 12 to 100.
        config_changes: Fields of :class:`~focaldet.RetinaNetConfig` that replace the recipe's.
        option_changes: Fields of :class:`~focaldet.training.TrainingOptions` that replace the recipe's.
        transform_options: Options of :func:`~focaldet.datasets.train_transform` that replace the
            recipe's, other than sizes, which follow from the config.

    Raises:
        TypeError: If ``data`` is missing, arguments are combined that exclude each other, or a change
            is not a field or option.
        ValueError: If the name is unknown, the data has no images or no classes, or a value is out of
            range.
        FileNotFoundError: If ``like`` is not the folder of a run.
        TrainingError: If the files of that run are damaged.

    .. versionadded:: 0.3.0
    """
    if data is None:
        raise TypeError("data is required: the classes and sizes of a recipe follow from it.")
    table = data if isinstance(data, AnnotationTable) else data.table
    if not len(table) or not table.class_names:
        missing = "no images" if not len(table) else "no classes"
        raise ValueError(f"data {str(table.source)!r} has {missing}, so there is nothing to train.")
    check_range("devices", devices, 1)
    if name is not None:
        check_choice("name", name, RECIPES)
    if epochs is not None:
        check_range("epochs", epochs, 1)
    changes = dict(config_changes or {})
    changes |= {"num_classes": len(table.class_names), "class_names": table.class_names}
    for field_name, value in (("backbone", backbone), ("min_size", min_size)):
        if value is not None:
            changes.setdefault(field_name, value)
    wanted = dict(option_changes or {})
    if epochs is not None:
        wanted.setdefault("epochs", epochs)
    TrainingOptions(**wanted)  # raises for wrong values before the recipe calculates with them
    job = _Job(
        table=table,
        sizes=data.image_sizes if isinstance(data, AnnotationTable) else data.sizes,
        kind="cpu" if _device_type(device) == "cpu" else "gpu",
        devices=devices,
        config=changes,
        options=wanted,
        transform=dict(transform_options or {}),
        reasons=[],
    )
    if like is not None:
        if name is not None or start is not None:
            raise TypeError(
                "like cannot be combined with name or start, because the run has its own."
            )
        plan = job.like(like)
    else:
        chosen = job.choose_name(name)
        plan = job.paper(start) if chosen == "paper" else job.small_data(start)
    options = TrainingOptions(**{**plan.options, **wanted})
    transform = {**plan.transform, **job.transform}
    return Recipe(
        name=plan.name,
        config=plan.config,
        options=options,
        train_transform=train_transform(plan.config, **transform),
        transform_options=transform,
        reasons=(*job.reasons, _outcome(plan.config, options, len(table), devices)),
    )


class _Plan(NamedTuple):
    """What a recipe chooses, with the changes to the config and without those to the options."""

    name: str
    config: RetinaNetConfig
    options: dict[str, Any]
    transform: dict[str, Any]


class _Job(NamedTuple):
    """What the choices depend on, and the reasons for them."""

    table: AnnotationTable
    sizes: npt.NDArray[np.int32]  # [I, 2], (height, width), 0 where it is not known
    kind: Literal["cpu", "gpu"]
    devices: int
    config: dict[str, Any]  # the caller's changes, with the classes
    options: dict[str, Any]  # the caller's changes
    transform: dict[str, Any]  # the caller's changes
    reasons: list[str]

    def choose_name(self, name: str | None) -> str:
        """Return the name of the recipe."""
        count = len(self.table)
        if name is not None:
            self.reasons.append(
                f"Recipe {name!r}, as requested. The data has {_counted(count, 'image')}."
            )
            return name
        if count >= _MANY_IMAGES and self.kind == "gpu":
            self.reasons.append(
                f"Recipe 'paper', because there is a GPU and the data has {count:,} images "
                f"({_MANY_IMAGES:,} or more)."
            )
            return "paper"
        reason = (
            f"the data has only {_counted(count, 'image')} (fewer than {_MANY_IMAGES:,})"
            if count < _MANY_IMAGES
            else "there is no GPU"
        )
        self.reasons.append(f"Recipe 'small_data', because {reason}.")
        return "small_data"

    def paper(self, start: RetinaNetConfig | None) -> _Plan:
        """Return the settings of the paper."""
        if start is None:
            config = self._sized(RetinaNetConfig.paper()).replace(**self.config)
        else:
            config = self._fine_tuned(start)
        batch, accumulate = self._split_batch()
        options = {"batch_size": batch, "accumulate": accumulate, "workers": self._workers()}
        return _Plan("paper", config, options, {"min_scale": 1.0})

    def small_data(self, start: RetinaNetConfig | None) -> _Plan:
        """Return the settings that did best on a few hundred photos."""
        config = self._network_for_small_data() if start is None else self._fine_tuned(start)
        self._explain_stages(config)
        batch = self.options.get("batch_size", max(1, _BATCH // self.devices))
        options = {
            "epochs": self._epochs(batch * self.options.get("accumulate", 1) * self.devices),
            "batch_size": batch,
            "optimizer": "adamw",
            "lr": self._lr(config, start),
            "schedule": "cosine",
            "clip_norm": 10.0,
            "ema_decay": 0.99,
            "workers": self._workers(),
        }
        return _Plan("small_data", config, options, self._flips())

    def _explain_stages(self, config: RetinaNetConfig) -> None:
        trained = config.trainable_stages
        if trained < _STAGES:
            self.reasons.append(
                f"The first {_STAGES - trained} of {_STAGES} stages of the backbone are frozen, as is usual "
                "with pretrained weights."
            )
        elif self.options.get("freeze") is None:
            self.reasons.append("All stages of the backbone train.")
        if self.options.get("freeze") is not None:
            self.reasons.append(f"Frozen, as requested: {shortened(self.options['freeze'])}.")

    def _epochs(self, per_update: int) -> int:
        """Return the number of epochs, and explain it together with the images per update."""
        low, high = _EPOCHS
        updates = math.ceil(len(self.table) / per_update)
        epochs = min(max(round(_UPDATES / updates), low), high)
        self.reasons.append(
            f"Updates use {_counted(per_update, 'image')}, "
            + (
                "as requested."
                if {"batch_size", "accumulate"} & self.options.keys()
                else "so that there are many updates even with few images."
            )
        )
        if "epochs" in self.options:
            why = "as requested"
        elif epochs == high:
            why = "the most that this recipe chooses"
        elif epochs == low:
            why = "the fewest that this recipe chooses"
        else:
            why = (
                f"because {_counted(len(self.table), 'image')} make {_counted(updates, 'update')} per "
                f"epoch, and this recipe aims at {_UPDATES:,} in all"
            )
        self.reasons.append(f"Epochs: {self.options.get('epochs', epochs)}, {why}.")
        return epochs

    def _lr(self, config: RetinaNetConfig, start: RetinaNetConfig | None) -> float:
        """Return the learning rate. That of MobileNetV2 was measured; the others are AdamW's usual one."""
        measured = start is None and config.backbone == "mobilenet_v2"
        lr = 1e-3 if measured else 1e-4
        if "lr" in self.options:
            why = "as requested"
        elif "optimizer" in self.options and self.options["optimizer"] != "adamw":
            why = "which is meant for AdamW, so set another for a different optimizer"
        elif measured:
            why = "which was tried with AdamW and this backbone"
        elif start is not None:
            why = "because a trained detector needs only small steps"
        else:
            why = "the usual one for AdamW"
        chosen = self.options.get("lr", lr)
        value = "the optimizer's default" if chosen is None else f"{chosen:g}"
        self.reasons.append(f"Learning rate: {value}, {why}.")
        return lr

    def _flips(self) -> dict[str, Any]:
        """Return the options of the transform about mirroring, with those of the caller explained."""
        sided = [name for name in self.table.class_names if _has_a_side(name)]
        found: dict[str, Any] = {"horizontal_flip": 0.0} if sided else {}
        flips = {**found, **self.transform}
        across, upright = flips.get("horizontal_flip", 0.5), flips.get("vertical_flip", 0.0)
        if across and upright:
            how = "Images are mirrored left to right and top to bottom at random"
        elif across or upright:
            way = "left to right" if across else "top to bottom"
            how = f"Images are mirrored {way} at random"
        else:
            how = "Images are not mirrored"
        if {"horizontal_flip", "vertical_flip"} & self.transform.keys():
            why = "as requested"
        elif sided:
            why = f"because left and right differ in the class {printable(shortened(sided[0]))}"
        else:
            why = "and not top to bottom, because most scenes have an upright direction"
        self.reasons.append(f"{how}, {why}.")
        return found

    def like(self, folder: str | os.PathLike[str]) -> _Plan:
        """Return the settings of a run."""
        run = read_run(folder)
        config = self._changed(RetinaNetConfig.from_json(json.dumps(run.config)))
        known = {one.name for one in dataclasses.fields(TrainingOptions)} - _OF_THE_MACHINE
        options = {name: run.options[name] for name in run.options.keys() & known}
        self.reasons.append(f"Model and options of the run in {str(run.folder)!r}.")
        unknown = sorted(run.options.keys() - known - _OF_THE_MACHINE)
        if unknown:
            self.reasons.append(f"This focaldet does not know its options {', '.join(unknown)}.")
        notes = run.recipe or {}
        transform = notes.get("transform_options")
        if not isinstance(transform, dict):
            self.reasons.append(
                "The run does not say how its images were transformed; the usual transform is used."
            )
            transform = {}
        name = notes.get("name")
        return _Plan(name if isinstance(name, str) else "like", config, options, transform)

    def _changed(self, config: RetinaNetConfig) -> RetinaNetConfig:
        """Return a config with the caller's changes; a new min_size changes max_size in proportion."""
        long_side = {}
        if "min_size" in self.config:
            long_side["max_size"] = round(
                self.config["min_size"] * config.max_size / config.min_size
            )
        return config.replace(**{**long_side, **self.config})

    def _fine_tuned(self, start: RetinaNetConfig) -> RetinaNetConfig:
        config = self._changed(start)
        self.reasons.append(
            f"The model starts from a trained detector, so it keeps its network ({config.backbone}) "
            f"and image size ({config.min_size}/{config.max_size} pixels) unless you change them."
        )
        return config

    def _network_for_small_data(self) -> RetinaNetConfig:
        config = RetinaNetConfig.paper().replace(
            head_norm="group", head_init="fan_in", box_loss="giou", box_loss_weight=2.0
        )
        if self.kind == "cpu":
            config = config.replace(backbone="mobilenet_v2", fpn_channels=64)
        if "backbone" not in self.config:
            which = "no GPU, and a ResNet-50 would take too long" if self.kind == "cpu" else "a GPU"
            self.reasons.append(f"Backbone {config.backbone}, because there is {which}.")
        config = self._sized(config, self._short_side()).replace(**self.config)
        if {"anchor_sizes", "octave_scales", "aspect_ratios"} & self.config.keys():
            return config
        return self._anchors(config)

    def _anchors(self, config: RetinaNetConfig) -> RetinaNetConfig:
        """Return the config with anchors for the objects of the data, at the size of the input."""
        if config.criterion != "retinanet" or config.assigner != "iou":
            self.reasons.append(
                "Anchors stay as they are, because they are not assigned to objects by IoU thresholds."
            )
            return config
        objects, _ = objects_at_input(self.table, self.sizes, config)
        if len(objects.boxes) < _FEWEST_OBJECTS:
            self.reasons.append(
                f"Anchors stay as they are, because the data has only "
                f"{_counted(len(objects.boxes), 'object')} of a known size in a known image size."
            )
            return config
        strides = [2**level for level in config.map_levels]
        fitted = fit_anchors(objects, config, strides)
        before = share_reached(objects, config, strides)
        share = f"{before:.1%} of the objects with an IoU of {config.positive_threshold:g} or more"
        if fitted == config:
            self.reasons.append(f"Anchors of the default sizes, because they reach {share}.")
            return config
        sizes = ", ".join(f"{size:g}" for size in fitted.anchor_sizes)
        ratios = ""
        if fitted.aspect_ratios != config.aspect_ratios:
            ratios = f" (height / width: {', '.join(f'{r:g}' for r in fitted.aspect_ratios)})"
        self.reasons.append(
            f"Anchors of {sizes} pixels{ratios}, because they reach "
            f"{share_reached(objects, fitted, strides):.1%} and the default ones {share}."
        )
        return fitted

    def _sized(self, config: RetinaNetConfig, min_size: int | None = None) -> RetinaNetConfig:
        """Return the config with a min_size, or that of the caller, and a max_size to go with it."""
        size = self.config.get("min_size", min_size)
        if size is None:
            return config
        return config.replace(min_size=size, max_size=round(size * _LONG_SIDE))

    def _short_side(self) -> int | None:
        """Return the length that the short side of an image gets, or None if the caller says it."""
        if "min_size" in self.config:
            return None
        longest = _SHORT_SIDES[self.kind]
        known = self.sizes[(self.sizes > 0).all(axis=1)]
        median = int(np.median(known.min(axis=1))) if len(known) else longest
        size = min(longest, max(_SIZE_STEP, round(median / _SIZE_STEP) * _SIZE_STEP))
        where = "without a GPU" if self.kind == "cpu" else "on a GPU"
        why = (
            f"the most that this recipe uses {where}"
            if size == longest
            else f"because half of the images have {median} or fewer"
        )
        self.reasons.append(f"Images are resized to a short side of {size} pixels, {why}.")
        return size

    def _split_batch(self) -> tuple[int, int]:
        """Return images per step and device, and steps per update, for 16 images per update."""
        wanted = max(1, PAPER_BATCH // self.devices)
        if "batch_size" in self.options:
            batch = self.options["batch_size"]
            return batch, max(1, wanted // batch)
        fits = 2 if self.kind == "cpu" else _images_that_fit()
        batch = max(size for size in range(1, wanted + 1) if wanted % size == 0 and size <= fits)
        if batch < wanted:
            self.reasons.append(
                f"{_counted(batch, 'image')} per step and {wanted // batch} steps per update, because "
                "more images per step may not fit into memory."
            )
        return batch, wanted // batch

    def _workers(self) -> int:
        cores = (os.cpu_count() or 1) // (1 if self.kind == "cpu" else self.devices)
        return max(1, min(4, cores - 1))


def _has_a_side(name: str) -> bool:
    """Return whether the name of a class says left or right, so that its mirror image is not one.

    >>> [_has_a_side(name) for name in ("turn left", "RightHand", "leftover")]
    [True, True, False]
    """
    return bool({"left", "right"} & {word.lower() for word in _WORD.findall(name)})


def _device_type(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type


def _images_that_fit() -> int:
    """Return the number of images per step that a GPU's memory can hold, at the paper's size."""
    if not torch.cuda.is_available():
        return 2
    gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    return max(1, int(gigabytes / _GB_PER_IMAGE))


def _outcome(config: RetinaNetConfig, options: TrainingOptions, images: int, devices: int) -> str:
    per_update = options.batch_size * options.accumulate * devices
    updates = options.epochs * math.ceil(images / per_update)
    return (
        f"Training a {config.backbone} at {config.min_size} pixels for "
        f"{_counted(options.epochs, 'epoch')}, about {_counted(updates, 'update')} of "
        f"{_counted(per_update, 'image')}."
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
