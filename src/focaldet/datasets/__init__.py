"""Data sets for training and evaluation: COCO, Pascal VOC, YOLO and CSV, all giving the same targets."""

from __future__ import annotations

from focaldet.datasets._table import AnnotationTable
from focaldet.datasets.coco import read_coco
from focaldet.datasets.dataset import DetectionDataset

__all__ = ["AnnotationTable", "DetectionDataset", "read_coco"]
