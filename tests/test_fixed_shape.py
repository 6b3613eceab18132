"""The post-processing for accelerators gives the detections of the one for the CPU, with few waits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from focaldet import AnchorGenerator, Detections, RetinaNet, _fixed_shape
from focaldet.box_coder import BoxCoder
from focaldet.postprocess import PostProcess
from focaldet.structures import ImageBatch
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

FEATURES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
CLASSES = 4
IMAGES = 4

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*create_unbacked_symint:FutureWarning"
)  # raised inside torchvision


class Maps(NamedTuple):
    logits: list[Tensor]
    box_deltas: list[Tensor]
    anchors: list[Tensor]
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]

    def to(self, like: Any) -> Maps:
        """Convert the maps to a dtype or memory format."""
        key = "memory_format" if isinstance(like, torch.memory_format) else "dtype"
        logits, deltas = (
            [level.to(**{key: like}) for level in maps] for maps in (self.logits, self.box_deltas)
        )
        return self._replace(logits=logits, box_deltas=deltas)


def make_maps(seed: int = 0, images: int = IMAGES, highest: float = 3.0) -> Maps:
    """Return maps in which all logits differ, because the order of equal scores is undefined."""
    generator = torch.Generator().manual_seed(seed)
    counts = [images * 9 * CLASSES * height * width for height, width in FEATURES]
    order = torch.randperm(sum(counts), generator=generator)
    values = torch.linspace(-6, highest, sum(counts))[order]
    return Maps(
        [
            level.view(images, 9 * CLASSES, *size)
            for level, size in zip(torch.split(values, counts), FEATURES, strict=True)
        ],
        [0.4 * torch.randn(images, 36, *size, generator=generator) for size in FEATURES],
        AnchorGenerator()(FEATURES),
        [(60 - image, 90 - 2 * image) for image in range(images)],
        [(120 + 3 * image, 170 + 7 * image) for image in range(images)],
    )


def found_by(process: PostProcess, maps: Maps, **call: Any) -> tuple[list[Detections], int]:
    """Return what the formulation for accelerators finds, and how many images it processes again."""
    again = []
    one_by_one = process._detect_image

    def detect_image(batch: Any, image: int) -> Detections:
        again.append(image)
        return one_by_one(batch, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_prefers_fixed_shape", lambda _: process._has_fixed_shape())
        patch.setattr(process, "_detect_image", detect_image)
        return process(*maps, **call), len(again)


def assert_same(found: list[Detections], expected: list[Detections], fewest: int) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs) >= fewest
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.image_size == theirs.image_size
        assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-6)
        assert_close(ours.boxes, theirs.boxes, rtol=0, atol=1e-4)


def cuda_maps(images: int) -> Maps:
    """Return maps on a GPU, in the context of ``fake_cuda``."""
    device = torch.device("cuda:0")
    return Maps(
        [torch.zeros(images, 36, *size, device=device) for size in FEATURES],
        [torch.zeros(images, 36, *size, device=device) for size in FEATURES],
        AnchorGenerator()(FEATURES, device=device),
        [(60, 90)] * images,
        [(120, 180)] * images,
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_to": "batch"},
    {"clip_to": None},
    {"clip_to": "last_pixel", "nms_threshold": 0.3},
    {"clip_to": "image_after_nms"},
    {"clip_to": "image_after_nms", "drop_empty": True, "inclusive_corners": True},
    {"clip_to": "original", "inclusive_corners": True, "resize_limits": (60, 90)},
    {"drop_empty": True},
    {"inclusive_corners": True},
    {"inclusive_corners": True, "scale_before_nms": True},
    {"resize_limits": (60, 90)},
    {"class_agnostic_nms": True},
    {"last_level_threshold": 0.0},
    {"pre_nms_top_k": 20, "max_detections": None},
    {"pre_nms_top_k": None},
]


@pytest.mark.parametrize("call", [{}, {"labels": [1, 3], "score_threshold": 0.2}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_formulations_give_the_same_detections(
    options: dict[str, Any], call: dict[str, Any]
) -> None:
    process = PostProcess(BoxCoder(), **{"max_detections": 300, **options})
    maps = make_maps()
    if call:
        maps = maps.to(torch.channels_last)
    found, again = found_by(process, maps, **call)
    assert_same(found, process(*maps, **call), 20)
    assert again == 0


@pytest.mark.parametrize(
    "options",
    [{"pre_nms_top_k_per_class": 10}, {"pre_nms_top_k_of": "anchors", "pre_nms_top_k": 20}],
    ids=str,
)
def test_limits_by_class_or_anchor_are_processed_image_by_image(options: dict[str, Any]) -> None:
    process, maps = PostProcess(BoxCoder(), **options), make_maps()
    found, again = found_by(process, maps)
    assert_same(found, process(*maps), 20)
    assert again == IMAGES
    with pytest.raises(ValueError, match=r"fixed_shape does not support.*pairs"):
        process.fixed_shape(*maps[:3], torch.tensor(maps.sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_may_have_any_dtype(dtype: torch.dtype) -> None:
    maps = make_maps(images=1)
    for level in maps.logits:
        level.fill_(-10.0)
    chosen = torch.randperm(36 * 8 * 12)[:60]
    maps.logits[0].view(-1)[chosen] = 1 + torch.arange(60) / 64  # exact in bfloat16
    maps = maps.to(dtype)
    process = PostProcess(BoxCoder())
    found, _ = found_by(process, maps)
    expected = process(*maps)
    assert_same(found, expected, 40)
    assert found[0].boxes.dtype == expected[0].boxes.dtype


@pytest.mark.parametrize(
    ("options", "images_again"),
    [
        ({"max_detections": 5}, 0),
        ({"max_detections": 5, "pre_nms_top_k": None}, 0),
        ({"max_detections": 300}, IMAGES),
        ({"max_detections": None}, IMAGES),
        ({"pre_nms_top_k": None, "drop_empty": True, "max_detections": 5}, IMAGES),
        ({"max_detections": 300, "score_threshold": 0.981}, 0),
    ],
    ids=str,
)
def test_images_that_a_large_batch_leaves_incomplete_are_processed_again(
    options: dict[str, Any], images_again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fixed_shape, "_MAX_MASK_BYTES", (IMAGES * 60) ** 2 // 8)
    process, maps = PostProcess(BoxCoder(), **options), make_maps(highest=4.0)
    found, again = found_by(process, maps)
    assert_same(found, process(*maps), 1)
    assert again == images_again


def test_an_image_with_nan_is_processed_again() -> None:
    maps = make_maps()
    maps.logits[0][1, :, 0, :3] = torch.nan
    process = PostProcess(BoxCoder(), pre_nms_top_k=30)
    found, again = found_by(process, maps)
    assert_same(found, process(*maps), 20)
    assert again == 1


def test_images_without_detections_give_empty_results() -> None:
    maps = make_maps()
    for level in maps.logits:
        level[2] = -20.0
    found, _ = found_by(PostProcess(BoxCoder()), maps, labels=[])
    assert [len(one) for one in found] == [0] * IMAGES
    found, again = found_by(PostProcess(BoxCoder()), maps)
    assert [len(one) > 0 for one in found] == [True, True, False, True]
    assert again == 0


def test_gradients_are_the_same() -> None:
    maps = make_maps(images=2).to(torch.float64)
    process = PostProcess(BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)), max_detections=50)
    tensors = [level.requires_grad_() for level in (*maps.logits, *maps.box_deltas)]

    def gradients(found: list[Detections]) -> tuple[Tensor, ...]:
        loss = sum((one.boxes.sin().sum() + one.scores.square().sum()) for one in found)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)

    assert_close(
        gradients(found_by(process, maps)[0]), gradients(process(*maps)), rtol=0, atol=1e-7
    )


def test_options_can_be_tensors_at_run_time() -> None:
    maps = make_maps()
    process = PostProcess(BoxCoder())
    sizes = torch.tensor(maps.sizes)
    by_level = process.fixed_shape(
        *maps[:3],
        sizes,
        score_threshold=torch.tensor([1.0, 1.0, 1.0, 0.2, 0.3]),
        labels=torch.tensor([2]),
        max_detections=7,
    )
    assert by_level.boxes.shape == (IMAGES, 7, 4)
    filled = by_level.labels >= 0
    assert filled.sum(dim=1).tolist() == by_level.counts.tolist()
    assert set(by_level.labels[filled].tolist()) == {2}
    assert 0.2 < float(by_level.scores[filled].min()) < 0.6
    one = process.fixed_shape(*maps[:3], sizes, score_threshold=torch.tensor(0.5))
    same = process.fixed_shape(*maps[:3], sizes, score_threshold=0.5)
    for ours, theirs in zip(one, same, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="score_threshold must be in"):
        process.fixed_shape(*maps[:3], sizes, score_threshold=2.0)


@pytest.mark.parametrize("rows", [0, 20, 300])
def test_a_gpu_is_waited_for_twice_per_batch(rows: int) -> None:
    with fake_cuda(rows=rows) as counts:
        process = PostProcess(BoxCoder(), last_level_threshold=0.0)
        process(*cuda_maps(1))  # uploads the weights of the box coder
        for images in (1, 8, 16):
            maps = cuda_maps(images)
            for call in ({}, {"device": "cpu", "labels": [1, 3], "max_detections": 7}):
                counts.clear()
                found = process(*maps, **call)
                assert len(found) == images
                assert counts.num_waits == 2, counts.report()
                # The sizes and the labels, from pinned memory.
                assert counts.num_uploads == 1 + ("labels" in call), counts.report()
                assert counts.num_blocking_uploads == 0, counts.report()


def test_detections_are_on_the_device_of_the_maps_unless_told_otherwise() -> None:
    with fake_cuda():
        process, maps = PostProcess(BoxCoder()), cuda_maps(1)
        [found] = process(*maps)
        assert {one.device.type for one in (found.boxes, found.scores, found.labels)} == {"cuda"}
        [found] = process(*maps, device="cpu")
        assert {one.device.type for one in (found.boxes, found.scores, found.labels)} == {"cpu"}
    maps = make_maps()
    [first, *_] = PostProcess(BoxCoder())(*maps, device="meta")
    assert first.boxes.device.type == "meta"


def test_predict_gets_detections_on_the_cpu_without_additional_waits() -> None:
    with torch.no_grad(), fake_cuda() as counts:
        with torch.device("cuda:0"):
            model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone()).eval()
            output = model(ImageBatch(torch.zeros(2, 3, 64, 96), [(64, 96)] * 2, [(64, 96)] * 2))
        options = model._detection_options()
        counts.clear()
        [found, _] = model.detections(output, **options)
        assert found.to("cpu").boxes.device.type == "cpu"
        assert counts.num_waits == 2, counts.report()

        class Own(RetinaNet):
            def detections(self, output: Any, **options: Any) -> list[Detections]:
                return super().detections(output, **options)

        model.__class__ = Own  # its method need not have the argument
        assert not model._detection_options()


def test_values_on_a_gpu_are_checked_with_one_wait_and_only_once() -> None:
    with fake_cuda() as counts:
        boxes = torch.zeros(5, 4, device="cuda:0")
        scores = torch.zeros(5, device="cuda:0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Detections, "_check_each_value", lambda _: None)
            found = Detections(boxes, scores, scores.long(), (9, 9), class_names=("cat", "owl"))
        assert counts.num_waits == 1, counts.report()
        counts.clear()
        found.with_source("photo.jpg")
        assert counts.num_waits == 0, counts.report()
        found.to("cpu")
        assert counts.num_waits == 3, counts.report()  # one copy per tensor
