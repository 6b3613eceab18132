"""Parity with a reimplementation of ODTK that has the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.parity import check_photos, check_synthetic_images, load_like
from tests.helpers.reference_models import Body
from tests.helpers.reference_odtk import make_reference, write_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parity

CASES = {
    "release 19.04": ("ResNet18FPN", Body(18), True, "retinanet_rn18fpn.zip"),
    "newer": ("ResNet18FPN", Body(18), False, "mine.pth"),
    "mobilenet": ("MobileNetV2FPN", None, True, "retinanet_mobilenetv2fpn.pth"),
    "resnet34": ("ResNet34FPN", Body(34), True, "retinanet_rn34fpn.zip"),
    "resnet50": ("ResNet50FPN", Body(50), True, "retinanet_rn50fpn.zip"),
    "resnet101": ("ResNet101FPN", Body(101), True, "retinanet_rn101fpn.zip"),
    "resnet152": ("ResNet152FPN", Body(152), True, "retinanet_rn152fpn.zip"),
}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("mobilenet", "resnet34", "resnet50", "resnet101", "resnet152")
]


@pytest.fixture(scope="module", params=["release 19.04", "newer", *SLOW])
def pair(request: Any, tmp_path_factory: Any) -> Any:
    backbone, body, old, name = CASES[request.param]
    made = make_reference(backbone, body, old=old)
    return load_like(write_file(made, tmp_path_factory.mktemp("odtk") / name), made), made


def test_synthetic_images(pair: Any) -> None:
    check_synthetic_images(pair[0], pair[1], other_pixels=0)


@pytest.mark.slow
def test_a_few_photos(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos[:2], other_pixels=0)


@pytest.mark.slow
def test_every_photo(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos, other_pixels=0)
