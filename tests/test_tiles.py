"""Prediction in tiles: each object gives one box, wherever the edges of the windows cut it."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from focaldet._tiles._grid import make_grid
from focaldet.boxes import box_iou
from tests.helpers.bright_shapes import Box, ShapeFinder, draw_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet import Detections, RetinaNet


def assert_found(
    found: Detections, boxes: Sequence[Box], labels: Sequence[int] | None = None, *, atol: float = 0
) -> None:
    """Assert that the detections are these boxes, in any order, each once."""
    expected = sorted(zip(labels or [0] * len(boxes), boxes, strict=True))
    rows = sorted(zip(found.labels.tolist(), found.boxes.round().int().tolist(), strict=True))
    assert [label for label, _ in rows] == [label for label, _ in expected], rows
    if not boxes:
        return
    assert_close(
        torch.tensor([box for _, box in rows]).float(),
        torch.tensor([box for _, box in expected]).float(),
        atol=atol,
        rtol=0,
    )


def many_small_objects() -> list[Box]:
    """Return 111 boxes of 9 to 15 pixels in 1024x1024, in random positions, at least 3 px apart."""
    generator = np.random.default_rng(0)
    cells = generator.permutation(36 * 36)[:111]
    boxes = []
    for cell in cells:
        y, x = divmod(int(cell), 36)
        width, height = (int(side) for side in generator.integers(9, 16, 2))
        left, top = (int(shift) for shift in generator.integers(0, 10, 2))
        x1, y1 = 28 * x + left, 28 * y + top
        boxes.append((x1, y1, x1 + width, y1 + height))
    return boxes


def test_111_small_objects_give_111_boxes_in_tiles_and_none_in_the_whole_image() -> None:
    boxes = many_small_objects()
    image = draw_shapes((1024, 1024), boxes)
    detector = ShapeFinder(side=256)
    [whole] = detector.predict(image)
    assert len(whole) == 0
    [found] = detector.predict(image, tile=(256, 256), overlap=0.25, batch_size=4)
    assert_found(found, boxes)
    assert detector.model.batches == [1, *[4] * 6, 1]  # 5 x 5 windows


def test_windows_that_are_resized_give_the_same_objects() -> None:
    boxes = many_small_objects()
    [found] = ShapeFinder(side=300).predict(
        draw_shapes((1024, 1024), boxes), tile=(200, 200), overlap=0.3
    )
    assert len(found) == 111
    best = box_iou(found.boxes, torch.tensor(boxes).float()).max(dim=0).values
    assert float((best > 0.75).float().mean()) >= 0.97


# Three windows of 100 pixels that overlap by 25: their edges are at 75, 100, 150 and 175.
TILE, SIZE = (100, 100), (250, 250)


@pytest.mark.parametrize(("side", "overlap"), [(8, 0.25), (20, 0.27), (20, 0.5)])
def test_a_small_object_at_any_place_gives_one_box(side: int, overlap: float) -> None:
    places = range(60, 190, 17)
    detector = ShapeFinder(side=100)
    for x, y in itertools.product(places, (2, 76, 99)):
        boxes = [(x, y, x + side, y + side)]
        [found] = detector.predict(draw_shapes(SIZE, boxes), tile=TILE, overlap=overlap)
        assert_found(found, boxes)


@pytest.mark.parametrize(
    "box",
    [
        (60, 20, 120, 50),  # over one edge in x
        (20, 60, 50, 120),  # in y
        (60, 60, 130, 140),  # over a corner
        (10, 20, 240, 60),  # over all windows of a row
        (20, 10, 60, 240),  # of a column
        (10, 10, 240, 240),  # of the image
        (0, 0, 250, 250),
        (74, 74, 176, 176),  # just over all edges of the window in the middle
        (76, 76, 174, 174),  # just inside
        (75, 75, 175, 175),
    ],
)
@pytest.mark.parametrize("overlap", [0.1, 0.4])
def test_an_object_larger_than_the_overlap_gives_one_box(box: Box, overlap: float) -> None:
    [found] = ShapeFinder(side=100).predict(draw_shapes(SIZE, [box]), tile=TILE, overlap=overlap)
    assert_found(found, [box])


@pytest.mark.parametrize("gap", [1, 5])
@pytest.mark.parametrize(("side", "overlap"), [(24, 0.1), (40, 0.25), (60, 0.25)])
def test_equal_objects_next_to_each_other_are_not_joined(
    side: int, gap: int, overlap: float
) -> None:
    detector = ShapeFinder(side=100)
    for start in (5, 37, 51):
        ends = range(start, 250 - side, side + gap)
        boxes = [(x, y, x + side, y + side) for x, y in itertools.product(ends, ends)]
        [found] = detector.predict(draw_shapes(SIZE, boxes), tile=TILE, overlap=overlap)
        assert_found(found, boxes)


def test_parts_of_different_classes_are_not_joined() -> None:
    boxes, labels = [(60, 20, 120, 50), (60, 51, 120, 80)], [0, 1]
    [found] = ShapeFinder(side=100).predict(draw_shapes(SIZE, boxes, labels), tile=TILE)
    assert_found(found, boxes, labels)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    tile=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    overlap=st.floats(0, 0.9),
)
def test_windows_cover_the_image_and_overlap_enough(
    size: tuple[int, int], tile: tuple[int, int], overlap: float
) -> None:
    grid = make_grid(size, tile, overlap)
    column, row = [line[0] for line in grid], grid[0]
    for first, last, length, side, pairs in (
        (row[0].left, row[-1].right, tile[1], size[1], [(w.left, w.right) for w in row]),
        (column[0].top, column[-1].bottom, tile[0], size[0], [(w.top, w.bottom) for w in column]),
    ):
        assert (first, last) == (0, side)
        assert all(end - start == min(length, side) for start, end in pairs)
        for (_, end), (start, _) in itertools.pairwise(pairs):
            assert end - start >= min(overlap * length, length - 1) - 1e-6


def test_an_image_that_is_not_larger_than_the_tile_is_predicted_whole(
    tiny_model: RetinaNet,
) -> None:
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    [expected] = tiny_model.predict(image)
    [found] = tiny_model.predict(image, tile=(60, 100))
    assert len(found) > 0
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_windows_without_overlap_give_what_each_gives_alone(tiny_model: RetinaNet) -> None:
    """Also small boxes at the edge of a window inside larger and surer ones of the same window."""
    tiny_model.postprocess.max_detections = None
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    expected = []
    for y, x in itertools.product((0, 60), (0, 80)):
        [one] = tiny_model.predict(image[y : y + 60, x : x + 80])
        boxes = one.boxes + torch.tensor([x, y, x, y])
        expected.append(torch.cat((boxes, one.scores[:, None], one.labels[:, None]), dim=1))
    [found] = tiny_model.predict(image, tile=(60, 80), overlap=0)
    rows = torch.cat((found.boxes, found.scores[:, None], found.labels[:, None]), dim=1)
    assert len(rows) > 300
    assert sorted(rows.tolist()) == sorted(torch.cat(expected).tolist())


def test_every_kind_of_source_gives_the_same_in_tiles(tmp_path: Path) -> None:
    boxes = [(60, 20, 120, 50), (10, 100, 40, 240)]
    image = draw_shapes(SIZE, boxes)
    Image.fromarray(image).save(tmp_path / "image.png")
    np.save(tmp_path / "image.npy", image)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    sources: list[Any] = [
        tmp_path / "image.png",
        Image.fromarray(image),
        np.load(tmp_path / "image.npy", mmap_mode="r"),
        pixels,
        pixels / 255,
        iter([image]),
    ]
    for source in sources:
        [found] = ShapeFinder(side=100).predict(source, tile=TILE, batch_size=3)
        assert_found(found, boxes)
        assert found.image_size == SIZE
    results = ShapeFinder(side=100).predict(
        [tmp_path / "image.png", image, Image.fromarray(image[:90])], tile=TILE, batch_size=4
    )
    assert [one.source for one in results] == [str(tmp_path / "image.png"), None, None]
    assert [len(one) for one in results] == [2, 2, 1]


class ReadByWindows:
    """An array-like object that notes how much of it is read."""

    dtype, ndim = np.dtype(np.uint8), 3

    def __init__(self, pixels: Any) -> None:
        self._pixels, self.shape = pixels, pixels.shape
        self.read: list[tuple[int, ...]] = []

    def __getitem__(self, index: Any) -> Any:
        part = self._pixels[index]
        self.read.append(part.shape)
        return part

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("The whole array is read.")


@pytest.mark.parametrize("in_a_list", [False, True])
def test_an_array_is_read_by_windows_and_never_whole(in_a_list: bool) -> None:
    boxes = [(60, 20, 120, 50), (10, 100, 40, 240)]
    source: Any = ReadByWindows(draw_shapes(SIZE, boxes))
    [found] = ShapeFinder(side=100).predict([source] if in_a_list else source, tile=TILE)
    assert_found(found, boxes)
    assert source.read == [(100, 100, 3)] * 9


def test_files_of_hdf5_are_read_by_windows(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    boxes = [(60, 20, 120, 50)]
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        scan = file.create_dataset("scan", data=draw_shapes(SIZE, boxes), chunks=(50, 50, 3))
        [found] = ShapeFinder(side=100).predict(scan, tile=TILE)
    assert_found(found, boxes)


def test_an_unreadable_file_is_named_or_gives_none(tmp_path: Path) -> None:
    image = draw_shapes(SIZE, [(60, 20, 120, 50)])
    sources: list[Any] = [tmp_path / "none.png", image, tmp_path / "none.png"]
    with pytest.raises(FileNotFoundError, match=r"none\.png.*sources\[0\]"):
        ShapeFinder(side=100).predict(sources, tile=TILE)
    with pytest.warns(UserWarning, match=r"none\.png"):
        found = ShapeFinder(side=100).predict(sources, tile=TILE, on_error="skip")
    assert [one is None for one in found] == [True, False, True]
    with pytest.warns(UserWarning, match=r"none\.png"):
        assert ShapeFinder().predict(sources[:1], tile=TILE, on_error="skip") == [None]


def test_a_wrong_array_is_named_by_its_place_among_the_sources() -> None:
    wrong: list[Any] = [np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 4), np.uint8)]
    with pytest.raises(ValueError, match=r"sources\[1\].*\[9, 9, 4\]"):
        ShapeFinder().predict(wrong, tile=(4, 4))
    floats: Any = np.zeros((9, 9, 3))
    with pytest.raises(TypeError, match=r"sources must be a uint8 array"):
        ShapeFinder().predict(floats, tile=(4, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tile": 512}, TypeError, r"tile must be two integers \(height, width\), got 512"),
        ({"tile": (512.0, 512)}, TypeError, "tile must be two integers"),
        ({"tile": (1, 2, 3)}, TypeError, "tile must be two integers"),
        ({"tile": (0, 512)}, ValueError, r"tile\[0\] must be at least 1, got 0"),
        ({"tile": (512, -1)}, ValueError, r"tile\[1\] must be at least 1, got -1"),
        ({"tile": (9, 9), "overlap": 0.95}, ValueError, "overlap must be .*0.9.*, got 0.95"),
        ({"overlap": -0.1}, ValueError, "overlap must be .*, got -0.1"),
        ({"max_detections": 0}, ValueError, "max_detections must be at least 1, got 0"),
        ({"max_detections": 1.5}, TypeError, "max_detections must be an integer"),
        ({"classes": "red"}, TypeError, r"classes must be a sequence.*\['red'\]"),
        ({"classes": ["blue"]}, ValueError, "classes contains 'blue'.*red"),
        ({"classes": [2]}, ValueError, "classes contains 2, but the model has labels 0 to 1"),
        ({"classes": [0.5]}, TypeError, "classes.* must be an integer"),
        ({"classes": []}, ValueError, "classes is empty"),
    ],
)
def test_invalid_options_raise(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ShapeFinder().predict(np.zeros((9, 9, 3), np.uint8), **options)


def test_windows_that_reach_their_limit_are_counted_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    boxes = many_small_objects()
    image = draw_shapes((1024, 1024), boxes)
    detector = ShapeFinder(side=256, max_detections=6)
    with caplog.at_level(logging.WARNING, logger="focaldet"):
        [found] = detector.predict(image, tile=(256, 256))
    assert len(found) < 111
    [record] = caplog.records
    assert "of 25 windows hold as many detections as are kept per window (6)" in record.message
    caplog.clear()
    [found] = detector.predict(image, tile=(256, 256), max_detections=200)
    assert len(found) == 111
    assert caplog.records == []
    [best] = detector.predict(image, tile=(256, 256), max_detections=20)
    assert len(best) == 20
    assert_close(best.scores, found.scores[:20])
