"""Parity with a reimplementation of Detectron that has the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.parity import check_photos, check_synthetic_images, load_like
from tests.helpers.reference_detectron import Detectron, make_reference, write_file
from tests.helpers.reference_models import Body

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet import RetinaNet

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: Any) -> tuple[RetinaNet, Detectron]:
    made = make_reference(Body(50, stride_in_1x1=True))
    path = write_file(made, tmp_path_factory.mktemp("detectron") / "model_final.pkl")
    return load_like(path, made), made


def test_synthetic_images(fifty: Any) -> None:
    check_synthetic_images(*fifty, other_pixels=0)


@pytest.mark.slow
def test_a_few_photos(fifty: Any, coco_photos: list[Path]) -> None:
    check_photos(fifty[0], fifty[1], coco_photos[:3], other_pixels=0)


@pytest.mark.slow
def test_every_photo(fifty: Any, coco_photos: list[Path]) -> None:
    check_photos(fifty[0], fifty[1], coco_photos, other_pixels=0)
