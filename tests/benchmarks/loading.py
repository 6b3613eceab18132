"""Speed of training data: ``DetectionDataset`` and its loader compared with torchvision's v2 transforms.

Both sides read the same photos, flip half of them, resize the short side to 800 (or the long side to
1333), and clamp and filter the boxes; torchvision also converts the images to float32. The first row is an
item as training reads it, uint8, and the second is ``dataset[index]``, float32. There, torchvision starts
from boxes that are already tensors, and decodes with ``decode_image``. The other rows are whole loaders
that yield lists of images and targets, with the worker processes started and ended: focaldet's is that of
``DetectionDataModule``, which seeds and checks each item and leaves it to the model to convert the images;
torchvision's is a ``DataLoader`` over ``CocoDetection`` and ``wrap_dataset_for_transforms_v2``, with
``decode_image`` in place of Pillow.

torch has one thread in all processes, as in the workers of a ``DataLoader``. The sides take turns in one
process. Prints medians and, for items, checks that the images and boxes are equal.

    python -m tests.benchmarks.loading COCO [--rounds 5] [--workers 0 1 2]

COCO is a folder with ``annotations/instances_train2017.json`` and ``train2017/``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.io import decode_image
from torchvision.transforms import v2

from focaldet.datasets import DetectionDataset, collate, read_coco, train_transform
from focaldet.training import DetectionDataModule

if TYPE_CHECKING:
    from collections.abc import Callable

SIDES = ("focaldet", "torchvision")


def decoded(path: str | Path) -> Any:
    pixels = decode_image(str(path), mode="RGB", apply_exif_orientation=True)
    return tv_tensors.Image(pixels)


class DecodedCoco(CocoDetection):  # type: ignore[misc]  # untyped
    def _load_image(self, id: int) -> Any:  # noqa: A002  # the name in CocoDetection
        return decoded(Path(self.root) / self.coco.loadImgs(id)[0]["file_name"])


def steps_of_torchvision() -> Any:
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomShortestSize([800], 1333, antialias=False),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = function()
    return result, cpu_seconds() - cpu, time.perf_counter() - wall


def items(
    data: DetectionDataset, read_item: Callable[[int], Any], rounds: int
) -> dict[str, tuple[float, float]]:
    """Return the median CPU and wall time of an item, in milliseconds."""
    transform = steps_of_torchvision()
    plain = DetectionDataset(data.table)
    targets = [plain[index][1] for index in range(len(plain))]
    paths = [data.table.image_path(index) for index in range(len(data))]

    def by_torchvision(index: int) -> Any:
        image = decoded(paths[index])
        boxes = tv_tensors.BoundingBoxes(
            targets[index]["boxes"], format="XYXY", canvas_size=image.shape[-2:]
        )
        return transform(image, {**targets[index], "boxes": boxes})

    readers: dict[str, Callable[[int], Any]] = {
        "focaldet": read_item,
        "torchvision": by_torchvision,
    }
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    largest = 0.0
    for turn in range(rounds + 1):
        for index in range(len(data)):
            read = {}
            for side in SIDES if (turn + index) % 2 else SIDES[::-1]:
                torch.manual_seed(index)
                cpu, wall = time.thread_time(), time.perf_counter()
                read[side] = readers[side](index)
                cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
                if turn:  # the first round brings the files into the system's cache
                    times[side].append((1e3 * cpu, 1e3 * wall))
            (image, target), (expected, expected_target) = read["focaldet"], read["torchvision"]
            if image.dtype == torch.uint8:
                image = image / 255
            largest = max(largest, float((image - expected).abs().max()))
            assert torch.equal(target["boxes"], expected_target["boxes"])
    print(
        f"{len(data)} photos; equal boxes; largest difference of a pixel {255 * largest:.1g} of 255"
    )
    return {side: medians(rows) for side, rows in times.items()}


def medians(rows: list[tuple[float, float]]) -> tuple[float, float]:
    cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
    return cpu, wall


def loaders(
    data: DetectionDataset, file: Path, photos: Path, *, workers: int, batch_size: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Return the median CPU and wall time per image of a pass over the data, in milliseconds."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        peer = wrap_dataset_for_transforms_v2(
            DecodedCoco(photos, file, transforms=steps_of_torchvision()),
            target_keys=("boxes", "labels", "image_id"),
        )
    with_objects = [
        index for index, image_id in enumerate(peer.ids) if peer.coco.getAnnIds(image_id)
    ]
    makers: dict[str, Callable[[], Any]] = {
        "focaldet": DetectionDataModule(
            data, batch_size=batch_size, workers=workers
        ).train_dataloader,
        "torchvision": lambda: DataLoader(
            Subset(peer, with_objects),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            collate_fn=collate,
        ),
    }

    def whole_pass(side: str) -> int:
        return sum(len(images) for images, _ in makers[side]())

    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            count, cpu, wall = timed(lambda s=side: whole_pass(s))  # type: ignore[misc]
            if turn:
                times[side].append((1e3 * cpu / count, 1e3 * wall / count))
    return {side: medians(rows) for side, rows in times.items()}


def report(name: str, row: dict[str, tuple[float, float]]) -> None:
    (cpu, wall), (peer_cpu, peer_wall) = row["focaldet"], row["torchvision"]
    print(
        f"{name:20s} CPU {cpu:6.2f} / {peer_cpu:6.2f} ms {peer_cpu / cpu:5.2f}x   "
        f"wall {wall:6.2f} / {peer_wall:6.2f} ms {peer_wall / wall:5.2f}x   "
        f"images/s {1e3 / wall:6.1f} / {1e3 / peer_wall:6.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("coco", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.coco / "annotations" / "instances_train2017.json"
    photos = options.coco / "train2017"
    transform = train_transform(min_sizes=[800], max_size=1333)
    data = DetectionDataset(read_coco(file, photos, cache=False), transform)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
        f"1 thread per process, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print("focaldet / torchvision, per image, medians")
    report("item, uint8", items(data, data.read, options.rounds))
    report("item, float32", items(data, data.__getitem__, options.rounds))
    for workers in options.workers:
        row = loaders(
            data,
            file,
            photos,
            workers=workers,
            batch_size=options.batch_size,
            rounds=options.rounds,
        )
        report(f"loader, {workers} workers", row)


if __name__ == "__main__":
    main()
