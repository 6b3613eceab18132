"""Prediction in tiles holds a few windows at a time, however large the image is."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import focaldet.images
from tests.helpers.bright_shapes import ShapeFinder
from tests.helpers.tiff_files import write_tiff

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TILE, OVERLAP = (100, 100), 0.25
BATCH_SIZE, READ_AHEAD = 4, 3
SIDES = (250, 700)  # 9 and 81 windows
# Those that are read ahead, one that is handed over, and those that wait for the rest of their batch
# or are in the one that was predicted last.
MOST_WINDOWS = READ_AHEAD + 1 + 2 * BATCH_SIZE


class Counter:
    """Counts the objects that are alive, and the most that were at a time."""

    def __init__(self) -> None:
        self.alive = self.most = self.total = 0

    def add(self, item: Any) -> Any:
        self.alive += 1
        self.total += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(item, self._remove)
        return item

    def _remove(self) -> None:
        self.alive -= 1


class CountedWindows:
    """An array that is mapped into memory, whose windows are copied and counted."""

    dtype, ndim = np.dtype(np.uint8), 3

    def __init__(self, pixels: np.memmap[Any, Any]) -> None:
        self._pixels, self.shape = pixels, pixels.shape
        self.counter = Counter()

    def __getitem__(self, index: Any) -> Any:
        return self.counter.add(np.array(self._pixels[index]))


def map_file(path: Path, side: int) -> np.memmap[Any, Any]:
    """Return a black image with a red square, in a sparse file."""
    pixels = np.memmap(path, np.uint8, "w+", shape=(side, side, 3))
    pixels[side - 90 : side - 60, side - 90 : side - 60, 0] = 255
    return pixels


def predict(source: Any, detector: ShapeFinder | None = None) -> Any:
    detector = detector or ShapeFinder(side=100)
    results: Iterator[Any] = detector.predict_iter(
        source, tile=TILE, overlap=OVERLAP, batch_size=BATCH_SIZE, read_ahead=READ_AHEAD
    )
    [found] = results
    return found


@pytest.mark.parametrize("side", SIDES)
def test_few_windows_of_an_array_are_in_memory_at_a_time(side: int, tmp_path: Path) -> None:
    source = CountedWindows(map_file(tmp_path / "scan", side))
    found = predict(source)
    assert found.boxes.tolist() == [[side - 90, side - 90, side - 60, side - 60]]
    assert source.counter.total == {250: 9, 700: 81}[side]
    assert 0 < source.counter.most <= MOST_WINDOWS
    assert source.counter.alive == 0


@pytest.mark.parametrize("side", SIDES)
def test_few_tiles_of_a_file_are_in_memory_at_a_time(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter()
    decode = focaldet.images.decode_image
    monkeypatch.setattr("focaldet._tiles._tiff._CACHE", 12 * 48 * 48 * 3)
    monkeypatch.setattr(
        "focaldet._tiles._tiff.decode_image", lambda *args: counter.add(decode(*args))
    )
    pixels = map_file(tmp_path / "scan", side)
    path = write_tiff(tmp_path / "scan.tif", pixels, tile=(48, 48), compression="deflate")
    found = predict(path)
    assert found.boxes.tolist() == [[side - 90, side - 90, side - 60, side - 60]]
    # A window overlaps at most four tiles in each direction. As many as fit into the cache stay.
    assert counter.total >= {250: 36, 700: 225}[side]
    assert 0 < counter.most <= 4 * 4 + 12 + 1
    assert counter.alive == 0


@pytest.mark.parametrize("side", SIDES)
def test_few_detections_are_kept_as_tensors_of_their_own(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small blocks among the pixels of windows would keep their memory from being used again."""
    counter = Counter()
    detector = ShapeFinder(side=100)
    detect = detector.model.detections

    def counted(*args: Any, **options: Any) -> Any:
        found = detect(*args, **options)
        for one in found:
            counter.add(one.boxes.untyped_storage())
        return found

    monkeypatch.setattr(detector.model, "detections", counted)
    found = predict(map_file(tmp_path / "scan", side), detector)
    assert found.boxes.tolist() == [[side - 90, side - 90, side - 60, side - 60]]
    assert counter.total == {250: 9, 700: 81}[side]
    assert counter.most <= 2 * BATCH_SIZE + 1
