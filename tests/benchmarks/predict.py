"""Speed from files to boxes: ``RetinaNet.predict`` compared with torchvision's model.

Both have the same weights, read each photo, run at 800x1333 and return boxes in pixels of the photo, one
image after the other, in turn. The weights are random, with a class bias that gives hundreds of
detections. Prints the median process CPU time and wall time per image, and checks that the detections are
equal.

    python -m tests.benchmarks.predict FOLDER [--threads 2] [--limit 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import to_tensor

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.images import count_images, iter_images
from tests.helpers.reference_torchvision import assert_same_detections, randomised

if TYPE_CHECKING:
    from collections.abc import Callable


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="number of photos (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    peer = randomised("retinanet_resnet50_fpn", class_bias=-4.5, num_classes=91)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(peer.state_dict(), Path(folder) / "peer.pth")
        config = RetinaNetConfig.torchvision_v1().replace(backbone_norm="batch")
        ours = RetinaNet.from_pretrained(Path(folder) / "peer.pth", config=config)

    @torch.no_grad()
    def by_torchvision(path: str) -> Any:
        return peer([to_tensor(Image.open(path).convert("RGB"))])

    names = [item.name for item in iter_images(options.folder) if item and item.name]
    names = names[: options.limit]
    times: dict[str, list[tuple[float, float]]] = {"focaldet": [], "torchvision": []}
    counts = []
    ours.predict(names[0])
    by_torchvision(names[0])
    for index, name in enumerate(names):
        sides: list[tuple[str, Callable[[str], Any]]] = [
            ("focaldet", ours.predict),
            ("torchvision", by_torchvision),
        ]
        found = {}
        for side, function in sides if index % 2 else sides[::-1]:
            found[side], cpu, wall = timed(lambda f=function, n=name: f(n))  # type: ignore[misc]
            times[side].append((cpu, wall))
        assert_same_detections(found["focaldet"], found["torchvision"])
        counts.append(len(found["focaldet"][0]))

    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{len(names)} of {count_images(options.folder)} photos; equal detections in all; "
        f"{min(counts)} to {max(counts)} per image, median {statistics.median(counts):.0f}"
    )
    medians = {
        side: [statistics.median(column) for column in zip(*rows, strict=True)]
        for side, rows in times.items()
    }
    for side, (cpu, wall) in medians.items():
        print(f"{side:12s} CPU {cpu:.3f} s, wall {wall:.3f} s per image (median)")
    cpu, wall = (
        theirs / ours
        for ours, theirs in zip(medians["focaldet"], medians["torchvision"], strict=True)
    )
    print(f"torchvision / focaldet: CPU {cpu:.2f}, wall {wall:.2f}")


if __name__ == "__main__":
    main()
