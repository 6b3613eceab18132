"""A dataset and a detector that train in seconds.

As a script, this module trains in a process that a test can kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.datasets import DetectionDataset, read_coco
from focaldet.training import RetinaNetModule, TrainingOptions, TrainingSummary, train


def write_data(folder: Path, count: int, seed: int = 0) -> Path:
    """Write images of squares and circles with annotations; the first has exactly two objects."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)  # noqa: S311
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        width, height = (64, 48) if number % 3 else (48, 64)
        picture = Image.new("RGB", (width, height), (rng.randrange(256), 120, 120))
        draw = ImageDraw.Draw(picture)
        name = f"{number}.png"
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for _ in range(rng.randint(0, 2) if number else 2):
            side = rng.randint(14, 30)
            x, y, label = rng.randint(0, 48 - side), rng.randint(0, 48 - side), rng.randrange(2)
            shape = (x, y, x + side - 1, y + side - 1)
            (draw.ellipse if label else draw.rectangle)(shape, fill=(255, 255, rng.randrange(256)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": (3, 7)[label],
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        picture.save(folder / name)
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "circle"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_data(path: Path, transform: Any = None) -> DetectionDataset:
    return DetectionDataset(read_coco(path, path.parent), transform)


def darken(image: Any, target: Any) -> Any:
    """Darken an image by a random factor, as an augmentation that uses random numbers."""
    return image.float() / 255 * (0.5 + 0.5 * torch.rand(1)), target


def tiny_detector(norm: Any = "batch") -> RetinaNet:
    torch.manual_seed(0)
    config = RetinaNetConfig(
        num_classes=2,
        class_names=("square", "circle"),
        backbone="mobilenet_v2",
        backbone_norm=norm,
        fpn_channels=16,
        head_depth=1,
        anchor_sizes=(8, 16, 32, 64, 128),
        min_size=72,
        max_size=96,
    )
    return RetinaNet.from_config(config)


class _Backbone(nn.Module):
    channels, strides = (2, 2, 2), (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 8, 8)
        self.stages = nn.ModuleList([nn.Conv2d(2, 2, 2, 2) for _ in range(2)])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


def smallest_detector() -> RetinaNet:
    """Return a detector of a few hundred weights, which learns nothing."""
    torch.manual_seed(0)
    config = RetinaNetConfig(
        num_classes=2,
        class_names=("square", "circle"),
        backbone="custom",
        fpn_channels=2,
        head_depth=1,
        octave_scales=(1.0,),
        aspect_ratios=(1.0,),
        min_size=64,
        max_size=64,
    )
    return RetinaNet.from_config(config, backbone=_Backbone())


def tiny_options(**changes: Any) -> TrainingOptions:
    defaults: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 4,
        "workers": 0,
        "log_every": 1,
        "pictures": 0,
        "accelerator": "cpu",
    }
    return TrainingOptions(**{**defaults, **changes})


def send_signal(number: int, at_step: int, *, whole_group: bool = True) -> None:
    """Make this process, or its whole group, receive a signal before the forward pass of a step."""
    original_step = RetinaNetModule.training_step

    def step(self: RetinaNetModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == at_step:
            os.killpg(0, number) if whole_group else signal.raise_signal(number)
        return original_step(self, batch, batch_idx)

    RetinaNetModule.training_step = step  # type: ignore[method-assign]


def run(
    data: Path,
    folder: Path,
    *,
    model: RetinaNet | None = None,
    resume: bool = False,
    **options: Any,
) -> TrainingSummary:
    return train(
        smallest_detector() if model is None else model,
        read_data(data / "train" / "annotations.json", darken),
        read_data(data / "val" / "annotations.json"),
        folder=folder,
        options=tiny_options(**options),
        resume=resume,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--signal", nargs=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.signal:
        send_signal(signal.Signals[args.signal[0]], int(args.signal[1]))
    run(args.data, args.folder, model=tiny_detector(), **args.options)


if __name__ == "__main__":
    main()
