"""Adapt a checkpoint to other classes: decide which layers are kept and which start from scratch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from focaldet._checks import check_names, shortened
from focaldet.errors import CheckpointError
from focaldet.pretrained.families._focaldet import num_classes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.config import RetinaNetConfig
    from focaldet.pretrained._checkpoint import Checkpoint

__all__ = ["for_other_classes", "without_background"]

_CLASS_OUTPUT, _BOX_OUTPUT = "head.class_logits", "head.box_deltas"


def for_other_classes(
    checkpoint: Checkpoint,
    config: RetinaNetConfig | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Checkpoint:
    """Describe a model that starts from a checkpoint's weights and detects other classes.

    The class output layer is new unless the classes are the checkpoint's: the same number and, where
    both have names, the same names in the same order. Weights of classes that coincide are not
    carried over. With different anchors (``octave_scales``, ``aspect_ratios`` or a field
    ``anchor_…``), the class and box output layers are both new; with a different ``box_encoding`` or
    ``box_weights``, the box output layer is.

    Args:
        checkpoint: The checkpoint to start from.
        config: The configuration of the new model, which must agree with the other arguments. None
            uses the checkpoint's.
        num_classes: The number of classes. None uses the number of names.
        class_names: The names of the classes. None uses the config's, or the checkpoint's if
            ``num_classes`` is its own number.

    Returns:
        The same tensors with the new model's config; ``renewed`` lists the new layers.

    Raises:
        ValueError: If the arguments contradict each other.
        TypeError: If ``class_names`` is a single string.
    """
    names = None if class_names is None else check_names("class_names", class_names)
    old = checkpoint.config
    if config is not None:
        _check_agreement(config, num_classes, names)
    if num_classes is None:
        num_classes = old.num_classes if names is None else len(names)
    if names is None:
        names = config.class_names if config is not None else _names_if(old, num_classes)
    new = (config or old).replace(num_classes=num_classes, class_names=names)

    same_anchors = _anchors_of(old) == _anchors_of(new)
    same_names = new.class_names is None or old.class_names in (None, new.class_names)
    renewed = []
    if not (same_anchors and same_names and old.num_classes == new.num_classes):
        renewed.append(_CLASS_OUTPUT)
    same_boxes = (old.box_encoding, old.box_weights) == (new.box_encoding, new.box_weights)
    if not (same_anchors and same_boxes):
        renewed.append(_BOX_OUTPUT)
    return checkpoint._replace(config=new, renewed=tuple(renewed))


def without_background(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the first channel of each anchor's classes, a background.

    Its class is dropped from the config, with its name.

    Raises:
        CheckpointError: If the checkpoint has only one class.
    """
    tensors, config = dict(checkpoint.tensors), checkpoint.config
    num_classes = num_classes_of(tensors)
    if num_classes < 2:
        raise CheckpointError(
            "With drop_background=True no class remains, because the head has only one."
        )
    for kind in ("weight", "bias"):
        values = tensors[f"{_CLASS_OUTPUT}.{kind}"]
        rows = values.reshape(-1, num_classes, *values.shape[1:])
        tensors[f"{_CLASS_OUTPUT}.{kind}"] = rows[:, 1:].flatten(0, 1).clone()
    names = config.class_names
    names = names[1:] if names is not None and len(names) == num_classes else None
    return checkpoint._replace(
        config=config.replace(num_classes=num_classes - 1, class_names=names), tensors=tensors
    )


def _check_agreement(
    config: RetinaNetConfig, num_classes: int | None, names: tuple[str, ...] | None
) -> None:
    """Raise unless the classes given as arguments are those of the config."""
    if num_classes is not None and num_classes != config.num_classes:
        raise ValueError(
            f"num_classes is {num_classes!r}, but config.num_classes is {config.num_classes}."
        )
    if names is None:
        return
    if num_classes is None and len(names) != config.num_classes:
        raise ValueError(
            f"class_names has {len(names)} {'entry' if len(names) == 1 else 'entries'}, but "
            f"config.num_classes is {config.num_classes}."
        )
    if config.class_names and names != config.class_names:
        raise ValueError(
            f"class_names is {shortened(names)}, but config.class_names is "
            f"{shortened(config.class_names)}."
        )


def _anchors_of(config: RetinaNetConfig) -> dict[str, object]:
    fields = dataclasses.asdict(config)
    names = ("octave_scales", "aspect_ratios")
    return {
        key: value for key, value in fields.items() if key.startswith("anchor_") or key in names
    }


def _names_if(config: RetinaNetConfig, num_classes: int) -> tuple[str, ...] | None:
    return config.class_names if config.num_classes == num_classes else None
