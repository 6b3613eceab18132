"""Parity with the installed torchvision that has the same weights."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.functional import to_tensor

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.heads import flatten_maps
from tests.helpers.reference_torchvision import (
    assert_same_detections,
    everything_of,
    randomised,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from torchvision.models import detection

pytestmark = pytest.mark.parity

SIZES = [(96, 128), (131, 97), (64, 64)]
PRESETS = {
    "retinanet_resnet50_fpn": RetinaNetConfig.torchvision_v1,
    "retinanet_resnet50_fpn_v2": RetinaNetConfig.torchvision_v2,
}


def ours_like(peer: detection.RetinaNet, config: RetinaNetConfig, folder: Path) -> RetinaNet:
    """Load torchvision's weights from a file."""
    torch.save(peer.state_dict(), folder / "peer.pth")
    return RetinaNet.from_pretrained(folder / "peer.pth", config=config)


@pytest.fixture(params=PRESETS, scope="module")
def pair(request: Any, tmp_path_factory: Any) -> tuple[detection.RetinaNet, RetinaNet]:
    name = request.param
    peer = randomised(name, num_classes=91, min_size=160, max_size=256)
    config = PRESETS[name]().replace(min_size=160, max_size=256, backbone_norm="batch")
    return peer, ours_like(peer, config, tmp_path_factory.mktemp("weights"))


def random_images(sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.rand(3, *size, dtype=dtype) for size in sizes]


def random_targets(sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Any]:
    targets = []
    for index, (height, width) in enumerate(sizes):
        count = 4 * index  # the first image has no objects
        corners = torch.rand(count, 2, dtype=dtype) * torch.tensor([width, height]) * 0.7
        sides = 4 + torch.rand(count, 2, dtype=dtype) * torch.tensor([width, height]) * 0.25
        boxes = torch.cat((corners, corners + sides), dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(91, (count,))})
    return targets


@pytest.mark.parametrize("sizes", [[size] for size in SIZES] + [SIZES], ids=str)
def test_logits_deltas_anchors_and_detections_are_torchvisions(pair: Any, sizes: Any) -> None:
    peer, ours = pair
    images = random_images(sizes, torch.float32)
    with torch.no_grad(), everything_of(peer) as seen:
        expected = peer(images)
        output = ours(images)
    assert_close(flatten_maps(output.logits, 9), seen["cls_logits"], rtol=1e-5, atol=1e-5)
    assert_close(flatten_maps(output.box_deltas, 9), seen["bbox_regression"], rtol=1e-5, atol=1e-5)
    for anchors in seen["anchors"]:
        assert_close(torch.cat(output.anchors), anchors, rtol=0, atol=0)
    assert min(len(found["scores"]) for found in expected) >= 200
    assert_same_detections(ours.detections(output), expected)


@pytest.mark.slow  # smaller models are compared in test_torchvision_drop_in
@pytest.mark.parametrize(
    "pair",
    ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"],
    indirect=True,
)
def test_losses_and_every_gradient_are_torchvisions(pair: Any) -> None:
    peer, ours = (model.double() for model in pair)
    try:
        images, targets = random_images(SIZES, torch.float64), random_targets(SIZES, torch.float64)
        peer.train()
        for module in peer.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()  # keeps its statistics
        expected = peer(images, targets)
        sum(expected.values()).backward()
        peer.eval()
        losses = ours.requires_grad_(requires_grad=True)(images, targets).losses
        sum(losses.values()).backward()
        assert_close(losses["classification"], expected["classification"], rtol=1e-5, atol=0)
        assert_close(losses["box_regression"], expected["bbox_regression"], rtol=1e-5, atol=0)
        gradients = {name: p.grad for name, p in peer.named_parameters()}
        assert len(gradients) == len(list(ours.parameters()))
        for name, parameter in ours.named_parameters():
            wanted = gradients[peer_name(name)]
            assert parameter.grad is not None
            assert wanted is not None, name
            scale = float(wanted.abs().max())
            assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-6 * scale, msg=name)
    finally:
        for model in pair:
            model.float().zero_grad()


def peer_name(name: str) -> str:
    """Return torchvision's name for a parameter of focaldet, independently of the converter."""
    group, _, rest = name.partition(".")
    if group == "backbone":
        return f"backbone.body.{rest}"
    if group == "fpn":
        part, _, rest = rest.partition(".")
        if part in ("p6", "p7"):
            return f"backbone.fpn.extra_blocks.{part}.{rest}"
        index, kind = rest.split(".")
        blocks = {"lateral": "inner_blocks", "output": "layer_blocks"}[part]
        return f"backbone.fpn.{blocks}.{index}.0.{kind}"
    part, _, rest = rest.partition(".")
    if part == "class_logits":
        return f"head.classification_head.cls_logits.{rest}"
    if part == "box_deltas":
        return f"head.regression_head.bbox_reg.{rest}"
    side = {"class_tower": "classification", "box_tower": "regression"}[part]
    index, layer, kind = rest.split(".")
    return f"head.{side}_head.conv.{index}.{ {'conv': 0, 'norm': 1}[layer] }.{kind}"


@pytest.mark.parametrize(
    ("name", "count"),
    [("retinanet_resnet50_fpn", 34_014_999), ("retinanet_resnet50_fpn_v2", 38_198_935)],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frozen norms without weights
        model = RetinaNet.from_config(PRESETS[name]())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_detections_on_real_photos_are_torchvisions(
    name: str, coco_photos: list[Path], tmp_path: Path
) -> None:
    peer = randomised(name, class_bias=-4.5, num_classes=91)
    bias = peer.head.classification_head.cls_logits.bias.view(9, 91)
    dead = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    bias.data[:, dead] = -math.inf  # as in trained weights, channels without a class never fire
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = RetinaNet.from_pretrained(tmp_path / "peer.pth")
    label_of = {c: i for i, c in enumerate(c for c in range(91) if c not in dead)}
    assert len(coco_photos) == 57
    for path in coco_photos:
        [found] = ours.predict(path)
        with torch.no_grad():
            [expected] = peer([to_tensor(Image.open(path).convert("RGB"))])
        expected["labels"] = torch.tensor([label_of[i] for i in expected["labels"].tolist()])
        assert len(found) > 0, path.name
        assert_same_detections([found], [expected])
