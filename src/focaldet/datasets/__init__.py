"""Datasets for training and evaluation in COCO, Pascal VOC, YOLO and CSV format.

A reader (:func:`read_coco`, :func:`read_voc`, :func:`read_yolo`, :func:`read_csv`, or
:func:`read_annotations` for any format) returns an :class:`AnnotationTable` with everything that the
files contain. :class:`DetectionDataset` turns it into images and targets, and :func:`check_dataset`
looks for mistakes in it. torchvision is imported only when a transform is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from focaldet.datasets._batching import AspectRatioBatchSampler, collate, seed_worker
from focaldet.datasets._dataset import DetectionDataset
from focaldet.datasets._table import AnnotationTable
from focaldet.datasets.readers import read_annotations
from focaldet.datasets.readers._coco import read_coco
from focaldet.datasets.readers._csv import read_csv
from focaldet.datasets.readers._voc import read_voc
from focaldet.datasets.readers._yolo import read_yolo

if TYPE_CHECKING:
    from focaldet.datasets._augment import train_transform
    from focaldet.datasets._gallery import draw_gallery
    from focaldet.datasets.checks import DatasetReport, check_dataset

__all__ = [
    "AnnotationTable",
    "AspectRatioBatchSampler",
    "DatasetReport",
    "DetectionDataset",
    "check_dataset",
    "collate",
    "draw_gallery",
    "read_annotations",
    "read_coco",
    "read_csv",
    "read_voc",
    "read_yolo",
    "seed_worker",
    "train_transform",
]

_HOME = {
    "DatasetReport": "checks",
    "check_dataset": "checks",
    "draw_gallery": "_gallery",
    "train_transform": "_augment",
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
