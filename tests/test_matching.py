from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection._utils import Matcher as PeerMatcher
from torchvision.ops import box_iou

from focaldet import AnchorGenerator, matching
from focaldet.anchor_grid import AnchorGrid
from focaldet.box_coder import BoxCoder
from focaldet.boxes import paired_box_iou
from focaldet.criterion import RetinaNetCriterion
from focaldet.matching import BACKGROUND, BETWEEN, Matcher
from tests.test_boxes import random_boxes

SQUARE = torch.tensor([[0.0, 0, 10, 10]])


@pytest.mark.parametrize(
    ("height", "expected"), [(5.1, 0), (5.0, 0), (4.9, BETWEEN), (4.0, BETWEEN), (3.9, BACKGROUND)]
)
def test_thresholds_are_closed_below(height: float, expected: int) -> None:
    anchors = torch.tensor([[0.0, 0, 10, height]], dtype=torch.float64)
    match = Matcher(force_match_floor=None)(SQUARE.double(), anchors)
    assert match.tolist() == [expected]


def test_the_best_anchor_of_an_object_is_positive_whatever_its_iou() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 0, 10, 1]])
    assert Matcher()(SQUARE, anchors).tolist() == [0, BACKGROUND]
    assert Matcher(force_match_floor=0.3)(SQUARE, anchors).tolist() == [BACKGROUND, BACKGROUND]


def test_a_box_that_no_anchor_touches_makes_none_positive() -> None:
    far = torch.tensor([[900.0, 900, 910, 910]])
    anchors = AnchorGenerator()([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)])
    small = anchors[0]
    assert set(Matcher()(far, small).tolist()) == {BACKGROUND}
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=True)
    assert int((peer(box_iou(far, small)) >= 0).sum()) == len(small)  # the fault we do not repeat


def test_ties_for_the_best_anchor_are_all_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 8, 10, 10]])
    assert Matcher()(SQUARE, anchors).tolist() == [0, 0]


def test_a_forced_anchor_keeps_the_box_that_it_overlaps_most() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 1]])
    anchors = torch.tensor([[0.0, 0, 10, 7]])
    assert Matcher()(boxes, anchors).tolist() == [0]


def test_no_boxes_leave_background_alone() -> None:
    assert Matcher()(torch.zeros(0, 4), random_boxes(3, torch.float32)).tolist() == [BACKGROUND] * 3


