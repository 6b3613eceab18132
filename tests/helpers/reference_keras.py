"""keras-retinanet's model, reimplemented from its facts, and a writer of its HDF5 files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from tests.helpers import reference_models as plain
from tests.helpers.reference_opencv import resized_by_factor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

CLASS_TOWER = [f"pyramid_classification_{i}" for i in range(4)]
BOX_TOWER = [f"pyramid_regression_{i}" for i in range(4)]
CLASSES, BOXES = "pyramid_classification", "pyramid_regression"
NAMES = plain.Names(  # what calibrate needs
    stem="",
    stem_norm="",
    conv="",
    norm="",
    shortcut="",
    shortcut_norm="",
    laterals=("C3_reduced", "C4_reduced", "C5_reduced"),
    outputs=("P3", "P4", "P5"),
    p6="P6",
    p7="P7",
    class_tower=tuple(CLASS_TOWER),  # type: ignore[arg-type]
    box_tower=tuple(BOX_TOWER),  # type: ignore[arg-type]
    classes=CLASSES,
    boxes=BOXES,
)
MEAN = np.array([103.939, 116.779, 123.68])  # blue, green, red


def blocks(depth: int) -> Iterator[tuple[int, str, int]]:
    """Yield the stage of each block, from 2 to 5, its name in keys and its index in the stage."""
    for stage, count in enumerate(plain.BLOCKS[depth], start=2):
        numbered = depth > 50 and stage in {3, 4}
        for block in range(count):
            letter = f"b{block}" if numbered and block else "abcdefgh"[block]
            yield stage, f"{stage}{letter}", block


def layout(depth: int, *, classes: int = 20, channels: int = 32) -> dict[str, Any]:
    """Return the shape of every tensor by layer, with PyTorch's order of dimensions."""
    shapes: dict[str, Any] = {"conv1.weight": (64, 3, 7, 7)} | _norm("bn_conv1", 64)
    inside = 64
    for stage, block, index in blocks(depth):
        width = 64 * 2 ** (stage - 2)
        convs = {
            "2a": (width, inside, 1, 1),
            "2b": (width, width, 3, 3),
            "2c": (4 * width, width, 1, 1),
        }
        if index == 0:
            convs["1"] = (4 * width, inside, 1, 1)
        for branch, shape in convs.items():
            shapes[f"res{block}_branch{branch}.weight"] = shape
            shapes |= _norm(f"bn{block}_branch{branch}", shape[0])
        inside = 4 * width
    return shapes | plain.pyramid_layout(NAMES, (512, 1024, 2048), classes, channels)


def _norm(name: str, channels: int) -> plain.State:
    return {
        f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")
    }


