"""Detectron2's RetinaNet, reimplemented from its facts, and a writer of its model zoo's files."""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from tests.helpers import reference_models as plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAMES = plain.Names(
    stem="backbone.bottom_up.stem.conv1",
    stem_norm="backbone.bottom_up.stem.conv1.norm",
    conv="backbone.bottom_up.res{}.{}.conv{}",
    norm="backbone.bottom_up.res{}.{}.conv{}.norm",
    shortcut="backbone.bottom_up.res{}.{}.shortcut",
    shortcut_norm="backbone.bottom_up.res{}.{}.shortcut.norm",
    laterals=("backbone.fpn_lateral3", "backbone.fpn_lateral4", "backbone.fpn_lateral5"),
    outputs=("backbone.fpn_output3", "backbone.fpn_output4", "backbone.fpn_output5"),
    p6="backbone.top_block.p6",
    p7="backbone.top_block.p7",
    class_tower=tuple(f"head.cls_subnet.{i}" for i in (0, 2, 4, 6)),  # type: ignore[arg-type]
    box_tower=tuple(f"head.bbox_subnet.{i}" for i in (0, 2, 4, 6)),  # type: ignore[arg-type]
    classes="head.cls_score",
    boxes="head.bbox_pred",
    first_stage=2,
)
PIXEL_MEAN = np.array([103.530, 116.280, 123.675])  # blue, green, red


class Detectron2:
    """Detectron2's way from an image to detections."""

    min_size, max_size = 160, 256
    min_share = 0.9

    def __init__(self, state: plain.State, depth: int) -> None:
        self.state = state
        self.body = plain.Body(depth, stride_in_1x1=True)

    def prepare(self, image: Any) -> plain.Prepared:
        height, width = image.shape[:2]
        scale = self.min_size / min(height, width)
        new_h, new_w = scale * height, scale * width
        if max(new_h, new_w) > self.max_size:
            shrink = self.max_size / max(new_h, new_w)
            new_h, new_w = new_h * shrink, new_w * shrink
        size = (int(new_h + 0.5), int(new_w + 0.5))
        resized = Image.fromarray(image[:, :, ::-1]).resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(resized).astype(np.float64) - PIXEL_MEAN
        batch = [plain.up_to(side, 32) for side in size]
        rgb = pixels[:, :, ::-1] / (255 * np.array(plain.STD))
        return plain.Prepared(plain.padded(pixels, *batch), size, plain.padded(rgb, *batch))

    def network(self, tensor: Tensor) -> plain.Maps:
        features = plain.resnet(self.state, NAMES, self.body, tensor)
        return plain.pyramid_and_head(self.state, NAMES, features, p7_relu=True)

    @staticmethod
    def anchors(level: int, height: int, width: int) -> Tensor:
        stride = 8 * 2**level
        cells = []
        for size in (4 * stride * 2 ** (octave / 3) for octave in range(3)):
            for ratio in (0.5, 1.0, 2.0):
                w = math.sqrt(size**2 / ratio)
                cells.append([-w / 2, -w * ratio / 2, w / 2, w * ratio / 2])
        shifts = [
            [x * stride, y * stride, x * stride, y * stride]
            for y in range(height)
            for x in range(width)
        ]
        grid = torch.tensor(shifts, dtype=torch.float64)[:, None]
        return (grid + torch.tensor(cells, dtype=torch.float64)[None]).view(-1, 4)

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        boxes, scores, labels = [], [], []
        for level, (logits, deltas) in enumerate(zip(*maps, strict=True)):
            anchors = self.anchors(level, *logits.shape[1:])
            score = plain.rows(logits, len(logits) // 9).sigmoid()
            index = (score > 0.05).nonzero()
            best, order = score[score > 0.05].topk(min(1000, len(index)))
            index = index[order]
            dx, dy, dw, dh = plain.rows(deltas, 4)[index[:, 0]].unbind(1)
            x1, y1, x2, y2 = anchors[index[:, 0]].unbind(1)
            w, h = x2 - x1, y2 - y1
            x, y = dx * w + x1 + w / 2, dy * h + y1 + h / 2
            w, h = (d.clamp(max=math.log(1000 / 16)).exp() * side for d, side in ((dw, w), (dh, h)))
            boxes.append(torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 1))
            scores.append(best)
            labels.append(index[:, 1])
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        keep = plain.suppress(box, score, label, 100)
        box, score, label = box[keep], score[keep], label[keep]
        height, width = original
        box = box * torch.tensor([width / prepared.size[1], height / prepared.size[0]] * 2)
        box[:, 0::2] = box[:, 0::2].clamp(0, width)
        box[:, 1::2] = box[:, 1::2].clamp(0, height)
        some = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
        return plain.Found(box[some], score[some], label[some])


def make_reference(depth: int) -> Detectron2:
    """Build a reference with random weights, scaled to a normal range."""
    made = Detectron2(plain.filled(plain.layout(NAMES, plain.Body(depth))), depth)
    stem = made.state[f"{NAMES.stem}.weight"]
    stem /= 57  # for pixels that are not divided by their standard deviation
    image = made.prepare(plain.smooth_image(160, 200)).tensor
    plain.calibrate(
        made.state, NAMES, lambda state, x: Detectron2(state, depth).network(x), image, -4.0
    )
    return made


def write_file(made: Detectron2, path: Path) -> Path:
    """Write the file in the model zoo's format: a pickle of arrays, with the buffers of all parts."""
    arrays = {key: value.numpy() for key, value in made.state.items()}
    arrays["pixel_mean"] = PIXEL_MEAN.reshape(3, 1, 1).astype(np.float32)
    arrays["pixel_std"] = np.ones((3, 1, 1), dtype=np.float32)
    for level in range(5):
        key = f"anchor_generator.cell_anchors.{level}"
        arrays[key] = made.anchors(level, 1, 1).float().numpy()
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path
