from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focaldet.datasets import AnnotationTable, split_dataset
from tests.helpers.annotation_tables import Row, table_of_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

BOX = [10.0, 10.0, 40.0, 40.0]


def table_of_classes(
    classes: Sequence[Sequence[int]], names: Sequence[str] = "abcdefgh", **changes: Any
) -> AnnotationTable:
    """Return a table with a box for each class of each image."""
    rows: list[Row] = [
        (image, label, BOX) for image, labels in enumerate(classes) for label in labels
    ]
    files = tuple(f"{image}.png" for image in range(len(classes)))
    ids = tuple(range(len(names)))
    return table_of_rows(*rows, files=files, class_names=tuple(names), category_ids=ids, **changes)


def images_of(table: AnnotationTable, label: int) -> int:
    """Return how many images of a table have a class."""
    return len(np.unique(table.image_indices[table.labels == label]))


def test_each_class_is_divided_like_the_whole() -> None:
    table = table_of_classes([[0]] * 100 + [[1]] * 50 + [[0, 1, 2]] * 10 + [[]] * 40)
    parts = split_dataset(table, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=3)
    assert list(parts) == ["train", "val", "test"]
    assert [len(part) for part in parts.values()] == [140, 40, 20]
    for label, count in ((0, 110), (1, 60), (2, 10)):
        images = [images_of(part, label) for part in parts.values()]
        np.testing.assert_allclose(images, [count * 0.7, count * 0.2, count * 0.1], atol=1)
    empty = [len(part) - len(np.unique(part.image_indices)) for part in parts.values()]
    assert empty == [28, 8, 4]


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=3, max_size=25),
    fractions=st.sampled_from([(0.8, 0.2), (0.5, 0.5), (0.6, 0.3, 0.1), (1.0,)]),
    seed=st.integers(0, 5),
)
def test_every_image_is_in_one_part_and_nothing_changes_in_it(
    classes: list[list[int]], fractions: tuple[float, ...], seed: int
) -> None:
    table = table_of_classes(classes)
    wanted = dict(zip(("train", "val", "test"), fractions, strict=False))
    parts = split_dataset(table, wanted, seed)
    ids = np.concatenate([part.image_ids for part in parts.values()])
    assert sorted(ids.tolist()) == table.image_ids.tolist()
    for part in parts.values():
        assert len(part)
        assert (np.diff(part.image_ids) > 0).all()
        for index, image_id in enumerate(part.image_ids.tolist()):
            old = image_id - 11
            assert part.file_names[index] == table.file_names[old]
            np.testing.assert_array_equal(
                part.annotation_ids[part.boxes_of(index)],
                table.annotation_ids[table.boxes_of(old)],
            )


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=2, max_size=6), seed=st.integers(0, 3))
def test_a_class_of_two_images_is_in_train_and_val(counts: list[int], seed: int) -> None:
    classes = [[label] for label, count in enumerate(counts) for _ in range(count)]
    parts = split_dataset(table_of_classes([*classes, [], []]), seed=seed)
    for label, count in enumerate(counts):
        found = images_of(parts["train"], label), images_of(parts["val"], label)
        assert sum(found) == count
        assert min(found) >= 1 or count < 2
        assert found[0] >= found[1]


def test_images_are_moved_if_rarer_classes_leave_a_part_without_a_class(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # "a" and "b" have one image each, which both go to "train", although "c" is in both.
    parts = split_dataset(table_of_classes([[0, 2], [1, 2]] + [[]] * 8))
    assert images_of(parts["val"], 2) == 1
    [record] = caplog.records
    assert "not in every part: 2" in record.getMessage()
    assert "c (" not in record.getMessage()


def test_classes_that_cannot_be_everywhere_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    # Of three images in two parts, two are together, and these two share a class.
    parts = split_dataset(table_of_classes([[0, 1], [1, 2], [0, 2]]), {"train": 0.5, "val": 0.5})
    assert sorted(len(part) for part in parts.values()) == [1, 2]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "Classes that are not in every part: 1." in record.getMessage()
    assert "(2 images) not in " in record.getMessage()


def test_a_rare_class_is_in_train_first_and_then_in_val(caplog: pytest.LogCaptureFixture) -> None:
    table = table_of_classes([[0], [1], [1], *[[2]] * 9])
    parts = split_dataset(table, {"test": 0.4, "val": 0.1, "train": 0.5})
    assert [images_of(parts[name], 0) for name in ("train", "val", "test")] == [1, 0, 0]
    assert [images_of(parts[name], 1) for name in ("train", "val", "test")] == [1, 1, 0]
    assert "a (1 image) not in test and val; b (2 images) not in test." in caplog.text


def test_the_seed_and_nothing_else_decides() -> None:
    table = table_of_classes([[i % 3] for i in range(60)])
    first = split_dataset(table, seed=1)["val"].image_ids.tolist()
    assert split_dataset(table, seed=1)["val"].image_ids.tolist() == first
    assert split_dataset(table, seed=2)["val"].image_ids.tolist() != first


def test_an_image_that_is_listed_twice_stays_together(caplog: pytest.LogCaptureFixture) -> None:
    table = table_of_classes([[0]] * 40)
    names = [f"{image // 2}.png" if image % 2 else f"./{image // 2}.png" for image in range(40)]
    parts = split_dataset(replace(table, file_names=names), {"train": 0.5, "val": 0.5})
    train, val = ({name.removeprefix("./") for name in part.file_names} for part in parts.values())
    assert (len(train), len(val)) == (10, 10)
    assert not train & val
    assert "listed more than once and stay together: 20" in caplog.text


def test_crowds_and_unusable_boxes_do_not_make_an_image_one_of_a_class() -> None:
    rows: list[Row] = [(0, 0, BOX), (1, 0, BOX), (2, 0, BOX), (3, 0, [0, 0, np.nan, 1])]
    table = table_of_rows(*rows, files=("0", "1", "2", "3"), crowd=(2,))
    for seed in range(5):
        parts = split_dataset(table, {"train": 0.5, "val": 0.5}, seed)
        for part in parts.values():
            assert len(part) == 2
            assert sum(image_id in {11, 12} for image_id in part.image_ids) == 1


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({}, "fractions is empty"),
        ({"train": 0.8, "val": 0.1}, r"must sum to 1.*'val': 0.1.*sums to 0.9"),
        ({"train": 1.0, "val": 0.0}, r"fractions\['val'\] must be in \(0, 1\], got 0.0"),
        ({"train": 0.5, "val": 0.25, "test": 0.25}, "2 different images.* 3 parts: 'train', 'val'"),
    ],
)
def test_wrong_fractions_are_errors(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_dataset(table_of_classes([[0], [0]]), fractions)


def test_wrong_types_are_errors() -> None:
    fractions: Any = {"train": "0.8", "val": 0.2}
    with pytest.raises(TypeError, match=r"fractions\['train'\] must be a number, got '0.8'"):
        split_dataset(table_of_classes([[0], [0]]), fractions)
    seed: Any = 0.5
    with pytest.raises(TypeError, match="seed must be an integer"):
        split_dataset(table_of_classes([[0], [0]]), seed=seed)
