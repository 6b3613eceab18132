"""What is written next to a torchvision RetinaNet: the ``config.json`` of DeepForest's repositories.

DeepForest publishes torchvision models whose classes and thresholds are in a ``config.json``. Its
training checkpoints have the classes in the entry ``label_dict``.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from focaldet._checks import shortened
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from focaldet.config import RetinaNetConfig
    from focaldet.pretrained._checkpoint import CheckpointFile

__all__ = ["Description", "read_description", "with_thresholds"]

_logger = logging.getLogger(__name__)

_CONFIG = "config.json"
_THRESHOLDS = {
    "score_thresh": "score_threshold",
    "nms_thresh": "nms_threshold",
    "detections_per_img": "max_detections",
    "topk_candidates": "pre_nms_top_k",
}
_REMEDY = "Correct it, or pass config= to ignore it."


class Description(NamedTuple):
    """What the neighbours of a checkpoint say about it.

    Attributes:
        class_names: The names of the classes in the order of the labels, or None.
        thresholds: Fields of ``config.json`` for post-processing, with their values.
    """

    class_names: tuple[str, ...] | None
    thresholds: dict[str, Any]


def read_description(file: CheckpointFile, num_classes: int) -> Description:
    """Read the ``config.json`` next to a checkpoint, and the entry ``label_dict`` in it.

    Fields that are not understood are named in a warning of the logger ``focaldet``.

    Args:
        file: The checkpoint.
        num_classes: The number of classes of its head.

    Raises:
        CheckpointError: If the file is not a JSON object, contradicts the head, or does not give one
            name per class.
    """
    where = f"{_CONFIG} next to {file.name!r}"
    values = _read(file, where)
    count = values.get("num_classes", num_classes)
    if count != num_classes or isinstance(count, bool):
        raise CheckpointError(
            f"num_classes is {shortened(count)} in {where}, but the head of the checkpoint has "
            f"{num_classes} {'class' if num_classes == 1 else 'classes'}. {_REMEDY}"
        )
    names = None
    if "label_dict" in values:
        names = _names_by_label(values["label_dict"], f"label_dict in {where}", num_classes)
    elif "id2label" in values:
        names = _names_by_id(values["id2label"], f"id2label in {where}", num_classes)
    elif file.extras.get("label_dict") is not None:
        source = f"The entry label_dict of {file.name!r}"
        names = _names_by_label(file.extras["label_dict"], source, num_classes)
    return Description(names, {field: values[field] for field in _THRESHOLDS if field in values})


def with_thresholds(
    config: RetinaNetConfig, file: CheckpointFile, thresholds: dict[str, Any]
) -> tuple[RetinaNetConfig, set[str]]:
    """Return the config with the thresholds of a :class:`Description`, and the names of its fields.

    Raises:
        CheckpointError: If a value is out of range or has the wrong type.
    """
    fields = set()
    for theirs, value in thresholds.items():
        fields.add(_THRESHOLDS[theirs])
        try:
            config = config.replace(**{_THRESHOLDS[theirs]: value})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{theirs} is {shortened(value)} in {_CONFIG} next to {file.name!r}: {error} {_REMEDY}"
            ) from error
    return config, fields


def _read(file: CheckpointFile, where: str) -> dict[str, Any]:
    """Return the fields that are understood and not null."""
    text = file.beside.get(_CONFIG)
    if text is None:
        return {}
    try:
        values = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not valid JSON ({type(error).__name__}). {_REMEDY}"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{where} must contain one JSON object, but contains {shortened(values)}. {_REMEDY}"
        )
    if "format_version" in values:
        _logger.warning("Ignored %s: it describes a checkpoint of focaldet.", where)
        return {}
    known = {"num_classes", "label_dict", "id2label", *_THRESHOLDS}
    unknown = sorted(values.keys() - known)
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        listed = ", ".join(shortened(field, 50) for field in unknown[:8])
        _logger.warning(
            "Ignored %d field%s of %s that focaldet does not understand: %s%s.",
            *(len(unknown), "s" * (len(unknown) != 1), where, listed, more),
        )
    return {field: values[field] for field in known & values.keys() if values[field] is not None}


def _names_by_label(labels: object, source: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of a dictionary from names to labels, in the order of the labels."""
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels):
        raise CheckpointError(
            f"{source} must map the name of each class to its label, got {shortened(labels)}. {_REMEDY}"
        )
    by_label = {
        label: name
        for name, label in labels.items()
        if isinstance(label, int) and not isinstance(label, bool)
    }
    return _ordered(by_label, labels, source, num_classes)


def _names_by_id(labels: object, source: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of a dictionary from labels, as strings of digits, to names."""
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise CheckpointError(
            f"{source} must map each label to the name of its class, got {shortened(labels)}. {_REMEDY}"
        )
    by_label = {int(label): name for label, name in labels.items() if _is_label(label)}
    return _ordered(by_label, labels, source, num_classes)


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _ordered(
    by_label: dict[int, str], labels: dict[str, Any], source: str, num_classes: int
) -> tuple[str, ...]:
    if len(labels) != num_classes or by_label.keys() != set(range(num_classes)):
        expected = "label 0" if num_classes == 1 else f"the labels 0 to {num_classes - 1} once each"
        raise CheckpointError(
            f"{source} must have {expected}, as the head of the checkpoint has {num_classes} "
            f"{'class' if num_classes == 1 else 'classes'}, got {shortened(labels)}. {_REMEDY}"
        )
    return tuple(by_label[label] for label in range(num_classes))
