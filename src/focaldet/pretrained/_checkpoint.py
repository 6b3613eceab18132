"""Checkpoints in memory: as read from a file, and as a model loads them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

__all__ = ["Checkpoint", "CheckpointFile", "Family", "SuggestedConfig"]


class CheckpointFile(NamedTuple):
    """The contents of a checkpoint file, before conversion.

    Attributes:
        tensors: The state dict, with the file's own key names.
        extras: The other entries of the file, next to the state dict.
        name: The file's name. Some projects record there what the tensors don't show.
        beside: The texts of the files that lie next to it and may describe the model, such as
            ``config.json``, by name.
    """

    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = MappingProxyType({})
    name: str = ""
    beside: Mapping[str, str] = MappingProxyType({})


class SuggestedConfig(NamedTuple):
    """The configuration that a file suggests.

    Attributes:
        config: The configuration.
        assumed: The fields that the file says nothing about, so that they have the values that are
            usual in its project.
    """

    config: RetinaNetConfig
    assumed: tuple[str, ...] = ()


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

    def suggest(self, file: CheckpointFile, /) -> SuggestedConfig:
        """Return the configuration that a file of the family suggests."""

    def convert(self, file: CheckpointFile, config: RetinaNetConfig, /) -> dict[str, Tensor]:
        """Convert the tensors of a file to those of the model that the config describes."""
