"""What a checkpoint holds once read, and whether it fits a model."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from focaldet._checks import must_be

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

__all__ = ["Checkpoint", "CheckpointFile", "Family", "check_fit"]


class CheckpointFile(NamedTuple):
    """What was read from a file.

    Attributes:
        tensors: the state dict, in the file's key names.
        extras: what lay beside it.
        name: of the file; projects say there what the tensors don't.
    """

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = MappingProxyType({})
    name: str = ""


class Checkpoint(NamedTuple):
    """A RetinaNet at rest.

    Attributes:
        config: describes the model that takes the tensors.
        tensors: its state dict, in focaldet's key names.
        renewed: layers that the model initialises itself, whatever the tensors hold for them.
        source: the path of what was read, for messages.
    """

    config: RetinaNetConfig
    tensors: dict[str, Tensor]
    renewed: tuple[str, ...] = ()
    source: str = ""


class Family(Protocol):
    """Published checkpoints of one project, which share their key names."""

    NAME: str

    def missing(self, tensors: Mapping[str, Tensor], /) -> list[str]:
        """Return the characteristic keys that a file lacks; none if it is the family's."""

    def convert(self, file: CheckpointFile, config: RetinaNetConfig | None = None, /) -> Checkpoint:
        """Turn the family's file into a checkpoint, of its own config or another."""


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless a state dict has exactly the keys and shapes that a model wants.

    Args:
        wanted: the model's own state dict.
        tensors: the one to be loaded.

    Raises:
        ValueError: keys missing, left over, or of another shape. The message names a few of them
            and the likely cause.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = sorted(
        f"{key} {list(tensors[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted.keys() & tensors.keys()
        if tensors[key].shape != wanted[key].shape
    )
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        cause = _likely_cause([*missing, *unexpected], misshapen)
        raise ValueError(
            must_be("tensors", "those of this architecture", "keys " + "; ".join(problems), cause)
        )


def _likely_cause(strange: list[str], misshapen: list[str]) -> str:
    """Name the option that explains which keys are missing, unexpected or of another shape."""
    for option, parts, keys, others in (
        ("backbone_norm", ("num_batches_tracked",), strange, misshapen),
        ("head_norm` or `head_depth", ("tower",), strange, misshapen),
        ("normalizer", ("criterion.",), strange, misshapen),
        ("num_classes", ("head.class_logits",), misshapen, strange),
        ("p6_from", ("fpn.p6",), misshapen, strange),
        ("octave_scales` or `aspect_ratios", ("class_logits", "box_deltas"), misshapen, strange),
    ):
        if keys and not others and all(any(part in key for part in parts) for key in keys):
            return f"Likely cause: another `{option}`."
    if any(key.startswith("backbone.") for key in [*strange, *misshapen]):
        return "Likely cause: another `backbone`."
    return "Likely cause: a checkpoint of another model."
