"""Shared by the tests of export: a model that is traced in a second, and comparisons of results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from focaldet import Detections

BOX_TOLERANCE, SCORE_TOLERANCE = 0.02, 5e-5

# The exporters take a third less time than with five levels.
THREE_LEVELS: dict[str, Any] = {"levels": (3, 4, 5), "anchor_sizes": (32, 64, 128)}

# A batch of one image, levels with a single cell, different sides.
SHAPES = [(1, 32, 32), (3, 64, 96), (2, 160, 64), (1, 320, 256)]


class TinyBackbone(nn.Module):
    """A backbone of three convolutions."""

    channels = (8, 8, 8)
    strides = (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.c3 = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.ReLU())
        self.c4 = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.c5 = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        c3 = self.c3(images)
        c4 = self.c4(c3)
        return [c3, c4, self.c5(c4)]


def with_many_detections(model: RetinaNet) -> RetinaNet:
    """Give a new model weights with which the logits of every level differ from cell to cell.

    The model then finds many objects, and hardly any two have nearly equal scores.
    """
    generator = torch.Generator().manual_seed(1)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            gain = {"head.class_logits": 0.3, "head.box_deltas": 0.1}.get(name, 2**0.5)
            fan_in = layer.weight[0].numel()
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data = noise * gain / fan_in**0.5
    nn.init.constant_(model.head.class_logits.bias, -2.0)  # type: ignore[arg-type]
    return model.eval()


def make_model(config: RetinaNetConfig | None = None, **changes: Any) -> RetinaNet:
    """Build a detector that finds objects in any image."""
    config = (config or RetinaNetConfig(num_classes=3, class_names=("cat", "dog", "owl"))).replace(
        backbone="custom", fpn_channels=32, head_depth=1, min_size=64, max_size=96, **THREE_LEVELS
    )
    torch.manual_seed(0)
    return with_many_detections(
        RetinaNet.from_config(config.replace(**changes), backbone=TinyBackbone())
    )


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def assert_same(found: Detections, expected: Detections, count: int = 1) -> None:
    """Assert that both sides have the same detections, in order of their scores."""
    assert len(found) == len(expected) >= count
    assert found.image_size == expected.image_size
    assert found.class_names == expected.class_names
    assert found.source == expected.source
    assert_rows((found.boxes, found.scores, found.labels), expected)


def assert_rows(rows: Sequence[Tensor], expected: Detections) -> None:
    boxes, scores, labels = rows
    assert len(boxes) == len(expected)
    torch.testing.assert_close(scores, expected.scores, atol=SCORE_TOLERANCE, rtol=0)
    for index in range(len(boxes)):  # nearly equal scores may swap places
        near = (expected.scores - scores[index]).abs() <= SCORE_TOLERANCE
        near &= expected.labels == labels[index]
        distances = (expected.boxes[near] - boxes[index]).abs().amax(dim=1)
        assert len(distances), f"row {index}: no such label"
        assert float(distances.min()) <= BOX_TOLERANCE, f"row {index}: {float(distances.min())} px"


def expected_of(model: RetinaNet, images: Tensor, sizes: Tensor) -> list[Detections]:
    """Return what the model itself finds in a batch, in pixels of the batch."""
    image_sizes = [(int(height), int(width)) for height, width in sizes]
    with torch.no_grad():
        output = model(ImageBatch(images, image_sizes, image_sizes))
    found: list[Detections] = model.postprocess(
        output.logits, output.box_deltas, output.anchors, output.sizes
    )
    return found


@torch.no_grad()
def assert_same_as_model(
    run: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    model: RetinaNet,
    shapes: Sequence[tuple[int, int, int]],
) -> None:
    """Assert that a file finds what the model finds, in noise of some shapes."""
    for shape in shapes:
        images, sizes = batch_of(*shape)
        outputs = run(images, sizes)
        for index, expected in enumerate(expected_of(model, images, sizes)):
            count = int(outputs["count"][index])
            assert count > 0
            rows = [outputs[name][index, :count] for name in ("boxes", "scores", "labels")]
            assert_rows(rows, expected)


def batch_of(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return noise, and sizes that make part of each image except the first padding."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, height, width, generator=generator)
    sizes = torch.tensor([[height - 5 * i, width - 3 * i] for i in range(count)])
    return images, sizes
