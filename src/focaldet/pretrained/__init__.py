"""Checkpoints: read them safely, and convert those of other projects to a config and tensors.

The formats of other projects are in :mod:`focaldet.pretrained.families`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from focaldet._checks import must_be
from focaldet.errors import DownloadError
from focaldet.pretrained import _directory
from focaldet.pretrained._checkpoint import Checkpoint, CheckpointFile, check_fit
from focaldet.pretrained._downloads import cache_folder
from focaldet.pretrained._hub import push
from focaldet.pretrained._published import PublishedTable, PublishedWeights, list_published
from focaldet.pretrained._reading import read_checkpoint, read_tensors
from focaldet.pretrained._sources import locate
from focaldet.pretrained._transfer import LoadingReport, for_other_classes, load_into
from focaldet.pretrained.families import FAMILIES, Family

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet.config import RetinaNetConfig

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "CheckpointFile",
    "DownloadError",
    "Family",
    "LoadingReport",
    "PublishedTable",
    "PublishedWeights",
    "cache_folder",
    "check_fit",
    "for_other_classes",
    "list",
    "load_checkpoint",
    "load_into",
    "push_checkpoint",
    "read_tensors",
    "save_checkpoint",
]

save_checkpoint = _directory.save
push_checkpoint = push
list = list_published  # noqa: A001


def load_checkpoint(
    source: str | os.PathLike[str],
    config: RetinaNetConfig | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known kind.

    Args:
        source: a directory that ``RetinaNet.save_pretrained`` wrote; a file of a known family; a
            published name, see :func:`list`; or a repository on the Hugging Face Hub.
        config: instead of the one that the checkpoint brings or suggests.
        num_classes: other classes, for which :func:`load_into` begins layers anew.
        class_names: their names.

    Raises:
        FileNotFoundError: nothing is there, or a directory without a checkpoint.
        DownloadError: a published file that could not be fetched.
        ValueError: a damaged file, one that would run code, one of no known family, or arguments
            that contradict one another.
    """
    path = locate(source)
    if num_classes is None and class_names is None:
        return _read(path, config)._replace(source=str(path))
    checkpoint = _read(path)._replace(source=str(path))
    return for_other_classes(checkpoint, config, num_classes=num_classes, class_names=class_names)


def _read(path: Path, config: RetinaNetConfig | None = None) -> Checkpoint:
    if path.is_dir():
        return _directory.load(path, config)
    file = read_checkpoint(path)
    tried = []
    for family in FAMILIES:
        missing = family.missing(file.tensors)
        if not missing:
            try:
                return family.convert(file, config)
            except ValueError as error:
                raise ValueError(f"{str(path)!r}: {error}") from error
        tried.append(f"{family.NAME} (no key {missing[0]!r})")
    few = ", ".join(repr(key) for key in sorted(file.tensors)[:3])
    raise ValueError(
        must_be(
            "source",
            "a RetinaNet of a known family",
            f"{str(path)!r} with {len(file.tensors)} tensors ({few}, …)",
            f"Tried: {'; '.join(tried)}.",
        )
    )
