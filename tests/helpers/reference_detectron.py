"""Detectron's RetinaNet, reimplemented from its facts, and a writer of its files."""

from __future__ import annotations

import math
import pickle
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.helpers import reference_models as plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# The layers have names of the same pattern as Detectron2's here, and get those of blobs in the file.
NAMES = plain.Names(
    stem="conv1",
    stem_norm="res_conv1_bn",
    conv="res{}_{}_branch2{}",
    norm="res{}_{}_branch2{}_bn",
    shortcut="res{}_{}_branch1",
    shortcut_norm="res{}_{}_branch1_bn",
    laterals=(
        "fpn_inner_res3_3_sum_lateral",
        "fpn_inner_res4_5_sum_lateral",
        "fpn_inner_res5_2_sum",
    ),
    outputs=("fpn_res3_3_sum", "fpn_res4_5_sum", "fpn_res5_2_sum"),
    p6="fpn_6",
    p7="fpn_7",
    class_tower=tuple(f"retnet_cls_conv_n{i}_fpn3" for i in range(4)),  # type: ignore[arg-type]
    box_tower=tuple(f"retnet_bbox_conv_n{i}_fpn3" for i in range(4)),  # type: ignore[arg-type]
    classes="retnet_cls_pred_fpn3",
    boxes="retnet_bbox_pred_fpn3",
    first_stage=2,
)
PIXEL_MEAN = np.array([102.9801, 115.9465, 122.7717])  # blue, green, red
RATIOS = (1.0, 2.0, 0.5)
CONFIG = """\
!!python/object/new:utils.collections.AttrDict
dictitems:
  FPN: !!python/object/new:utils.collections.AttrDict
    dictitems: {COARSEST_STRIDE: 128, RPN_MAX_LEVEL: 7, RPN_MIN_LEVEL: 3}
    state: {__immutable__: false}
  MODEL: !!python/object/new:utils.collections.AttrDict
    dictitems: {NUM_CLASSES: 81, TYPE: retinanet}
  PIXEL_MEANS: !!python/object/apply:numpy.core.multiarray._reconstruct
    args:
    - !!python/name:numpy.ndarray ''
    - !!python/tuple [0]
    - b
    state: !!python/tuple
    - 1
    - !!python/tuple [1, 1, 3]
    - null
    - false
    - !!binary |
      MEAN
  RESNETS: !!python/object/new:utils.collections.AttrDict
    dictitems: {STRIDE_1X1: true}
  RETINANET: !!python/object/new:utils.collections.AttrDict
    dictitems:
      ASPECT_RATIOS: !!python/tuple [1.0, 2.0, 0.5]
      INFERENCE_TH: 0.05
  TEST: !!python/object/new:utils.collections.AttrDict
    dictitems: {MAX_SIZE: 256, NMS: 0.5, SCALES: !!python/tuple [160]}
"""


