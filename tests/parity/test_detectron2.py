"""Parity with a reimplementation of Detectron2 that has the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.parity import check_photos, check_synthetic_images, load_like
from tests.helpers.reference_detectron2 import Detectron2, make_reference, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet import RetinaNet

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: Any) -> tuple[RetinaNet, Detectron2]:
    made = make_reference(50)
    path = write_file(made, tmp_path_factory.mktemp("detectron2") / "model_final_bfca0b.pkl")
    return load_like(path, made), made


def test_synthetic_images(fifty: Any) -> None:
    check_synthetic_images(*fifty, other_pixels=0)


@pytest.mark.slow
def test_a_few_photos(fifty: Any, coco_photos: list[Path]) -> None:
    check_photos(fifty[0], fifty[1], coco_photos[:3], other_pixels=0)


@pytest.mark.slow
def test_every_photo(fifty: Any, coco_photos: list[Path]) -> None:
    check_photos(fifty[0], fifty[1], coco_photos, other_pixels=0)


@pytest.mark.slow
def test_synthetic_images_with_a_resnet101(tmp_path: Path) -> None:
    made = make_reference(101)
    model = load_like(write_file(made, tmp_path / "model_final_971ab9.pkl"), made)
    assert model.config.backbone == "resnet101"
    check_synthetic_images(model, made, other_pixels=0)


def test_the_config_describes_the_published_model(fifty: Any) -> None:
    config = fifty[0].config
    assert (config.backbone, config.stride_in_1x1, config.num_classes) == ("resnet50", True, 80)
    assert config.class_names is not None
    assert config.class_names[0] == "person"
