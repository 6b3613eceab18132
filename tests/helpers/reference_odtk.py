"""ODTK's RetinaNet, reimplemented from its facts, and a writer of its files."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v2

from tests.helpers import reference_models as plain

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RATIOS, SCALES = [1.0, 2.0, 0.5], [4 * 2 ** (i / 3) for i in range(3)]


def names_of(backbone: str) -> plain.Names:
    """Return the key names of a model with a backbone such as "ResNet18FPN"."""
    start = f"backbones.{backbone}"
    return plain.Names(
        stem=f"{start}.features.conv1",
        stem_norm=f"{start}.features.bn1",
        conv=f"{start}.features.layer{{}}.{{}}.conv{{}}",
        norm=f"{start}.features.layer{{}}.{{}}.bn{{}}",
        shortcut=f"{start}.features.layer{{}}.{{}}.downsample.0",
        shortcut_norm=f"{start}.features.layer{{}}.{{}}.downsample.1",
        laterals=(f"{start}.lateral3", f"{start}.lateral4", f"{start}.lateral5"),
        outputs=(f"{start}.smooth3", f"{start}.smooth4", f"{start}.smooth5"),
        p6=f"{start}.pyramid6",
        p7=f"{start}.pyramid7",
        class_tower=tuple(f"cls_head.{i}" for i in (0, 2, 4, 6)),  # type: ignore[arg-type]
        box_tower=tuple(f"box_head.{i}" for i in (0, 2, 4, 6)),  # type: ignore[arg-type]
        classes="cls_head.8",
        boxes="box_head.8",
    )


class ODTK:
    """ODTK's way from an image to detections, in older and newer versions."""

    min_size, max_size = 160, 256

    def __init__(
        self, state: plain.State, backbone: str, body: plain.Body | None, *, old: bool
    ) -> None:
        self.state = state
        self.backbone, self.names = backbone, names_of(backbone)
        self.body = body
        self.old = old
        self.min_share = 0.6 if body is None else 0.9  # a random MobileNet amplifies differences

    def prepare(self, image: Any) -> plain.Prepared:
        height, width = image.shape[:2]
        ratio = self.ratio((height, width))
        size = (int(ratio * height), int(ratio * width))
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = (np.asarray(resized) / 255 - np.array(plain.MEAN)) / np.array(plain.STD)
        tensor = plain.padded(pixels, *(plain.up_to(side, 128) for side in size))
        return plain.Prepared(tensor, size, tensor)

    def ratio(self, size: tuple[int, int]) -> float:
        ratio = self.min_size / min(size)
        return self.max_size / max(size) if ratio * max(size) > self.max_size else ratio

    def network(self, tensor: Tensor) -> plain.Maps:
        if self.body is None:
            features = mobilenet_features(self.state, self.backbone, tensor)
        else:
            features = plain.resnet(self.state, self.names, self.body, tensor)
        return plain.pyramid_and_head(self.state, self.names, features, p7_relu=True)

    def cell(self, stride: int) -> Tensor:
        """Return the anchors of one cell. In older versions x2 and y2 are the last pixel."""
        corners = []
        for scale in SCALES:
            for ratio in RATIOS:
                w = (stride * stride / ratio) ** 0.5
                h = w * ratio
                if self.old:
                    w = round(w)
                    h = round(w * ratio)
                last = 1 if self.old else 0
                corners.append(
                    [
                        0.5 * (stride - w * scale),
                        0.5 * (stride - h * scale),
                        0.5 * (stride + w * scale) - last,
                        0.5 * (stride + h * scale) - last,
                    ]
                )
        return torch.tensor(corners, dtype=torch.float64)

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        boxes, scores, labels = [], [], []
        for logits, deltas in zip(*maps, strict=True):
            _, height, width = logits.shape
            stride = prepared.tensor.shape[-1] // width
            score = logits.sigmoid().flatten()
            index = (score >= 0.05).nonzero()[:, 0]
            best, order = score[index].topk(min(1000, len(index)))
            index = index[order]
            classes = len(logits) // 9
            x, y = index % width, index // width % height
            label, a = index // width // height % classes, index // classes // height // width
            delta = deltas.view(9, 4, height, width)[a, :, y, x]
            anchor = torch.stack((x, y, x, y), 1) * stride + self.cell(stride)[a]
            size = anchor[:, 2:] - anchor[:, :2] + 1
            centre = anchor[:, :2] + 0.5 * size + delta[:, :2] * size
            size = delta[:, 2:].exp() * size
            most = torch.tensor([width * stride - 1, height * stride - 1], dtype=torch.float64)
            zero = torch.zeros(2, dtype=torch.float64)
            near = (centre - 0.5 * size).minimum(most).maximum(zero)
            far = (centre + 0.5 * size - 1).minimum(most).maximum(zero)
            boxes.append(torch.cat((near, far), 1))
            scores.append(best)
            labels.append(label)
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        keep = self.suppress(box, score, label)
        box = box[keep] / self.ratio(original)
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
            left = left[(iou <= 0.5) | (label[left] != label[best])]
        return torch.stack(kept)


class MobileNetFeatures(nn.Module):
    """torchvision's MobileNetV2 as ODTK wraps it: its ``features``, with outputs after three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.features = mobilenet_v2(weights=None).features

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for index, block in enumerate(self.features[:-1]):
            x = block(x)
            if index in (6, 13, 17):
                maps.append(x)
        return maps


def mobilenet_features(state: plain.State, backbone: str, x: Tensor) -> list[Tensor]:
    start = f"backbones.{backbone}.features."
    body = MobileNetFeatures().eval()
    own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start + "features.")}
    body.load_state_dict(own, strict=False)
    maps: list[Tensor] = body.double()(x)
    return maps


def make_reference(backbone: str, body: plain.Body | None, *, old: bool) -> ODTK:
    """Build a reference with random weights, scaled to a normal range. No body means MobileNetV2."""
    if body is None:
        shapes = plain.pyramid_layout(names_of(backbone), (32, 96, 320), 80, 32)
        own = MobileNetFeatures().state_dict()
        shapes |= {f"backbones.{backbone}.features.{k}": tuple(v.shape) for k, v in own.items()}
        shapes = {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")}
    else:
        shapes = plain.layout(names_of(backbone), body)
    made = ODTK(plain.filled(shapes), backbone, body, old=old)
    image = made.prepare(plain.smooth_image(160, 200)).tensor
    with torch.no_grad():
        plain.calibrate(made.state, made.names, lambda _, x: made.network(x), image, -4.0)
    return made


def write_file(made: ODTK, path: Path) -> Path:
    """Write the file as its training does, or for ``.zip`` an archive of one, as in its releases."""
    state = dict(made.state)
    start = f"backbones.{made.backbone}.features"
    unused = {"fc.weight": (10, 512), "fc.bias": (10,)}
    if made.body is None:
        unused = {"classifier.1.weight": (10, 1280), "classifier.1.bias": (10,)}
    state |= {f"{start}.{key}": torch.randn(shape) for key, shape in unused.items()}
    content: Any = {"backbone": [made.backbone], "classes": 80, "state_dict": state, "iteration": 9}
    if not made.old:
        content |= {"ratios": RATIOS, "scales": SCALES}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not made.old)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("retinanet_rn18fpn/retinanet_rn18fpn.pth", buffer.getvalue())
    else:
        path.write_bytes(buffer.getvalue())
    return path
