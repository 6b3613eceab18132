from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from focaldet import visualization
from focaldet.visualization import class_color, draw_boxes

if TYPE_CHECKING:
    from pathlib import Path


def gray(height: int = 100, width: int = 200) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def pixels_of(picture: Image.Image, color: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return for each pixel, [H, W], whether it has a colour."""
    return np.asarray(np.all(np.asarray(picture) == color, axis=-1))


def labels_drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return a list to which each label that is drawn adds its text and its rectangle."""
    drawn: list[tuple[str, tuple[int, int, int, int]]] = []
    draw_label = visualization._draw_label

    def remember(draw: Any, label: Any, corner: tuple[int, int], color: Any) -> None:
        x, y = corner
        drawn.append((label.text, (x, y, x + label.width, y + label.height)))
        draw_label(draw, label, corner, color)

    monkeypatch.setattr(visualization, "_draw_label", remember)
    return drawn


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ------------------------------------------------------------------ colours


def test_the_colour_of_a_class_is_always_the_same() -> None:
    assert [class_color(label) for label in (0, 1, 79)] == [
        (0, 102, 255),
        (210, 251, 116),
        (0, 255, 140),
    ]


def test_classes_near_each_other_have_distinct_colours() -> None:
    for first, second in itertools.combinations(range(20), 2):
        difference = np.subtract(class_color(first), class_color(second))
        assert np.abs(difference).max() > 30, (first, second)
    assert len({class_color(label) for label in range(1000)}) > 950


def test_a_negative_class_has_no_colour() -> None:
    with pytest.raises(ValueError, match=r"label must be at least 0, got -1"):
        class_color(-1)


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_text_contrasts_with_every_colour_by_4_5_to_1(color: tuple[int, int, int]) -> None:
    def luminance(rgb: tuple[int, int, int]) -> float:
        scaled = np.array(rgb) / 255
        linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(color), luminance(visualization._contrasting(color))])

    assert (high + 0.05) / (low + 0.05) >= 4.5


# ------------------------------------------------------------------ boxes


def test_a_box_is_drawn_inside_its_edges_between_two_thin_lines() -> None:
    picture = draw_boxes(gray(), torch.tensor([[20.0, 30.0, 120.0, 90.0]]), line_width=3)

    row = pixels_of(picture, class_color(0))[60]
    assert np.flatnonzero(row).tolist() == [20, 21, 22, 117, 118, 119]
    column = pixels_of(picture, class_color(0))[:, 70]
    assert np.flatnonzero(column).tolist() == [30, 31, 32, 87, 88, 89]
    changed = ~pixels_of(picture, (128, 128, 128))[60]
    assert np.flatnonzero(changed).tolist() == [*range(19, 24), *range(116, 121)]


def test_a_box_shows_on_a_background_of_its_own_colour() -> None:
    image = Image.new("RGB", (60, 60), class_color(0))

    picture = draw_boxes(image, torch.tensor([[10.0, 10.0, 50.0, 50.0]]))

    assert (~pixels_of(picture, class_color(0))).sum() > 200


def test_labels_choose_the_colours_and_the_last_box_is_on_top() -> None:
    boxes = torch.tensor([[10.0, 10.0, 90.0, 90.0], [10.0, 50.0, 90.0, 90.0]])

    picture = draw_boxes(gray(), boxes, torch.tensor([1, 2]), line_width=2)

    assert picture.getpixel((10, 20)) == class_color(1)
    assert picture.getpixel((10, 70)) == picture.getpixel((50, 89)) == class_color(2)


def test_parts_outside_the_image_are_not_drawn() -> None:
    boxes = torch.tensor([[-50.0, 20.0, 60.0, 900.0], [200.0, 10.0, 350.0, 20.0]])

    picture = draw_boxes(gray(), boxes, torch.tensor([0, 1]), texts=["", "far away"], line_width=2)

    assert picture.size == (200, 100)
    ours = pixels_of(picture, class_color(0))
    assert ours[50, [0, 1, 58, 59]].all()
    assert ours[[98, 99], 30].all()
    assert not pixels_of(picture, class_color(1)).any()


@pytest.mark.parametrize(
    "box", [[7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.2, 0.2], [31.9, 31.9, 32.0, 32.0]]
)
def test_a_box_of_no_extent_is_drawn_as_one_pixel(box: list[float]) -> None:
    picture = draw_boxes(gray(32, 32), torch.tensor([box]), line_width=5)

    assert pixels_of(picture, class_color(0)).sum() == 1


def test_a_small_box_is_not_filled_by_its_own_line() -> None:
    picture = draw_boxes(gray(), torch.tensor([[50.0, 50.0, 66.0, 66.0]]), line_width=20)

    assert picture.getpixel((58, 58)) == (128, 128, 128)


