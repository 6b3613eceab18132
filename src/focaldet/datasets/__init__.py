"""Datasets for training and evaluation in many formats: COCO, Pascal VOC, YOLO, CSV, exports of tools.

A reader (:func:`read_annotations` for any format, :func:`read_splits` for all splits, or a format's own,
such as :func:`read_coco`) returns an :class:`AnnotationTable` with everything that the files contain.
:class:`DetectionDataset` turns it into images and targets, and :func:`check_dataset` looks for mistakes
in it. :func:`split_dataset` divides a table, and :func:`write_annotations` writes tables. torchvision is
imported only when a transform is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from focaldet.datasets._batching import AspectRatioBatchSampler, collate, seed_worker
from focaldet.datasets._dataset import DetectionDataset
from focaldet.datasets._table import AnnotationTable
from focaldet.datasets.readers import read_annotations, read_splits
from focaldet.datasets.readers._coco import read_coco
from focaldet.datasets.readers._csv import read_csv
from focaldet.datasets.readers._labelme import read_labelme
from focaldet.datasets.readers._voc import read_voc
from focaldet.datasets.readers._yolo import read_yolo

if TYPE_CHECKING:
    from focaldet.datasets._augment import train_transform
    from focaldet.datasets._gallery import draw_errors, draw_gallery
    from focaldet.datasets._split import split_dataset
    from focaldet.datasets.checks import DatasetReport, check_dataset
    from focaldet.datasets.writers import write_annotations

__all__ = [
    "AnnotationTable",
    "AspectRatioBatchSampler",
    "DatasetReport",
    "DetectionDataset",
    "check_dataset",
    "collate",
    "draw_errors",
    "draw_gallery",
    "read_annotations",
    "read_coco",
    "read_csv",
    "read_labelme",
    "read_splits",
    "read_voc",
    "read_yolo",
    "seed_worker",
    "split_dataset",
    "train_transform",
    "write_annotations",
]

_HOME = {
    "DatasetReport": "checks",
    "check_dataset": "checks",
    "draw_errors": "_gallery",
    "draw_gallery": "_gallery",
    "split_dataset": "_split",
    "train_transform": "_augment",
    "write_annotations": "writers",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, if its imports are heavy or rarely needed (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
