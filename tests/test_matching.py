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
from focaldet.matching import BACKGROUND, BETWEEN, ATSSAssigner, Matcher
from tests.helpers.boxes import random_boxes

SQUARE = torch.tensor([[0.0, 0, 10, 10]])


@pytest.mark.parametrize(
    ("height", "expected"), [(5.1, 0), (5.0, 0), (4.9, BETWEEN), (4.0, BETWEEN), (3.9, BACKGROUND)]
)
def test_an_iou_equal_to_a_threshold_reaches_it(height: float, expected: int) -> None:
    anchors = torch.tensor([[0.0, 0, 10, height]], dtype=torch.float64)
    match = Matcher(force_match_floor=None)(SQUARE.double(), anchors)
    assert match.tolist() == [expected]


def test_the_best_anchor_of_an_object_is_positive_whatever_its_iou() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 0, 10, 1]])
    assert Matcher()(SQUARE, anchors).tolist() == [0, BACKGROUND]
    assert Matcher(force_match_floor=0.3)(SQUARE, anchors).tolist() == [BACKGROUND, BACKGROUND]


def test_a_box_that_overlaps_no_anchor_makes_none_positive() -> None:
    far = torch.tensor([[900.0, 900, 910, 910]])
    anchors = AnchorGenerator()([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)])
    small = anchors[0]
    assert set(Matcher()(far, small).tolist()) == {BACKGROUND}
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=True)
    assert int((peer(box_iou(far, small)) >= 0).sum()) == len(small)  # see the deviation of Matcher


def test_all_anchors_that_tie_for_the_best_are_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 8, 10, 10]])
    assert Matcher()(SQUARE, anchors).tolist() == [0, 0]


def test_a_forced_anchor_keeps_the_box_that_it_overlaps_most() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 1]])
    anchors = torch.tensor([[0.0, 0, 10, 7]])
    assert Matcher()(boxes, anchors).tolist() == [0]


def test_without_boxes_every_anchor_is_background() -> None:
    assert Matcher()(torch.zeros(0, 4), random_boxes(3, torch.float32)).tolist() == [BACKGROUND] * 3


@pytest.mark.parity
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans(), st.integers(1, 300))
def test_matches_equal_those_of_torchvision(seed: int, count: int, force: bool, block: int) -> None:
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
        iou = paired_box_iou(boxes, anchors)
        sizes.append(iou.numel())
        return iou

    monkeypatch.setattr(matching, "paired_box_iou", spy)
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
    """Return boxes with log-uniform sides, inside, around and far from an image, some of them twice.

    With ``snap`` above 0, coordinates are multiples of it, so that many anchors tie.
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
    """Match within reach, however large the windows, and compare with the match of all pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_FEW_PAIRS", 0)
        patch.setattr(matching, "_WINDOWS_PAY", 0)
        patch.setattr(matching, "_PAIRS_AT_ONCE", block)
        patch.setattr(matching, "_IOUS_IN_CACHE", block)
        with patch.context() as no_other_way:
            no_other_way.setattr(Matcher, "_match_all", None)
            within_reach = matcher(boxes, grid)
        assert_close(within_reach, matcher(boxes, grid.anchors), rtol=0, atol=0)
    return within_reach


# Anchors of NVIDIA's detector: one pixel larger than intended, or rounded in older files.
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
            {"mode": "inclusive_rounded"},
        ]
    ),
    thresholds=st.sampled_from([(0.5, 0.4), (0.5, 0.5), (0.6, 0.1), (0.5, 0.0)]),
    floor=st.sampled_from([0.0, None, 0.2]),
    block=st.sampled_from([1, 100, 2**18]),
)
def test_matching_within_reach_equals_matching_all_pairs(
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
        image = (max(image[0], 32), max(image[1], 32))  # strides of 0 must not result
    matcher = Matcher(*thresholds, force_match_floor=floor)
    boxes = boxes_of_all_kinds(count, *image, *sides, snap)
    match_both_ways(matcher, boxes, pyramid(*image, **anchors), block=block)


@pytest.mark.parity
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("anchors", [{}, {"mode": "torchvision", "offset": 0}])
@pytest.mark.parametrize("snap", [0, 4])
def test_matches_within_reach_equal_those_of_torchvision(
    force: bool, anchors: dict[str, Any], snap: int
) -> None:
    grid = pyramid(320, 480, **anchors)
    boxes = boxes_of_all_kinds(100, 320, 480, 4, 400, snap)
    boxes = boxes[(box_iou(boxes, grid.anchors) > 0).any(dim=1)]  # see the deviation of Matcher
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=force)(box_iou(boxes, grid.anchors))
    found = match_both_ways(Matcher(force_match_floor=0.0 if force else None), boxes, grid)
    assert_close(found, peer, rtol=0, atol=0)
    assert len(set(found.tolist())) > (40 if force else 10)


