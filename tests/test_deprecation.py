"""Old spellings of public names keep working, with a warning that names the new one."""

from __future__ import annotations

import importlib

import pytest

OLD = {
    "focaldet.datasets.check_anchors.AnchorReach": "focaldet.datasets.checks.AnchorReach",
    "focaldet.datasets.check_report.KINDS": "focaldet.datasets.checks.KINDS",
    "focaldet.training.WholeFiles": "focaldet.training.AtomicCheckpointIO",
    "focaldet.coco.CLASS_NAMES": "focaldet.class_names.COCO_CLASS_NAMES",
    "focaldet.coco.CATEGORY_IDS": "focaldet.class_names.COCO_CATEGORY_IDS",
}


def look_up(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_an_old_name_warns_and_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old}.*1.0.*{new}"):
        value = look_up(old)
    assert value is look_up(new)


def test_a_name_that_never_was_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"focaldet\.coco.*NAMES"):
        look_up("focaldet.coco.NAMES")