class Detectron:
    """Detectron's way from an image to detections."""

    min_size, max_size = 160, 256
    min_share = 0.9

    def __init__(self, state: plain.State, body: plain.Body) -> None:
        self.state = state
        self.body = body

    def factor(self, size: tuple[int, int]) -> float:
        factor = self.min_size / min(size)
        if np.round(factor * max(size)) > self.max_size:
            factor = self.max_size / max(size)
        return factor

    def prepare(self, image: Any) -> plain.Prepared:
        original = (image.shape[0], image.shape[1])
        factor = self.factor(original)
        size = (int(np.rint(original[0] * factor)), int(np.rint(original[1] * factor)))
        pixels = image[:, :, ::-1].astype(np.float64) - PIXEL_MEAN
        pixels = along(along(pixels, 1, size[1], factor), 0, size[0], factor)
        batch = [plain.up_to(side, 128) for side in size]
        rgb = pixels[:, :, ::-1] / (255 * np.array(plain.STD))
        return plain.Prepared(plain.padded(pixels, *batch), size, plain.padded(rgb, *batch))

    def network(self, tensor: Tensor) -> plain.Maps:
        features = plain.resnet(self.state, NAMES, self.body, tensor)
        return plain.pyramid_and_head(self.state, NAMES, features, p7_relu=True)

    @staticmethod
    def cell(level: int) -> Tensor:
        """Return the anchors of one cell, x2 and y2 being their last pixels."""
        stride = 8 * 2**level
        centre = 0.5 * (stride - 1)
        corners = []
        for octave in range(3):
            scale = 4 * 2 ** (octave / 3)
            for ratio in RATIOS:
                w = np.round(np.sqrt(stride * stride / ratio))
                h = np.round(w * ratio)
                w, h = w * scale, h * scale
                corners.append(
                    [
                        centre - 0.5 * (w - 1),
                        centre - 0.5 * (h - 1),
                        centre + 0.5 * (w - 1),
                        centre + 0.5 * (h - 1),
                    ]
                )
        return torch.tensor(corners, dtype=torch.float64)

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        del prepared
        factor = self.factor(original)
        last = torch.tensor([original[1] - 1, original[0] - 1] * 2, dtype=torch.float64)
        boxes, scores, labels = [], [], []
        for level, (logits, deltas) in enumerate(zip(*maps, strict=True)):
            _, height, width = logits.shape
            score = logits.sigmoid().flatten()
            index = (score > (0.05 if level < 4 else 0.0)).nonzero()[:, 0]
            best, order = score[index].topk(min(1000, len(index)))
            index = index[order]
            classes = len(logits) // 9
            x, y = index % width, index // width % height
            label, a = index // width // height % classes, index // classes // height // width
            delta = deltas.view(9, 4, height, width)[a, :, y, x]
            anchor = torch.stack((x, y, x, y), 1) * 8 * 2**level + self.cell(level)[a]
            size = anchor[:, 2:] - anchor[:, :2] + 1
            centre = anchor[:, :2] + 0.5 * size + delta[:, :2] * size
            size = delta[:, 2:].clamp(max=math.log(1000 / 16)).exp() * size
            box = torch.cat((centre - 0.5 * size, centre + 0.5 * size - 1), 1) / factor
            boxes.append(box.minimum(last).clamp(min=0))
            scores.append(best)
            labels.append(label)
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        keep = self.suppress(box, score, label)
        box = box[keep]
        box[:, 2:] += 1  # a COCO box is as wide as x2 - x1 + 1
        return plain.Found(box, score[keep], label[keep])

    @staticmethod
    def suppress(box: Tensor, score: Tensor, label: Tensor) -> Tensor:
        area = (box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1)
        left = score.argsort(descending=True)
        kept: list[Tensor] = []
        while len(left) and len(kept) < 100:
            best, left = left[0], left[1:]
            kept.append(best)
            near = torch.maximum(box[left, :2], box[best, :2])
            far = torch.minimum(box[left, 2:], box[best, 2:])
            inter = (far - near + 1).clamp(min=0).prod(1)
            iou = inter / (area[left] + area[best] - inter)
            left = left[(iou < 0.5) | (label[left] != label[best])]
        return torch.stack(kept)


def along(pixels: Any, axis: int, count: int, factor: float) -> Any:
    """Interpolate between pixels at points that are ``1 / factor`` apart; edges are repeated."""
    length = pixels.shape[axis]
    at = ((np.arange(count) + 0.5) / factor - 0.5).clip(0, length - 1)
    left = np.floor(at).astype(int)
    right = np.minimum(left + 1, length - 1)
    share = (at - left).reshape([-1 if i == axis else 1 for i in range(3)])
    return pixels.take(left, axis) * (1 - share) + pixels.take(right, axis) * share


def make_reference(body: plain.Body) -> Detectron:
    """Build a reference with random weights, scaled to a normal range. The body has 50 layers."""
    state = plain.filled(plain.layout(NAMES, body))
    for key, value in state.items():  # affine layers have no statistics
        if key.endswith("running_mean"):
            value.zero_()
        elif key.endswith("running_var"):
            value.fill_(1 - 1e-5)  # plus the epsilon of the plain network
    made = Detectron(state, body)
    state[f"{NAMES.stem}.weight"] /= 57  # for pixels that are not divided by their deviation
    image = made.prepare(plain.smooth_image(160, 200)).tensor
    plain.calibrate(
        made.state, NAMES, lambda state, x: Detectron(state, body).network(x), image, -4.0
    )
    return made


def blobs_of(state: plain.State) -> dict[str, Any]:
    """Return the tensors by Detectron's names."""
    blobs = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if kind.startswith("running"):
            continue
        layer = re.sub("branch2([123])", lambda m: f"branch2{'abc'[int(m[1]) - 1]}", layer)
        scale = "s" if layer.endswith("_bn") else "w"
        blobs[f"{layer}_{scale if kind == 'weight' else 'b'}"] = value
    return blobs


def config_text(**changes: str) -> str:
    """Return the settings as the project writes them, with parts of the text replaced."""
    import base64

    text = CONFIG.replace("MEAN\n", base64.b64encode(PIXEL_MEAN.tobytes()).decode() + "\n")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def write_file(made: Detectron, path: Path) -> Path:
    """Write the file as its training does: blobs with their momentum, and the settings."""
    blobs = {key: value.numpy() for key, value in blobs_of(made.state).items()}
    blobs |= {f"{key}_momentum": np.zeros(1, np.float32) for key in list(blobs)}
    blobs["fc1000_w"] = np.zeros((10, 8), np.float32)
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": config_text()}, protocol=2))
    return path
