"""Checkpoints in memory: as read from a file, and as a model loads them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

__all__ = ["Checkpoint", "CheckpointFile", "Family"]


class CheckpointFile(NamedTuple):
    """The contents of a checkpoint file, before conversion.

    Attributes:
        tensors: The state dict, with the file's own key names.
        extras: The other entries of the file, next to the state dict.
        name: The file's name. Some projects record there what the tensors don't show.
    """

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = MappingProxyType({})
    name: str = ""


class Checkpoint(NamedTuple):
    """A configuration with the weights that belong to it.

    Attributes:
        config: The configuration of the model that loads the tensors.
        tensors: The model's state dict, with focaldet's key names.
        renewed: The layers that keep the model's own initialisation, whatever the tensors hold for
            them.
        source: The path that was read, for messages.
    """

    config: RetinaNetConfig
    tensors: dict[str, Tensor]
    renewed: tuple[str, ...] = ()
    source: str = ""


class Family(Protocol):
    """The checkpoint format of one project, recognised by its key names."""

    NAME: str

    def missing(self, tensors: Mapping[str, Tensor], /) -> list[str]:
        """Return the characteristic keys that a file lacks. If none, the family can convert it."""

    def convert(self, file: CheckpointFile, config: RetinaNetConfig | None = None, /) -> Checkpoint:
        """Convert a file of the family, with the given config or the one that the file suggests."""
