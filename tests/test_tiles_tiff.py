"""TIFF files that are read by windows: the same pixels as those of the whole file."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from focaldet._tiles._grid import Window, make_grid
from focaldet._tiles._tiff import TiffWindows, open_tiff
from focaldet.errors import UnreadableImageError
from focaldet.images import load_image
from tests.helpers.bright_shapes import ShapeFinder, draw_shapes
from tests.helpers.tiff_files import write_tiff

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SIZE = (150, 210)


def make_pixels(*shape: int, dtype: str = "uint8") -> npt.NDArray[Any]:
    """Return smooth colours with noise, which JPEG changes."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[: shape[0], : shape[1]].reshape(2, *shape[:2], *[1] * (len(shape) - 2))
    top = np.iinfo(dtype).max
    waves = 0.5 + 0.3 * np.sin(y / 17) * np.cos(x / 23) + generator.uniform(-0.2, 0.2, shape)
    pixels: npt.NDArray[Any] = (waves * top).clip(0, top).astype(dtype)
    return pixels


def opened(path: Path, channels: int = 3) -> TiffWindows:
    windows = open_tiff(str(path), "image", channels)
    assert windows is not None
    return windows


def assert_same_pixels(
    path: Path, *, expected: torch.Tensor | None = None, channels: int = 3
) -> None:
    """Assert that every window has exactly the pixels of the whole file."""
    whole = load_image(path, channels=channels) if expected is None else expected
    with closing(opened(path, channels)) as windows:
        assert windows.size == tuple(whole.shape[1:])
        grid = make_grid(windows.size, (61, 70), 0.2)
        for window in itertools.chain.from_iterable(grid):
            part = windows.read(window)
            assert part.dtype == torch.uint8
            assert part.is_contiguous()
            y, x = window.slices
            assert torch.equal(part, whole[:, y, x]), window


LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (32, 48)},
    "tiles of planes": {"tile": (64, 64), "planar": True},
    "thin strips": {"rows_per_strip": 7},
    "tall strips": {"rows_per_strip": 100},
    "strips of planes": {"rows_per_strip": 40, "planar": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", ["none", "deflate", "lzw", "jpeg"])
def test_windows_have_the_pixels_of_the_whole_file(
    layout: str, compression: str, tmp_path: Path
) -> None:
    pixels = make_pixels(*SIZE, 3)
    path = write_tiff(tmp_path / "a.tif", pixels, compression=compression, **LAYOUTS[layout])
    whole = load_image(path)
    error = (whole.permute(1, 2, 0).int() - torch.from_numpy(pixels).int()).abs().float().mean()
    assert error < (25 if compression == "jpeg" else 1e-9)
    assert_same_pixels(path)


@pytest.mark.parametrize("layout", ["tiles", "tall strips", "strips of planes"])
@pytest.mark.parametrize(("big", "order"), [(False, ">"), (True, "<"), (True, ">")])
def test_files_of_either_byte_order_and_bigtiff_are_read(
    layout: str, big: bool, order: Any, tmp_path: Path
) -> None:
    # Pillow cannot read a whole BigTIFF file whose bytes are in this order, so it is not asked.
    pixels = make_pixels(*SIZE, 3)
    path = write_tiff(
        tmp_path / "a.tif", pixels, big=big, order=order, compression="deflate", **LAYOUTS[layout]
    )
    assert_same_pixels(path, expected=torch.from_numpy(pixels).permute(2, 0, 1))


def test_one_strip_without_compression_is_read_by_rows(tmp_path: Path) -> None:
    assert_same_pixels(write_tiff(tmp_path / "a.tif", make_pixels(*SIZE, 3)))
    assert_same_pixels(write_tiff(tmp_path / "a.tif", make_pixels(*SIZE, 3), planar=True))
    assert_same_pixels(
        write_tiff(tmp_path / "a.tif", make_pixels(*SIZE, dtype="uint16"), order=">")
    )


PALETTE = [int(value) for value in np.random.default_rng(1).integers(0, 65536, 3 * 256)]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((), {}),
        ((), {"photometric": 0}),
        ((), {"dtype": "uint16"}),
        ((), {"dtype": "uint16", "order": ">"}),
        ((), {"photometric": 3, "extra": {320: (3, PALETTE)}}),
        ((2,), {"extra": {338: (3, [2])}}),
        ((3,), {"predictor": True}),
        ((3,), {"dtype": "uint16"}),
        ((3,), {"compression": "jpeg", "subsampling": "4:4:4"}),
        ((4,), {"extra": {338: (3, [2])}}),
        ((4,), {"extra": {338: (3, [1])}}),
        ((4,), {"extra": {338: (3, [0])}, "planar": True}),
        ((4,), {"photometric": 5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixel_is_converted_as_in_the_whole_file(
    shape: tuple[int, ...], options: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    dtype = options.get("dtype", "uint8")
    pixels = make_pixels(90, 130, *shape, dtype=dtype)
    rest = {name: value for name, value in options.items() if name != "dtype"}
    path = write_tiff(
        tmp_path / "a.tif", pixels, tile=(48, 32), **{"compression": "deflate", **rest}
    )
    assert_same_pixels(path, channels=channels)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_an_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    pixels = make_pixels(*SIZE, 3)
    path = write_tiff(tmp_path / "a.tif", pixels, tile=(32, 48), extra={274: (3, [orientation])})
    assert_same_pixels(path)
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'.encode()
    path = write_tiff(tmp_path / "b.tif", pixels, rows_per_strip=30, extra={700: (1, list(xmp))})
    assert_same_pixels(path)


def test_only_the_first_level_of_a_pyramid_is_read(tmp_path: Path) -> None:
    pixels = make_pixels(*SIZE, 3)
    path = write_tiff(tmp_path / "a.tif", pixels, tile=(32, 48), next_image=pixels[::2, ::2])
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert_same_pixels(path, expected=torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (make_pixels(*SIZE, 3), {"compression": "deflate"}),  # one strip
        (make_pixels(*SIZE, 3), {"tile": (160, 224)}),  # one tile
        (
            make_pixels(*SIZE, dtype="uint16").astype("int32"),
            {"tile": (32, 32), "extra": {339: (3, [2])}},
        ),
    ],
    ids=["one strip", "one tile", "32 bits"],
)
def test_files_that_cannot_be_cut_are_read_whole(
    pixels: npt.NDArray[Any], options: dict[str, Any], tmp_path: Path
) -> None:
    path = write_tiff(tmp_path / "a.tif", pixels, **options)
    assert open_tiff(str(path), "image", 3) is None
    whole: Any = load_image(path)
    [found] = ShapeFinder(side=100).predict(path, tile=(100, 100))
    [expected] = ShapeFinder(side=100).predict(whole, tile=(100, 100))
    assert found.image_size == SIZE
    assert torch.equal(found.boxes, expected.boxes)


def test_other_files_are_left_to_the_reader_of_whole_files(tmp_path: Path) -> None:
    Image.fromarray(make_pixels(20, 30, 3)).save(tmp_path / "a.png")
    (tmp_path / "empty.tif").touch()
    for name in ("a.png", "empty.tif", "missing.tif", "", ".", "nul\0.tif", "https://a.b/c.tif"):
        assert open_tiff(str(tmp_path / name) if name else "", "image", 3) is None
    path = write_tiff(tmp_path / "a.tif", make_pixels(*SIZE, 3), tile=(32, 32))
    assert open_tiff(str(path), "image", 4) is None


BOXES = [(60, 20, 120, 50), (10, 100, 40, 240)]


def write_scan(path: Path, **options: Any) -> Path:
    options = {"tile": (48, 48), "compression": "deflate", **options}
    return write_tiff(path, draw_shapes((250, 250), BOXES), **options)


@pytest.mark.parametrize("augment", [False, True])
def test_a_file_gives_the_same_detections_as_its_pixels(augment: bool, tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.tif")
    options: dict[str, Any] = {"tile": (100, 100), "augment": augment, "batch_size": 2}
    found, again = ShapeFinder(side=100).predict([path, str(path)], **options)
    [expected] = ShapeFinder(side=100).predict(draw_shapes((250, 250), BOXES), **options)
    assert len(found) > 0
    assert found.source == again.source == str(path)
    for one in (found, again):
        assert torch.equal(one.boxes, expected.boxes)
        assert torch.equal(one.scores, expected.scores)


def test_a_file_beyond_the_limit_of_pillow_is_read_by_windows_and_refused_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_scan(tmp_path / "scan.tif")
    strip = write_scan(tmp_path / "strip.tif", tile=None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    [found] = ShapeFinder(side=100).predict(path, tile=(100, 100))
    assert len(found) == 2
    remedy = r"strip\.tif.*too large to be decoded whole.*62500.*tiled TIFF.*MAX_IMAGE_PIXELS"
    with pytest.raises(UnreadableImageError, match=remedy):
        ShapeFinder(side=100).predict(strip, tile=(100, 100))
    with pytest.raises(UnreadableImageError, match=r"scan\.tif.*tile="):
        ShapeFinder(side=100).predict(path)


def test_a_damaged_tile_is_named_or_gives_none(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.tif")
    whole = write_scan(tmp_path / "whole.tif")
    with Image.open(path) as image:
        place = dict(image.getexif())[324][21]  # in the fourth row and column of six
    content = bytearray(path.read_bytes())
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    message = r"rows 144 to 191 and columns 144 to 191 of '.*scan\.tif' \(sources\[1\]\)"
    detector = ShapeFinder(side=100)
    options: dict[str, Any] = {}
    for augment in (False, True):
        options = {"tile": (100, 100), "batch_size": 4, "augment": augment}
        with pytest.raises(UnreadableImageError, match=message):
            detector.predict([whole, path, whole], **options)
        with pytest.warns(UserWarning, match=message):
            found = detector.predict([whole, path, whole], on_error="skip", **options)
        assert [None if one is None else len(one) for one in found] == [2, None, 2]
    with pytest.warns(UserWarning, match=r"rows 144 to 191.*\(sources\)"):
        assert detector.predict(path, on_error="skip", **options) == [None]


def test_a_truncated_file_is_an_error_that_names_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    pixels = draw_shapes((250, 250), BOXES)
    # Pillow writes the directory first, so that a truncated file lacks pixels.
    Image.fromarray(pixels).save(path, compression=None)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableImageError, match=r"scan\.tif"):
        ShapeFinder(side=100).predict(path, tile=(100, 100))


@pytest.mark.filterwarnings("ignore:Metadata Warning", "ignore:.*EXIF data", "ignore:Truncated")
def test_damaged_headers_raise_nothing_but_the_error_of_unreadable_files(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", make_pixels(60, 70, 3), tile=(16, 16), compression="lzw")
    content = path.read_bytes()
    directory = int.from_bytes(content[4:8], "little")
    generator = np.random.default_rng(0)
    opened_files = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.integers(directory - 150, len(content))] = generator.integers(256)
        path.write_bytes(damaged)
        windows = open_tiff(str(path), "image", 3)
        if windows is None:
            continue
        opened_files += 1
        with closing(windows):
            height, width = (min(side, 60) for side in windows.size)
            try:
                part = windows.read(Window(0, 0, width, height, windows.size))
            except UnreadableImageError:
                continue
            assert part.shape == (3, height, width)
    assert opened_files > 10


def test_a_small_file_that_claims_a_huge_image_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", make_pixels(60, 70, 3), rows_per_strip=60)
    content = bytearray(path.read_bytes())
    huge = (2**31 - 1).to_bytes(4, "little")
    for tag, value in ((256, 70), (257, 60), (278, 60)):
        entry = tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0" + value.to_bytes(4, "little")
        place = content.index(entry)
        content[place + 8 : place + 12] = huge
    path.write_bytes(content)
    assert open_tiff(str(path), "image", 3) is None
    with pytest.raises(UnreadableImageError, match=r"a\.tif.*too large to be decoded whole"):
        ShapeFinder().predict(path, tile=(800, 800))


@pytest.mark.parametrize(
    "options", [{"tile": (48, 48)}, {"tile": None, "rows_per_strip": 5}], ids=["tiles", "strips"]
)
def test_no_more_blocks_are_kept_than_a_window_needs(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("focaldet._tiles._tiff._CACHE", 0)
    decoded: list[int] = []

    def count(*arguments: Any) -> torch.Tensor:
        image = load_image(arguments[2])
        decoded.append(image.numel())
        return image

    monkeypatch.setattr("focaldet._tiles._tiff.decode_image", count)
    path = write_scan(tmp_path / "scan.tif", **options)
    with closing(opened(path)) as windows:
        for window in itertools.chain.from_iterable(make_grid((250, 250), (100, 100), 0.2)):
            windows.read(window)
            held = sum(block.numel() for block in windows._blocks.values())
            assert held <= 3 * (150 * 250 if options["tile"] is None else (4 * 48) ** 2) * 1.3
    # A block is decoded once for all windows of a row that follow each other.
    assert sum(decoded) < 3 * 250 * 250 * 2.5
    assert max(decoded) <= 3 * 65 * 250
