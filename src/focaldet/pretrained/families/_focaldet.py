"""focaldet's own tensors outside a folder: bare state dicts, and the checkpoints of training runs.

Their configuration is in the file, as in the checkpoints of a run, or next to it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile, SuggestedConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = [
    "CONFIG_KEY",
    "NAME",
    "convert",
    "is_own_config",
    "missing",
    "num_classes_of",
    "own_config",
    "suggest",
]

NAME = "focaldet"
CONFIG_KEY = "focaldet_config"  # the entry of a run's checkpoint with the text of its config.json

_CHARACTERISTIC = (
    "head.class_logits.weight",
    "head.class_logits.bias",
    "head.box_deltas.weight",
    "head.box_deltas.bias",
)
_CONFIG_FILES = ("config.json", "../config.json")


def missing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the characteristic keys of the family that a file lacks."""
    return [key for key in _CHARACTERISTIC if key not in tensors]


def suggest(file: CheckpointFile) -> SuggestedConfig:
    """Return the configuration in a file or next to it.

    Raises:
        CheckpointError: If there is none, or it is invalid.
    """
    config = own_config(file)
    if config is None:
        raise CheckpointError(
            "It contains the tensors of a focaldet model, but there is no config.json of focaldet next to "
            "it. Pass config=, or keep the file in its folder."
        )
    return SuggestedConfig(config)


def convert(file: CheckpointFile, config: RetinaNetConfig) -> dict[str, Tensor]:  # noqa: ARG001
    """Return the tensors, which have focaldet's key names already."""
    return dict(file.tensors)


def own_config(file: CheckpointFile) -> RetinaNetConfig | None:
    """Return the configuration in a file or next to it, or None if there is none of focaldet.

    Raises:
        CheckpointError: If it is invalid.
    """
    text = file.extras.get(CONFIG_KEY)
    if isinstance(text, str):
        return RetinaNetConfig.from_json(text)
    for name in _CONFIG_FILES:
        if is_own_config(file.beside.get(name, "")):
            return RetinaNetConfig.from_json(file.beside[name])
    return None


def is_own_config(text: str) -> bool:
    """Return whether a text is a ``config.json`` of focaldet, of any version.

    >>> is_own_config('{"format_version": 1}'), is_own_config('{"model_type": "detr"}')
    (True, False)
    """
    try:
        values = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "format_version" in values


def num_classes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a head, whatever its anchors.

    Raises:
        CheckpointError: If its class and box outputs do not fit together.
    """
    classes, deltas = (
        tensors[f"head.{layer}.weight"].shape[:1].numel()
        for layer in ("class_logits", "box_deltas")
    )
    if deltas < 4 or deltas % 4 or classes < 1 or classes % (deltas // 4):
        raise CheckpointError(
            f"head.class_logits has {classes} channels and head.box_deltas {deltas}, which are not those of "
            "one number of anchors per cell."
        )
    return classes // (deltas // 4)