def tensorflow_padded(x: Tensor, kernel: int, value: float = 0.0) -> Tensor:
    """Pad for stride 2 so that there are ceil(side / 2) windows, the odd pixel of padding after."""
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        windows = -(-side // 2)
        total = max((windows - 1) * 2 + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def strided(state: plain.State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"].to(x)
    bias = state.get(f"{name}.bias")
    bias = None if bias is None else bias.to(x)
    return F.conv2d(tensorflow_padded(x, weight.shape[-1]), weight, bias, stride=2)


def nearest(x: Tensor, like: Tensor) -> Tensor:
    """Resize to the size of another map: cell i comes from floor(i * old / new)."""
    for axis in (-2, -1):
        old, new = x.shape[axis], like.shape[axis]
        x = x.index_select(axis, torch.arange(new) * old // new)
    return x


class Keras:
    """keras-retinanet's way from an image to detections."""

    min_size, max_size = 160, 256
    min_share = 0.98

    def __init__(self, state: plain.State, depth: int) -> None:
        self.state, self.depth = state, depth

    def scale(self, size: tuple[int, int]) -> float:
        scale = self.min_size / min(size)
        return self.max_size / max(size) if max(size) * scale > self.max_size else scale

    def prepare(self, image: Any) -> plain.Prepared:
        pixels = image[:, :, ::-1].astype(np.float64) - MEAN  # the mean first, then the size
        resized = resized_by_factor(pixels, self.scale(image.shape[:2]))
        size = (resized.shape[0], resized.shape[1])
        tensor = plain.padded(resized, *size)
        return plain.Prepared(tensor, size, tensor.flip(1))

    def network(self, tensor: Tensor) -> plain.Maps:
        state = self.state
        x = plain.norm(state, "bn_conv1", strided(state, "conv1", tensor)).relu()
        x = F.max_pool2d(tensorflow_padded(x, 3, value=float("-inf")), 3, 2)
        stages: dict[int, Tensor] = {}
        for stage, block, index in blocks(self.depth):
            stride = 2 if index == 0 and stage > 2 else 1
            y = x
            for branch in ("2a", "2b", "2c"):
                step = stride if branch == "2a" else 1
                y = plain.conv(state, f"res{block}_branch{branch}", y, stride=step)
                y = plain.norm(state, f"bn{block}_branch{branch}", y)
                y = y if branch == "2c" else y.relu()
            if index == 0:
                x = plain.conv(state, f"res{block}_branch1", x, stride=stride)
                x = plain.norm(state, f"bn{block}_branch1", x)
            stages[stage] = x = (x + y).relu()
        return self._pyramid_and_head(stages[3], stages[4], stages[5])

    def _pyramid_and_head(self, c3: Tensor, c4: Tensor, c5: Tensor) -> plain.Maps:
        state = self.state
        m5 = plain.conv(state, "C5_reduced", c5)
        m4 = plain.conv(state, "C4_reduced", c4) + nearest(m5, c4)
        m3 = plain.conv(state, "C3_reduced", c3) + nearest(m4, c3)
        levels = [
            plain.conv(state, f"P{level}", m)
            for level, m in zip((3, 4, 5), (m3, m4, m5), strict=True)
        ]
        p6 = strided(state, "P6", c5)
        levels += [p6, strided(state, "P7", p6.relu())]
        maps = []
        for tower, last in ((CLASS_TOWER, CLASSES), (BOX_TOWER, BOXES)):
            outputs = []
            for level in levels:
                x = level
                for name in tower:
                    x = plain.conv(state, name, x).relu()
                outputs.append(plain.conv(state, last, x)[0])
            maps.append(outputs)
        return plain.Maps(*maps)

    @staticmethod
    def anchors(level: int, height: int, width: int) -> Tensor:
        stride = 8 * 2**level
        cell = []
        for ratio in (0.5, 1, 2):
            for octave in range(3):
                w = np.sqrt((4 * stride * 2 ** (octave / 3)) ** 2 / ratio)
                cell.append([-w / 2, -w * ratio / 2, w / 2, w * ratio / 2])
        x, y = np.meshgrid((np.arange(width) + 0.5) * stride, (np.arange(height) + 0.5) * stride)
        shifts = np.stack((x.ravel(), y.ravel(), x.ravel(), y.ravel()), 1)
        return torch.from_numpy((shifts[:, None] + np.array(cell)[None]).reshape(-1, 4))

    def detect(
        self, maps: plain.Maps, prepared: plain.Prepared, original: tuple[int, int]
    ) -> plain.Found:
        height, width = prepared.size
        classes = len(maps.logits[0]) // 9
        score = torch.cat([plain.rows(level, classes) for level in maps.logits]).sigmoid()
        delta = torch.cat([plain.rows(level, 4) for level in maps.deltas]) * 0.2
        anchor = torch.cat(
            [self.anchors(i, *level.shape[1:]) for i, level in enumerate(maps.logits)]
        )
        w, h = anchor[:, 2] - anchor[:, 0], anchor[:, 3] - anchor[:, 1]
        box = anchor + delta * torch.stack((w, h, w, h), 1)
        last = torch.tensor([width - 1, height - 1] * 2, dtype=box.dtype)
        box = torch.minimum(box.clamp(min=0), last)
        # TensorFlow's suppression takes any two opposite corners; the project returns them as they are.
        ordered = torch.cat(
            (torch.minimum(box[:, :2], box[:, 2:]), torch.maximum(box[:, :2], box[:, 2:])), 1
        )
        found = []
        for label in range(classes):
            over = (score[:, label] > 0.05).nonzero()[:, 0]
            keep = over[nms(ordered[over], score[over, label], 0.5)][:300]
            found.append((ordered[keep], score[keep, label], torch.full((len(keep),), label)))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        best = scores.argsort(descending=True)[:300]
        return plain.Found(boxes[best] / self.scale(original), scores[best], labels[best])


def make_reference(depth: int, classes: int = 20) -> Keras:
    """Build a reference with random weights, scaled to a normal range."""
    made = Keras(plain.filled(layout(depth, classes=classes)), depth)
    made.state["conv1.weight"] /= 57  # for pixels that are not divided by their standard deviation
    image = made.prepare(plain.smooth_image(160, 201)).tensor
    plain.calibrate(made.state, NAMES, lambda _, x: made.network(x), image, -5.0, deltas=(2.0, 2.0))
    return made


# --- Files ---------------------------------------------------------------------------------------

_PARTS = {"running_mean": "moving_mean", "running_var": "moving_variance"}


def keras_arrays(state: plain.State) -> dict[str, Tensor]:
    """Return the weights by their path in the file's group of weights."""
    arrays = {}
    for key, value in state.items():
        layer, _, part = key.rpartition(".")
        is_norm = f"{layer}.running_mean" in state
        if part in {"weight", "bias"}:
            norm_part = {"weight": "gamma", "bias": "beta"}[part]
            name = norm_part if is_norm else {"weight": "kernel", "bias": "bias"}[part]
        else:
            name = _PARTS[part]
        group = layer
        if layer.startswith("pyramid_"):
            group = f"{layer.split('_')[1]}_submodel"
        array = value.permute(2, 3, 1, 0).contiguous() if value.ndim == 4 else value
        arrays[f"{group}/{layer}/{name}:0"] = array
    return arrays


def model_config(*, converted: bool, **options: Any) -> dict[str, Any]:
    """Return the description of the layers whose options matter.

    Args:
        converted: Whether the model has the layers that decode and filter boxes.
        **options: Options that replace those of every layer that has them.
    """
    scales = [2 ** (octave / 3) for octave in range(3)]
    layers: list[tuple[str, str, dict[str, Any]]] = [("InputLayer", "input_1", {})]
    layers += [
        (
            "Anchors",
            f"anchors_{i}",
            {"size": 32 * 2**i, "stride": 8 * 2**i, "ratios": [0.5, 1.0, 2.0], "scales": scales},
        )
        for i in range(5)
    ]
    if converted:
        layers += [
            ("RegressBoxes", "boxes", {"mean": [0, 0, 0, 0], "std": [0.2, 0.2, 0.2, 0.2]}),
            ("ClipBoxes", "clipped_boxes", {}),
            (
                "FilterDetections",
                "filtered_detections",
                {
                    "nms": True,
                    "class_specific_filter": True,
                    "nms_threshold": 0.5,
                    "score_threshold": 0.05,
                    "max_detections": 300,
                    "parallel_iterations": 32,
                },
            ),
        ]
    return {
        "class_name": "Model",
        "config": {
            "name": "retinanet",
            "layers": [
                {
                    "class_name": kind,
                    "name": name,
                    "config": {
                        "name": name,
                        **config,
                        **{key: value for key, value in options.items() if key in config},
                    },
                }
                for kind, name, config in layers
            ],
        },
    }


def write_file(made: Keras, path: Path, kind: str = "training", **options: Any) -> Path:
    """Write a file of its training ("training"), of its conversion ("converted") or of weights alone."""
    import h5py

    with h5py.File(path, "w") as root:
        weights = root
        if kind != "weights":
            config = model_config(converted=kind == "converted", **options)
            root.attrs["model_config"] = json.dumps(config).encode()
            root.attrs["keras_version"] = b"2.2.4"
            weights = root.create_group("model_weights")
        weights.attrs["backend"] = b"tensorflow"
        for layer in ("C6_relu", "P5_upsampled"):
            weights.create_group(layer)  # layers without weights have a group, too
        for name, value in keras_arrays(made.state).items():
            weights.create_dataset(name, data=value.numpy())
        if kind == "training":
            optimizer = root.create_group("optimizer_weights/training/Adam")
            optimizer.create_dataset("iterations:0", data=np.int64(5))
            optimizer.create_dataset("Variable:0", data=np.zeros((3, 3), np.float32))
    return path
