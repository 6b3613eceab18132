"""Only safe formats are opened, so no image runs another program, wherever it is passed in."""

from __future__ import annotations

import json
import os
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from PIL import Image, ImageFile

from focaldet import Detections, RetinaNet
from focaldet._image_formats import open_image
from focaldet.datasets import DetectionDataset, check_dataset, read_coco
from focaldet.errors import UnreadableImageError
from focaldet.images import iter_images, load_image, load_picture, read_image_size
from focaldet.visualization import draw_boxes
from tests.helpers.annotation_files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    b"newpath 0 0 moveto 8 8 lineto stroke\nshowpage\n%%EOF\n"
)


def iptc(payload: bytes, width: int = 8, height: int = 8) -> bytes:
    """Return an IPTC/NAA file that contains another image file."""

    def field(record: int, tag: int, value: bytes) -> bytes:
        return bytes((0x1C, record, tag)) + len(value).to_bytes(2, "big") + value

    return b"".join(
        (
            field(3, 60, b"\x01\x00"),
            field(3, 20, width.to_bytes(4, "big")),
            field(3, 30, height.to_bytes(4, "big")),
            field(3, 120, b"\x05"),  # "jpeg", which Pillow takes for any image file
            field(8, 10, payload),
        )
    )


Request: TypeAlias = pytest.FixtureRequest

PROGRAMS = {"eps": EPS, "iptc": iptc(EPS)}


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program ``gs`` on the path; it creates the returned file when it runs."""
    trace = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{trace}'\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow remembers what it found
    return trace


def pil_load(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def model_of(request: Request) -> RetinaNet:
    model: RetinaNet = request.getfixturevalue("tiny_model")
    return model


def skip(path: Path, _: Request) -> None:
    with pytest.warns(UserWarning, match="Skipped an image"):
        assert list(iter_images([path], on_error="skip")) == [None]
    raise UnreadableImageError("supported format")


def read_dataset(path: Path, size: int) -> DetectionDataset:
    annotations = {
        "images": [{"id": 1, "file_name": path.name, "width": size, "height": size}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    file = path.parent / "annotations.json"
    write_text(file, json.dumps(annotations))
    return DetectionDataset(read_coco(file, images=path.parent, cache=False))


def pil_image(path: Path, _: Request) -> None:
    with Image.open(path) as image:
        load_image(image)


def drawn_pil_image(path: Path, _: Request) -> None:
    with Image.open(path) as image:
        draw_boxes(image, torch.zeros(0, 4))


def picture_of_detections(path: Path, _: Request) -> None:
    found = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), (8, 8))
    found.with_source(str(path)).draw()


ENTRIES: dict[str, Callable[[Path, Request], Any]] = {
    "load_image": lambda path, _: load_image(path),
    "load_picture": lambda path, _: load_picture(path),
    "read_image_size": lambda path, _: read_image_size(path),
    "predict": lambda path, request: model_of(request).predict(path),
    "predict_folder": lambda path, request: model_of(request).predict(path.parent),
    "skip": skip,
    "dataset_item": lambda path, _: read_dataset(path, 8)[0],
    "dataset_of_unknown_size": lambda path, _: read_dataset(path, 0)[0],
    "pil_image": pil_image,
    "drawn_pil_image": drawn_pil_image,
    "picture_of_detections": picture_of_detections,
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
@pytest.mark.parametrize("kind", PROGRAMS)
def test_no_entry_runs_ghostscript(
    kind: str, entry: Any, tmp_path: Path, ghostscript: Path, request: Request
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    path = folder / "photo.png"
    path.write_bytes(PROGRAMS[kind])

    with pytest.raises(UnreadableImageError, match=r"supported format"):
        entry(path, request)

    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_fake_ghostscript_would_run(kind: str, tmp_path: Path, ghostscript: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(PROGRAMS[kind])

    with pytest.raises(Exception):  # noqa: B017, PT011  # the fake writes no image
        pil_load(path)

    assert ghostscript.exists()


@pytest.mark.parametrize("images", ["decode", "headers"])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_dataset_checker_reports_such_a_file(
    kind: str, images: Any, tmp_path: Path, ghostscript: Path
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(PROGRAMS[kind])

    report = check_dataset(read_dataset(path, 8).table, images=images)

    assert "image-unreadable" in {finding.kind for finding in report.findings}
    assert not ghostscript.exists()


def test_an_inner_image_cannot_evade_the_check_for_decompression_bombs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (300, 300)).save(tmp_path / "inner.png")
    path = tmp_path / "outer.png"
    path.write_bytes(iptc((tmp_path / "inner.png").read_bytes()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    with pytest.raises(UnreadableImageError, match=r"outer\.png'.*supported format"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["pcx", "ico", "sgi", "eps"])
def test_other_formats_are_not_read_but_their_pixels_are(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (16, 16), "red").save(path)

    with pytest.raises(UnreadableImageError, match=r"supported format \(AVIF, BMP, .*, WEBP\)"):
        load_image(path)
    if suffix != "eps":
        with Image.open(path) as image:
            with pytest.raises(UnreadableImageError, match=r"photo is a .*photo\.copy\(\)"):
                load_image(image, "photo")
            assert load_image(image.copy()).shape == (3, 16, 16)


@pytest.mark.parametrize(
    "suffix",
    ["avif", "bmp", "dib", "gif", "jp2", "jpg", "mpo", "pgm", "png", "ppm", "tga", "tif", "webp"],
)
def test_the_formats_of_the_docstring_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    image = Image.new("L" if suffix == "pgm" else "RGB", (16, 8), 77)
    if suffix == "mpo":
        image.save(path, save_all=True, append_images=[image])
    else:
        image.save(path)
    unnamed = path.rename(tmp_path / "picture")

    assert load_image(unnamed).shape == (3, 8, 16)
    assert read_image_size(unnamed) == (8, 16)
    with Image.open(unnamed) as opened:
        assert load_image(opened).shape == (3, 8, 16)
        assert draw_boxes(opened, torch.zeros(0, 4)).size == (16, 8)


def test_a_registered_plugin_for_heif_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (4, 2), "RGB"

        def load(self) -> None:
            self.im = Image.new("RGB", (4, 2)).im

    path = tmp_path / "phone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UnreadableImageError):
        load_image(path)
    monkeypatch.setitem(Image.OPEN, "HEIF", (Heif, lambda prefix: prefix[8:12] == b"heic"))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])

    assert load_image(path).shape == (3, 2, 4)


def test_a_common_format_is_opened_without_a_warning_and_without_other_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (4, 2)).save(path)
    monkeypatch.setattr(Image, "init", lambda: pytest.fail("all plugins were imported"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(path).close()
