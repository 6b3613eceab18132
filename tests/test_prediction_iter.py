"""``predict_iter``: results in order as they come, with a bounded number of images read ahead."""

from __future__ import annotations

import io
import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from focaldet import RetinaNet
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet import Detections

LAND, PORTRAIT, SQUARE = (48, 96), (96, 48), (64, 64)


@pytest.fixture
def tiny_model() -> RetinaNet:
    """A model that is faster than the one of the same name for all tests."""
    return RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone()).eval()


def picture(size: tuple[int, int] = SQUARE, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("focaldet-reader")]


class Camera:
    """An endless source of images, which counts those that were requested."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = itertools.chain(sizes, itertools.repeat(SQUARE))
        self.requested = 0

    def __iter__(self) -> Iterator[Any]:
        for size in self.sizes:
            self.requested += 1
            yield picture(size, self.requested)


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(found) > 0
    assert found.image_size == expected.image_size
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(("batch_size", "read_ahead"), [(1, 0), (2, 0), (2, 3), (3, None)])
def test_results_are_those_of_predict(
    tiny_model: RetinaNet, optimized: bool, batch_size: int, read_ahead: int | None
) -> None:
    model = tiny_model.optimize_for_inference() if optimized else tiny_model
    images = [picture((LAND, SQUARE, SQUARE, PORTRAIT)[i % 4], i) for i in range(9)]
    found = model.predict_iter(iter(images), batch_size=batch_size, read_ahead=read_ahead)
    for ours, theirs in zip(found, model.predict(images), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(("batch_size", "read_ahead"), [(1, 0), (1, 3), (3, 0), (3, 2)])
def test_a_result_comes_after_a_stated_number_of_requests(
    tiny_model: RetinaNet, batch_size: int, read_ahead: int
) -> None:
    camera = Camera()
    found = tiny_model.predict_iter(camera, batch_size=batch_size, read_ahead=read_ahead)
    assert camera.requested == 0
    for index in range(7):
        next(found)
        first_of_batch = index - index % batch_size
        assert camera.requested == first_of_batch + batch_size + read_ahead
    found.close()


def test_the_default_reads_a_batch_and_three_images_ahead_at_most(tiny_model: RetinaNet) -> None:
    camera = Camera()
    found = tiny_model.predict_iter(camera, batch_size=2)
    next(found)
    assert 4 <= camera.requested <= 2 + 5
    found.close()


def test_an_image_of_a_rare_size_does_not_wait_forever(tiny_model: RetinaNet) -> None:
    camera = Camera(LAND)
    found = tiny_model.predict_iter(camera, batch_size=2, read_ahead=1)
    assert next(found).image_size == LAND
    assert camera.requested == 1 + 16 * 2 + 1
    for _ in range(31):  # they were found while the first one waited
        assert next(found).image_size == SQUARE
    assert camera.requested == 34
    found.close()


def test_few_results_and_images_are_in_memory(tiny_model: RetinaNet) -> None:
    alive: set[int] = set()

    def camera() -> Iterator[Any]:
        for index in itertools.count():
            image = picture((SQUARE, SQUARE, LAND)[index % 3], index)
            alive.add(index)
            weakref.finalize(image, alive.discard, index)
            yield image
            del image

    found = tiny_model.predict_iter(camera(), batch_size=2, read_ahead=3)
    for _ in range(30):
        next(found)
        assert len(alive) <= 3 + 2
    found.close()
    assert not alive


def test_closing_the_generator_stops_the_readers(tiny_model: RetinaNet) -> None:
    found = tiny_model.predict_iter(Camera(), read_ahead=3)
    assert readers() == []  # they start with the first result
    next(found)
    assert readers() != []
    found.close()
    assert readers() == []
    for _ in tiny_model.predict_iter(Camera()):
        break  # the generator is no longer referenced
    assert readers() == []


def test_the_mode_between_results_is_the_callers(tiny_model: RetinaNet) -> None:
    images = [picture(seed=seed) for seed in range(4)]
    expected = tiny_model.predict(images)
    tiny_model.train()
    found = tiny_model.predict_iter(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)
        assert all(module.training for module in tiny_model.modules())
        assert torch.is_grad_enabled()
        tiny_model.eval()
        tiny_model.train()  # as by a training step of the caller


@pytest.mark.parametrize(("batch_size", "read_ahead"), [(1, 0), (2, 4), (4, None)])
def test_results_before_a_failure_come_first(
    tiny_model: RetinaNet, batch_size: int, read_ahead: int | None
) -> None:
    def camera() -> Iterator[Any]:
        for index in range(5):
            yield picture((SQUARE, LAND)[index % 2], index)
        raise RuntimeError("the camera failed")

    found = tiny_model.predict_iter(camera(), batch_size=batch_size, read_ahead=read_ahead)
    assert [next(found).image_size for _ in range(5)] == [SQUARE, LAND, SQUARE, LAND, SQUARE]
    with pytest.raises(RuntimeError, match="the camera failed"):
        next(found)
    assert readers() == []


@pytest.mark.parametrize("bad", ["gone.png", b"no image", picture()[..., 0]])
def test_results_before_a_bad_image_come_first(tiny_model: RetinaNet, bad: Any) -> None:
    images = [picture(LAND), picture(), bad, picture(), picture()]
    found = tiny_model.predict_iter(images, batch_size=2)
    assert [next(found).image_size for _ in range(2)] == [LAND, SQUARE]
    with pytest.raises((ValueError, FileNotFoundError), match=r"sources\[2\]"):
        next(found)
    with pytest.raises(StopIteration):
        next(found)


def test_unreadable_images_give_none_on_request(tiny_model: RetinaNet) -> None:
    images = [picture(), b"no image", picture()]
    with pytest.warns(UserWarning, match=r"Skipped an image: .*sources\[1\]"):
        found = list(tiny_model.predict_iter(images, batch_size=2, on_error="skip"))
    assert [one is None for one in found] == [False, True, False]


def test_open_files_are_read_before_the_generator_continues(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    for index in range(6):
        Image.fromarray(picture(seed=index)).save(tmp_path / f"{index}.png")

    def opened() -> Iterator[Any]:
        for path in sorted(tmp_path.iterdir()):
            with path.open("rb") as file:
                yield file

    def in_one_buffer() -> Iterator[Any]:
        buffer = io.BytesIO()
        for path in sorted(tmp_path.iterdir()):
            buffer.seek(0)
            buffer.truncate()
            buffer.write(path.read_bytes())
            yield buffer

    expected = tiny_model.predict(tmp_path)
    for sources in (opened(), in_one_buffer()):
        found = list(tiny_model.predict_iter(sources, batch_size=2))
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
            assert ours.source is None


def test_wrong_options_and_sources_raise_immediately(tiny_model: RetinaNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read_ahead must be at least 0, got -1"):
        tiny_model.predict_iter([], read_ahead=-1)
    with pytest.raises(TypeError, match="read_ahead.*1.5"):
        tiny_model.predict_iter([], read_ahead=1.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="batch_size.*0"):
        tiny_model.predict_iter([], batch_size=0)
    with pytest.raises(ValueError, match=r"contains no images"):
        tiny_model.predict_iter(tmp_path)
    with pytest.raises(TypeError, match="sources must be a path"):
        tiny_model.predict_iter(3)  # type: ignore[call-overload]
    assert list(tiny_model.predict_iter([])) == []
