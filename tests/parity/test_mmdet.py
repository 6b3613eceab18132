"""Parity with a reimplementation of MMDetection that has the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.parity import check_photos, check_synthetic_images, load_like
from tests.helpers.reference_mmdet import make_reference, write_file
from tests.helpers.reference_models import Body

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parity

CASES = {
    "r18": (Body(18), False, "retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth", None),
    "r50_caffe": (Body(50), True, "retinanet_r50_caffe_fpn_1x_coco_20200531.pth", None),
    "r50_caffe_by_config": (Body(50), True, "mine.pth", "norm_eval=True, style='caffe'),"),
    "r50": (Body(50), False, "not_caffe.pth", "style='pytorch',"),
    "x101_32x4d": (
        Body(101, groups=32, width=4),
        False,
        "retinanet_x101_32x4d_fpn.pth",
        None,
    ),
    "x101_64x4d": (
        Body(101, groups=64, width=4),
        False,
        "retinanet_x101_64x4d_fpn.pth",
        None,
    ),
}
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("r50", "x101_32x4d", "x101_64x4d")]


@pytest.fixture(scope="module", params=["r18", "r50_caffe", "r50_caffe_by_config", *SLOW])
def pair(request: Any, tmp_path_factory: Any) -> Any:
    body, caffe, name, config = CASES[request.param]
    made = make_reference(body, caffe=caffe)
    folder = tmp_path_factory.mktemp("mmdet")
    return load_like(write_file(made, folder / name, config=config), made), made


def test_synthetic_images(pair: Any) -> None:
    check_synthetic_images(pair[0], pair[1], other_pixels=0.01)


def test_a_few_photos(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos[:2], other_pixels=0.01)


@pytest.mark.slow
def test_every_photo(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos, other_pixels=0.01)


def test_files_of_its_first_versions_load_the_same(tmp_path: Path) -> None:
    made = make_reference(Body(18))
    new = load_like(write_file(made, tmp_path / "new.pth"), made).state_dict()
    old = load_like(write_file(made, tmp_path / "old.pth", old=True), made).state_dict()
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in new)