@pytest.mark.parity
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans(), st.integers(1, 300))
def test_matches_are_torchvisions_index_by_index(
    seed: int, count: int, force: bool, block: int
) -> None:
    torch.manual_seed(seed)
    anchors = torch.cat(AnchorGenerator()([(8, 9), (4, 5), (2, 3), (1, 2), (1, 1)]))
    boxes = random_boxes(count, torch.float32) * 0.5
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=force)(box_iou(boxes, anchors))
    matcher = Matcher(force_match_floor=0.0 if force else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_IOUS_AT_ONCE", block * 10)  # blocks of one to a few boxes
        assert_close(matcher(boxes, anchors), peer, rtol=0, atol=0)


def test_a_thousand_boxes_never_need_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        sizes.append(len(boxes) * len(anchors))
        return box_iou(boxes, anchors)  # type: ignore[no-any-return]

    monkeypatch.setattr(matching, "box_iou", spy)
    Matcher()(random_boxes(1000, torch.float32), random_boxes(20_000, torch.float32))
    assert max(sizes) <= matching._IOUS_AT_ONCE < 20_000 * 1000


def pyramid(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, **options: Any
) -> AnchorGrid:
    options = {"strides": (8, 16, 32, 64, 128), **options}
    sizes = [(-(-height // s), -(-width // s)) for s in options["strides"]]
    return AnchorGrid(AnchorGenerator(**options)(sizes, (height, width), dtype=dtype), sizes)


def boxes_of_all_kinds(
    count: int, height: int, width: int, smallest: float, largest: float, snap: float
) -> torch.Tensor:
    """Boxes of sides log-uniform in a range, in, around and far from an image, some twice.

    With ``snap`` > 0 they keep to multiples of it, so that many anchors overlap a box alike.
    """
    ratio = torch.tensor(largest / smallest)
    sides = smallest * torch.exp(torch.rand(count, 2) * ratio.log())
    corners = (torch.rand(count, 2) * 1.4 - 0.2) * torch.tensor([width, height]) - sides / 2
    boxes = torch.cat((corners, corners + sides), dim=1)
    if snap:
        boxes = (boxes / snap).round() * snap
    return boxes[torch.randint(count, (count,))]


def match_both_ways(
    matcher: Matcher, boxes: torch.Tensor, grid: AnchorGrid, *, block: int = 2**18
) -> torch.Tensor:
    """Match within reach, however far that is, and prove it to be the match of all pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_FEW_PAIRS", 0)
        patch.setattr(matching, "_FEW_PAIRS_ON_A_GPU", 0)
        patch.setattr(matching, "_WINDOWS_PAY", 0)
        patch.setattr(matching, "_PAIRS_AT_ONCE", block)
        patch.setattr(matching, "_IOUS_IN_CACHE", block)
        with patch.context() as no_other_way:
            no_other_way.setattr(Matcher, "_match_all", None)
            within_reach = matcher(boxes, grid)
        assert_close(within_reach, matcher(boxes, grid.anchors), rtol=0, atol=0)
    return within_reach


# Anchors of NVIDIA's detector: a pixel larger than meant, or in older files of whole sides.
ODTK: dict[str, Any] = {
    "sizes": (8, 16, 32, 64, 128),
    "octave_scales": tuple(4 * 2 ** (i / 3) for i in range(3)),
}


@given(
    seed=st.integers(0, 2**32 - 1),
    image=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    count=st.integers(1, 40),
    sides=st.sampled_from([(0.01, 3), (2, 40), (8, 600), (100, 3000), (0.1, 1e6)]),
    snap=st.sampled_from([0, 1, 4, 8]),
    anchors=st.sampled_from(
        [
            {},
            {"offset": 0},
            {"mode": "torchvision", "offset": 0, "sizes": (32, 64, 128), "strides": (8, 16, 32)},
            {"offset": 0.3, "sizes": (20, 70), "strides": (7, 30), "aspect_ratios": (0.1, 1)},
            {**ODTK, "plus_one": True},
            {**ODTK, "mode": "rounded"},
            {**ODTK, "mode": "rounded", "plus_one": True, "offset": 0.25},
        ]
    ),
    thresholds=st.sampled_from([(0.5, 0.4), (0.5, 0.5), (0.6, 0.1), (0.5, 0.0)]),
    floor=st.sampled_from([0.0, None, 0.2]),
    block=st.sampled_from([1, 100, 2**18]),
)
def test_looking_within_reach_finds_the_match_of_all_pairs(
    seed: int,
    image: tuple[int, int],
    count: int,
    sides: tuple[float, float],
    snap: float,
    anchors: dict[str, Any],
    thresholds: tuple[float, float],
    floor: float | None,
    block: int,
) -> None:
    torch.manual_seed(seed)
    if anchors.get("mode") == "torchvision":
        image = (max(image[0], 32), max(image[1], 32))  # its strides must not come out as 0
    matcher = Matcher(*thresholds, force_match_floor=floor)
    boxes = boxes_of_all_kinds(count, *image, *sides, snap)
    match_both_ways(matcher, boxes, pyramid(*image, **anchors), block=block)


@pytest.mark.parity
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("anchors", [{}, {"mode": "torchvision", "offset": 0}])
@pytest.mark.parametrize("snap", [0, 4])
def test_within_reach_matches_are_torchvisions_index_by_index(
    force: bool, anchors: dict[str, Any], snap: int
) -> None:
    grid = pyramid(320, 480, **anchors)
    boxes = boxes_of_all_kinds(100, 320, 480, 4, 400, snap)
    boxes = boxes[(box_iou(boxes, grid.anchors) > 0).any(dim=1)]  # the one fault we do not repeat
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=force)(box_iou(boxes, grid.anchors))
    found = match_both_ways(Matcher(force_match_floor=0.0 if force else None), boxes, grid)
    assert_close(found, peer, rtol=0, atol=0)
    assert len(set(found.tolist())) > (40 if force else 10)


def test_the_best_anchor_is_found_far_below_the_threshold() -> None:
    grid = pyramid(400, 400)
    tiny, long = [50.0, 50, 52, 52], [-3000.0, 200, 3000, 203]
    match = match_both_ways(Matcher(), torch.tensor([tiny, long]), grid)
    assert int(box_iou(torch.tensor([tiny, long]), grid.anchors).amax(dim=1).max() * 100) < 2
    assert set(match.tolist()) == {BACKGROUND, 0, 1}


def test_a_weakly_forced_anchor_keeps_a_box_that_has_better_anchors() -> None:
    anchors = torch.tensor([[8.0 * x, 0, 8.0 * x + 16, 16] for x in range(5)])
    thin, wide = [0.0, 0, 2, 16], [8.0, 0, 24, 16]  # IoU with the first anchor 1/8 and 1/3
    grid = AnchorGrid([anchors], [(1, 5)])
    match = match_both_ways(Matcher(), torch.tensor([thin, wide]), grid)
    assert match.tolist() == [1, 1, BACKGROUND, BACKGROUND, BACKGROUND]


def test_many_boxes_are_compared_with_few_anchors_each(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = pyramid(800, 1344)
    boxes = boxes_of_all_kinds(1000, 800, 1344, 8, 600, 0)
    sizes: list[int] = []

    def spy(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        iou = paired_box_iou(boxes, anchors)
        sizes.append(iou.numel())
        return iou

    monkeypatch.setattr(matching, "paired_box_iou", spy)
    monkeypatch.setattr(Matcher, "_match_all", None)
    Matcher()(boxes, grid)
    assert sum(sizes) < 1000 * len(grid.anchors) / 20
    assert max(sizes) < 2 * matching._PAIRS_AT_ONCE


def test_windows_that_hold_too_much_are_left_for_all_pairs() -> None:
    grid = pyramid(400, 400)
    boxes = boxes_of_all_kinds(30, 400, 400, 100, 300, 0)
    everything = Matcher(negative_threshold=0.0, force_match_floor=None)
    assert everything._match_within_reach(boxes, grid) is None
    assert_close(everything(boxes, grid), everything(boxes, grid.anchors), rtol=0, atol=0)
    assert Matcher()._match_within_reach(boxes, grid) is not None


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("mode", ["exact", "rounded"])
@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("snap", [0, 1])
def test_within_reach_of_anchors_a_pixel_larger_or_rounded_or_off_centre(
    mode: str, plus_one: bool, offset: float, snap: int
) -> None:
    grid = pyramid(333, 500, **ODTK, mode=mode, plus_one=plus_one, offset=offset)
    boxes = boxes_of_all_kinds(60, 333, 500, 3, 500, snap)
    boxes = torch.cat((boxes, grid.anchors[:: len(grid.anchors) // 20]))  # equals of anchors too
    for floor in (0.0, None, 0.2):
        match = match_both_ways(Matcher(force_match_floor=floor), boxes, grid)
        assert len(set(match.tolist())) > 20


@pytest.mark.parametrize("disorder", ["shuffled", "shaken", "reversed", "nan", "infinite", "flat"])
def test_anchors_that_lie_on_no_grid_are_matched_all_the_same(disorder: str) -> None:
    boxes = boxes_of_all_kinds(20, 200, 200, 8, 200, 0)
    sizes = [(25, 25), (13, 13)]
    levels = AnchorGenerator((32, 64), strides=(8, 16))(sizes)
    disordered = {
        "shuffled": lambda level: level[torch.randperm(len(level))],
        "shaken": lambda level: level + torch.randn_like(level) * 3,
        "reversed": lambda level: level.flip(0),
        "nan": lambda level: level.index_fill(0, torch.tensor([0, 7]), torch.nan),
        "infinite": lambda level: level.index_fill(0, torch.tensor([0, 7]), torch.inf),
        "flat": lambda level: level[:1].expand_as(level),
    }[disorder]
    match = match_both_ways(Matcher(), boxes, AnchorGrid(list(map(disordered, levels)), sizes))
    assert bool((match >= 0).any())


@pytest.mark.parametrize("floor", [0.0, None])
def test_boxes_without_area_and_infinite_ones_match_nothing(floor: float | None) -> None:
    inf, nan = torch.inf, torch.nan
    useless = [[5.0, 5, 5, 9], [9, 9, 5, 5], [9, 5, 5, 9], [0, 0, inf, inf], [-inf, -inf, inf, inf]]
    useless += [[nan, 0, 9, 9], [inf, inf, inf, inf], [0, 0, 1e30, 1e30], [0, 0, 1e-30, 1e-30]]
    boxes = torch.tensor([*useless, [40, 40, 80, 80]])
    match = match_both_ways(Matcher(force_match_floor=floor), boxes, pyramid(200, 200))
    assert set(match.tolist()) == {BETWEEN, BACKGROUND, 9}


@pytest.mark.parametrize("of_boxes", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_anchors", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_may_differ(of_boxes: torch.dtype, of_anchors: torch.dtype) -> None:
    for snap in (0, 1):
        boxes = boxes_of_all_kinds(40, 300, 300, 0.5, 300, snap).to(of_boxes)
        match = match_both_ways(Matcher(), boxes, pyramid(300, 300, dtype=of_anchors))
        assert int(match.max()) > 20


def test_the_criterion_tells_the_matcher_the_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(13, 20), (7, 10)]
    anchors = AnchorGenerator((32, 64), strides=(8, 16))(sizes)
    logits, deltas = ([torch.randn(2, 9 * k, *size) for size in sizes] for k in (3, 4))
    targets: Any = [
        {"boxes": boxes_of_all_kinds(n, 104, 160, 8, 90, 0), "labels": torch.arange(n) % 3}
        for n in (5, 2)
    ]
    criterion = RetinaNetCriterion(Matcher(), BoxCoder())
    expected = criterion(logits, deltas, anchors, targets)
    monkeypatch.setattr(matching, "_FEW_PAIRS", 0)
    monkeypatch.setattr(matching, "_WINDOWS_PAY", 0)
    monkeypatch.setattr(Matcher, "_match_all", None)
    assert_close(criterion(logits, deltas, anchors, targets), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_match_of_a_cpu() -> None:
    grid = pyramid(800, 1344)
    boxes = boxes_of_all_kinds(200, 800, 1344, 4, 600, 4)
    on_gpu = AnchorGrid([grid.anchors.cuda()[:151200]], [(100, 168)])
    on_cpu = AnchorGrid([grid.anchors[:151200]], [(100, 168)])
    match = match_both_ways(Matcher(), boxes.cuda(), on_gpu)
    assert_close(match.cpu(), Matcher()(boxes, on_cpu), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_threshold": 0}, r"`positive_threshold` must be in \(0, 1\]; got 0"),
        ({"negative_threshold": 0.6}, r"`negative_threshold` must be in \[0, 0.5\]; got 0.6"),
        ({"force_match_floor": -0.1}, r"`force_match_floor` must be in \[0, 1\]; got -0.1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matcher(**options)


def test_no_anchors_are_an_error() -> None:
    with pytest.raises(ValueError, match="`anchors` must be not empty"):
        Matcher()(SQUARE, torch.zeros(0, 4))
