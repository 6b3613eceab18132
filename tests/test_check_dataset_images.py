"""Checks of image files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from focaldet.datasets.checks import check_dataset
from tests.helpers.annotation_tables import GOOD_ROWS, findings_of, table_of_rows

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photos of noise, 100x80."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def test_a_good_dataset_has_no_findings(folder: Path) -> None:
    report = check_dataset(table_of_rows(*GOOD_ROWS, folder=folder))
    assert report.ok
    assert report.findings == ()
    assert str(report).startswith("cells.json: 2 images, 2 boxes, 2 classes\nNo problems found.\n")


def test_missing_and_damaged_images_are_found(folder: Path) -> None:
    Image.open(folder / "b.png").save(folder / "b.jpg")
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c.png").write_bytes(b"no image")
    files = ("a.png", "b.jpg", "c.png", "d.png")
    report = check_dataset(table_of_rows(*GOOD_ROWS, folder=folder, files=files))
    missing, cut, text = report.findings[:3]
    assert (missing.kind, missing.file) == ("image-missing", "d.png")
    assert (cut.kind, cut.file, cut.image_id) == ("image-unreadable", "b.jpg", 12)
    assert "truncated" in cut.message
    assert (text.kind, text.file) == ("image-unreadable", "c.png")
    headers = check_dataset(table_of_rows(*GOOD_ROWS, folder=folder, files=files), images="headers")
    assert [one.file for one in headers.findings[:2]] == ["d.png", "c.png"]
    assert check_dataset(table_of_rows(*GOOD_ROWS, folder=folder, files=files), images="none").ok


@pytest.mark.parametrize("images", ["decode", "headers"])
def test_a_wrong_size_says_if_the_exif_orientation_explains_it(folder: Path, images: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (80, 100)).save(folder / "swapped.jpg")
    Image.new("RGB", (50, 40)).save(folder / "small.jpg")
    table = table_of_rows(
        (0, 0, [0, 0, 9, 9]),
        folder=folder,
        files=("a.png", "turned.jpg", "swapped.jpg", "small.jpg"),
    )
    turned, swapped, small = findings_of(table, "image-size", images=images)
    assert turned.message == (
        "annotated as 100x80 (width x height), but the image is 80x100: it is stored on its "
        "side and turned upright by its EXIF orientation; the annotated size and boxes must fit the "
        "upright image, or be read with exif='stored'"
    )
    assert swapped.message.endswith("the image is 80x100: width and height are swapped")
    assert small.message == "annotated as 100x80 (width x height), but the image is 50x40"


@pytest.mark.parametrize("size", [[-1, -1], [0, 0], [-1, 100]])
def test_an_unknown_size_or_area_is_taken_from_the_image_and_the_box(
    folder: Path, size: list[int]
) -> None:
    unknown: dict[str, Any] = {
        "image_sizes": np.array([size] * 2, np.int32),
        "areas": np.full(2, -1.0),
    }
    annotated = check_dataset(table_of_rows(*GOOD_ROWS, folder=folder))
    report = check_dataset(table_of_rows(*GOOD_ROWS, folder=folder, **unknown))
    assert report.findings == annotated.findings
    assert report.box_sizes == annotated.box_sizes


def test_equal_files_with_different_names_are_found(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    (folder / "copy.png").write_bytes(content)
    (folder / "other.png").write_bytes(content[:-1] + b"?")  # same length and beginning
    table = table_of_rows(
        *GOOD_ROWS, folder=folder, files=("a.png", "b.png", "copy.png", "other.png", "copy.png")
    )
    (finding,) = findings_of(table, "image-content-duplicate", images="headers")
    assert str(finding) == "copy.png, image 13: same content as a.png"


def test_a_size_that_is_not_annotated_is_read_or_reported(folder: Path) -> None:
    nowhere = np.zeros((2, 2), np.int32)
    table = table_of_rows((0, 0, [10, 10, 40, 240]), folder=folder, image_sizes=nowhere)
    assert [one.message for one in findings_of(table, "box-overhang", images="headers")] == [
        "x1 y1 x2 y2 = 10 10 40 240, image 100x80"
    ]
    assert not findings_of(table, "box-overhang")
    assert [one.file for one in findings_of(table, "image-size-unknown")] == ["a.png", "b.png"]
    assert not findings_of(table, "image-size-unknown", images="headers")


def test_threads_do_not_change_findings_and_progress_is_reported(folder: Path) -> None:
    files = tuple(f"{i}.png" for i in range(150))
    for name in files[::3]:
        (folder / name).write_bytes(b"no image")
    table = table_of_rows(*GOOD_ROWS, folder=folder, files=files)
    seen: list[tuple[int, int]] = []
    one = check_dataset(table, workers=1)
    four = check_dataset(table, workers=4, progress=lambda *done: seen.append(done))
    assert four.findings == one.findings
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_an_empty_dataset_is_reported(folder: Path) -> None:
    report = check_dataset(table_of_rows(files=(), folder=folder))
    assert report.counts == {"nothing-to-learn": 1, "category-unused": 2}
    assert "0 images, 0 boxes" in str(report)