def test_no_boxes_give_a_copy() -> None:
    image = Image.fromarray(gray().permute(1, 2, 0).numpy())

    picture = draw_boxes(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), texts=[])

    assert picture is not image
    assert picture.tobytes() == image.tobytes()


def test_the_image_passed_is_not_modified() -> None:
    tensor, image = gray(), Image.new("RGB", (200, 100))
    for given_image in (tensor, image):
        draw_boxes(given_image, torch.tensor([[5.0, 5.0, 50.0, 50.0]]), texts=["cat"])

    assert (tensor == 128).all()
    assert not np.asarray(image).any()


# ------------------------------------------------------------------ kinds of image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_floating_point_tensor_is_scaled(dtype: torch.dtype) -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).to(dtype).reshape(3, 1, 1).expand(3, 4, 5)

    assert draw_boxes(image, torch.zeros(0, 4)).getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_a_pil_image_of_any_eight_bit_mode_gives_rgb(mode: str) -> None:
    image = Image.new("RGB", (40, 40), (255, 255, 255)).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))

    picture = draw_boxes(image, torch.tensor([[5.0, 5.0, 35.0, 35.0]]))

    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_a_pil_image_is_turned_upright() -> None:
    image = Image.new("RGB", (40, 20))
    image.getexif()[0x0112] = 6

    assert draw_boxes(image, torch.zeros(0, 4)).size == (20, 40)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_pil_image_of_more_than_eight_bits_raises(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"image must have 8 bits per channel, got mode {mode}"):
        draw_boxes(Image.new(mode, (4, 4)), torch.zeros(0, 4))


@pytest.mark.parametrize("image", ["photo.jpg", np.zeros((4, 4, 3), dtype=np.uint8), None])
def test_another_kind_of_image_raises(image: Any) -> None:
    with pytest.raises(TypeError, match=r"image must be a \[3, H, W\] tensor or a PIL image, got"):
        draw_boxes(image, torch.zeros(0, 4))


def test_a_greyscale_tensor_is_drawn_on_in_colour() -> None:
    image = gray()[:1]
    boxes = torch.tensor([[20.0, 30.0, 120.0, 90.0]])

    assert draw_boxes(image, boxes).tobytes() == draw_boxes(gray(), boxes).tobytes()
    assert (image == 128).all()


def test_a_tensor_with_other_channels_raises() -> None:
    with pytest.raises(ValueError, match=r"image.*\[3, H, W\], got \[4, 5, 6\]. .*image\[:3\]"):
        draw_boxes(torch.zeros(4, 5, 6), torch.zeros(0, 4))


# ------------------------------------------------------------------ labels


def whole_label(picture: Image.Image, rectangle: tuple[int, int, int, int], text: str) -> bool:
    """Return whether a label is drawn completely, as it would be alone."""
    x1, _, _, y2 = rectangle
    size = picture.width * 2, picture.height * 2
    roomy = torch.full((3, size[1], size[0]), 128, dtype=torch.uint8)
    box = torch.tensor([[float(x1), float(y2), size[0] - 1.0, size[1] - 1.0]])
    alone = draw_boxes(roomy, box, texts=[text], font_size=14, line_width=1)
    return alone.crop(rectangle).tobytes() == picture.crop(rectangle).tobytes()


