"""The RetinaNet of yhenon/pytorch-retinanet, reimplemented from its facts, and a writer of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.ops import nms

from tests.helpers import reference_models as plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

NAMES = plain.Names(
    stem="conv1",
    stem_norm="bn1",
    conv="layer{}.{}.conv{}",
    norm="layer{}.{}.bn{}",
    shortcut="layer{}.{}.downsample.0",
    shortcut_norm="layer{}.{}.downsample.1",
    laterals=("fpn.P3_1", "fpn.P4_1", "fpn.P5_1"),
    outputs=("fpn.P3_2", "fpn.P4_2", "fpn.P5_2"),
    p6="fpn.P6",
    p7="fpn.P7_2",
    class_tower=tuple(f"classificationModel.conv{i}" for i in range(1, 5)),  # type: ignore[arg-type]
    box_tower=tuple(f"regressionModel.conv{i}" for i in range(1, 5)),  # type: ignore[arg-type]
    classes="classificationModel.output",
    boxes="regressionModel.output",
)


class Yhenon:
    """The way of yhenon/pytorch-retinanet from an image to detections."""

    min_size, max_size = 160, 256
    min_share = 0.9

    def __init__(self, state: plain.State, body: plain.Body) -> None:
        self.state, self.body = state, body

    def scale(self, size: tuple[int, int]) -> float:
        scale = self.min_size / min(size)
        return self.max_size / max(size) if max(size) * scale > self.max_size else scale

    def prepare(self, image: Any) -> plain.Prepared:
        pixels = (image / 255 - np.array(plain.MEAN)) / np.array(plain.STD)
        scale = self.scale(image.shape[:2])
        size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
        tensor = plain.padded(
            plain.bilinear(pixels, *size), *(side + 32 - side % 32 for side in size)
        )
        return plain.Prepared(tensor, size, tensor)

    def network(self, tensor: Tensor) -> plain.Maps:
        features = plain.resnet(self.state, NAMES, self.body, tensor)
        return plain.pyramid_and_head(self.state, NAMES, features, p7_relu=True)

    @staticmethod
    def anchors(height: int, width: int) -> Tensor:
        """Return the anchors of all levels for a padded image."""
        levels = []
        for level in (3, 4, 5, 6, 7):
            stride, base = 2**level, 2 ** (level + 2)
            cell = []
            for ratio in (0.5, 1, 2):
                for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3)):
                    w = np.sqrt((base * scale) ** 2 / ratio)
                    cell.append([-w / 2, -w * ratio / 2, w / 2, w * ratio / 2])
            rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
            x, y = np.meshgrid(
                (np.arange(columns) + 0.5) * stride, (np.arange(rows) + 0.5) * stride
            )
            shifts = np.stack((x.ravel(), y.ravel(), x.ravel(), y.ravel()), 1)
            levels.append((shifts[:, None] + np.array(cell)[None]).reshape(-1, 4))
        return torch.from_numpy(np.concatenate(levels))

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        height, width = prepared.tensor.shape[-2:]
        classes = len(maps.logits[0]) // 9
        score = torch.cat([plain.rows(level, classes) for level in maps.logits]).sigmoid()
        delta = torch.cat([plain.rows(level, 4) for level in maps.deltas])
        delta = delta * torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
        anchor = self.anchors(height, width)
        w, h = anchor[:, 2] - anchor[:, 0], anchor[:, 3] - anchor[:, 1]
        x, y = anchor[:, 0] + 0.5 * w + delta[:, 0] * w, anchor[:, 1] + 0.5 * h + delta[:, 1] * h
        w, h = delta[:, 2].exp() * w, delta[:, 3].exp() * h
        box = torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h), 1)
        # The project clips each corner from one side only, which turns boxes outside the image inside
        # out. Here they are empty. Neither kind overlaps anything.
        for axis, side in ((0, width), (1, height)):
            box[:, axis] = box[:, axis].clamp(min=0).clamp(max=side)
            box[:, axis + 2] = box[:, axis + 2].clamp(max=side).clamp(min=0)
        found = []
        for label in range(classes):
            over = (score[:, label] > 0.05).nonzero()[:, 0]
            keep = over[nms(box[over], score[over, label], 0.5)]
            found.append((box[keep], score[keep, label], torch.full((len(keep),), label)))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return plain.Found(boxes / self.scale(original), scores, labels)


def make_reference(body: plain.Body) -> Yhenon:
    """Build a reference with random weights, scaled to a normal range."""
    made = Yhenon(plain.filled(plain.layout(NAMES, body, classes=20)), body)
    image = made.prepare(plain.smooth_image(160, 200)).tensor
    plain.calibrate(made.state, NAMES, lambda _, x: made.network(x), image, -5.0, deltas=(4.0, 2.0))
    return made


def write_file(made: Yhenon, path: Path, prefix: str = "") -> Path:
    """Write the state dict, with a prefix such as "module." to all keys."""
    torch.save({prefix + key: value for key, value in made.state.items()}, path)
    return path
