"""A checkpoint for other classes: which layers are kept, and which a model starts anew."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, NamedTuple

from focaldet._checks import must_be
from focaldet.pretrained._checkpoint import check_fit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from focaldet.config import RetinaNetConfig
    from focaldet.pretrained._checkpoint import Checkpoint

__all__ = ["LoadingReport", "for_other_classes", "load_into"]

_logger = logging.getLogger(__name__)

_CLASS_OUTPUT, _BOX_OUTPUT = "head.class_logits", "head.box_deltas"


class LoadingReport(NamedTuple):
    """What became of a checkpoint's tensors, by their keys.

    Attributes:
        kept: in the checkpoint and in the model.
        dropped: in the checkpoint alone, or replaced.
        new: initialised by the model, still to be trained.

    >>> print(LoadingReport(("fpn.p7.bias",), (), ("head.class_logits.bias",)))
    1 tensor kept; dropped: nothing; new, to be trained: head.class_logits
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.kept)} tensor{'s' * (len(self.kept) != 1)} kept; "
            f"dropped: {_layers(self.dropped)}; new, to be trained: {_layers(self.new)}"
        )


def _layers(keys: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(key.rpartition(".")[0] for key in keys)) or "nothing"


def for_other_classes(
    checkpoint: Checkpoint,
    config: RetinaNetConfig | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Checkpoint:
    """Describe the model that takes a checkpoint's tensors and knows other classes.

    The class output is new unless the classes are the checkpoint's: as many, and of the same names in
    the same order where both have names. Rows of classes that coincide are not carried over. Where
    the anchors are others (``octave_scales``, ``aspect_ratios`` or a field ``anchor_…``), class output
    and box output are new; where ``box_weights`` are, the box output.

    Args:
        checkpoint: what was read.
        config: instead of the checkpoint's; must agree with the other arguments.
        num_classes: None takes the number of names.
        class_names: None takes the config's; or the checkpoint's, if ``num_classes`` is its own.

    Returns:
        The same tensors, the model's config, and in ``renewed`` the layers that are new.

    Raises:
        ValueError: arguments that contradict one another.
        TypeError: one string for ``class_names``.
    """
    if isinstance(class_names, str):
        raise TypeError(must_be("class_names", "a sequence of names", repr(class_names)))
    names = None if class_names is None else tuple(class_names)
    old = checkpoint.config
    if num_classes is None:
        num_classes = old.num_classes if names is None else len(names)
    if config is not None and config.num_classes != num_classes:
        condition = f"config.num_classes, {config.num_classes}, where a config is given"
        raise ValueError(must_be("num_classes", condition, num_classes))
    if config is not None and config.class_names and names not in (None, config.class_names):
        raise ValueError(must_be("class_names", "those of config, where it has names", names))
    if names is None:
        names = config.class_names if config is not None else _names_if(old, num_classes)
    new = (config or old).replace(num_classes=num_classes, class_names=names)

    same_anchors = _anchors_of(old) == _anchors_of(new)
    same_names = new.class_names is None or old.class_names in (None, new.class_names)
    renewed = []
    if not (same_anchors and same_names and old.num_classes == new.num_classes):
        renewed.append(_CLASS_OUTPUT)
    if not (same_anchors and old.box_weights == new.box_weights):
        renewed.append(_BOX_OUTPUT)
    return checkpoint._replace(config=new, renewed=tuple(renewed))


def _anchors_of(config: RetinaNetConfig) -> dict[str, object]:
    fields = dataclasses.asdict(config)
    names = ("octave_scales", "aspect_ratios")
    return {
        key: value for key, value in fields.items() if key.startswith("anchor_") or key in names
    }


def _names_if(config: RetinaNetConfig, num_classes: int) -> tuple[str, ...] | None:
    return config.class_names if config.num_classes == num_classes else None


def load_into(model: nn.Module, checkpoint: Checkpoint) -> LoadingReport:
    """Load a checkpoint's tensors into the model of its config, but for the layers that are new.

    Args:
        model: keeps its own values in ``checkpoint.renewed``.
        checkpoint: all its other tensors must fit.

    Returns:
        The report, which is logged too (logger ``focaldet``, as a warning) if a layer is new.

    Raises:
        ValueError: other tensors missing, left over, or of another shape.
    """
    prefixes = tuple(f"{layer}." for layer in checkpoint.renewed)
    own = model.state_dict()
    new = {key: value for key, value in own.items() if key.startswith(prefixes)}
    kept = {k: v for k, v in checkpoint.tensors.items() if not k.startswith(prefixes)}
    try:
        check_fit(own, kept | new)
    except ValueError as error:
        if not checkpoint.source:
            raise
        raise ValueError(f"{checkpoint.source!r}: {error}") from error
    model.load_state_dict(kept | new)
    dropped = tuple(key for key in checkpoint.tensors if key not in kept)
    report = LoadingReport(tuple(kept), dropped, tuple(new))
    if new:
        _logger.warning("from_pretrained: %s", report)
    return report
