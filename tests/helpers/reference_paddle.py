"""PaddleDetection's RetinaNet, reimplemented from its facts, and a writer of its ``.pdparams`` files."""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.ops import nms

from tests.helpers import reference_models as plain
from tests.helpers.reference_opencv import resized_by_factor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

# With blocks named by their index; file_keys names them by letters.
NAMES = plain.Names(
    stem="backbone.conv1.conv1.conv",
    stem_norm="backbone.conv1.conv1.norm",
    conv="backbone.res{0}.res{0}@{1}.branch2@{2}.conv",
    norm="backbone.res{0}.res{0}@{1}.branch2@{2}.norm",
    shortcut="backbone.res{0}.res{0}@{1}.short.conv",
    shortcut_norm="backbone.res{0}.res{0}@{1}.short.norm",
    laterals=(
        "neck.fpn_inner_res3_sum_lateral",
        "neck.fpn_inner_res4_sum_lateral",
        "neck.fpn_inner_res5_sum",
    ),
    outputs=("neck.fpn_res3_sum", "neck.fpn_res4_sum", "neck.fpn_res5_sum"),
    p6="neck.fpn_6",
    p7="neck.fpn_7",
    class_tower=tuple(  # type: ignore[arg-type]
        f"head.conv_feat.fcos_head_cls_tower_conv_{i}.conv" for i in range(4)
    ),
    box_tower=tuple(  # type: ignore[arg-type]
        f"head.conv_feat.fcos_head_reg_tower_conv_{i}.conv" for i in range(4)
    ),
    classes="head.retina_cls",
    boxes="head.retina_reg",
    first_stage=2,
)


class Paddle:
    """PaddleDetection's way from an image to detections.

    Args:
        state: The weights.
        depth: The depth of the ResNet.
        limits: How many anchors of a level, and how many predictions of a class, are kept.
    """

    min_size, max_size = 160, 256
    min_share = 0.9

    def __init__(
        self, state: plain.State, depth: int, limits: tuple[int, int] = (1000, 1000)
    ) -> None:
        self.state, self.body, self.limits = state, plain.Body(depth), limits

    def factor(self, size: tuple[int, int]) -> float:
        return min(self.min_size / min(size), self.max_size / max(size))

    def prepare(self, image: Any) -> plain.Prepared:
        resized = resized_by_factor(image, self.factor(image.shape[:2]))
        size = (resized.shape[0], resized.shape[1])
        pixels = (resized / 255 - np.array(plain.MEAN)) / np.array(plain.STD)
        tensor = plain.padded(pixels, *(plain.up_to(side, 32) for side in size))
        return plain.Prepared(tensor, size, tensor)

    def network(self, tensor: Tensor) -> plain.Maps:
        state = self.state
        features = plain.resnet(state, NAMES, self.body, tensor)
        inner = [
            plain.conv(state, name, c) for name, c in zip(NAMES.laterals, features, strict=True)
        ]
        for level in (1, 0):
            above = inner[level + 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
            inner[level] = inner[level] + above
        levels = [plain.conv(state, name, m) for name, m in zip(NAMES.outputs, inner, strict=True)]
        p6 = plain.conv(state, NAMES.p6, levels[2], stride=2)  # from P5
        levels += [p6, plain.conv(state, NAMES.p7, p6.relu(), stride=2)]
        return plain.Maps(
            self._subnet(NAMES.class_tower, NAMES.classes, levels),
            self._subnet(NAMES.box_tower, NAMES.boxes, levels),
        )

    def _subnet(self, tower: Sequence[str], last: str, levels: Sequence[Tensor]) -> list[Tensor]:
        maps = []
        for level in levels:
            x = level
            for name in tower:
                x = plain.conv(self.state, name, x).relu()
            maps.append(plain.conv(self.state, last, x)[0])
        return maps

    @staticmethod
    def anchors(level: int, height: int, width: int) -> Tensor:
        stride = 8.0 * 2**level
        cell = []
        for octave in range(3):
            for ratio in (0.5, 1.0, 2.0):
                w = math.sqrt((stride * 4 * 2 ** (octave / 3)) ** 2 / ratio)
                h = ratio * w
                cell.append([-w / 2, -h / 2, w / 2, h / 2])
        y, x = torch.meshgrid(
            torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij"
        )
        shifts = torch.stack((x, y, x, y), -1).view(-1, 1, 4)
        return (shifts + torch.tensor(cell, dtype=torch.float64)).view(-1, 4)

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        del prepared  # boxes are not clipped
        of_level, of_class = self.limits
        classes = len(maps.logits[0]) // 9
        boxes, scores = [], []
        for level, (logits, deltas) in enumerate(zip(*maps, strict=True)):
            logit, delta = plain.rows(logits, classes), plain.rows(deltas, 4)
            anchor = self.anchors(level, *logits.shape[1:])
            if len(logit) > of_level:
                best = logit.amax(dim=1).topk(of_level).indices
                logit, delta, anchor = logit[best], delta[best], anchor[best]
            side = anchor[:, 2:] - anchor[:, :2]
            centre = anchor[:, :2] + 0.5 * side + delta[:, :2] * side
            side = side * delta[:, 2:].clamp(max=math.log(1000 / 16)).exp()
            boxes.append(torch.cat((centre - 0.5 * side, centre + 0.5 * side), 1))
            scores.append(logit.sigmoid())
        box, score = torch.cat(boxes) / self.factor(original), torch.cat(scores)
        found = []
        for label in range(classes):
            over = (score[:, label] > 0.05).nonzero()[:, 0]
            over = over[score[over, label].argsort(descending=True)][:of_class]
            keep = over[nms(box[over], score[over, label], 0.5)]
            found.append((box[keep], score[keep, label], torch.full((len(keep),), label)))
        box, best_scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        best = best_scores.argsort(descending=True)[:100]
        return plain.Found(box[best], best_scores[best], labels[best])


def make_reference(depth: int, classes: int = 20) -> Paddle:
    """Build a reference with random weights, scaled to a normal range."""
    shapes = plain.layout(NAMES, plain.Body(depth), classes=classes)
    shapes[f"{NAMES.p6}.weight"] = (32, 32, 3, 3)
    made = Paddle(plain.filled(shapes), depth)
    image = made.prepare(plain.smooth_image(160, 200)).tensor
    plain.calibrate(made.state, NAMES, lambda _, x: made.network(x), image, -5.0)
    return made


def file_keys(state: plain.State, depth: int) -> plain.State:
    """Return a state dict with the keys of a file, where letters name the blocks."""
    renamed = {}
    for key, value in state.items():
        parts = key.replace("running_mean", "_mean").replace("running_var", "_variance").split(".")
        for i, part in enumerate(parts):
            stem, mark, index = part.partition("@")
            if mark and stem.startswith("branch"):
                parts[i] = stem + "?abc"[int(index)]
            elif mark:
                numbered = depth > 50 and stem == "res4" and index != "0"
                parts[i] = stem + (f"b{index}" if numbered else "abcdefgh"[int(index)])
        renamed[".".join(parts)] = value
    return renamed


def write_file(made: Paddle, path: Path) -> Path:
    """Write the weights as ``paddle.save`` does, with the names of its parameters beside."""
    arrays = {key: value.numpy() for key, value in file_keys(made.state, made.body.depth).items()}
    names = {key: f"param_{i}" for i, key in enumerate(arrays)}
    path.write_bytes(pickle.dumps({**arrays, "StructuredToParameterName@@": names}, protocol=4))
    return path
