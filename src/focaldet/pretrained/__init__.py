"""Checkpoints: reading them safely, and turning every known family's into a config and tensors.

A family (:class:`Family`) is a module with a ``NAME``, a function ``missing(tensors)`` that says
which of its characteristic keys a file lacks (none: the file is the family's), and a function
``convert(tensors, config)`` that gives a :class:`Checkpoint`. To add one, list it in ``FAMILIES``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._checks import must_be
from focaldet.pretrained import directory, torchvision_family
from focaldet.pretrained.checkpoint import Checkpoint, Family, check_fit
from focaldet.pretrained.reading import read_tensors

if TYPE_CHECKING:
    import os

    from focaldet.config import RetinaNetConfig

__all__ = ["FAMILIES", "Checkpoint", "Family", "check_fit", "load_checkpoint", "save_checkpoint"]

FAMILIES: tuple[Family, ...] = (torchvision_family,)
"""The families of which a lone file can be."""

save_checkpoint = directory.save


def load_checkpoint(
    source: str | os.PathLike[str], config: RetinaNetConfig | None = None
) -> Checkpoint:
    """Read a checkpoint of any known kind.

    Args:
        source: a directory that ``RetinaNet.save_pretrained`` wrote, or a file of a known family.
        config: instead of the one that the checkpoint brings or suggests.

    Raises:
        FileNotFoundError: nothing is there, or a directory without a checkpoint.
        ValueError: a damaged file, one that would run code, or one of no known family.
    """
    path = Path(source)
    if path.is_dir():
        return directory.load(path, config)
    if not path.is_file():
        condition = "a directory written by save_pretrained or a checkpoint file"
        raise FileNotFoundError(
            must_be("source", condition, f"{str(path)!r}, which does not exist")
        )
    tensors = read_tensors(path)
    tried = []
    for family in FAMILIES:
        missing = family.missing(tensors)
        if not missing:
            return family.convert(tensors, config)
        tried.append(f"{family.NAME} (no key {missing[0]!r})")
    few = ", ".join(repr(key) for key in sorted(tensors)[:3])
    raise ValueError(
        must_be(
            "source",
            "a RetinaNet of a known family",
            f"{str(path)!r} with {len(tensors)} tensors ({few}, …)",
            f"Tried: {'; '.join(tried)}.",
        )
    )
