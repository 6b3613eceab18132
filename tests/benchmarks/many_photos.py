"""What many photos cost: CPU time per photo, size of the results, and memory of writing them.

A ResNet-50 with random weights predicts photos whose short side is resized to 512, in one thread; the
medians of CPU time per photo are printed, of PyTorch and of an exported file. The sizes and the memory are those of synthetic detections.

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
from focaldet.export import OnnxDetector, export_onnx
from focaldet.export._processor import missing_units
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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file, check_image=photos[0])
        detectors: dict[str, Any] = {
            "RetinaNet": model,
            "after optimize_for_inference": model.optimize_for_inference(),
            "in onnxruntime": OnnxDetector(file, threads=1),
            "in OpenVINO": OnnxDetector(file, runtime="openvino", threads=1),
        }
        if missing_units("bfloat16", torch.cpu.get_capabilities()) is None:
            detectors["optimised, bfloat16"] = model.optimize_for_inference(torch.bfloat16)
        seconds: dict[str, list[float]] = {name: [] for name in detectors}
        for photo in (photos[0], *photos):  # the first warms up
            for name, detector in detectors.items():
                began = time.process_time()
                detector.predict(photo)
                seconds[name].append(time.process_time() - began)
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"{name}: {median:.2f} s of CPU time per photo, {1 / median:.2f} photos per second")


if __name__ == "__main__":
    main()
