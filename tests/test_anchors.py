from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from focaldet import AnchorGenerator
from focaldet.boxes import box_area

FEATURES = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]


def test_an_800x1344_image_has_201600_anchors() -> None:
    assert [len(level) for level in AnchorGenerator()(FEATURES)] == [151200, 37800, 9450, 2457, 693]


def test_sizes_are_areas_and_ratios_are_height_over_width() -> None:
    anchors = AnchorGenerator().cell_anchors(0)
    width, height = (anchors[:, 2] - anchors[:, 0]), (anchors[:, 3] - anchors[:, 1])
    sides = torch.tensor([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]).repeat(3)
    assert_close((width * height).sqrt(), sides)
    assert_close(height / width, torch.tensor([0.5, 1, 2]).repeat_interleave(3))  # ratio-major


def test_centres_are_offset_in_cells_and_rows_come_first() -> None:
    [level] = AnchorGenerator((32,), strides=(8,), octave_scales=(1,), aspect_ratios=(1,))([(2, 3)])
    centres = (level[:, :2] + level[:, 2:]) / 2
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_torchvision_mode_truncates_rounds_and_infers_strides() -> None:
    generator = AnchorGenerator(mode="torchvision", offset=0)
    sizes = [generator.cell_anchors(level)[3:6, 2] * 2 for level in range(5)]  # the squares
    assert [s.tolist() for s in sizes[:2]] == [[32, 40, 50], [64, 80, 100]]
    *_, p6, p7 = generator(FEATURES, (800, 1344))
    assert p6[9, 0] - p6[0, 0] == 64
    assert p6[21 * 9, 1] - p6[0, 1] == 61
    assert p7[11 * 9, 1] - p7[0, 1] == 114


def test_anchors_are_cached_by_size_and_dtype() -> None:
    generator = AnchorGenerator()
    first = generator(FEATURES)
    assert generator(FEATURES)[0] is first[0]
    assert generator(FEATURES, dtype=torch.float64)[0].dtype == torch.float64
    assert generator([(2, 2)] * 5)[0].shape == (36, 4)
    for size in range(1, 40):
        generator([(size, 1)] * 5)
    assert len(generator._cache) <= 16


def test_copies_and_pickles_do_not_carry_the_cache() -> None:
    generator = AnchorGenerator()
    generator(FEATURES)
    assert len(pickle.dumps(generator)) < 10_000
    assert copy.deepcopy(generator)(FEATURES)[0].shape == (151200, 4)


def test_anchors_created_in_inference_mode_can_be_used_in_training() -> None:
    generator = AnchorGenerator()
    with torch.inference_mode():
        generator([(1, 1)] * 5)
    weight = torch.ones(4, requires_grad=True)
    (generator([(1, 1)] * 5)[0] * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (32, -1, 1, 1, 1)}, r"sizes\[1\].* -1"),
        ({"sizes": (32,)}, "1 sizes and 5 strides"),
        ({"octave_scales": ()}, "octave_scales is empty"),
        ({"offset": 1.5}, r"offset must be in \[0, 1\], got 1.5"),
        (
            {"mode": "exakt"},
            "mode 'exakt'.*'exact', 'rounded', 'torchvision' or 'inclusive_rounded'",
        ),
        ({"mode": "torchvision"}, "mode='torchvision' requires offset=0.*0.5"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorGenerator(**options)


def test_errors_name_wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"feature_sizes.*5 levels.*\[\(1, 1\)\]"):
        AnchorGenerator()([(1, 1)])
    with pytest.raises(ValueError, match="mode='torchvision'.*image_size is required"):
        AnchorGenerator(mode="torchvision", offset=0)(FEATURES)


def test_repr_shows_the_arguments() -> None:
    assert "strides=(8, 16, 32, 64, 128), offset=0.5, mode='exact'" in repr(AnchorGenerator())


def test_rounded_anchors_equal_those_of_older_nvidia_releases() -> None:
    octaves = tuple(4 * 2 ** (i / 3) for i in range(3))
    generator = AnchorGenerator((8, 16, 32, 64, 128), octave_scales=octaves, mode="rounded")
    tall, square, wide = (generator.cell_anchors(0)[index] for index in (6, 3, 0))
    # Their corners include the last pixel: (-8, -20, 15, 27) in a cell of 8 pixels at (0, 0).
    assert tall.tolist() == [-12, -24, 12, 24]
    assert square.tolist() == [-16, -16, 16, 16]
    assert wide.tolist() == [-22, -12, 22, 12]
    assert_close(generator.cell_anchors(0)[7], tall * 2 ** (1 / 3))


