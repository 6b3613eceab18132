"""``ExportableDetector`` gives the same detections as the model, in tensors of fixed shapes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.export import ExportableDetector, ExportableMaps
from focaldet.export._metadata import ExportMetadata
from tests.helpers.tiny_export import assert_rows, batch_of, expected_of, make_model

SHAPES = [(1, 64, 96), (3, 96, 64), (2, 32, 32)]


def assert_module_matches_model(
    model: RetinaNet, shapes: list[tuple[int, int, int]] = SHAPES
) -> int:
    module = ExportableDetector(model).eval()
    total = 0
    for shape in shapes:
        images, sizes = batch_of(*shape)
        with torch.no_grad():
            boxes, scores, labels, counts = module(images, sizes)
        expected = expected_of(model, images, sizes)
        assert boxes.shape == (shape[0], module.num_detections, 4)
        for index, theirs in enumerate(expected):
            count = int(counts[index])
            assert_rows([part[index, :count] for part in (boxes, scores, labels)], theirs)
            assert (labels[index, count:] == -1).all()
            assert (boxes[index, count:] == 0).all()
            assert (scores[index, count:] == 0).all()
            total += count
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"anchor_mode": "torchvision", "anchor_offset": 0.0},
        {"anchor_mode": "rounded", "anchor_plus_one": True},
        {"anchor_mode": "inclusive_rounded", "inclusive_corners": True, "log_scale_clamp": "both"},
        {"anchor_offset": 0.25, "aspect_ratios": (1.0,), "octave_scales": (1.0, 1.5)},
        {"box_weights": (10.0, 10.0, 5.0, 5.0), "log_scale_clamp": "both"},
        {"log_scale_clamp": None},
        {"class_agnostic_nms": True},
        {"nms_threshold": 0.1},
        {"clip_to": "batch"},
        {"clip_to": None},
        {"clip_to": "last_pixel", "box_encoding": "corners", "box_weights": (5.0, 5.0, 5.0, 5.0)},
        {"clip_to": "batch", "inclusive_corners": True, "uniform_rescale": True},
        {"clip_to": "image_after_nms"},
        {"clip_to": "image_after_nms", "drop_empty": True, "inclusive_corners": True},
        {"drop_empty": True},
        {"score_threshold": 0.0},
        {"score_threshold": 0.3, "last_level_threshold": 0.0},
        {"max_detections": None},
        {"pre_nms_top_k": 7},
        {"pre_nms_top_k": 7, "max_detections": None},
        {"p6_from": "p5", "p7_relu": False, "head_norm": "group", "fpn_channels": 64},
        {"head_norm": "batch", "head_box_norm": None},
        {"levels": (3, 4, 5), "anchor_sizes": (32, 64, 128)},
        {"levels": (3, 4, 5, 6, 7, 8), "anchor_sizes": (16, 32, 64, 128, 256, 512)},
        {"levels": (3, 4, 5), "anchor_sizes": (32, 64, 128), "fpn_channels": None},
        {"size_divisor": 64, "always_pad": True},
        {"strided_padding": "same", "size_divisor": 1},
    ],
    ids=str,
)
def test_each_option_is_honoured(changes: dict[str, Any]) -> None:
    shapes = [(1, 64, 128), (3, 128, 64)] if "size_divisor" in changes else SHAPES
    assert assert_module_matches_model(make_model(**changes), shapes) > 50


@pytest.mark.parametrize("preset", ["paper", "torchvision_v1", "torchvision_v2"])
def test_each_preset_is_honoured(preset: str) -> None:
    config: RetinaNetConfig = getattr(RetinaNetConfig, preset)(num_classes=91)
    model = make_model(config, fpn_channels=64)  # GroupNorm needs two channels per group
    assert assert_module_matches_model(model) > 300


@torch.no_grad()
def test_an_image_without_detections_gives_empty_rows() -> None:
    model = make_model(max_detections=5)
    images, sizes = batch_of(2, 64, 64)
    module = ExportableDetector(model)
    alone = [float(module(images[i : i + 1], sizes[i : i + 1])[1].max()) for i in range(2)]
    model.postprocess.score_threshold = (alone[0] + alone[1]) / 2
    boxes, scores, labels, count = module(images, sizes)
    empty = alone.index(min(alone))
    assert count[empty] == 0
    assert count[1 - empty] >= 1
    assert (labels[empty] == -1).all()
    assert not boxes[empty].any()
    assert not scores[empty].any()


@torch.no_grad()
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_few_detections(wanted: int) -> None:
    model = make_model(nms_threshold=1.0)
    images, sizes = batch_of(1, 64, 64)
    best = ExportableDetector(model)(images, sizes)[1][0].tolist()
    threshold = (best[wanted] + (best[wanted - 1] if wanted else 1.0)) / 2
    model.postprocess.score_threshold = threshold
    assert ExportableDetector(model)(images, sizes)[3].item() == wanted
    assert assert_module_matches_model(model, [(1, 64, 64)]) == wanted


def test_only_the_best_max_detections_are_kept() -> None:
    images, sizes = batch_of(1, 64, 96)
    all_scores = ExportableDetector(make_model(max_detections=None))(images, sizes)[1]
    best = ExportableDetector(make_model(max_detections=3))(images, sizes)
    assert best[3].tolist() == [3]
    torch.testing.assert_close(best[1], all_scores[:, :3])


def test_boxes_of_many_classes_and_images_do_not_suppress_each_other() -> None:
    """One box predicted for every class in every image survives in each."""
    config = RetinaNetConfig(num_classes=120)
    model = make_model(config, pre_nms_top_k=120, max_detections=None, nms_threshold=0.0)
    for layer in (model.head.class_logits, model.head.box_deltas):
        layer.weight.data.zero_()
    bias = torch.full((9, 120), -20.0)
    bias[0] = 1.0
    model.head.class_logits.bias = nn.Parameter(bias.flatten())
    images, sizes = batch_of(4, 32, 32)
    _, _, labels, count = ExportableDetector(model)(images, sizes)
    for row, filled in zip(labels, count, strict=True):
        assert set(row[:filled].tolist()) == set(range(120))


def test_exportable_maps_equal_those_of_the_network() -> None:
    model = make_model()
    images, _ = batch_of(2, 64, 96)
    logits, box_deltas = model.forward_maps(images)
    for ours, theirs in zip(ExportableMaps(model)(images), logits + box_deltas, strict=True):
        assert torch.equal(ours, theirs)


def test_an_unbounded_number_of_candidates_raises() -> None:
    with pytest.raises(ValueError, match=r"pre_nms_top_k=None.*postprocess=False"):
        ExportableDetector(make_model(pre_nms_top_k=None))
    with pytest.raises(ValueError, match=r"clip_to='original'.*postprocess=False"):
        ExportableDetector(make_model(clip_to="original"))
    with pytest.raises(ValueError, match=r"suppression='gaussian'.*'hard'.*postprocess=False"):
        ExportableDetector(make_model(suppression="gaussian"))


@pytest.mark.parametrize(
    "changes", [{"pre_nms_top_k_of": "anchors"}, {"pre_nms_top_k_per_class": 100}]
)
def test_limits_by_anchor_and_by_class_are_not_supported(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pre_nms_top_k_of='anchors'.*postprocess=False"):
        ExportableDetector(make_model(**changes))


@pytest.mark.filterwarnings(
    "ignore:.*create_unbacked_symint:FutureWarning"
)  # raised inside torchvision
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_it_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = make_model(pre_nms_top_k=50)
    images, sizes = batch_of(2, 64, 96)
    module = ExportableDetector(model).eval()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.no_grad():
        for ours, theirs in zip(compiled(images, sizes), module(images, sizes), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        maps = torch.compile(model.forward_maps, fullgraph=True, backend=backend)(images)
        torch.testing.assert_close(maps, model.forward_maps(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # raised inside inductor
def test_it_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    model = make_model(pre_nms_top_k=50)
    images, sizes = batch_of(2, 64, 96)
    module = ExportableDetector(model).eval()
    with torch.no_grad():
        boxes, scores, _, count = torch.compile(module, fullgraph=True)(images, sizes)
        expected = module(images, sizes)
    assert count.tolist() == expected[3].tolist()
    torch.testing.assert_close(scores, expected[1], atol=5e-5, rtol=0)
    torch.testing.assert_close(boxes, expected[0], atol=0.02, rtol=0)


@torch.no_grad()
def test_infinite_boxes_are_clipped_to_the_image() -> None:
    model = make_model(log_scale_clamp=None)
    wide = torch.tensor([0.0, 0.0, 200.0, 0.0])  # exp overflows
    model.head.box_deltas.bias = nn.Parameter(wide.repeat(9))
    images, sizes = batch_of(1, 64, 64)
    boxes, _, _, count = ExportableDetector(model)(images, sizes)
    assert count.item() >= 1
    assert math.isfinite(float(boxes.abs().max()))
    assert_module_matches_model(model, [(1, 64, 64)])


def test_the_metadata_of_a_model_with_stretched_images_gives_one_side() -> None:
    model = make_model()
    model.preprocess.keep_ratio = False
    stretched = ExportMetadata.of_model(model, "detections", None, None).to_strings()
    resize = json.loads(next(v for k, v in stretched.items() if k.endswith("preprocessing")))[
        "resize"
    ]
    assert resize["both_sides"] == model.config.min_size
    assert "short_side" not in resize
