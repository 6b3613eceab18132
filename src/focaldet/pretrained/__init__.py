"""Pretrained checkpoints: download, read safely, convert, load and save.

:class:`~focaldet.RetinaNet` does all of this through ``from_pretrained`` and ``save_pretrained``;
the functions here are the steps. The formats of other projects are in
:mod:`focaldet.pretrained.families`.
"""

from __future__ import annotations

from focaldet.errors import DownloadError
from focaldet.pretrained._checkpoint import Checkpoint, CheckpointFile, SuggestedConfig
from focaldet.pretrained._downloads import PublishedFile, cache_folder, fetch
from focaldet.pretrained._fitting import LoadingReport, check_fit, load_into
from focaldet.pretrained._folder import save_checkpoint
from focaldet.pretrained._hub import push_checkpoint
from focaldet.pretrained._loading import load_checkpoint
from focaldet.pretrained._other_classes import for_other_classes
from focaldet.pretrained._published import PublishedTable, PublishedWeights, list_published
from focaldet.pretrained._reading import read_tensors
from focaldet.pretrained.families import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "CheckpointFile",
    "DownloadError",
    "Family",
    "LoadingReport",
    "PublishedFile",
    "PublishedTable",
    "PublishedWeights",
    "SuggestedConfig",
    "cache_folder",
    "check_fit",
    "fetch",
    "for_other_classes",
    "list",
    "load_checkpoint",
    "load_into",
    "push_checkpoint",
    "read_tensors",
    "save_checkpoint",
]

list = list_published  # noqa: A001  # read as focaldet.pretrained.list()
