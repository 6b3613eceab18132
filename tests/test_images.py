from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from focaldet.images import (
    IMAGE_EXTENSIONS,
    UnreadableImageError,
    count_images,
    iter_images,
    list_images,
    load_channels_last,
    load_image,
    load_picture,
    read_image_size,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from focaldet.images import ImageSource

# 3 pixels wide, 2 high, all different, so that a wrong turn or channel order is visible.
COLORS = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[255, 255, 0], [10, 20, 30], [255, 255, 255]],
    ],
    dtype=np.uint8,
)
PIXELS = torch.from_numpy(COLORS).permute(2, 0, 1)


def picture() -> Image.Image:
    return Image.fromarray(COLORS)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def jpeg_bytes(size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def broken_file(folder: Path, name: str = "broken.jpg") -> Path:
    path = folder / name
    path.write_text("no image")
    return path


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_gives_the_pixels_of_the_file(tmp_path: Path, kind: type[str | Path]) -> None:
    path = save(picture(), tmp_path / "a.png")

    assert_close(load_image(kind(path)), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_path_can_be_read_with_adjacent_channels(tmp_path: Path, mode: str) -> None:
    image = picture().convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(image, tmp_path / "a.png", exif=exif)

    read = load_channels_last(path)

    assert torch.equal(read, load_image(path))
    assert read.shape == (3, 3, 2)
    assert read.permute(1, 2, 0).is_contiguous()
    with pytest.raises(FileNotFoundError, match="some photo"):
        load_channels_last(tmp_path / "b.png", "some photo")


def test_a_pil_image_gives_its_pixels_and_is_not_modified() -> None:
    image = picture()

    assert_close(load_image(image), PIXELS)
    assert image.tobytes() == COLORS.tobytes()


def test_an_array_gives_its_pixels() -> None:
    assert_close(load_image(COLORS), PIXELS)


def test_a_reversed_view_such_as_bgr_to_rgb_is_read() -> None:
    bgr = np.ascontiguousarray(COLORS[..., ::-1])

    assert_close(load_image(bgr[..., ::-1]), PIXELS)


def test_a_tensor_is_returned_itself() -> None:
    floats = PIXELS / 255

    assert load_image(PIXELS) is PIXELS
    assert load_image(floats) is floats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_tensors_of_any_precision_are_accepted(dtype: torch.dtype) -> None:
    image = torch.rand(3, 4, 5).to(dtype).requires_grad_()

    assert load_image(image) is image


@pytest.mark.parametrize("kind", ["file", "pil", "array"])
def test_the_tensor_owns_its_memory(tmp_path: Path, kind: str) -> None:
    array = COLORS.copy()
    array.flags.writeable = False
    image = Image.fromarray(array)
    path = save(image, tmp_path / "a.png")

    sources: dict[str, ImageSource] = {"file": path, "pil": image, "array": array}
    loaded = load_image(sources[kind])
    loaded.zero_()

    assert loaded.is_contiguous()
    assert (array == COLORS).all()
    assert image.tobytes() == COLORS.tobytes()


# ------------------------------------------------------------------ bytes and open files


def png_bytes() -> bytes:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    return stream.getvalue()


class Pipe(io.RawIOBase):
    """A binary file that cannot be rewound, such as the body of a response."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.content.readinto(buffer)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO, Pipe])
def test_encoded_bytes_and_binary_files_give_the_pixels(kind: Any) -> None:
    assert_close(load_image(kind(png_bytes())), PIXELS)
    assert count_images(kind(png_bytes())) == 1
    [alone] = iter_images(kind(png_bytes()))
    [listed] = iter_images([kind(png_bytes())])
    for loaded in (alone, listed):
        assert loaded is not None
        assert_close(loaded.image, PIXELS)
        assert loaded.name is None


def test_an_open_file_is_read_from_its_beginning_and_stays_open(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture().save(stream, "PNG")  # its position is now at the end
    assert_close(load_image(stream), PIXELS)
    with save(picture(), tmp_path / "a.png").open("rb") as file:
        for _ in range(2):
            assert_close(load_image(file), PIXELS)
        assert not file.closed


@pytest.mark.parametrize("content", [b"", b"no image", jpeg_bytes()[:900]])
def test_bytes_that_cannot_be_decoded_are_counted_in_the_message(content: bytes) -> None:
    message = rf"Cannot read an encoded image of {len(content)} bytes \(sources\[0\]\)"
    with pytest.raises(UnreadableImageError, match=message):
        next(iter_images([content]))


def test_a_closed_file_and_a_file_in_text_mode_are_named(tmp_path: Path) -> None:
    closed = io.BytesIO(png_bytes())
    closed.close()
    with pytest.raises(UnreadableImageError, match=r"open file passed as image \(.*closed"):
        load_image(closed)
    (tmp_path / "a.txt").write_text("text")
    with (
        (tmp_path / "a.txt").open() as file,
        pytest.raises(TypeError, match=r"image is a .*\"rb\""),
    ):
        load_image(file)  # type: ignore[arg-type]


def test_bytes_give_three_channels_or_one() -> None:
    assert load_image(png_bytes(), channels=1).shape == (1, 2, 3)
    with pytest.raises(ValueError, match=r"image is an encoded image, .*4 channels"):
        load_image(png_bytes(), channels=4)


# ------------------------------------------------------------------ modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK"])
def test_every_mode_of_eight_bits_becomes_rgb(mode: str) -> None:
    bright, dark = [(255, 255, 255), (0, 0, 0)]
    rgb = Image.new("RGB", (2, 1), dark)
    rgb.putpixel((0, 0), bright)
    via = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    image = (rgb.convert(via) if via else rgb).convert(mode)

    expected = torch.tensor([255, 0], dtype=torch.uint8).expand(3, 1, 2)
    assert_close(load_image(image), expected)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    gray = (128, 128, 128) if mode == "YCbCr" else (0, 0, 128) if mode == "HSV" else (137, 128, 128)

    loaded = load_image(Image.new(mode, (2, 1), gray))

    assert_close(loaded, torch.full((3, 1, 2), 128, dtype=torch.uint8), atol=2, rtol=0)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_a_palette_with_transparency_keeps_its_colours(
    tmp_path: Path, transparency: int | bytes
) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    path = save(palette, tmp_path / "a.png", transparency=transparency)

    expected = torch.tensor([[[10, 40, 70]], [[20, 50, 80]], [[30, 60, 90]]], dtype=torch.uint8)
    assert_close(load_image(path), expected)


def test_transparency_is_dropped_and_not_blended(tmp_path: Path) -> None:
    path = save(Image.new("RGBA", (1, 1), (200, 100, 50, 0)), tmp_path / "a.png")

    assert load_image(path).flatten().tolist() == [200, 100, 50]


def test_premultiplied_transparency_is_divided_out() -> None:
    assert load_image(Image.new("RGBa", (1, 1), (100, 50, 25, 128))).flatten().tolist() == [
        199,
        99,
        49,
    ]


def test_a_cmyk_jpeg_has_its_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    path = save(red, tmp_path / "a.jpg", quality=100)

    loaded = load_image(path)

    expected = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 16, 16)
    assert_close(loaded, expected, atol=3, rtol=0)


@pytest.mark.parametrize("extension", ["png", "tiff"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, extension: str, order: str) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=order)
    image = Image.fromarray(values)
    if extension == "png" and order == ">u2":
        image = Image.fromarray(values.astype("<u2"))  # PNG has one byte order only

    loaded = load_image(save(image, tmp_path / f"a.{extension}"))

    assert_close(loaded, torch.tensor([0, 1, 100, 255], dtype=torch.uint8).expand(3, 1, 4))


def test_a_pil_image_of_sixteen_bits_is_scaled_too() -> None:
    values = np.array([[0, 128, 129, 65535]])

    for array in (values.astype(np.uint16), values.astype(np.int32)):
        image = Image.fromarray(array)
        assert image.mode in {"I;16", "I"}
        assert load_image(image)[0].tolist() == [[0, 0, 1, 255]]


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_raise(value: int) -> None:
    with pytest.raises(ValueError, match=rf"image.*\(mode I with values from {value}"):
        load_image(Image.new("I", (2, 2), value))


def test_floating_point_pictures_raise_an_error_with_the_file_name(tmp_path: Path) -> None:
    path = save(Image.new("F", (2, 2), 0.5), tmp_path / "depth.tif")

    with pytest.raises(ValueError, match=r"depth\.tif'.*\(mode F with values from 0\.5 to 0\.5"):
        load_image(path)


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    path = save(first, tmp_path / "a.gif", save_all=True, append_images=[second])

    assert load_image(path)[:, 0, 0].tolist() == [255, 0, 0]


# ------------------------------------------------------------------ orientation


def stored(orientation: int) -> Image.Image:
    """Turn the upright picture as a camera stores it with this EXIF orientation."""
    turn = {
        1: lambda upright: upright,
        2: np.fliplr,
        3: lambda upright: np.rot90(upright, 2),
        4: np.flipud,
        5: lambda upright: upright.transpose(1, 0, 2),
        6: lambda upright: np.rot90(upright, 1),  # to be turned clockwise
        7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
        8: lambda upright: np.rot90(upright, -1),  # to be turned counterclockwise
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(turn(COLORS)))


@pytest.mark.parametrize("extension", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright(tmp_path: Path, orientation: int, extension: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if extension == "webp" else {}
    path = save(stored(orientation), tmp_path / f"a.{extension}", exif=exif, **lossless)

    assert_close(load_image(path), PIXELS)
    assert read_image_size(path) == (2, 3)
    with Image.open(path) as image:
        assert_close(load_image(image), PIXELS)


def test_a_size_that_cannot_be_read_is_an_error_with_name_and_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?=.*'.*gone\.png')(?=.*photo 7)"):
        read_image_size(tmp_path / "gone.png", "photo 7")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableImageError, match=r"(?=.*'.*text\.png')(?=.*photo 7)"):
        read_image_size(str(tmp_path / "text.png"), "photo 7")


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation

    assert_close(load_image(save(picture(), tmp_path / "a.png", exif=exif)), PIXELS)


def test_sixteen_bit_pictures_are_turned_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[0, 25700, 65535]], dtype=np.uint16)

    loaded = load_image(save(Image.fromarray(values), tmp_path / "a.png", exif=exif))

    assert loaded[0].tolist() == [[0], [100], [255]]


# ------------------------------------------------------------------ files that cannot be read


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file: '.*gone\.jpg' \(image\)"):
        load_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page.jpg").write_bytes(content)

    with pytest.raises(
        UnreadableImageError, match=r"Cannot read '.*page\.jpg' \(image\).*\(AVIF, BMP, .*JPEG"
    ):
        load_image(tmp_path / "page.jpg")


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_jpeg_is_named(tmp_path: Path, kept: float) -> None:
    whole = jpeg_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * kept)])

    with pytest.raises(ValueError, match=r"cut\.jpg' \(image\).*\(.*truncated") as raised:
        load_image(tmp_path / "cut.jpg")

    assert isinstance(raised.value.__cause__, OSError)


def test_a_truncated_pil_image_is_an_error_of_the_same_kind() -> None:
    image = Image.open(io.BytesIO(jpeg_bytes()[:900]))

    with pytest.raises(UnreadableImageError, match=r"Cannot read a PIL image \(image\).*\(.*trunc"):
        load_image(image)


def test_a_corrupted_png_is_named(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.tile(COLORS, (20, 20, 1))), tmp_path / "bad.png")
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 8
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)

    with pytest.raises(UnreadableImageError, match=r"Cannot read '.*bad\.png'"):
        load_image(path)


def test_a_decompression_bomb_is_named(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)

    with pytest.raises(UnreadableImageError, match=r"bomb\.png'.*3600000000 pixels.*tiled TIFF"):
        load_image(tmp_path / "bomb.png")


def test_a_merely_very_large_image_is_read_with_the_warning_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(picture(), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)

    with pytest.warns(Image.DecompressionBombWarning):
        loaded = load_image(path)

    assert_close(loaded, PIXELS)


def test_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    open_file = Image.open

    def remember(path: str, formats: Any) -> Image.Image:
        opened.append(open_file(path, formats=formats))
        return opened[-1]

    (tmp_path / "cut.jpg").write_bytes(jpeg_bytes()[:900])
    good = save(picture(), tmp_path / "good.png")
    monkeypatch.setattr(Image, "open", remember)
    load_image(good)
    with pytest.raises(UnreadableImageError):
        load_image(tmp_path / "cut.jpg")

    assert len(opened) == 2
    assert all(getattr(image, "fp", None) is None for image in opened)


@pytest.mark.parametrize(
    "url", ["https://example.org/a.jpg", "s3://bucket/a.jpg", "data:image/png;base64,AAAA"]
)
def test_a_url_is_not_downloaded_unless_it_is_allowed(url: str) -> None:
    with pytest.raises(ValueError, match=r"image is the URL '.*'\. .*only .*with allow_urls=True"):
        load_image(url)


def test_a_folder_is_not_one_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image is the folder '.*', not an image"):
        load_image(tmp_path)


def test_an_impossible_file_name_is_an_unreadable_file() -> None:
    for path in ("x" * 5000, "a\0b.jpg"):
        with pytest.raises(UnreadableImageError, match=r"Cannot read '(xxx|a.x00b).*\(sources\)"):
            next(iter_images(path))


def test_an_empty_path_raises() -> None:
    with pytest.raises(ValueError, match=r"image is an empty string"):
        load_image("")


# ------------------------------------------------------------------ wrong arrays and tensors


@pytest.mark.parametrize("source", [None, 3, [COLORS], object()])
def test_an_unsupported_type_raises_with_the_accepted_ones(source: Any) -> None:
    with pytest.raises(
        TypeError, match=r"image must be a path, bytes, .* a PIL image, .* tensor, got an? \w+"
    ):
        load_image(source)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((4, 5), r"np\.stack\(\[image\] \* 3, axis=-1\)"),
        ((4, 5, 1), r"image\.repeat\(3, axis=-1\)"),
        ((4, 5, 4), r"image\[\.\.\., :3\]"),
        ((3, 4, 5), r"image\.transpose\(1, 2, 0\)"),
        ((2, 4, 5, 3), r"list\(batch\)"),
        ((), r"\[\]\.$"),
    ],
)
def test_an_array_of_a_wrong_shape_raises_with_a_remedy(
    shape: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ValueError, match=rf"image must have shape \[H, W, 3\], got .*{remedy}"):
        load_image(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int64, np.bool_])
def test_an_array_of_a_wrong_dtype_raises(dtype: type[np.generic]) -> None:
    with pytest.raises(TypeError, match=r"image must be a uint8 array, got \w+\. Scale the values"):
        load_image(np.zeros((4, 5, 3), dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((4, 5), r"\.expand\(3, -1, -1\)"),
        ((1, 4, 5), r"\.expand\(3, -1, -1\)"),
        ((6, 5, 3), r"\.permute\(2, 0, 1\)"),
        ((4, 5, 6), r"image\[:3\]"),
        ((2, 3, 4, 5), r"list\(batch\)"),
    ],
)
def test_a_tensor_of_a_wrong_shape_raises_with_a_remedy(
    shape: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ValueError, match=rf"image must have shape \[3, H, W\], got .*{remedy}"):
        load_image(torch.zeros(shape))


def test_a_tensor_of_integers_other_than_uint8_raises() -> None:
    with pytest.raises(TypeError, match=r"image must be uint8 or .*, got torch\.int64"):
        load_image(torch.zeros(3, 4, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (200.0, r"image has values from 0 to 200\. Divide values from 0 to 255 by 255"),
        (-2.0, r"image has values from -2 to 0\. The model normalises images itself"),
        (float("nan"), r"image contains NaN"),
        (float("inf"), r"image contains NaN or infinity"),
    ],
)
def test_a_floating_point_tensor_must_be_between_0_and_1(value: float, message: str) -> None:
    image = torch.zeros(3, 4, 5)
    image[1, 2, 3] = value

    with pytest.raises(ValueError, match=message):
        load_image(image)


@pytest.mark.parametrize("source", [torch.zeros(3, 0, 5), np.zeros((4, 0, 3), dtype=np.uint8)])
def test_an_image_without_pixels_raises(source: Any) -> None:
    with pytest.raises(ValueError, match=r"image has no pixels: its shape is \[.*0"):
        load_image(source)


def test_a_pil_image_without_pixels_raises() -> None:
    with pytest.raises(ValueError, match=r"a PIL image.*\(its width or height is zero\)"):
        load_image(Image.new("RGB", (0, 4)))


def test_the_name_of_the_argument_is_in_the_message() -> None:
    with pytest.raises(TypeError, match=r"photo must be"):
        load_image(3, "photo")  # type: ignore[arg-type]


# ------------------------------------------------------------------ many images


def test_a_single_source_is_one_image(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "a.png")

    for source in (path, str(path), picture(), COLORS, PIXELS):
        (loaded,) = iter_images(source)
        assert loaded is not None
        assert_close(loaded.image, PIXELS)
        assert loaded.name == (str(path) if isinstance(source, (str, Path)) else None)
        assert count_images(source) == 1


def test_a_folder_gives_its_images_in_name_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.tif", ".hidden.png"):
        save(picture(), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    save(picture(), tmp_path / "folder.jpg" / "inside.png")

    names = [Path(loaded.name or "").name for loaded in iter_images(tmp_path) if loaded]

    assert names == ["a.JPG", "b.png", "c.tif"]
    assert count_images(str(tmp_path)) == 3


@pytest.mark.parametrize("ask", [iter_images, count_images])
def test_a_folder_without_images_is_an_error_immediately(tmp_path: Path, ask: Any) -> None:
    broken_file(tmp_path, "notes.txt")

    with pytest.raises(ValueError, match=r"folder '.*' \(sources\) contains no images \(.*\.jpg"):
        ask(tmp_path)


def test_the_extensions_of_a_folder_are_lower_case_and_known_to_pillow() -> None:
    Image.init()

    assert [extension.lower() for extension in IMAGE_EXTENSIONS] == list(IMAGE_EXTENSIONS)
    assert set(IMAGE_EXTENSIONS) - {".avif"} <= set(Image.registered_extensions())


def test_a_list_may_mix_kinds(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "a.png")
    sources: list[ImageSource] = [path, picture(), COLORS, PIXELS]

    loaded = list(iter_images(sources))

    assert [item.name if item else "" for item in loaded] == [str(path), None, None, None]
    assert count_images(sources) == count_images(tuple(sources)) == 4


def test_a_batch_is_its_images() -> None:
    batch = torch.rand(2, 3, 4, 5)

    first, second = iter_images(batch)

    assert first is not None
    assert second is not None
    assert_close(torch.stack([first.image, second.image]), batch)
    assert count_images(batch) == 2


@pytest.mark.parametrize("sources", [[], torch.zeros(0, 3, 4, 4)])
def test_no_sources_are_no_images(sources: Any) -> None:
    assert list(iter_images(sources)) == []
    assert count_images(sources) == 0


def test_a_generator_is_advanced_one_item_at_a_time() -> None:
    asked = []

    def sources() -> Iterator[Image.Image]:
        for index in range(3):
            asked.append(index)
            yield picture()

    generator = sources()
    assert count_images(generator) is None
    images = iter_images(generator)
    assert asked == []
    next(images)
    assert asked == [0]
    assert len(list(images)) == 2


@pytest.mark.parametrize("sources", [3, None, object()])
def test_sources_of_an_unsupported_type_raise_immediately(sources: Any) -> None:
    with pytest.raises(TypeError, match=r"sources must be a path, .* or an iterable"):
        iter_images(sources)


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (3, TypeError),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError),
        (np.zeros((4, 4), dtype=np.uint8), ValueError),
        ("https://example.org/a.jpg", ValueError),
        (Path(), ValueError),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_wrong_item_raises_with_its_index(
    item: Any, error: type[Exception], on_error: str
) -> None:
    images = iter_images([picture(), item], on_error=on_error)
    next(images)

    with pytest.raises(error, match=r"sources\[1\] (must|is)"):
        next(images)


@pytest.mark.parametrize("name", ["broken.jpg", "gone.jpg"])
def test_an_unreadable_file_raises_with_its_index(tmp_path: Path, name: str) -> None:
    broken_file(tmp_path)
    images = iter_images([picture(), tmp_path / name])
    next(images)

    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}' \(sources\[1\]\)"):
        next(images)


@pytest.mark.parametrize("name", ["broken.jpg", "gone.jpg"])
def test_an_unreadable_file_is_skipped_when_asked(tmp_path: Path, name: str) -> None:
    broken_file(tmp_path)
    images = iter_images([picture(), tmp_path / name, picture()], on_error="skip")

    with pytest.warns(UserWarning, match=rf"Skipped an image: .*{name}' \(sources\[1\]\)"):
        loaded = list(images)

    assert [item is None for item in loaded] == [False, True, False]


def test_an_unknown_on_error_raises() -> None:
    with pytest.raises(ValueError, match=r"on_error 'ignore'.*'raise'.*'skip'"):
        iter_images([], on_error="ignore")


# ------------------------------------------------------------------ other numbers of channels


def test_a_file_becomes_greyscale_for_one_channel(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "a.png")
    # 0.299 R + 0.587 G + 0.114 B: of pure red 76.2, of pure green 149.7, of pure blue 29.1.
    expected = torch.tensor([[[76, 150, 29], [226, 18, 255]]], dtype=torch.uint8)

    for source in (path, picture()):
        assert_close(load_image(source, channels=1), expected)
        [loaded] = iter_images(source, channels=1)
        assert loaded is not None
        assert_close(loaded.image, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "CMYK", "I;16"])
def test_every_mode_becomes_greyscale_for_one_channel(mode: str) -> None:
    values = np.array([[255, 0]], dtype=np.uint8)
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode in {"La", "RGBa", "PA"}:
        image = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}[mode]).convert(mode)
    else:
        image = image.convert(mode)

    assert load_image(image, channels=1).tolist() == [[[255, 0]]]


def test_arrays_and_tensors_may_have_any_number_of_channels() -> None:
    for channels in (1, 2, 4, 12):
        values = np.arange(6 * channels, dtype=np.uint8).reshape(2, 3, channels)
        expected = torch.from_numpy(values).permute(2, 0, 1)

        assert_close(load_image(values, channels=channels), expected)
        assert load_image(expected, channels=channels) is expected
    assert_close(load_image(COLORS[..., 0], channels=1), PIXELS[:1])


@pytest.mark.parametrize("source", ["a.png", Path("a.jpg"), Image.new("RGBA", (2, 2))])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_files_cannot_give_four_channels(source: Any, on_error: str) -> None:
    with pytest.raises(ValueError, match=r"sources\[0\] is .*4 channels.*pass an \[H, W, 4\]"):
        next(iter_images([source], on_error=on_error, channels=4))


@pytest.mark.parametrize(
    ("source", "channels", "message"),
    [
        (COLORS, 1, r"image must have shape \[H, W\] or \[H, W, 1\], got \[2, 3, 3\]"),
        (COLORS, 4, r"image must have shape \[H, W, 4\], got \[2, 3, 3\]"),
        (PIXELS, 1, r"image must have shape \[1, H, W\], got \[3, 2, 3\]"),
        (PIXELS[0], 1, r"\[1, H, W\], got \[2, 3\]. Add the channel with image\[None\]"),
        (np.zeros((4, 2, 3), np.uint8), 4, r"\[H, W, 4\], got \[4, 2, 3\]. Put the channels last"),
        (torch.zeros(2, 3, 4), 4, r"\[4, H, W\], got \[2, 3, 4\]. Put the channels first"),
        (PIXELS, 0, r"channels must be at least 1, got 0"),
    ],
)
def test_a_wrong_number_of_channels_is_named(source: Any, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(source, channels=channels)


def test_greyscale_is_repeated_to_look_at() -> None:
    grey = COLORS[..., 0]
    for source in (grey, grey[..., None], PIXELS[:1]):
        assert_close(load_picture(source), PIXELS[:1].expand(3, -1, -1))
    assert load_picture(PIXELS) is PIXELS
    with pytest.raises(ValueError, match=r"\[3, H, W\], got \[4, 5, 6\]. Keep .* image\[:3\]"):
        load_picture(torch.zeros(4, 5, 6))


def test_folders_among_paths_are_replaced_with_their_images(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    lost = Path("lost.jpg")
    assert list_images([lost, tmp_path]) == [lost, tmp_path / "a.PNG", tmp_path / "b.jpg"]
    with pytest.raises(ValueError, match=r"empty' \(paths\) contains no images"):
        list_images([tmp_path / "empty"])
