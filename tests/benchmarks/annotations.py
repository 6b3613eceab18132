"""Opening a COCO-sized annotation file with focaldet and with ``torchvision.datasets.CocoDetection``.

Writes a file like instances_train2017.json (118,287 images, 860,001 boxes with outlines, about 450 MB)
to a temporary folder, or uses one of yours. Each reader in turn opens the file in a new process, up to
a dataset that can be indexed. Modules are imported before the clock starts, and the file is in the
system's cache. Prints medians of wall time, CPU time, the memory held afterwards (growth of the
resident set after a garbage collection) and the peak, and the ratio of torchvision to each.

    python -m tests.benchmarks.annotations [--file instances_train2017.json] [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIDES = ("torchvision", "standard library", "msgspec", "cache")
MEBI = 2**20


def write_like_coco(path: Path, *, images: int, boxes: int, outlines: int = 5000) -> None:
    """Write a file with COCO's fields and about as many bytes per image and box."""
    draw = random.Random(0)  # noqa: S311
    ids = [9 + 5 * index for index in range(images)]
    polygons = [
        json.dumps(
            [
                [
                    round(draw.uniform(0, 640), 2)
                    for _ in range(2 * int(draw.lognormvariate(2.85, 0.7)) + 6)
                ]
            ]
        )
        for _ in range(outlines)
    ]
    runs = json.dumps({"counts": [draw.randrange(400) for _ in range(200)], "size": [480, 640]})
    kinds = [
        {"supercategory": "thing", "id": 1 + index, "name": f"thing {index}"} for index in range(80)
    ]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "synthetic"}, "licenses": [], "images": [')
        for index, image_id in enumerate(ids):
            image = {
                "license": 3,
                "file_name": f"{image_id:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{image_id:012d}.jpg",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
                "id": image_id,
            }
            file.write((", " if index else "") + json.dumps(image))
        file.write('], "annotations": [')
        for index in range(boxes):
            crowd = index % 86 == 0
            width, height = round(draw.uniform(2, 130), 2), round(draw.uniform(2, 120), 2)
            file.write(
                f"{', ' if index else ''}"
                f'{{"segmentation": {runs if crowd else draw.choice(polygons)}, '
                f'"area": {0.6 * width * height:.4f}, "iscrowd": {int(crowd)}, '
                f'"image_id": {draw.choice(ids)}, "bbox": [{draw.uniform(0, 500):.2f}, '
                f"{draw.uniform(0, 350):.2f}, {width}, {height}], "
                f'"category_id": {draw.randint(1, 80)}, "id": {index + 1}}}'
            )
        file.write(f'], "categories": {json.dumps(kinds)}}}')


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def open_once(side: str, path: Path) -> None:
    """Open the file with one reader, in this process, and print time and memory."""
    if side == "torchvision":
        import pycocotools.coco  # noqa: F401
        from torchvision.datasets import CocoDetection

        def opened() -> Any:
            return CocoDetection(str(path.parent), str(path))

    else:
        from focaldet.datasets import DetectionDataset, read_coco

        if side == "standard library":
            sys.modules["msgspec"] = None  # type: ignore[assignment]  # importing it fails
        else:
            import msgspec  # noqa: F401

        def opened() -> Any:
            return DetectionDataset(read_coco(path, path.parent, cache=side == "cache"))

    gc.collect()
    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    dataset = opened()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gc.collect()
    held = resident() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    taken = {"wall": wall, "cpu": cpu, "held": held, "peak": peak, "images": len(dataset)}
    print(json.dumps(taken))


def in_fresh_process(side: str, path: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.annotations",
        "--file",
        str(path),
        "--side",
        side,
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    taken: dict[str, float] = json.loads(printed.splitlines()[-1])
    return taken


def compare(path: Path, rounds: int) -> None:
    with path.open("rb") as file:  # to put it into the system's cache
        while file.read(MEBI):
            pass
    in_fresh_process("cache", path)  # writes the cache
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for index in range(rounds):
        for side in SIDES[:: 1 if index % 2 else -1]:
            measured[side].append(in_fresh_process(side, path))
    medians = {
        side: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for side, rows in measured.items()
    }
    print(
        f"{path.stat().st_size / MEBI:.0f} MiB, {medians['cache']['images']:.0f} images, median of {rounds}"
    )
    print(
        f"{'':18}{'wall':>9}{'CPU':>9}{'held':>10}{'peak':>10}   torchvision / this: wall, CPU, held"
    )
    peer = medians["torchvision"]
    for side, row in medians.items():
        ratios = "  ".join(f"{peer[key] / row[key]:8.1f}" for key in ("wall", "cpu", "held"))
        print(
            f"{side:18}{row['wall']:7.3f} s{row['cpu']:7.3f} s{row['held'] / MEBI:6.0f} MiB"
            f"{row['peak'] / MEBI:6.0f} MiB   {ratios}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--file", type=Path, default=None, help="a COCO file (a cache is written next to it)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, default=None, help="open once with this reader")
    options = parser.parse_args()
    if options.side is not None:
        open_once(options.side, options.file)
        return
    packages = ("focaldet", "torchvision", "pycocotools", "msgspec", "numpy")
    print(
        f"Python {sys.version.split()[0]}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
    )
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if options.file is not None:
        compare(options.file, options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances_like_train2017.json"
        write_like_coco(path, images=118_287, boxes=860_001)
        compare(path, options.rounds)


if __name__ == "__main__":
    main()
