"""Parity with a reimplementation of MMDetection that has the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from focaldet.pretrained import load_checkpoint
from tests.helpers.parity import check_photos, check_synthetic_images, load_like
from tests.helpers.reference_mmdet import MMDetection, MMDetection1, make_reference, write_file
from tests.helpers.reference_models import Body

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parity


class FreeAnchor(MMDetection):
    stds = (0.1, 0.1, 0.2, 0.2)


class Shifted(MMDetection):
    means, stds = (0.05, -0.1, 0.1, 0.2), (0.5, 0.6, 0.7, 0.8)


class Case(NamedTuple):
    """A file: its network, name and contents, and the project that made it."""

    body: Body
    name: str
    caffe: bool = False
    kind: type[MMDetection] = MMDetection
    options: dict[str, Any] = {}  # noqa: RUF012


def coder(kind: type[MMDetection]) -> str:
    return (
        f"dict(type='DeltaXYWHBBoxCoder', target_means={list(kind.means)}, target_stds={kind.stds})"
    )


CASES = {
    "r18": Case(Body(18), "retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth"),
    "r50_caffe": Case(Body(50), "retinanet_r50_caffe_fpn_1x_coco_20200531.pth", caffe=True),
    "r50_caffe_by_config": Case(
        Body(50),
        "mine.pth",
        caffe=True,
        options={"config": "model = dict(backbone=dict(norm_eval=True, style='caffe'))"},
    ),
    "r50_caffe_of_version_3": Case(
        Body(50),
        "epoch_12.pth",
        caffe=True,
        options={
            "version": "3.3.0",
            "config": "model = dict(backbone=dict(style='caffe'), data_preprocessor=dict("
            "mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False, "
            "pad_size_divisor=32))",
        },
    ),
    "r18_free_anchor": Case(
        Body(18),
        "mine.pth",
        kind=FreeAnchor,
        options={"config": f"model = dict(bbox_head=dict(bbox_coder={coder(FreeAnchor)}))"},
    ),
    "r18_shifted_deltas": Case(
        Body(18),
        "mine.pth",
        kind=Shifted,
        options={"config": f"model = dict(bbox_head=dict(bbox_coder={coder(Shifted)}))"},
    ),
    "r18_ghm": Case(
        Body(18), "retinanet_ghm_r18_fpn_1x_coco_20200130.pth", options={"buffers": True}
    ),
    "r18_of_version_1": Case(
        Body(18), "mine.pth", kind=MMDetection1, options={"version": "1.2.0+0f33c08"}
    ),
    "r50": Case(
        Body(50),
        "not_caffe.pth",
        options={"config": "model = dict(backbone=dict(style='pytorch'))"},
    ),
    "r50_of_version_1": Case(
        Body(50),
        "retinanet_r50_fpn_1x_20181125-7b0c2548.pth",
        kind=MMDetection1,
        options={"old": True, "version": "0.5.4"},
    ),
    "r101": Case(Body(101), "retinanet_r101_fpn_1x_coco_20200130-7a93545f.pth"),
    "x101_32x4d": Case(Body(101, groups=32, width=4), "retinanet_x101_32x4d_fpn.pth"),
    "x101_64x4d": Case(Body(101, groups=64, width=4), "retinanet_x101_64x4d_fpn.pth"),
}
SLOW = (
    "r18_free_anchor",
    "r18_shifted_deltas",
    "r18_ghm",
    "r50",
    "r50_caffe_by_config",
    "r50_caffe_of_version_3",
    "r50_of_version_1",
    "r101",
    "x101_32x4d",
    "x101_64x4d",
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES],
)
def pair(request: Any, tmp_path_factory: Any) -> Any:
    case = CASES[request.param]
    made = make_reference(case.body, caffe=case.caffe, kind=case.kind)
    folder = tmp_path_factory.mktemp("mmdet")
    return load_like(write_file(made, folder / case.name, **case.options), made), made


def test_synthetic_images(pair: Any) -> None:
    check_synthetic_images(pair[0], pair[1], other_pixels=0)


@pytest.mark.slow
def test_a_few_photos(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos[:2], other_pixels=0)


@pytest.mark.slow
def test_every_photo(pair: Any, coco_photos: list[Path]) -> None:
    check_photos(pair[0], pair[1], coco_photos, other_pixels=0)


def test_files_of_its_first_versions_have_the_same_tensors(tmp_path: Path) -> None:
    made = make_reference(Body(18))
    new = load_like(write_file(made, tmp_path / "new.pth"), made).state_dict()
    old_file = write_file(made, tmp_path / "old.pth", old=True, version="0.5.4")
    assert load_checkpoint(old_file).config.anchor_mode == "inclusive_rounded"
    old = load_like(old_file, made).state_dict()
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in new)
