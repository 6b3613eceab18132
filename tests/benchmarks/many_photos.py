"""What many photos cost: CPU time per photo, size of the results, and memory of writing them.

A ResNet-50 with random weights predicts photos whose short side is resized to 512, in one thread; the
median of CPU time per photo is printed. The sizes and the memory are those of synthetic detections.

    python -m tests.benchmarks.many_photos FOLDER [--photos 12]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet.results import predict_to_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

NAMES = ("person", "bicycle", "traffic light")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=12)
    options = parser.parse_args()
    print_sizes()
    print_memory()
    print_cpu_time(sorted(options.folder.iterdir())[: options.photos])


def synthetic(path: Path, count: int) -> Detections:
    corners = torch.rand(count, 2) * 400
    boxes = torch.cat([corners, corners + 10 + torch.rand(count, 2) * 90], dim=1)
    scores = torch.rand(count).sort(descending=True).values
    labels = torch.arange(count) % len(NAMES)
    return Detections(boxes, scores, labels, (512, 640), class_names=NAMES, source=str(path))


def write(count: int, images: int, name: Literal["json", "jsonl", "coco"]) -> int:
    """Write detections of some images, and return the bytes of the files."""
    paths = [Path(f"photos/{index:012d}.jpg") for index in range(images)]

    def predict(part: Sequence[Path]) -> list[Detections]:
        return [synthetic(path, count) for path in part]

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"settings": {}, "class_names": NAMES}
        summary = predict_to_folder(predict, paths, folder, format=name, **options)
        assert summary is not None
        return sum(file.stat().st_size for file in summary.files)


def print_sizes() -> None:
    for name in ("json", "jsonl", "coco"):
        empty, full = write(0, 500, name) / 500, write(20, 500, name) / 500
        print(f"{name}: {empty:.0f} bytes per photo and {(full - empty) / 20:.0f} per detection")


def print_memory() -> None:
    for images in (1_000, 10_000, 50_000):
        write(5, images, "jsonl")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{images:,} photos of 5 detections: peak {peak:.0f} MiB")


def print_cpu_time(photos: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    config = RetinaNetConfig(num_classes=80, backbone_norm="batch", min_size=512, max_size=853)
    model = RetinaNet.from_config(config)
    for what, detector in (
        ("RetinaNet", model),
        ("after optimize_for_inference", model.optimize_for_inference()),
    ):
        detector.predict(photos[0])  # warms up
        seconds = []
        for photo in photos:
            began = time.process_time()
            detector.predict(photo)
            seconds.append(time.process_time() - began)
        print(f"{what}: {statistics.median(seconds):.2f} s of CPU time per photo", flush=True)


if __name__ == "__main__":
    main()
