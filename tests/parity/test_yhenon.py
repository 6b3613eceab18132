"""Parity with a reimplementation of yhenon/pytorch-retinanet that has the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.parity import check_photos, check_synthetic_images, load_like
from tests.helpers.reference_models import Body
from tests.helpers.reference_yhenon import make_reference, write_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parity

CASES = {
    "resnet18": (Body(18), ""),
    "parallel": (Body(18), "module."),
    "resnet50": (Body(50), ""),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("parallel", "resnet50")]


@pytest.fixture(scope="module", params=["resnet18", *SLOW])
def pair(request: Any, tmp_path_factory: Any) -> Any:
    body, prefix = CASES[request.param]
    made = make_reference(body)
    path = tmp_path_factory.mktemp("yhenon") / "coco_resnet_50_map_0_335_state_dict.pt"
    return load_like(write_file(made, path, prefix), made), made


def test_synthetic_images(pair: Any) -> None:
    check_synthetic_images(pair[0], pair[1], other_pixels=0)


@pytest.mark.slow
def test_a_few_photos(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos[:2], other_pixels=0)


@pytest.mark.slow
def test_every_photo(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos, other_pixels=0)
