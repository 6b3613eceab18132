"""Prediction in tiles of mosaics of photos: memory, time, and what is found.

    python -m tests.benchmarks.tiles [--sides 5000 10000 30000]   # photos of COCO
    python -m tests.benchmarks.tiles --picture mosaic.jpg         # photos of BCCD, with their boxes

Most runs use a detector without a network, which knows the annotations and returns, for each window,
the visible parts of the objects in it, so that errors come from merging alone. One compares a RetinaNet
with random weights in the windows of a mosaic with the same network on each photo.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw

import focaldet._tiles._sources
from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet._prediction import Predictor
from focaldet._tiles._grid import make_grid
from focaldet._tiles._merging import merge_windows
from focaldet.box_coder import BoxCoder
from focaldet.boxes import box_iou
from focaldet.postprocess import PostProcess
from focaldet.transforms import Preprocess
from tests.helpers.shared import SHARED
from tests.helpers.tiff_files import write_tiff

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from focaldet._tiles._grid import Window
    from focaldet.structures import ImageBatch

_SMALLEST = 8  # pixels of the visible part of an object that is found


class Photo(NamedTuple):
    """A photo, with boxes in its pixels."""

    path: Path
    boxes: torch.Tensor
    labels: torch.Tensor


def read_photos(annotations: Path, folder: Path) -> tuple[list[Photo], tuple[str, ...]]:
    """Read the photos that COCO JSON lists, and the names of its classes."""
    content = json.loads(annotations.read_text(encoding="utf-8"))
    ids = [category["id"] for category in content["categories"]]
    found: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        if not one.get("iscrowd") and min(one["bbox"][2:]) >= _SMALLEST:
            x, y, width, height = one["bbox"]
            found[one["image_id"]].append(
                ([x, y, x + width, y + height], ids.index(one["category_id"]))
            )
    photos = [
        Photo(
            folder / image["file_name"],
            torch.tensor([box for box, _ in found[image["id"]]]).float().view(-1, 4),
            torch.tensor([label for _, label in found[image["id"]]], dtype=torch.int64),
        )
        for image in content["images"]
        if (folder / image["file_name"]).exists()
    ]
    return photos, tuple(category["name"] for category in content["categories"])


def draw_mosaic(
    pixels: npt.NDArray[np.uint8], photos: Sequence[Photo], cell: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill an array with photos in cells, and return the boxes and labels of all."""
    boxes, labels = [], []
    columns = pixels.shape[1] // cell[1]
    loaded = [np.asarray(Image.open(photo.path).convert("RGB")) for photo in photos]
    for index in range(pixels.shape[0] // cell[0] * columns):
        y, x = index // columns * cell[0], index % columns * cell[1]
        picture = loaded[index % len(photos)][: cell[0], : cell[1]]
        pixels[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
        boxes.append(photos[index % len(photos)].boxes + torch.tensor([x, y, x, y]))
        labels.append(photos[index % len(photos)].labels)
    return torch.cat(boxes), torch.cat(labels)


class _Model:
    """Returns the annotated boxes of each window, in the order in which windows are predicted."""

    def __init__(
        self, side: int, names: tuple[str, ...], truth: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self.config = RetinaNetConfig(num_classes=len(names), class_names=names)
        self.preprocess = Preprocess(min_size=side, max_size=side)
        self.postprocess = PostProcess(BoxCoder(), max_detections=None)
        self.boxes, self.labels = truth
        self.windows: list[Window] = []  # those that are not predicted yet
        self.most_memory = 0

    def __call__(self, batch: ImageBatch, /) -> ImageBatch:
        self.most_memory = max(self.most_memory, anonymous_memory())
        return batch

    def detections(self, output: ImageBatch, **_: object) -> list[Detections]:
        return [self._visible(self.windows.pop(0)) for _ in output.sizes]

    def _visible(self, window: Window) -> Detections:
        edges = torch.tensor(window.edges)
        boxes = self.boxes.clamp(min=edges[:2].repeat(2), max=edges[2:].repeat(2))
        sides = boxes[:, 2:] - boxes[:, :2]
        whole = self.boxes[:, 2:] - self.boxes[:, :2]
        rows = (sides >= _SMALLEST).all(dim=1).nonzero()[:, 0]
        # The more of an object is visible, the higher its score.
        scores = 0.5 + 0.5 * (sides.prod(dim=1) / whole.prod(dim=1))[rows].clamp(max=1)
        order = scores.argsort(descending=True, stable=True)
        return Detections(
            boxes[rows][order] - edges[:2].repeat(2),
            scores[order],
            self.labels[rows][order],
            window.size,
            class_names=self.config.class_names,
        )


class AnnotationFinder(Predictor):
    """Finds the visible parts of annotated objects."""

    def __init__(self, *args: Any) -> None:
        self.model = _Model(*args)

    def _choose_model(self, batch_size: int | None, *_: object) -> tuple[Any, int]:
        return self.model, batch_size or 1

    def find(
        self, source: Any, size: tuple[int, int], tile: tuple[int, int], overlap: float
    ) -> Detections:
        self.model.windows = [window for row in make_grid(size, tile, overlap) for window in row]
        [found] = self.predict(source, tile=tile, overlap=overlap, batch_size=4)
        return found


def anonymous_memory() -> int:
    """Return the KiB that the process holds, without pages of files, which the system can drop."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+)", status)
    assert found is not None
    return int(found[1])


def count_found(found: Detections, boxes: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Return the number of objects with a box of IoU 0.9, and of boxes that are of no object."""
    hit, right = 0, 0
    for label in set(labels.tolist()):
        iou = box_iou(boxes[labels == label], found.boxes[found.labels == label])
        if iou.numel():
            hit += int((iou.amax(dim=1) >= 0.9).sum())
            right += int((iou.amax(dim=0) >= 0.9).sum())
    return hit, len(found) - right


def measure(side: int, folder: Path, photos: Sequence[Photo], names: tuple[str, ...]) -> None:
    """Predict a mosaic of a size and print time, memory and what was found."""
    pixels = np.lib.format.open_memmap(folder / "scan.npy", "w+", np.uint8, (side, side, 3))
    truth = draw_mosaic(pixels, photos, (640, 640))
    sources: dict[str, Any] = {"array": np.load(folder / "scan.npy", mmap_mode="r")}
    if side <= 10_000:
        sources["TIFF"] = write_tiff(
            folder / "scan.tif", pixels, tile=(256, 256), compression="jpeg"
        )
    del pixels
    for kind, source in sources.items():
        merging: list[float] = []

        def merge(*args: Any, times: list[float] = merging, **options: Any) -> Detections:
            begin = time.process_time()
            merged = merge_windows(*args, **options)
            times.append(time.process_time() - begin)
            return merged

        detector = AnnotationFinder(800, names, truth)
        num_windows = sum(map(len, make_grid((side, side), (800, 800), 0.25)))
        before, begin = anonymous_memory(), time.process_time()
        with mock.patch.object(focaldet._tiles._sources, "merge_windows", merge):
            found = detector.find(source, (side, side), (800, 800), 0.25)
        seconds = time.process_time() - begin - sum(merging)
        hit, wrong = count_found(found, *truth)
        print(
            f"{side:6d} {kind:5s} {num_windows:5d} windows, {1000 * seconds / num_windows:4.0f} ms each, "
            f"merging {sum(merging):5.1f} s, peak {(detector.model.most_memory - before) / 1024:4.0f} MiB, "
            f"{hit} of {len(truth[0])} objects, {wrong} other boxes",
            flush=True,
        )


def compare_network(photos: Sequence[Photo]) -> None:
    """Compare a network in the cells of a mosaic with the same network on each cell."""
    torch.manual_seed(0)
    cell = 320
    model = RetinaNet.from_config(
        RetinaNetConfig(
            num_classes=3,
            backbone_norm="batch",
            min_size=cell,
            max_size=cell,
            score_threshold=0.005,
        )
    )
    pixels = np.zeros((4 * cell, 4 * cell, 3), np.uint8)
    draw_mosaic(pixels, photos, (cell, cell))
    [found] = model.predict(pixels, tile=(cell, cell), overlap=0.0)
    expected = []
    for y in range(0, 4 * cell, cell):
        for x in range(0, 4 * cell, cell):
            [one] = model.predict(pixels[y : y + cell, x : x + cell])
            shifted = one.boxes + torch.tensor([x, y, x, y])
            expected.append(torch.cat((shifted, one.scores[:, None], one.labels[:, None]), dim=1))
    alone = torch.cat(expected)
    merged = torch.cat((found.boxes, found.scores[:, None], found.labels[:, None]), dim=1)
    same = Counter(map(tuple, alone.tolist())) == Counter(map(tuple, merged.tolist()))
    print(f"RetinaNet, 16 cells: {len(alone)} boxes alone, {len(merged)} in tiles, equal: {same}")


def time_network() -> None:
    """Print the CPU time per window of 800x800 of a ResNet-50 on all threads."""
    model = RetinaNet.from_config(
        RetinaNetConfig(num_classes=80, backbone_norm="batch")
    ).optimize_for_inference()
    pixels = np.zeros((1600, 1600, 3), np.uint8)
    model.predict(pixels[:800, :800])
    begin, cpu = time.perf_counter(), time.process_time()
    model.predict(pixels, tile=(800, 800))
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(
        f"RetinaNet (ResNet-50), 9 windows of 800x800: {cpu / 9:.1f} s of CPU time each, {wall / 9:.1f} s of wall time"
    )


def draw_picture(path: Path) -> None:
    """Draw the windows of a mosaic of blood cells, and the merged boxes."""
    folder = SHARED / "data" / "bccd"
    photos, names = read_photos(folder / "coco" / "test.json", folder / "voc" / "JPEGImages")
    size, tile = (960, 1920), (500, 700)
    pixels = np.zeros((*size, 3), np.uint8)
    truth = draw_mosaic(pixels, photos[:6], (480, 640))
    found = AnnotationFinder(700, names, truth).find(pixels, size, tile, 0.25)
    hit, wrong = count_found(found, *truth)
    print(f"{hit} of {len(truth[0])} objects, {wrong} other boxes")
    picture = found.draw(pixels, line_width=2, font_size=13)
    draw = ImageDraw.Draw(picture)
    for index, window in enumerate(window for row in make_grid(size, tile, 0.25) for window in row):
        left, top, right, bottom = window.edges
        color = ("black", "white", "blue", "yellow")[index % 4]
        draw.rectangle((left + 2, top + 2, right - 3, bottom - 3), outline=color, width=4)
    picture.resize((1280, 640), Image.Resampling.LANCZOS).save(path, quality=70)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="*", default=[5000, 10_000, 30_000])
    parser.add_argument("--network", action="store_true", help="time a ResNet-50 as well")
    parser.add_argument("--picture", type=Path, help="only draw a mosaic of blood cells")
    options = parser.parse_args()
    if options.picture is not None:
        draw_picture(options.picture)
        return
    folder = SHARED / "data" / "coco_sample"
    photos, names = read_photos(
        folder / "annotations" / "instances_val2017.json", folder / "val2017"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(photos)} photos")
    compare_network(photos)
    if options.network:
        time_network()
    for side in options.sides:
        with TemporaryDirectory() as temporary:
            measure(side, Path(temporary), photos, names)


if __name__ == "__main__":
    main()
