"""Boxes that state their format are converted wherever they enter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2

from focaldet import Detections
from focaldet.anchor_grid import AnchorGrid
from focaldet.box_coder import BoxCoder
from focaldet.boxes import (
    as_xyxy,
    box_area,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    generalized_box_iou,
    paired_box_iou,
    scale_boxes,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)
from focaldet.criterion import RetinaNetCriterion
from focaldet.datasets import DetectionDataset, read_coco
from focaldet.matching import ATSSAssigner, Matcher
from focaldet.structures import ImageBatch, check_targets
from focaldet.visualization import draw_boxes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = (64, 96)
BOXES = torch.tensor([[5.0, 6.0, 35.0, 46.0], [20.0, 10.0, 90.0, 60.0]])
ANCHORS = torch.tensor([[8.0 * x, 0.0, 8.0 * x + 40, 40.0] for x in range(12)])
GRID = AnchorGrid([ANCHORS], [(1, 12)])


def stated(box_format: str, boxes: Tensor = BOXES) -> Tensor:
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=SIZE)
    converted: Tensor = v2.functional.convert_bounding_box_format(boxes, new_format=box_format)
    return converted


def detections(boxes: Tensor) -> Tensor:
    scores, labels = torch.ones(len(boxes)), torch.zeros(len(boxes)).long()
    return Detections(boxes, scores, labels, SIZE).boxes


def drawn(boxes: Tensor) -> Tensor:
    picture = draw_boxes(torch.zeros(3, *SIZE, dtype=torch.uint8), boxes)
    return torch.from_numpy(np.array(picture))


def scaled_targets(boxes: Tensor) -> Tensor:
    batch = ImageBatch(torch.zeros(1, 3, 128, 192), [(128, 192)], [SIZE])
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes)).long()}
    check_targets([target], [SIZE], 1)  # type: ignore[list-item]
    return batch.scale_targets([target])[0]["boxes"]  # type: ignore[list-item]


def losses(boxes: Tensor) -> Tensor:
    torch.manual_seed(0)
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes)).long()}
    maps = [torch.randn(1, 1, 1, 12)], [torch.randn(1, 4, 1, 12)]
    found = RetinaNetCriterion(Matcher(), BoxCoder())(*maps, [ANCHORS], [target])
    return torch.stack(list(found.values()))


ENTRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "as_xyxy": as_xyxy,
    "box_area": box_area,
    "box_iou, first": lambda boxes: box_iou(boxes, ANCHORS),
    "box_iou, second": lambda boxes: box_iou(ANCHORS, boxes),
    "paired_box_iou, first": lambda boxes: paired_box_iou(boxes, ANCHORS[:2]),
    "paired_box_iou, second": lambda boxes: paired_box_iou(ANCHORS[:2], boxes),
    "generalized_box_iou, first": lambda boxes: generalized_box_iou(boxes, ANCHORS[:2]),
    "generalized_box_iou, second": lambda boxes: generalized_box_iou(ANCHORS[:2], boxes),
    "clip_boxes": lambda boxes: clip_boxes(boxes, (30, 40)),
    "scale_boxes": lambda boxes: scale_boxes(boxes, SIZE, (32, 96)),
    "xyxy_to_xywh": xyxy_to_xywh,
    "xyxy_to_cxcywh": xyxy_to_cxcywh,
    "Matcher, boxes": lambda boxes: Matcher()(boxes, ANCHORS),
    "Matcher, anchors": lambda boxes: Matcher()(ANCHORS, boxes),
    "Matcher, grid": lambda boxes: Matcher()(boxes, GRID),
    "ATSSAssigner": lambda boxes: ATSSAssigner(3)(boxes, GRID),
    "AnchorGrid": lambda boxes: AnchorGrid([boxes], [(1, 2)]).anchors,
    "AnchorGrid.nearest": GRID.nearest,
    "AnchorGrid.windows": lambda boxes: GRID.windows(boxes, torch.tensor([0.4, 0.4])).counts,
    "BoxCoder.encode, boxes": lambda boxes: BoxCoder().encode(boxes, ANCHORS[:2]),
    "BoxCoder.encode, anchors": lambda boxes: BoxCoder().encode(ANCHORS[:2], boxes),
    "BoxCoder.decode": lambda boxes: BoxCoder().decode(torch.ones(2, 4), boxes),
    "Detections": detections,
    "draw_boxes": drawn,
    "targets of a batch": scaled_targets,
    "criterion": losses,
}


@pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_boxes_are_converted_by_the_format_they_state(entry: str, box_format: str) -> None:
    found = ENTRIES[entry](stated(box_format))
    assert type(found) is Tensor
    assert_close(found, ENTRIES[entry](BOXES))


@pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
@pytest.mark.parametrize("convert", [xywh_to_xyxy, cxcywh_to_xyxy])
def test_a_stated_format_has_precedence_over_the_name_of_a_conversion(
    convert: Callable[[Tensor], Tensor], box_format: str
) -> None:
    assert_close(convert(stated(box_format)), BOXES)


@pytest.mark.parametrize("box_format", ["XYWHR", "CXCYWHR", "XYXYXYXY"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_rotated_boxes_raise_an_error_that_names_their_format(entry: str, box_format: str) -> None:
    width = 8 if box_format == "XYXYXYXY" else 5
    boxes: Any = tv_tensors.BoundingBoxes(torch.ones(2, width), format=box_format, canvas_size=SIZE)
    with pytest.raises(ValueError, match=rf"format {box_format}.*XYXY, XYWH and CXCYWH"):
        ENTRIES[entry](boxes)


@pytest.mark.parametrize("entry", ENTRIES)
def test_key_points_and_arrays_are_not_boxes(entry: str) -> None:
    points: Any = tv_tensors.KeyPoints(torch.ones(2, 2), canvas_size=SIZE)
    with pytest.raises(ValueError, match=r"shape \[N, 4\].*\[2, 2\]"):
        ENTRIES[entry](points)
    array: Any = BOXES.numpy()
    with pytest.raises(TypeError, match=r"must be a tensor, got a? ?ndarray"):
        ENTRIES[entry](array)


def test_gradients_flow_through_the_conversion() -> None:
    boxes = BOXES.clone().requires_grad_()
    box_area(tv_tensors.wrap(boxes * 1, like=stated("XYWH"))).sum().backward()  # type: ignore[no-untyped-call]
    assert boxes.grad is not None
    assert_close(boxes.grad[0], torch.tensor([0.0, 0.0, 46.0, 35.0]))


@pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
def test_a_dataset_converts_the_boxes_of_its_transform(tmp_path: Path, box_format: str) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 30, 40]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 96, "height": 64}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [annotation],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    table = read_coco(tmp_path / "a.json", tmp_path)
    _, target = DetectionDataset(table, v2.ConvertBoundingBoxFormat(box_format))[0]
    assert type(target["boxes"]) is Tensor
    assert_close(target["boxes"], BOXES[:1])
