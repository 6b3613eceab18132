from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focaldet import RetinaNetConfig
from focaldet._assembly import build_anchor_generator, build_preprocess
from focaldet.boxes import box_iou, clip_boxes, scale_boxes
from focaldet.datasets._anchor_fit import Objects, best_anchor_ious, fit_anchors, share_reached
from focaldet.datasets.checks import check_dataset
from tests.helpers.annotation_tables import table_of_rows

if TYPE_CHECKING:
    from focaldet.anchors import AnchorGenerator

CONFIGS = {
    "exact": RetinaNetConfig(num_classes=2, min_size=200, max_size=300),
    "centres at corners": RetinaNetConfig(num_classes=2, anchor_offset=0.0),
    "torchvision": RetinaNetConfig.torchvision_v1(num_classes=2),
    "a pixel to the right": RetinaNetConfig(
        num_classes=2, anchor_mode="rounded", anchor_plus_one=True
    ),
    "one shape": RetinaNetConfig(
        num_classes=2,
        anchor_sizes=(8, 9, 60, 100, 700),
        octave_scales=(1.3,),
        aspect_ratios=(0.2,),
        anchor_offset=0.3,
    ),
}
STRIDES = (8, 16, 32)


def all_anchors(generator: AnchorGenerator, padded: tuple[int, int]) -> torch.Tensor:
    grids = [tuple(-(-side // stride) for side in padded) for stride in generator.strides]
    levels = generator(grids, padded, dtype=torch.float64)
    return torch.cat(levels)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@given(
    padded=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_iou_is_the_maximum_over_all_anchors(
    config: RetinaNetConfig, padded: tuple[int, int], seed: int
) -> None:
    size = (padded[0] * 32, padded[1] * 32)
    rng = np.random.default_rng(seed)
    height, width = size
    ends = rng.uniform(0, 1, (20, 2, 2)) * (width, height)
    boxes = np.concatenate([ends.min(1), ends.max(1) + 0.01], axis=1)
    generator = build_anchor_generator(config, STRIDES)
    wanted = box_iou(torch.from_numpy(boxes), all_anchors(generator, size)).amax(1)
    got = best_anchor_ious(Objects(boxes, np.array([size] * 20)), generator)
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-12)


def test_grids_match_a_backbone_when_sides_are_not_multiples_of_its_strides() -> None:
    generator = build_anchor_generator(CONFIGS["exact"], STRIDES)
    size = (75, 331)
    boxes = torch.rand(200, 4, dtype=torch.float64) * 60
    boxes[:, 2:] += boxes[:, :2] + 1
    boxes[:, ::2] *= 2.5
    wanted = box_iou(boxes, all_anchors(generator, size)).amax(1)
    got = best_anchor_ious(Objects(boxes.numpy(), np.array([size] * 200)), generator)
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "torchvision", "a pixel to the right"])
@pytest.mark.parametrize(
    ("rounding", "keep_ratio"), [("floor", True), ("round", True), ("floor", False)]
)
def test_the_report_agrees_with_the_resizing_and_anchors_of_the_model(
    name: str, rounding: Literal["floor", "round"], *, keep_ratio: bool
) -> None:
    config = CONFIGS[name].replace(
        min_size=191,
        max_size=300,
        keep_ratio=keep_ratio,
        size_rounding=rounding,
        always_pad=rounding == "round",
    )
    torch.manual_seed(3)
    boxes = torch.rand(60, 2).repeat(1, 2) * 80
    boxes[:, 2:] += torch.rand(60, 2) ** 3 * 70 + 1
    table = table_of_rows(*((0, 0, box) for box in boxes.tolist()))
    report = check_dataset(table, config=config, images="none")
    batch = build_preprocess(config)([torch.rand(3, 80, 100)])
    padded = (int(batch.tensor.shape[2]), int(batch.tensor.shape[3]))
    resized = (191, (238 if rounding == "floor" else 239) if keep_ratio else 191)
    assert batch.sizes == [resized]
    objects = scale_boxes(clip_boxes(boxes.double(), (80, 100)), (80, 100), resized)
    usable = (objects[:, 2:] > objects[:, :2]).all(1)
    generator = build_anchor_generator(config, STRIDES)
    best = box_iou(objects, all_anchors(generator, padded)).amax(1)
    wanted = [501 + i for i in range(60) if usable[i] and best[i] < 0.5]
    unreached = [one for one in report.findings if one.kind == "anchor-unreached"]
    assert [one.annotation_id for one in unreached] == wanted
    assert wanted
    assert f"best IoU {best[wanted[0] - 501]:.3f};" in unreached[0].message
    assert report.anchors is not None
    assert report.anchors.objects["all"] == int(usable.sum())
    share = report.anchors.reachable["all"]
    assert share == pytest.approx(1 - len(wanted) / int(usable.sum()))


def test_crowds_invalid_boxes_and_images_of_unknown_size_are_left_out() -> None:
    table = table_of_rows(
        (0, 0, [10, 10, 40, 40]),
        (0, 0, [10, 10, 10, 40]),
        (0, 0, [float("nan"), 10, 10, 40]),
        (0, 0, [200, 10, 250, 40]),
        (0, 0, [10, 10, 12, 12]),
        (1, 0, [10, 10, 12, 12]),
        crowd=(4,),
        image_sizes=np.array([[80, 100], [0, 0]], np.int32),
    )
    report = check_dataset(table, config=CONFIGS["exact"], images="none")
    assert report.anchors is not None
    assert report.anchors.objects == {"all": 1, "small": 1, "medium": 0, "large": 0}
    assert report.anchors.reachable == {"all": 1.0, "small": 1.0, "medium": None, "large": None}
    assert "anchor-unreached" not in report.counts


def test_without_objects_there_are_no_shares_and_no_suggestion() -> None:
    report = check_dataset(table_of_rows(), config=CONFIGS["exact"], images="none")
    assert report.anchors is not None
    assert set(report.anchors.reachable.values()) == {None}
    assert report.anchors.suggestion is None
    assert "No better anchors were found." in str(report)


def tiny_wide_objects() -> list[tuple[int, int, list[float]]]:
    rng = np.random.default_rng(5)
    corners = rng.uniform(0, 57, (300, 2))
    sides = rng.uniform(4, 7, (300, 1)) * np.array([[6, 1]])
    boxes = np.concatenate([corners, corners + sides], axis=1)
    return [(0, 0, box) for box in boxes.tolist()]


def test_suggested_anchors_reach_as_many_objects_as_reported() -> None:
    config = CONFIGS["exact"]
    table = table_of_rows(*tiny_wide_objects())
    before = check_dataset(table, config=config, images="none").anchors
    assert before is not None
    better = before.suggestion
    assert better is not None
    changed = config.replace(
        anchor_sizes=better.anchor_sizes,
        octave_scales=better.octave_scales,
        aspect_ratios=better.aspect_ratios,
    )
    after = check_dataset(table, config=changed, images="none").anchors
    assert after is not None
    assert after.reachable == better.reachable
    now, then = before.reachable["all"], better.reachable["all"]
    assert now is not None
    assert then is not None
    assert now < 0.1
    assert then > 0.95
    assert len(better.octave_scales) * len(better.aspect_ratios) == 9
    again = check_dataset(table, config=config, images="none").anchors
    assert again == before


def test_nothing_is_suggested_if_every_object_is_reached() -> None:
    table = table_of_rows((0, 0, [10, 10, 40, 40]), (1, 1, [20, 20, 60, 60]))
    anchors = check_dataset(table, config=CONFIGS["exact"], images="none").anchors
    assert anchors is not None
    assert anchors.reachable["all"] == 1
    assert anchors.suggestion is None


def test_the_anchors_are_printed_and_written_as_json() -> None:
    table = table_of_rows(*tiny_wide_objects())
    report = check_dataset(table, config=CONFIGS["exact"], images="none")
    assert report.anchors is not None
    assert report.anchors.suggestion is not None
    text = str(report)
    assert "Objects with an anchor at IoU 0.5 or more (model input: 200 to 300 pixels)" in text
    assert f"anchor_sizes={report.anchors.suggestion.anchor_sizes}" in text
    written = json.loads(report.to_json())["anchors"]
    assert written == json.loads(json.dumps(dataclasses.asdict(report.anchors)))


def test_classes_that_differ_from_the_model_are_a_note() -> None:
    table = table_of_rows((0, 0, [10, 10, 40, 40]), (1, 1, [20, 20, 60, 60]))
    for config, message in (
        (RetinaNetConfig(num_classes=3), "number of classes: 3 in the model, 2 in the dataset"),
        (
            RetinaNetConfig(num_classes=2, class_names=("cat", "owl")),
            "label 1 is 'owl' in the model and 'dog' in the dataset",
        ),
    ):
        (finding,) = check_dataset(table, config=config, images="none").findings
        assert (finding.kind, finding.message) == ("class-mismatch", message)
    same = RetinaNetConfig(num_classes=2, class_names=("cat", "dog"))
    assert not check_dataset(table, config=same, images="none").findings


def squares(low: float, high: float, *, ratio: float = 1.0, count: int = 300) -> Objects:
    """Return boxes of random sizes, h / w = ratio, at random places of images of 256 x 320 pixels."""
    rng = np.random.default_rng(2)
    sides = np.exp(rng.uniform(np.log(low), np.log(high), (count, 1)))
    sides = sides * np.array([[ratio**-0.5, ratio**0.5]])
    corners = rng.uniform(0, 1, (count, 2)) * ((320, 256) - sides)
    return Objects(np.concatenate([corners, corners + sides], 1), np.array([(256, 320)] * count))


def changed(config: RetinaNetConfig, factor: float) -> RetinaNetConfig:
    return config.replace(anchor_sizes=tuple(factor * size for size in config.anchor_sizes))


@pytest.mark.parametrize(
    "objects", [squares(6, 16), squares(20, 60), squares(90, 200), squares(8, 200)]
)
def test_fitted_anchors_reach_as_many_as_the_default_half_and_double_ones_for_what_they_cost(
    objects: Objects,
) -> None:
    default = RetinaNetConfig(num_classes=2)
    fitted = fit_anchors(objects, default, STRIDES)
    octaves = abs(np.log2(fitted.anchor_sizes[0] / 32))
    cost = 0.01 * octaves + 0.01 * (fitted.aspect_ratios != default.aspect_ratios)
    worth = share_reached(objects, fitted, STRIDES) - cost
    for factor, price in ((1, 0), (0.5, 0.01), (2, 0.01)):
        other = share_reached(objects, changed(default, factor), STRIDES) - price
        assert worth >= other - 1e-4  # sizes are rounded to three digits
    if octaves:
        assert share_reached(objects, fitted, STRIDES) > share_reached(objects, default, STRIDES)


def test_anchors_move_only_for_objects_that_need_it() -> None:
    default = RetinaNetConfig(num_classes=2)
    assert fit_anchors(squares(90, 200), default, STRIDES) == default
    small = fit_anchors(squares(14, 60), default, STRIDES)
    assert small.anchor_sizes[0] < 25
    assert small.aspect_ratios == default.aspect_ratios
    tall = fit_anchors(squares(40, 60, ratio=6), default, STRIDES)
    assert max(tall.aspect_ratios) > 4
    # One small object in two hundred is not worth an octave.
    mixed = squares(90, 200, count=199)
    tiny = squares(15, 15.1, count=1)
    both = Objects(*(np.concatenate(parts) for parts in zip(mixed, tiny, strict=True)))
    assert share_reached(both, default, STRIDES) == 0.995
    assert fit_anchors(both, default, STRIDES) == default
