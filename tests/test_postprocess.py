from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import batched_nms

from focaldet import AnchorGenerator
from focaldet.box_coder import BoxCoder
from focaldet.boxes import clip_boxes
from focaldet.heads import flatten_maps
from focaldet.postprocess import PostProcess, soft_nms

FEATURES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
SIZE = (60, 90)
CLASSES = 4


def head_output(batch: int = 1, bias: float = -2.0) -> tuple[Any, Any, Any]:
    counts = [batch * 9 * CLASSES * height * width for height, width in FEATURES]
    # All scores differ, because the order of equal scores is undefined.
    values = (torch.linspace(-4, 4, sum(counts)) + bias)[torch.randperm(sum(counts))]
    logits = [
        level.view(batch, 9 * CLASSES, *size)
        for level, size in zip(torch.split(values, counts), FEATURES, strict=True)
    ]
    deltas = [torch.randn(batch, 36, *size) * 0.3 for size in FEATURES]
    return logits, deltas, AnchorGenerator()(FEATURES)


def brute(logits: Any, deltas: Any, anchors: Any, image: int, top_k: int, threshold: float) -> Any:
    """Post-process in the plain way: flatten everything and take the sigmoid of all logits."""
    boxes, scores, labels = [], [], []
    for level in range(len(logits)):
        score = flatten_maps([logits[level]], 9)[image].sigmoid().flatten()
        best, index = score.sort(descending=True)
        index = index[best > threshold][:top_k]
        row = flatten_maps([deltas[level]], 9)[image][index // CLASSES]
        boxes.append(clip_boxes(BoxCoder().decode(row, anchors[level][index // CLASSES]), SIZE))
        scores.append(score[index])
        labels.append(index % CLASSES)
    box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    keep = batched_nms(box, score, label, 0.5)
    return box[keep], score[keep], label[keep]


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([3, 50, 1000]))
def test_maps_in_either_layout_agree_with_flattened_rows(
    seed: int, channels_last: bool, top_k: int
) -> None:
    torch.manual_seed(seed)
    logits, deltas, anchors = head_output(batch=2)
    expected = [brute(logits, deltas, anchors, image, top_k, 0.2) for image in range(2)]
    if channels_last:
        logits, deltas = (
            [level.contiguous(memory_format=torch.channels_last) for level in maps]
            for maps in (logits, deltas)
        )
    process = PostProcess(
        BoxCoder(), pre_nms_top_k=top_k, score_threshold=0.2, max_detections=10**6
    )
    for found, (boxes, scores, labels) in zip(
        process(logits, deltas, anchors, [SIZE] * 2), expected, strict=True
    ):
        assert_close(found.scores, scores, rtol=0, atol=1e-6)
        assert_close(found.labels, labels, rtol=0, atol=0)
        assert_close(found.boxes, boxes)


def test_boxes_are_scaled_to_the_input_image_after_suppression() -> None:
    case = head_output()
    process = PostProcess(BoxCoder())
    [plain], [scaled] = process(*case, [SIZE]), process(*case, [SIZE], [(600, 45)])
    assert scaled.image_size == (600, 45)
    assert_close(scaled.boxes, plain.boxes * torch.tensor([0.5, 10, 0.5, 10]))
    assert float(plain.boxes[:, 2].max()) <= SIZE[1]
    assert float(plain.boxes[:, 3].max()) <= SIZE[0]


def test_scores_decrease_and_respect_threshold_and_count() -> None:
    process = PostProcess(BoxCoder(), max_detections=7)
    [found] = process(*head_output(), [SIZE])
    assert len(found) == 7
    assert bool((found.scores.diff() <= 0).all())
    [found] = process(*head_output(), [SIZE], score_threshold=0.9)
    assert bool((found.scores > 0.9).all())
    [found] = process(*head_output(), [SIZE], score_threshold=0.0)
    assert len(found) == 7


def test_the_threshold_is_exact_to_the_last_bit() -> None:
    logit = torch.tensor(-2.9444389)
    score = float(logit.sigmoid())
    case: Any = (
        [logit.view(1, 1, 1, 1)],
        [torch.zeros(1, 4, 1, 1)],
        [torch.tensor([[0.0, 0, 8, 8]])],
    )
    process = PostProcess(BoxCoder())
    assert len(process(*case, [(8, 8)], score_threshold=score)[0]) == 0
    assert len(process(*case, [(8, 8)], score_threshold=score - 1e-8)[0]) == 1


def test_suppression_is_per_class_by_default() -> None:
    logits = [torch.tensor([3.0, 2.0]).view(1, 2, 1, 1)]
    case: Any = (logits, [torch.zeros(1, 4, 1, 1)], [torch.tensor([[0.0, 0, 8, 8]])], [(8, 8)])
    assert PostProcess(BoxCoder())(*case)[0].labels.tolist() == [0, 1]
    assert PostProcess(BoxCoder(), class_agnostic_nms=True)(*case)[0].labels.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "soft"),
    [
        ({"suppression": "linear", "nms_threshold": 0.3}, {"method": "linear"}),
        ({"suppression": "gaussian", "soft_nms_sigma": 0.2}, {"sigma": 0.2}),
        ({"suppression": "gaussian", "max_detections": 60}, {"max_detections": 60}),
        ({"suppression": "gaussian", "class_agnostic_nms": True}, {}),
    ],
    ids=str,
)
def test_soft_suppression_lowers_the_scores_of_all_candidates(options: Any, soft: Any) -> None:
    maps = head_output()
    everything = PostProcess(BoxCoder(), nms_threshold=1.0, max_detections=None)
    [before] = everything(*maps, [SIZE], score_threshold=0.3)
    labels = torch.zeros_like(before.labels) if "class_agnostic_nms" in options else before.labels
    kept, lowered = soft_nms(before.boxes, before.scores, labels, score_threshold=0.3, **soft)
    [found] = PostProcess(BoxCoder(), **{"max_detections": None, **options})(
        *maps, [SIZE], score_threshold=0.3
    )
    assert 5 < len(found) < len(before)
    assert_close(found.boxes, before.boxes[kept])
    assert_close(found.scores, lowered)
    assert torch.equal(found.labels, before.labels[kept])
    assert (found.scores[1:] <= found.scores[:-1]).all()
    assert (found.scores < before.scores[kept]).any()


def test_soft_suppression_keeps_scores_above_the_lowest_threshold_of_the_levels() -> None:
    maps = head_output()
    soft = PostProcess(
        BoxCoder(),
        suppression="gaussian",
        score_threshold=0.3,
        last_level_threshold=0.1,
        max_detections=None,
    )
    [found] = soft(*maps, [SIZE])
    assert 0.1 < found.scores.min() < 0.3
    [above] = soft(*maps, [SIZE], score_threshold=0.2)
    assert 0.2 < above.scores.min() < 0.3


def test_softly_lowered_scores_carry_gradients() -> None:
    logits = [torch.tensor([3.0, 2.0]).view(1, 2, 1, 1).requires_grad_()]
    case: Any = (logits, [torch.zeros(1, 4, 1, 1)], [torch.tensor([[0.0, 0, 8, 8]])], [(8, 8)])
    soft = PostProcess(BoxCoder(), suppression="gaussian", class_agnostic_nms=True)
    [found] = soft(*case)
    first, second = torch.tensor([3.0, 2.0]).sigmoid().tolist()
    factor = math.exp(-2)  # the IoU is 1 and sigma 0.5
    assert_close(found.scores, torch.tensor([first, second * factor]))
    found.scores.sum().backward()
    assert logits[0].grad is not None
    expected = torch.tensor([first * (1 - first), second * (1 - second) * factor])
    assert_close(logits[0].grad.flatten(), expected)


def test_soft_suppression_of_no_candidates_gives_none() -> None:
    [found] = PostProcess(BoxCoder(), suppression="linear")(*head_output(bias=-30), [SIZE])
    assert found.boxes.shape == (0, 4)


def test_an_unknown_suppression_raises_when_it_is_set_and_when_it_is_used() -> None:
    with pytest.raises(ValueError, match="Unknown suppression 'soft'; choose 'hard', 'linear'"):
        PostProcess(BoxCoder(), suppression="soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="soft_nms_sigma must be .*, got 0"):
        PostProcess(BoxCoder(), soft_nms_sigma=0.0)
    process = PostProcess(BoxCoder())
    process.suppression = "soft"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Unknown suppression 'soft'"):
        process(*head_output(), [SIZE])


def test_images_without_detections_give_empty_results() -> None:
    [found] = PostProcess(BoxCoder())(*head_output(bias=-30), [SIZE])
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.labels.dtype == torch.int64


def test_half_precision_maps_are_decoded_in_float32() -> None:
    logits, deltas, anchors = head_output()
    logits, deltas = [m.bfloat16() for m in logits], [m.bfloat16() for m in deltas]
    process = PostProcess(BoxCoder())
    [low] = process(logits, deltas, anchors, [SIZE])
    [high] = process([m.float() for m in logits], [m.float() for m in deltas], anchors, [SIZE])
    assert low.boxes.dtype == low.scores.dtype == torch.float32
    assert_close(low.scores, high.scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, r"score_threshold must be in \[0, 1\], got 1.5"),
        ({"last_level_threshold": 2}, r"last_level_threshold must be in \[0, 1\], got 2"),
        ({"size_rounding": "up"}, "size_rounding 'up'"),
        ({"nms_threshold": -1}, r"nms_threshold must be in \[0, 1\], got -1"),
        ({"pre_nms_top_k": 0}, "pre_nms_top_k.* 0"),
        ({"max_detections": 0}, "max_detections.* 0"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostProcess(BoxCoder(), **options)


def test_errors_name_a_wrong_threshold_of_a_call() -> None:
    with pytest.raises(ValueError, match=r"score_threshold must be in \[0, 1\], got 50"):
        PostProcess(BoxCoder())(*head_output(), [SIZE], score_threshold=50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": []}, "logits is empty"),
        ({"anchors": [torch.zeros(4, 4)]}, "one tensor per level, got 2, 2 and 1"),
        ({"logits": [(1, 6, 2, 2), (1, 6, 0, 1)]}, r"Level 1 .*at least one cell.*\[1, 6, 0, 1\]"),
        ({"anchors": [torch.zeros(3, 4), torch.zeros(1, 4)]}, r"Level 0 .* and \[3, 4\]"),
        ({"anchors": [torch.zeros(4, 4), torch.zeros(0, 4)]}, r"Level 1 .* and \[0, 4\]"),
        ({"box_deltas": [(1, 4, 2, 2), (1, 3, 1, 1)]}, r"Level 1 .*\[1, 3, 1, 1\]"),
        ({"logits": [(1, 6, 2, 2), (2, 6, 1, 1)]}, r"Level 1 .*\[2, 6, 1, 1\]"),
        ({"logits": [(1, 0, 2, 2), (1, 6, 1, 1)]}, r"Level 0 .*\[1, 0, 2, 2\]"),
        ({"sizes": []}, r"sizes must have one \(height, width\) per image, got 0 for 1"),
        ({"sizes": [(5, 0)]}, r"sizes\[0\] must be .* above 0, got \(5, 0\)"),
        ({"original_sizes": [(9, 9)] * 2}, "original_sizes must have one .* got 2 for 1"),
        ({"original_sizes": [(-1, 9)]}, r"original_sizes\[0\] must be .* got \(-1, 9\)"),
    ],
)
def test_errors_name_maps_and_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "logits": [(1, 6, 2, 2), (1, 6, 1, 1)],
        "box_deltas": [(1, 4, 2, 2), (1, 4, 1, 1)],
        "anchors": [torch.zeros(4, 4), torch.zeros(1, 4)],
        "sizes": [(16, 16)],
    }
    call |= changes
    for name in ("logits", "box_deltas"):
        call[name] = [torch.zeros(shape) for shape in call[name]]
    with pytest.raises(ValueError, match=message):
        PostProcess(BoxCoder())(**call)


def one_cell(boxes: Any, scores: Any) -> tuple[Any, Any, Any]:
    """Return the maps of one class and one cell, whose anchors are the given boxes."""
    logits = torch.tensor(scores, dtype=torch.float64).logit().float().view(1, -1, 1, 1)
    anchors = torch.tensor(boxes, dtype=torch.float32)
    return [logits], [torch.zeros(1, 4 * len(anchors), 1, 1)], [anchors]


OUTSIDE = ([[-4.0, -4, 0, 2], [0, 0, 20, 20], [0, 0, 9, 8]], [0.9, 0.8, 0.7])


def test_boxes_are_clipped_to_the_image_or_the_batch_before_or_after_suppression() -> None:
    def found(**options: Any) -> Any:
        case = one_cell(*OUTSIDE)
        [detections] = PostProcess(BoxCoder(), **options)(*case, [(10, 10)])
        return detections.boxes.tolist()

    empty, whole, small = [0, 0, 0, 2], [0, 0, 10, 10], [0, 0, 9, 8]
    assert found() == [empty, whole]  # clipped to 10x10, the third overlaps the second by 72%
    assert found(drop_empty=True) == [whole]
    after = "image_after_nms"
    assert found(clip_to=after) == [empty, whole, small]  # unclipped, by 18%
    assert found(clip_to=after, drop_empty=True) == [whole, small]
    assert found(clip_to=after, drop_empty=True, max_detections=2) == [
        whole
    ]  # 2 with the empty one
    assert found(drop_empty=True, max_detections=1, nms_threshold=0.9) == [whole]
    batch = found(clip_to="batch", first_stride=16)  # one cell of 16 pixels
    assert batch == [empty, [0, 0, 16, 16], small]
    inclusive = found(clip_to="batch", first_stride=16, inclusive_corners=True)
    assert inclusive == [[0, 0, 1, 2], [0, 0, 16, 16], small]


def test_boxes_are_scaled_back_by_each_side_or_by_the_intended_factor() -> None:
    def found(**options: Any) -> Any:
        case = one_cell([[3.0, 3, 9, 15]], [0.9])
        process = PostProcess(BoxCoder(), **options)
        [detections] = process(*case, [(15, 31)], [(10, 21)])
        return detections.boxes[0]

    sides = torch.tensor([3 * 21 / 31, 2, 9 * 21 / 31, 10])
    assert_close(found(), sides)
    assert_close(found(resize_limits=(15, 99)), torch.tensor([2.0, 2, 6, 10]))  # 1.5
    assert_close(found(resize_limits=(16, 21)), torch.tensor([3.0, 3, 9, 15]))  # long side to 21
    pixels = found(resize_limits=(15, 99), inclusive_corners=True)
    assert_close(pixels, torch.tensor([2, 2, 8 / 1.5 + 1, 14 / 1.5 + 1]))


def test_boxes_with_their_last_pixels_may_be_compared_in_either_image() -> None:
    # Resized, the areas are 8 * 8 and 4 * 8, an IoU of 0.5. In the input image, at half the size, last
    # pixels are at 3.5 and 1.5, so that areas are 4.5 * 4.5 and 2.5 * 4.5, an IoU of 0.56.
    def found(**options: Any) -> int:
        case = one_cell([[0.0, 0, 8, 8], [0.0, 0, 4, 8]], [0.9, 0.8])
        [detections] = PostProcess(BoxCoder(), **options)(*case, [(16, 16)], [(8, 8)])
        return len(detections)

    assert found(inclusive_corners=True) == 2
    assert found(inclusive_corners=True, scale_before_nms=True) == 1
    assert found(scale_before_nms=True) == 2  # an IoU of 0.5 in both
    assert "scale_before_nms=True" in repr(PostProcess(BoxCoder(), scale_before_nms=True))


def test_boxes_can_be_suppressed_in_pixels_of_the_input_image() -> None:
    def found(**options: Any) -> Any:
        case = one_cell([[0.0, 0, 8, 8], [4.0, 0, 13, 8]], [0.9, 0.8])
        process = PostProcess(
            BoxCoder(),
            inclusive_corners=True,
            nms_threshold=0.35,
            resize_limits=(16, 99),
            **options,
        )
        [detections] = process(*case, [(16, 32)], [(4, 8)])
        return detections.boxes.tolist()

    # Last pixels 7 and 12 of 4-fold size are 1.75 and 3: the boxes are 2.75 and 3 wide, not 2 and 2.25.
    assert found(clip_to="image") == [[0, 0, 2.75, 2.75], [1, 0, 4, 2.75]]  # IoU 4 / 13
    assert found(clip_to="original") == [[0, 0, 2.75, 2.75]]  # IoU 1.75 / 4
    # The limit of the long side is compared after rounding, and 32.4 is no more than 32.
    case = one_cell([[0.0, 0, 9, 9]], [0.9])
    limits: Any = {"resize_limits": (16, 32), "clip_to": "original"}
    [half_even] = PostProcess(BoxCoder(), size_rounding="round_before_limit", **limits)(
        *case, [(16, 32)], [(40, 81)]
    )
    [floor] = PostProcess(BoxCoder(), **limits)(*case, [(16, 32)], [(40, 81)])
    assert_close(half_even.boxes[0, 2:], torch.full((2,), 9 * 40 / 16))
    assert_close(floor.boxes[0, 2:], torch.full((2,), 9 * 81 / 32))


def test_the_last_level_can_have_its_own_threshold() -> None:
    parts = [one_cell([[0.0, 0, 8, 8]], [score]) for score in (0.04, 0.3, 0.04)]
    maps = [[part[i][0] for part in parts] for i in range(3)]

    def found(score_threshold: float | None = None, **options: Any) -> list[float]:
        process = PostProcess(BoxCoder(), nms_threshold=1.0, **options)
        [detections] = process(*maps, [(8, 8)], score_threshold=score_threshold)
        return [round(score, 4) for score in detections.scores.tolist()]

    assert found() == [0.3]
    assert found(last_level_threshold=0.0) == [0.3, 0.04]
    assert found(last_level_threshold=0.5) == [0.3]
    assert found(0.2, last_level_threshold=0.0) == [0.3]
    assert found(0.01) == [0.3, 0.04, 0.04]


def test_no_limit_keeps_every_candidate() -> None:
    logits, deltas, anchors = head_output(bias=4)
    process = PostProcess(BoxCoder(), pre_nms_top_k=None, max_detections=None, nms_threshold=1.0)
    count = sum(level.numel() for level in logits)
    assert len(process(logits, deltas, anchors, [SIZE], score_threshold=0.0)[0]) == count


@pytest.mark.parametrize("bias", [-30.0, -9.0, -6.0, 0.0, 9.0])  # none, few, some, half, all
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_above_the_threshold_is_missed(
    bias: float, channels_last: bool, dtype: torch.dtype
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    level = (torch.randn(1, 9 * CLASSES, 17, 23) * 1.5 + bias).to(dtype)
    level = level.contiguous(memory_format=layout)
    anchors = AnchorGenerator(sizes=(32,), strides=(8,))([(17, 23)])
    process = PostProcess(BoxCoder(), pre_nms_top_k=None, max_detections=None, nms_threshold=1.0)
    [found] = process([level], [torch.zeros(1, 36, 17, 23)], anchors, [SIZE])
    scores = level.float().sigmoid().flatten()
    wanted = scores[scores > 0.05].sort(descending=True).values
    assert_close(found.scores, wanted, rtol=0, atol=1e-6)


def test_the_threshold_is_exact_in_bfloat16() -> None:
    logit = torch.tensor(-2.953125)  # the bfloat16 to which the logit of 0.0497 is rounded
    assert float(logit.bfloat16()) == float(logit)
    case: Any = (
        [logit.bfloat16().view(1, 1, 1, 1)],
        [torch.zeros(1, 4, 1, 1)],
        [torch.tensor([[0.0, 0, 8, 8]])],
    )
    score = float(logit.sigmoid())
    assert len(PostProcess(BoxCoder())(*case, [(8, 8)], score_threshold=score - 1e-5)[0]) == 1
    assert len(PostProcess(BoxCoder())(*case, [(8, 8)], score_threshold=score)[0]) == 0


def test_a_nan_does_not_hide_its_neighbours() -> None:
    level = torch.full((1, 9 * CLASSES, 8, 8), -9.0)
    level[0, 0, 0, 0], level[0, 0, 0, 1] = math.nan, 3.0
    anchors = AnchorGenerator(sizes=(32,), strides=(8,))([(8, 8)])
    [found] = PostProcess(BoxCoder())([level], [torch.zeros(1, 36, 8, 8)], anchors, [SIZE])
    assert_close(found.scores, torch.tensor([3.0]).sigmoid())


@pytest.mark.parametrize("crowd", [1, 30, 2000], ids="{} boxes a place".format)
@pytest.mark.parametrize("max_detections", [1, 10, 300])
@pytest.mark.parametrize("clip_to", ["image", "image_after_nms"])
def test_stopping_early_agrees_with_suppressing_everything(
    crowd: int, max_detections: int, clip_to: Any
) -> None:
    count, classes = 3000, 5
    corners = (torch.rand(count // crowd + 1, 2) * 400).repeat_interleave(crowd, dim=0)[:count]
    corners += torch.rand(count, 2)
    anchors = torch.cat((corners, corners + 20), dim=1)[torch.randperm(count)]
    values = torch.linspace(-2, 2, count * classes)[torch.randperm(count * classes)]
    values[torch.rand(count * classes) < 0.5] = -9
    logits, deltas = values.view(1, -1, 1, 1), torch.zeros(1, 4 * count, 1, 1)
    options: Any = {"pre_nms_top_k": None, "clip_to": clip_to}
    [stopped] = PostProcess(BoxCoder(), max_detections=max_detections, **options)(
        [logits], [deltas], [anchors], [(300, 400)]
    )
    [whole] = PostProcess(BoxCoder(), max_detections=None, **options)(
        [logits], [deltas], [anchors], [(300, 400)]
    )
    assert len(whole) > max_detections or crowd == 2000
    whole = whole[:max_detections]
    assert len(stopped) == len(whole)
    assert_close(stopped.scores, whole.scores, rtol=0, atol=0)
    assert_close(stopped.boxes, whole.boxes, rtol=0, atol=0)
    assert_close(stopped.labels, whole.labels, rtol=0, atol=0)


# --- Limits by anchor and by class, and other ways to clip ---------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("top_k", "per_class"), [(20, None), (1000, 7), (30, 5), (1000, None)])
def test_limits_by_anchor_and_by_class_agree_with_the_plain_way(
    channels_last: bool, top_k: int, per_class: int | None
) -> None:
    logits, deltas, anchors = head_output(batch=2)
    if channels_last:
        logits = [level.contiguous(memory_format=torch.channels_last) for level in logits]
    postprocess = PostProcess(
        BoxCoder(),
        score_threshold=0.2,
        pre_nms_top_k=top_k,
        pre_nms_top_k_of="anchors",
        pre_nms_top_k_per_class=per_class,
        max_detections=None,
        clip_to=None,
    )
    found = postprocess(logits, deltas, anchors, [SIZE, SIZE])
    for image in range(2):
        boxes, scores, labels = [], [], []
        for level in range(len(logits)):
            score = flatten_maps([logits[level]], 9)[image].sigmoid()
            best = score.amax(dim=1).sort(descending=True).indices[:top_k]
            row, label = (score[best] > 0.2).nonzero(as_tuple=True)
            delta = flatten_maps([deltas[level]], 9)[image][best[row]]
            boxes.append(BoxCoder().decode(delta, anchors[level][best[row]]))
            scores.append(score[best[row], label])
            labels.append(label)
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        kept = []
        for k in range(CLASSES):
            of_class = (label == k).nonzero()[:, 0]
            kept.append(of_class[score[of_class].sort(descending=True).indices[:per_class]])
        index = torch.cat(kept)
        index = index[batched_nms(box[index], score[index], label[index], 0.5)]
        assert_close(found[image].boxes, box[index])
        assert_close(found[image].scores, score[index])
        assert torch.equal(found[image].labels, label[index])


def test_anchors_without_a_limit_are_pairs_without_one() -> None:
    output = head_output()
    options: Any = {"pre_nms_top_k": None, "score_threshold": 0.3}
    [pairs] = PostProcess(BoxCoder(), **options)(*output, [SIZE])
    [anchors] = PostProcess(BoxCoder(), pre_nms_top_k_of="anchors", **options)(*output, [SIZE])
    assert torch.equal(pairs.boxes, anchors.boxes)


@pytest.mark.parametrize(
    ("clip_to", "expected"),
    [("last_pixel", [0.0, 0, 8, 5]), ("image", [0.0, 0, 9, 6]), (None, [-5.0, -5, 15, 15])],
)
def test_boxes_are_clipped_to_the_last_pixel_or_not_at_all(
    clip_to: Any, expected: list[float]
) -> None:
    anchors = [torch.tensor([[-5.0, -5, 15, 15]])]
    logits, deltas = [torch.full((1, 1, 1, 1), 2.0)], [torch.zeros(1, 4, 1, 1)]
    [found] = PostProcess(BoxCoder(), clip_to=clip_to)(logits, deltas, anchors, [(6, 9)])
    assert_close(found.boxes, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_to": "last_pixel", "inclusive_corners": True}, "contradicts inclusive_corners"),
        ({"pre_nms_top_k_of": "cells"}, "pre_nms_top_k_of.*'cells'"),
        ({"pre_nms_top_k_per_class": 0}, "pre_nms_top_k_per_class must be at least 1"),
        ({"clip_to": "pixel"}, "clip_to.*'pixel'"),
    ],
)
def test_errors_name_wrong_limits_and_ways_to_clip(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostProcess(BoxCoder(), **options)