def test_plus_one_makes_anchors_a_pixel_larger() -> None:
    exact, larger = AnchorGenerator(), AnchorGenerator(plus_one=True)
    for a, b in zip(exact(FEATURES), larger(FEATURES), strict=True):
        assert_close(b - a, torch.tensor([0.0, 0, 1, 1]).expand_as(a), rtol=0, atol=1e-3)
    assert "plus_one=True" in repr(larger)
    assert "plus_one" not in repr(exact)


def inclusive_anchor(stride: int, scale: float, ratio: float) -> list[int]:
    """Return the first and last pixels of an anchor of the first cell, as MMDetection 1.x does."""
    centre = (stride - 1) / 2
    width, height = (stride * scale * factor for factor in (ratio**-0.5, ratio**0.5))
    corners = (centre + sign * (side - 1) / 2 for sign in (-1, 1) for side in (width, height))
    return [round(corner) for corner in corners]


def test_inclusive_rounded_anchors_extend_to_the_end_of_their_rounded_last_pixel() -> None:
    generator = AnchorGenerator(mode="inclusive_rounded")
    for level, anchors in enumerate(generator([(2, 3)] * 5)):
        stride = 8 * 2**level
        expected = torch.tensor(
            [
                inclusive_anchor(stride, 4 * 2 ** (k / 3), ratio)
                for ratio in (0.5, 1.0, 2.0)
                for k in range(3)
            ],
            dtype=torch.float32,
        )
        expected[:, 2:] += 1
        assert torch.equal(anchors[:9], expected)
        across = anchors.view(2, 3, 9, 4)
        assert torch.equal(
            across[0, 2] - across[0, 0], torch.tensor([2.0 * stride, 0] * 2).expand(9, 4)
        )
        assert torch.equal(
            across[1, 0] - across[0, 0], torch.tensor([0, 1.0 * stride] * 2).expand(9, 4)
        )


def test_inclusive_rounded_anchors_of_the_first_cell_by_hand() -> None:
    # The first is 45.25 pixels wide: 3.5 - 22.13 = -18.63 and 3.5 + 22.13 = 25.63, then + 1.
    [anchors] = AnchorGenerator((32,), strides=(8,), mode="inclusive_rounded")([(1, 1)])
    assert anchors.tolist() == [
        *([-19, -7, 27, 15], [-25, -10, 33, 18], [-32, -14, 40, 22]),
        *([-12, -12, 20, 20], [-16, -16, 24, 24], [-21, -21, 29, 29]),
        *([-7, -19, 15, 27], [-10, -25, 18, 33], [-14, -32, 22, 40]),
    ]
    exact = AnchorGenerator((32,), strides=(8,))([(1, 1)])[0]
    assert float((anchors - exact).abs().max()) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": 0.0}, r"mode='inclusive_rounded' requires offset=0\.5, got offset=0\.0"),
        ({"plus_one": True}, "mode='inclusive_rounded'.* requires plus_one=False"),
    ],
)
def test_inclusive_rounded_anchors_have_one_position(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorGenerator(mode="inclusive_rounded", **options)


@pytest.mark.parametrize("name", ["sizes", "octave_scales", "aspect_ratios", "strides"])
@pytest.mark.parametrize("mode", ["exact", "rounded", "torchvision", "inclusive_rounded"])
def test_anchors_that_would_overflow_raise_an_error(name: str, mode: Any) -> None:
    options: dict[str, Any] = {"offset": 0.5 * (mode == "inclusive_rounded"), "mode": mode}
    for value in (float("inf"), 1e300, 10**400):
        with pytest.raises(ValueError, match=rf"{name}\[0\].* 1000000000\]"):
            AnchorGenerator(**(options | {name: (value,)}))
    with pytest.raises(TypeError, match=rf"{name}.*sequence.* 32"):
        AnchorGenerator(**(options | {name: 32}))
    with pytest.raises(TypeError, match=rf"{name}\[0\].*number.*'32'"):
        AnchorGenerator(**(options | {name: ("32",)}))


def test_the_largest_anchors_have_a_finite_area() -> None:
    large: dict[str, Any] = {
        "sizes": (1e9,),
        "octave_scales": (1e9,),
        "aspect_ratios": (1e9,),
        "strides": (1e9,),
    }
    [anchors] = AnchorGenerator(**large)([(2, 2)])
    assert bool(box_area(anchors).isfinite().all())
