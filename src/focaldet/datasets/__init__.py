"""Data sets for training and evaluation: COCO, Pascal VOC, YOLO and CSV, all giving the same targets.

A reader (:func:`read_coco`, :func:`read_voc`, :func:`read_yolo`, :func:`read_csv`, or
:func:`read_annotations` for any of them) returns an :class:`AnnotationTable`, with everything that the
files say. :class:`DetectionDataset` makes images and targets of it, :func:`check_dataset` looks for
mistakes in it. torchvision is imported when a transform is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from focaldet.datasets._batching import AspectRatioBatchSampler, collate, seed_worker
from focaldet.datasets._dataset import DetectionDataset
from focaldet.datasets._reading import read_annotations
from focaldet.datasets._table import AnnotationTable
from focaldet.datasets.readers._coco import read_coco
from focaldet.datasets.readers._csv import read_csv
from focaldet.datasets.readers._voc import read_voc
from focaldet.datasets.readers._yolo import read_yolo

if TYPE_CHECKING:
    from focaldet.datasets._augment import train_transform
    from focaldet.datasets.checks._check import check_dataset
    from focaldet.datasets.checks._report import DatasetReport

__all__ = [
    "AnnotationTable",
    "AspectRatioBatchSampler",
    "DatasetReport",
    "DetectionDataset",
    "check_dataset",
    "collate",
    "read_annotations",
    "read_coco",
    "read_csv",
    "read_voc",
    "read_yolo",
    "seed_worker",
    "train_transform",
]

_LATER = {
    "DatasetReport": "checks._report",
    "check_dataset": "checks._check",
    "train_transform": "_augment",
}


def __getattr__(name: str) -> object:
    """Import on first use what not everybody needs (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
