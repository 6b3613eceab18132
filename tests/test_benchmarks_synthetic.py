"""The synthetic datasets have the difficulty that they are named after, and can be drawn again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from focaldet.datasets import AnnotationTable, read_splits
from tests.benchmarks.synthetic import SETS, draw_photo, write_set


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AnnotationTable]:
    """Return the training data of small versions of all sets."""
    folder = tmp_path_factory.mktemp("sets")
    for name in SETS:
        write_set(folder / name, name, {"train": 12, "test": 4})
    splits = {name: read_splits(folder / name) for name in SETS}
    assert all(set(tables) == {"train", "test"} for tables in splits.values())
    return {name: tables["train"] for name, tables in splits.items()}


def sides(table: AnnotationTable) -> Any:
    return np.sqrt((table.boxes[:, 2:] - table.boxes[:, :2]).prod(1))


def test_objects_have_the_sizes_of_their_set_and_are_inside_the_photos(
    tables: dict[str, AnnotationTable],
) -> None:
    for name, table in tables.items():
        low, high = SETS[name].sides
        # A turned square is up to sqrt(2) times as large as its side.
        assert sides(table).min() > 0.5 * low
        assert sides(table).max() < 1.5 * high
        assert (table.boxes[:, 2:] <= (320, 240)).all()
        assert (table.boxes[:, :2] >= 0).all()


def test_each_set_is_difficult_in_its_way(tables: dict[str, AnnotationTable]) -> None:
    per_photo = {name: len(table.boxes) / len(table) for name, table in tables.items()}
    assert per_photo["tiny"] > 12
    assert per_photo["large"] <= 1
    labels = tables["long_tail"].labels
    assert (labels < 3).mean() > 0.5
    pairs = {}
    for name in ("crowded", "tiny"):
        table = tables[name]
        boxes, images = table.boxes, table.image_indices
        meet = (boxes[:, None, :2] < boxes[None, :, 2:]).all(2)
        pairs[name] = (meet & meet.T & (images[:, None] == images)).sum() - len(boxes)
    assert pairs["tiny"] == 0
    assert pairs["crowded"] > 100


def test_the_seed_determines_a_photo() -> None:
    first, again, other = (
        draw_photo(SETS["long_tail"], np.random.default_rng(s)) for s in (3, 3, 4)
    )
    assert first[1:] == again[1:]
    assert (np.asarray(first[0]) == np.asarray(again[0])).all()
    assert first[1] != other[1]
