"""Load a checkpoint from any source: find it, read it, and convert it to a config and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import Checkpoint
from focaldet.pretrained._folder import load_folder
from focaldet.pretrained._other_classes import for_other_classes
from focaldet.pretrained._reading import read_checkpoint
from focaldet.pretrained._sources import locate
from focaldet.pretrained.families import FAMILIES

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet.config import RetinaNetConfig
    from focaldet.pretrained._checkpoint import CheckpointFile, Family

__all__ = ["convert", "load_checkpoint"]


def load_checkpoint(
    source: str | os.PathLike[str],
    config: RetinaNetConfig | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Checkpoint:
    """Load a checkpoint in any supported format.

    Args:
        source: A folder that ``RetinaNet.save_pretrained`` wrote, a file of a supported project
            (:mod:`focaldet.pretrained.families`), a published name (:func:`list`), or a repository on
            the Hugging Face Hub.
        config: The configuration to use. None uses the one that the checkpoint contains or suggests.
        num_classes: The number of classes, to detect other classes than the checkpoint does. See
            :func:`for_other_classes`.
        class_names: The names of those classes.

    Raises:
        FileNotFoundError: If the source does not exist, or is a folder without a checkpoint.
        DownloadError: If a published file could not be downloaded.
        CheckpointError: If a file is damaged, would run code, or is in no supported format.
        ValueError: If the arguments contradict each other.
    """
    path = locate(source)
    if num_classes is None and class_names is None:
        return _read(path, config)._replace(source=str(path))
    checkpoint = _read(path)._replace(source=str(path))
    return for_other_classes(checkpoint, config, num_classes=num_classes, class_names=class_names)


def _read(path: Path, config: RetinaNetConfig | None = None) -> Checkpoint:
    if path.is_dir():
        return load_folder(path, config)
    file = read_checkpoint(path)
    family = _family_of(file, path)
    try:
        return convert(file, family, config)
    except KeyError as error:  # a key that the family's files always have
        raise CheckpointError(
            f"Cannot load {str(path)!r}: it looks like a RetinaNet of {family.NAME}, but has no tensor "
            f"for focaldet's {error}."
        ) from error
    except (IndexError, RuntimeError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"Cannot load {str(path)!r}: it has the keys of a RetinaNet of {family.NAME}, but not its "
            "shapes."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"Cannot load {str(path)!r}. {error}") from error


def convert(
    file: CheckpointFile, family: Family, config: RetinaNetConfig | None = None
) -> Checkpoint:
    """Convert a file of a family, with the given config or the one that the file suggests."""
    if config is None:
        config = family.suggest(file).config
    return Checkpoint(config, family.convert(file, config))


def _family_of(file: CheckpointFile, path: Path) -> Family:
    """Return the family that recognises a file.

    Raises:
        CheckpointError: If none does.
    """
    tried = []
    for family in FAMILIES:
        missing = family.missing(file.tensors)
        if not missing:
            return family
        tried.append(f"{family.NAME} (no key {missing[0]!r})")
    count = len(file.tensors)
    some = ", ".join(repr(key) for key in sorted(file.tensors)[:3])
    raise CheckpointError(
        f"{str(path)!r} ({count} tensor{'s' * (count != 1)}: {some}{', …' if count > 3 else ''}) is "
        f"not a RetinaNet in a supported format. Tried: {'; '.join(tried)}."
    )
