"""Stand-ins for the functions that read and make the splits of a dataset, where they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet import datasets
from focaldet.datasets import AnnotationTable, read_annotations
from focaldet.datasets.readers import find_reader

if TYPE_CHECKING:
    import pytest

__all__ = ["install_missing"]


def install_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins into `focaldet.datasets` for the length of a test."""
    for function in (read_splits, split_dataset):
        if not hasattr(datasets, function.__name__):
            monkeypatch.setattr(datasets, function.__name__, function, raising=False)


def read_splits(path: Any, images: Any = None) -> dict[str, AnnotationTable]:
    names = find_reader(Path(path)).splits(Path(path))
    if names is None:
        return {"all": read_annotations(path, images)}
    return {name.rstrip("0123456789"): read_annotations(path, images, split=name) for name in names}


def split_dataset(
    table: AnnotationTable, fractions: dict[str, float], seed: int = 0
) -> dict[str, AnnotationTable]:
    order = np.random.default_rng(seed).permutation(len(table))
    first = round(len(table) * fractions["train"])
    parts = (np.sort(order[:first]), np.sort(order[first:]))
    return {name: _select(table, part) for name, part in zip(fractions, parts, strict=True)}


def _select(table: AnnotationTable, chosen: Any) -> AnnotationTable:
    rows = np.flatnonzero(np.isin(table.image_indices, chosen))
    return AnnotationTable(
        source=table.source,
        image_folder=table.image_folder,
        file_names=[table.file_names[i] for i in chosen],
        image_ids=table.image_ids[chosen],
        image_sizes=table.image_sizes[chosen],
        class_names=table.class_names,
        category_ids=table.category_ids,
        boxes=table.boxes[rows],
        labels=table.labels[rows],
        areas=table.areas[rows],
        crowd=table.crowd[rows],
        annotation_ids=table.annotation_ids[rows],
        image_indices=np.searchsorted(chosen, table.image_indices[rows]),
    )