def test_the_best_anchor_is_found_even_far_below_the_threshold() -> None:
    grid = pyramid(400, 400)
    tiny, long = [50.0, 50, 52, 52], [-3000.0, 200, 3000, 203]
    match = match_both_ways(Matcher(), torch.tensor([tiny, long]), grid)
    assert int(box_iou(torch.tensor([tiny, long]), grid.anchors).amax(dim=1).max() * 100) < 2
    assert set(match.tolist()) == {BACKGROUND, 0, 1}


def test_a_forced_anchor_may_match_a_box_that_has_better_anchors() -> None:
    anchors = torch.tensor([[8.0 * x, 0, 8.0 * x + 16, 16] for x in range(5)])
    thin, wide = [0.0, 0, 2, 16], [8.0, 0, 24, 16]  # IoU with the first anchor 1/8 and 1/3
    grid = AnchorGrid([anchors], [(1, 5)])
    match = match_both_ways(Matcher(), torch.tensor([thin, wide]), grid)
    assert match.tolist() == [1, 1, BACKGROUND, BACKGROUND, BACKGROUND]


def test_each_of_many_boxes_is_compared_with_few_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_all_pairs_are_compared_if_windows_are_too_large() -> None:
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
def test_matching_within_reach_works_for_larger_rounded_or_shifted_anchors(
    mode: str, plus_one: bool, offset: float, snap: int
) -> None:
    grid = pyramid(333, 500, **ODTK, mode=mode, plus_one=plus_one, offset=offset)
    boxes = boxes_of_all_kinds(60, 333, 500, 3, 500, snap)
    boxes = torch.cat((boxes, grid.anchors[:: len(grid.anchors) // 20]))  # some equal an anchor
    for floor in (0.0, None, 0.2):
        match = match_both_ways(Matcher(force_match_floor=floor), boxes, grid)
        assert len(set(match.tolist())) > 20


@pytest.mark.parametrize("disorder", ["shuffled", "shaken", "reversed", "nan", "infinite", "flat"])
def test_anchors_without_a_grid_are_matched_too(disorder: str) -> None:
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


def test_the_criterion_passes_the_grids_to_the_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_gpu_and_cpu_give_the_same_matches() -> None:
    grid = pyramid(800, 1344)
    boxes = boxes_of_all_kinds(200, 800, 1344, 4, 600, 4)
    on_gpu = AnchorGrid([grid.anchors.cuda()[:151200]], [(100, 168)])
    on_cpu = AnchorGrid([grid.anchors[:151200]], [(100, 168)])
    match = match_both_ways(Matcher(), boxes.cuda(), on_gpu)
    assert_close(match.cpu(), Matcher()(boxes, on_cpu), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_threshold": 0}, r"positive_threshold must be in \(0, 1\], got 0"),
        ({"negative_threshold": 0.6}, r"negative_threshold must be in \[0, 0.5\], got 0.6"),
        ({"force_match_floor": -0.1}, r"force_match_floor must be in \[0, 1\], got -0.1"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matcher(**options)


def test_no_anchors_are_an_error() -> None:
    with pytest.raises(ValueError, match="anchors is empty"):
        Matcher()(SQUARE, torch.zeros(0, 4))


def test_atss_by_hand() -> None:
    # A level of 4x1 cells of 8 pixels, and one of 2x1 cells of 16, each with one square anchor.
    fine = torch.tensor([[8.0 * x, 0, 8.0 * x + 8, 8] for x in range(4)])
    coarse = torch.tensor([[16.0 * x, 0, 16.0 * x + 16, 16] for x in range(2)])
    grid = AnchorGrid([fine, coarse], [(1, 4), (1, 2)])
    box = torch.tensor([[2.0, 0, 14, 8]])  # centre (8, 4)
    # Two cells each: IoUs 48/112 twice, and 96/256 and 0. Mean 0.308, deviation 0.207, sum 0.515.
    assert ATSSAssigner(top_k=2)(box, grid).tolist() == [BACKGROUND] * 6
    # One cell each, the first of the two nearest: 3/7 and 3/8. Mean 0.402, deviation 0.038.
    assert ATSSAssigner(top_k=1)(box, grid).tolist() == [BACKGROUND] * 6
    # Centred on a cell, with IoU 1 against 0, 0, and 1/4 and 0 at the coarse level.
    box = torch.tensor([[8.0, 0, 16, 8]])
    assert ATSSAssigner(top_k=3)(box, grid).tolist() == [BACKGROUND, 0] + [BACKGROUND] * 4


def test_atss_anchors_need_their_centre_in_the_box() -> None:
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    grid = AnchorGrid([anchors], [(1, 2)])
    box = torch.tensor([[4.5, 0, 8, 8]])  # overlaps the first anchor alone, beside its centre
    assert ATSSAssigner()(box, grid).tolist() == [BACKGROUND, BACKGROUND]
    box = torch.tensor([[4.0, 0, 8, 8]])
    assert ATSSAssigner()(box, grid).tolist() == [BACKGROUND, BACKGROUND]  # 0.25 + 0.35 > 0.5
    single = AnchorGrid([anchors[:1]], [(1, 1)])
    assert ATSSAssigner()(box, single).tolist() == [0]  # a single candidate has no deviation


def atss_by_brute_force(boxes: torch.Tensor, grid: AnchorGrid, top_k: int) -> list[int]:
    """Follow algorithm 1 of the paper box by box, with lists and loops."""
    anchors = grid.anchors.tolist()
    iou = box_iou(boxes, grid.anchors)
    matches, best = [BACKGROUND] * len(anchors), [0.0] * len(anchors)
    for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        distances = [
            ((a1 + a2 - x1 - x2) / 2) ** 2 + ((b1 + b2 - y1 - y2) / 2) ** 2
            for a1, b1, a2, b2 in anchors
        ]
        candidates: list[int] = []
        first = 0
        for count, (height, width) in zip(grid.num_anchors, grid.grid_sizes, strict=True):
            per_cell = count // (height * width)
            starts = range(first, first + count, per_cell)
            for start in sorted(starts, key=distances.__getitem__)[:top_k]:
                candidates += range(start, start + per_cell)
            first += count
        values = iou[g, candidates]
        threshold = float(values.mean() + values.std())
        for anchor in candidates:
            a1, b1, a2, b2 = anchors[anchor]
            inside = x1 <= (a1 + a2) / 2 < x2 and y1 <= (b1 + b2) / 2 < y2
            if inside and iou[g, anchor] >= threshold and iou[g, anchor] > best[anchor]:
                matches[anchor], best[anchor] = g, float(iou[g, anchor])
    return matches


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 12),
    top_k=st.sampled_from([1, 4, 9, 10_000]),
    ratios=st.sampled_from([(1.0,), (0.5, 1.0, 2.0)]),
    block=st.sampled_from([1, 2**22]),
)
def test_atss_agrees_with_brute_force(
    seed: int, count: int, top_k: int, ratios: tuple[float, ...], block: int
) -> None:
    torch.manual_seed(seed)
    grid = pyramid(
        120,
        150,
        sizes=(32, 64, 128),
        strides=(8, 16, 32),
        aspect_ratios=ratios,
        dtype=torch.float64,
    )
    # Random positions, so that neither distances nor IoUs tie or reach a threshold exactly.
    boxes = boxes_of_all_kinds(max(count, 1), 120, 150, 4, 150, 0)[:count].double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_IOUS_AT_ONCE", block)
        match = ATSSAssigner(top_k)(boxes, grid)
    assert match.tolist() == atss_by_brute_force(boxes, grid, top_k)


def test_atss_takes_the_first_of_equally_near_cells() -> None:
    grid = pyramid(64, 64, sizes=(16,), strides=(8,), octave_scales=(1,), aspect_ratios=(1,))
    box = torch.tensor([[24.0, 24, 40, 40]])  # its centre is a corner of four cells
    candidates = ATSSAssigner(6)._candidates(box, grid)
    row, column = candidates[0] // 8, candidates[0] % 8
    # The four cells around the centre, and the first two of eight at the same distance.
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
        *((2, 3), (2, 4)),
        *((3, 3), (3, 4), (4, 3), (4, 4)),
    ]


def test_atss_makes_every_ordinary_box_positive_somewhere() -> None:
    grid = pyramid(400, 400)
    boxes = boxes_of_all_kinds(60, 400, 400, 32, 300, 1)
    match = ATSSAssigner()(boxes, grid)
    assert match.dtype == torch.int64
    assert BETWEEN not in match
    inside = ((boxes > 0) & (boxes < 400)).all(dim=1).nonzero()[:, 0].tolist()
    repeated = {i for i in inside if any(torch.equal(boxes[i], boxes[j]) for j in range(i))}
    assert set(inside) - repeated <= set(match.tolist())


def test_atss_ignores_boxes_without_finite_corners() -> None:
    boxes = torch.tensor([[torch.nan, 0, 9, 9], [0, 0, torch.inf, torch.inf], [40, 40, 80, 80]])
    assert set(ATSSAssigner()(boxes, pyramid(200, 200)).tolist()) == {BACKGROUND, 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_atss_gives_the_same_matches_on_a_gpu() -> None:
    sizes = [(100, 168), (50, 84)]
    levels = AnchorGenerator((32, 64), strides=(8, 16))(sizes)
    boxes = boxes_of_all_kinds(200, 800, 1344, 4, 600, 4)
    on_gpu = ATSSAssigner()(boxes.cuda(), AnchorGrid([level.cuda() for level in levels], sizes))
    expected = ATSSAssigner()(boxes, AnchorGrid(levels, sizes))
    # The sum of IoUs is rounded differently, which can decide over a candidate at its threshold.
    assert float((on_gpu.cpu() == expected).float().mean()) > 0.9999


def test_atss_errors_name_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="top_k.* 0"):
        ATSSAssigner(0)
    with pytest.raises(TypeError, match="top_k.*integer.*9.0"):
        ATSSAssigner(9.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="anchors must be an AnchorGrid, got Tensor"):
        ATSSAssigner()(SQUARE, SQUARE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boxes must have shape \[N, 4\]"):
        ATSSAssigner()(torch.zeros(2, 5), pyramid(32, 32))