@pytest.mark.parametrize(
    "box",
    [
        [50.0, 50.0, 100.0, 90.0],  # room above
        [0.0, 0.0, 200.0, 100.0],  # none
        [190.0, 0.0, 200.0, 10.0],  # upper right corner
        [190.0, 90.0, 300.0, 300.0],  # lower right corner
        [-40.0, 95.0, 3.0, 99.0],  # lower left corner
    ],
)
def test_a_label_is_drawn_completely_inside_the_image(
    box: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = labels_drawn(monkeypatch)

    picture = draw_boxes(
        gray(), torch.tensor([box]), texts=["wine glass 0.93"], font_size=14, line_width=1
    )

    ((text, rectangle),) = drawn
    assert text == "wine glass 0.93"
    assert rectangle[0] >= 0
    assert rectangle[1] >= 0
    assert rectangle[2] <= 200
    assert rectangle[3] <= 100
    assert whole_label(picture, rectangle, text)


def test_text_does_not_reach_beyond_its_background(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)
    box = torch.tensor([[50.0, 60.0, 51.0, 61.0]])

    for size in (9, 12, 14, 20, 33):
        picture = draw_boxes(gray(), box, texts=["jAg|_(y)"], font_size=size)
        _, (x1, y1, x2, y2) = drawn[-1]
        edge = np.asarray(picture)[y1:y2, x1:x2]
        for line in (edge[0], edge[-1], edge[:, 0], edge[:, -1]):
            assert (line == class_color(0)).all()


def test_text_is_dark_on_light_colours_and_light_on_dark_ones() -> None:
    box = torch.tensor([[10.0, 40.0, 190.0, 90.0]])

    on_light = draw_boxes(gray(), box, torch.tensor([1]), texts=["####"], font_size=20)
    on_dark = draw_boxes(gray(), box, torch.tensor([13]), texts=["####"], font_size=20)

    assert pixels_of(on_light, (0, 0, 0)).any()
    assert pixels_of(on_dark, (255, 255, 255)).any()


def test_labels_avoid_each_other_and_the_last_one_is_placed_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = labels_drawn(monkeypatch)
    box = [60.0, 40.0, 150.0, 90.0]

    draw_boxes(gray(140, 240), torch.tensor([box] * 4), texts=["cat 0.7", "dog 0.8", "owl", "cow"])

    assert [text for text, _ in drawn] == ["cat 0.7", "dog 0.8", "owl", "cow"]
    assert drawn[-1][1][0] == 60
    assert drawn[-1][1][3] == 40  # above the box, flush with its left edge
    for (_, first), (_, second) in itertools.combinations(drawn, 2):
        assert not overlap(first, second)


def test_a_label_that_has_to_cover_another_covers_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = labels_drawn(monkeypatch)
    boxes = torch.tensor([[0.0, 0.0, 60.0, 16.0]] * 3)

    picture = draw_boxes(gray(16, 60), boxes, torch.tensor([0, 1, 2]), texts=["cat", "dog", "owl"])

    x, y = drawn[-1][1][:2]
    assert picture.getpixel((x, y)) == class_color(2)


def test_no_box_line_crosses_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)
    boxes = torch.tensor([[30.0, 50.0, 120.0, 90.0], [50.0, 5.0, 70.0, 95.0]])

    picture = draw_boxes(
        gray(), boxes, torch.tensor([0, 1]), texts=["wine glass", ""], font_size=14, line_width=1
    )

    ((text, rectangle),) = drawn
    assert overlap(rectangle, (50, 5, 70, 95))
    assert whole_label(picture, rectangle, text)


def test_a_small_box_is_not_hidden_by_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)

    draw_boxes(gray(), torch.tensor([[50.0, 2.0, 70.0, 22.0]]), texts=["bird 0.51"])

    assert not overlap(drawn[0][1], (50, 2, 70, 22))


def test_text_too_wide_becomes_smaller_and_then_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)
    box = torch.tensor([[10.0, 30.0, 70.0, 70.0]])

    draw_boxes(gray(80, 80), box, texts=["dining table"], font_size=30)
    draw_boxes(gray(80, 80), box, texts=["a very long name of a class 0.98"], font_size=30)

    (whole, (x1, y1, x2, y2)), (shortened, (x3, _, x4, _)) = drawn
    assert whole == "dining table"
    assert y2 - y1 < 20
    assert shortened.startswith("a very")
    assert shortened.endswith("…")
    assert x2 - x1 <= 80
    assert x4 - x3 <= 80


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (4, 500), (500, 4)])
def test_an_image_too_small_for_letters_gets_only_the_box(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = labels_drawn(monkeypatch)

    picture = draw_boxes(gray(*size), torch.tensor([[0.0, 0.0, 3.0, 3.0]]), texts=["cat"])

    assert drawn == []
    assert picture.size == size[::-1]


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_gives_no_label(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)

    draw_boxes(gray(), torch.tensor([[5.0, 5.0, 50.0, 50.0]]), texts=[text])

    assert drawn == []


def test_line_breaks_become_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)

    draw_boxes(gray(), torch.tensor([[5.0, 40.0, 50.0, 50.0]]), texts=["wine\n glass"])

    assert drawn[0][0] == "wine glass"


def test_lines_and_letters_grow_with_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)
    heights = []
    for scale in (1, 2, 8):
        height, width = 240 * scale, 320 * scale
        box = torch.tensor([[100.0, 100.0, 200.0, 200.0]]) * scale
        draw_boxes(gray(height, width), box, texts=["cat"])
        _, (_, top, _, bottom) = drawn[-1]
        heights.append((bottom - top) / height)

    assert all(0.03 < height < 0.06 for height in heights)


