"""MMDetection's RetinaNet, reimplemented from its facts, and a writer of its files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from focaldet.class_names import COCO_CLASS_NAMES
from tests.helpers import reference_models as plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAMES = plain.Names(
    stem="backbone.conv1",
    stem_norm="backbone.bn1",
    conv="backbone.layer{}.{}.conv{}",
    norm="backbone.layer{}.{}.bn{}",
    shortcut="backbone.layer{}.{}.downsample.0",
    shortcut_norm="backbone.layer{}.{}.downsample.1",
    laterals=tuple(f"neck.lateral_convs.{i}.conv" for i in range(3)),  # type: ignore[arg-type]
    outputs=tuple(f"neck.fpn_convs.{i}.conv" for i in range(3)),  # type: ignore[arg-type]
    p6="neck.fpn_convs.3.conv",
    p7="neck.fpn_convs.4.conv",
    class_tower=tuple(f"bbox_head.cls_convs.{i}.conv" for i in range(4)),  # type: ignore[arg-type]
    box_tower=tuple(f"bbox_head.reg_convs.{i}.conv" for i in range(4)),  # type: ignore[arg-type]
    classes="bbox_head.retina_cls",
    boxes="bbox_head.retina_reg",
)


class MMDetection:
    """MMDetection's way from an image to detections, for ResNets of either style."""

    min_size, max_size = 160, 256
    min_share = 0.9

    def __init__(self, state: plain.State, body: plain.Body, *, caffe: bool) -> None:
        self.state = state
        self.body = body._replace(stride_in_1x1=caffe and body.bottleneck)
        self.caffe = caffe

    def prepare(self, image: Any) -> plain.Prepared:
        height, width = image.shape[:2]
        long, short = max(height, width), min(height, width)
        factor = min(self.max_size / long, self.min_size / short)
        size = (int(height * factor + 0.5), int(width * factor + 0.5))
        bgr = opencv_bilinear(image[:, :, ::-1], *size).astype(np.float64)
        if self.caffe:
            pixels = bgr - np.array([103.530, 116.280, 123.675])
        else:
            pixels = bgr[:, :, ::-1] - np.array([123.675, 116.28, 103.53])
            pixels = pixels / np.array([58.395, 57.12, 57.375])
        batch = [plain.up_to(side, 32) for side in size]
        rgb = (bgr[:, :, ::-1] / 255 - np.array(plain.MEAN)) / np.array(plain.STD)
        return plain.Prepared(plain.padded(pixels, *batch), size, plain.padded(rgb, *batch))

    def network(self, tensor: Tensor) -> plain.Maps:
        features = plain.resnet(self.state, NAMES, self.body, tensor)
        return plain.pyramid_and_head(self.state, NAMES, features, p7_relu=False)

    @staticmethod
    def anchors(level: int, height: int, width: int) -> Tensor:
        stride = 8 * 2**level
        scales = 4 * 2 ** (torch.arange(3, dtype=torch.float64) / 3)
        root = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).sqrt()
        w = (stride * (1 / root)[:, None] * scales[None]).view(-1) / 2
        h = (stride * root[:, None] * scales[None]).view(-1) / 2
        base = torch.stack((-w, -h, w, h), 1)
        y, x = torch.meshgrid(
            torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij"
        )
        shifts = torch.stack((x, y, x, y), -1).view(-1, 1, 4)
        return (shifts + base).view(-1, 4)

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        height, width = prepared.size
        boxes, scores, labels = [], [], []
        limit = abs(math.log(16 / 1000))
        for level, (logits, deltas) in enumerate(zip(*maps, strict=True)):
            score = plain.rows(logits, len(logits) // 9).sigmoid()
            index = (score > 0.05).nonzero()
            best, order = score[score > 0.05].sort(descending=True)
            best, index = best[:1000], index[order[:1000]]
            anchor = self.anchors(level, *logits.shape[1:])[index[:, 0]]
            delta = plain.rows(deltas, 4)[index[:, 0]]
            centre = (anchor[:, :2] + anchor[:, 2:]) * 0.5 + (
                anchor[:, 2:] - anchor[:, :2]
            ) * delta[:, :2]
            side = (anchor[:, 2:] - anchor[:, :2]) * delta[:, 2:].clamp(-limit, limit).exp()
            box = torch.cat((centre - side * 0.5, centre + side * 0.5), 1)
            box[:, 0::2] = box[:, 0::2].clamp(0, width)
            box[:, 1::2] = box[:, 1::2].clamp(0, height)
            boxes.append(box)
            scores.append(best)
            labels.append(index[:, 1])
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        factor = torch.tensor([width / original[1], height / original[0]] * 2)
        box = box / factor
        some = (box[:, 2] - box[:, 0] > 0) & (box[:, 3] - box[:, 1] > 0)
        box, score, label = box[some], score[some], label[some]
        keep = plain.suppress(box, score, label, 100)
        return plain.Found(box[keep], score[keep], label[keep])


def opencv_bilinear(image: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Resize ``[H, W, C]`` bytes as ``cv2.resize`` does, with weights that are multiples of 1/2048."""
    old = image.shape[:2]
    pixels = image.astype(np.int64)
    if old == (height, width):
        return image
    if old == (2 * height, 2 * width):
        blocks = pixels.reshape(height, 2, width, 2, -1).sum((1, 3))
        return ((blocks + 2) // 4).astype(np.uint8)

    def ends(old_side: int, side: int) -> tuple[Any, Any]:
        place = np.float32((np.arange(side) + 0.5) * (1 / (side / old_side)) - 0.5)
        return np.floor(place).astype(int), place - np.floor(place)

    def share(fraction: Any) -> Any:
        return np.rint(np.float32(2048) * fraction).astype(int)

    x, dx = ends(old[1], width)
    dx[(x < 0) | (x > old[1] - 2)] = 0
    right, left = share(dx)[:, None], share(1 - dx)[:, None]
    x0, x1 = x.clip(0, old[1] - 1), (x + 1).clip(0, old[1] - 1)
    lines = (pixels[:, x0] * left + pixels[:, x1] * right) // 16
    y, dy = ends(old[0], height)
    below, above = share(dy)[:, None, None], share(1 - dy)[:, None, None]
    y0, y1 = y.clip(0, old[0] - 1), (y + 1).clip(0, old[0] - 1)
    total = lines[y0] * above // 2**16 + lines[y1] * below // 2**16
    return ((total + 2) // 4).astype(np.uint8)


def make_reference(body: plain.Body, *, caffe: bool = False) -> MMDetection:
    """Build a reference with random weights, scaled to a normal range."""
    made = MMDetection(plain.filled(plain.layout(NAMES, body)), body, caffe=caffe)
    if caffe:
        stem = made.state[f"{NAMES.stem}.weight"]
        stem /= 57  # for pixels that are not divided by their standard deviation
    image = made.prepare(plain.smooth_image(160, 200)).tensor
    plain.calibrate(made.state, NAMES, lambda _, x: made.network(x), image, -4.0)
    return made


def write_file(
    made: MMDetection, path: Path, *, config: str | None = None, old: bool = False
) -> Path:
    """Write the file as its training does, with a ``meta`` entry."""
    state = dict(made.state)
    for key in [key for key in state if key.endswith("running_mean")]:
        state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(5)
    if old:  # before version 0.6
        state = {
            key.replace(".conv.", ".") if "_convs." in key and "bbox_head" in key else key: value
            for key, value in state.items()
        }
    meta: Any = {
        "mmdet_version": "2.22.0",
        "CLASSES": COCO_CLASS_NAMES,
        "epoch": 12,
        "hook_msgs": {},
    }
    if config is not None:
        meta["config"] = config
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=not old)
    return path