def test_many_labels_become_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = labels_drawn(monkeypatch)
    boxes = torch.tensor([[10.0, 100.0, 90.0, 190.0]]).repeat(200, 1)

    draw_boxes(gray(960, 1280), boxes[:1], texts=["wine glass 0.93"])
    draw_boxes(gray(960, 1280), boxes, texts=["wine glass 0.93"] * 200)

    heights = [bottom - top for _, (_, top, _, bottom) in drawn]
    assert heights[1] < heights[0] / 2


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    corners=st.lists(st.tuples(*[st.floats(-50, 200, width=32)] * 4), max_size=5),
    text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
    font_size=st.sampled_from([None, 4, 9.5, 40]),
)
def test_any_boxes_on_any_image_are_drawn_within_it(
    size: tuple[int, int],
    corners: list[tuple[float, float, float, float]],
    text: str,
    font_size: float | None,
) -> None:
    boxes = torch.tensor(
        [[min(x, u), min(y, v), max(x, u), max(y, v)] for x, y, u, v in corners]
    ).reshape(-1, 4)

    with pytest.MonkeyPatch.context() as patch:
        drawn = labels_drawn(patch)
        picture = draw_boxes(gray(*size), boxes, texts=[text] * len(boxes), font_size=font_size)

    assert picture.size == size[::-1]
    for _, (x1, y1, x2, y2) in drawn:
        assert 0 <= x1 < x2 <= size[1]
        assert 0 <= y1 < y2 <= size[0]


# ------------------------------------------------------------------ fonts


def test_characters_that_the_built_in_font_lacks_are_reported() -> None:
    box = torch.tensor([[5.0, 40.0, 50.0, 50.0]])

    with pytest.warns(UserWarning, match=r"font has no characters '(犬é|é犬)'.*Pass font="):
        draw_boxes(gray(), box, texts=["é犬 dog"])


def test_the_ellipsis_is_in_the_built_in_font() -> None:
    draw_boxes(gray(), torch.tensor([[5.0, 40.0, 50.0, 50.0]]), texts=["dog…"])


def test_the_users_font_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = ImageFont.load_default(20)
    assert isinstance(built_in, ImageFont.FreeTypeFont)
    path = tmp_path / "own.ttf"
    path.write_bytes(built_in.font_bytes)
    used = []
    draw_label = visualization._draw_label

    def remember(draw: Any, label: Any, corner: tuple[int, int], color: Any) -> None:
        used.append((label.font.path, label.font.size))
        draw_label(draw, label, corner, color)

    monkeypatch.setattr(visualization, "_draw_label", remember)
    box = torch.tensor([[5.0, 40.0, 50.0, 90.0]])
    draw_boxes(gray(), box, texts=["dog"], font=path, font_size=20)

    assert used == [(str(path), 20)]


@pytest.mark.parametrize("content", [None, b"no font"])
def test_a_font_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "own.ttf"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ValueError, match=r"Cannot read font '.*own\.ttf': .*TrueType"):
        draw_boxes(gray(), torch.tensor([[5.0, 5.0, 50.0, 50.0]]), texts=["dog"], font=path)


# ------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.0, 0.0, float("nan"), 1.0], r"boxes\[1\] = \[0\.0, 0\.0, nan.*NaN"),
        ([0.0, 0.0, 1.0, float("inf")], r"boxes\[1\] = .*inf.* contains NaN or infinity"),
        ([5.0, 0.0, 4.0, 1.0], r"boxes\[1\] = .* swapped corners.*x1 <= x2"),
        ([0.0, 5.0, 4.0, 1.0], r"boxes\[1\] = \[0\.0, 5\.0.* y1 <= y2"),
    ],
)
def test_a_wrong_box_is_named(box: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(gray(), torch.tensor([[0.0, 0.0, 1.0, 1.0], box]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"boxes": torch.zeros(2, 5)}, ValueError, r"boxes.*\[N, 4\].*\[2, 5\]"),
        ({"boxes": torch.zeros(2, 4).int()}, TypeError, r"boxes.*floating-point.*int32"),
        (
            {"labels": torch.zeros(3).long()},
            ValueError,
            r"labels must have shape \[2\].*got \[3",
        ),
        (
            {"labels": torch.zeros(2)},
            TypeError,
            r"labels must be a tensor of integers, got torch.float32",
        ),
        ({"labels": torch.tensor([0, -1])}, ValueError, r"labels\[1\] must be at least 0, got -1"),
        ({"texts": ["one"]}, ValueError, r"texts must have one entry per box \(2\), got 1"),
        ({"texts": "ab"}, TypeError, r"texts must be a sequence of strings, got 'ab'"),
        ({"texts": [1, 2]}, TypeError, r"texts must be a sequence of strings, got \[1, 2\]"),
        ({"line_width": 0}, ValueError, r"line_width must be at least 1, got 0"),
        ({"font_size": 0.5}, ValueError, r"font_size must be at least 1, got 0\.5"),
    ],
)
def test_a_wrong_argument_is_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw_boxes(**{"image": gray(), "boxes": torch.zeros(2, 4), **options})
