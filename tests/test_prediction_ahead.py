"""``predict``: reading ahead, batching images of the same shape, and threads."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet import Detections, RetinaNet

LAND, PORTRAIT, SQUARE = (48, 96), (96, 48), (64, 64)


def picture(size: tuple[int, int], seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def assert_same(found: list[Detections], expected: list[Detections]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs) > 0
        assert ours.image_size == theirs.image_size
        assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-6)


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("focaldet-reader")]


def batch_shapes(model: RetinaNet) -> list[tuple[int, ...]]:
    """Return a list to which the shape of each batch is appended when the network runs on it."""
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


def test_images_of_the_same_shape_share_batches_and_results_keep_their_order(
    tiny_model: RetinaNet,
) -> None:
    sizes = [LAND, PORTRAIT, LAND, SQUARE, PORTRAIT, LAND, LAND, PORTRAIT]
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    expected = tiny_model.predict(images)
    seen = batch_shapes(tiny_model)
    found = tiny_model.predict(images, batch_size=2)
    assert_same(found, expected)
    assert [f.image_size for f in found] == sizes
    land, portrait, square = (3, 64, 96), (3, 96, 64), (3, 64, 64)
    full = [(2, *land), (2, *portrait), (2, *land)]
    assert seen == [*full, (1, *square), (1, *portrait)]


@pytest.mark.parametrize(("shapes", "first"), [(7, 2), (8, 1)])
def test_at_most_four_batches_worth_of_images_wait_before_the_oldest_runs(
    tiny_model: RetinaNet, shapes: int, first: int
) -> None:
    tiny_model.preprocess.min_size, tiny_model.preprocess.max_size = 32, 999
    images = [picture((32, 32 * (i + 1)), i) for i in range(shapes)]
    seen = batch_shapes(tiny_model)
    tiny_model.predict([*images, images[0]], batch_size=2)
    assert seen[0] == (first, 3, 32, 32)
    assert len(seen) == shapes + 2 - first


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "count", [60, pytest.param(10_000, marks=pytest.mark.slow)], ids="{} images".format
)
def test_few_images_are_in_memory_at_a_time(
    tiny_model: RetinaNet, batch_size: int, count: int
) -> None:
    alive = {"sources": 0, "batches": 0}
    most = dict(alive)
    lock = threading.Lock()

    def watch(value: Any, kind: str) -> None:
        def gone() -> None:
            with lock:
                alive[kind] -= 1

        with lock:
            alive[kind] += 1
            most[kind] = max(most[kind], alive[kind])
        weakref.finalize(value, gone)

    def endless() -> Iterator[Any]:
        for index in range(count):
            image = picture((LAND, PORTRAIT, SQUARE)[index % 3], index)
            watch(image, "sources")
            yield image
            del image

    tiny_model.preprocess.register_forward_hook(lambda _, __, out: watch(out.tensor, "batches"))
    assert len(tiny_model.predict(endless(), batch_size=batch_size)) == count
    ahead = 4 + batch_size  # four readers
    assert most["sources"] <= ahead + 2
    assert most["batches"] <= ahead + 4 * batch_size + batch_size + 1
    assert alive == {"sources": 0, "batches": 0}


def test_a_generator_runs_in_the_thread_that_predicts(tiny_model: RetinaNet) -> None:
    threads = set()

    def camera() -> Iterator[Any]:
        for index in range(12):
            threads.add(threading.get_ident())
            yield picture(SQUARE, index)

    tiny_model.predict(camera())
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_first_bad_image_is_named_and_no_reader_thread_remains(
    tiny_model: RetinaNet, tmp_path: Path, batch_size: int
) -> None:
    for index in range(12):
        (tmp_path / f"{index:02}.jpg").write_text("not a photo")
    paths = sorted(tmp_path.glob("*.jpg"))
    with pytest.raises(ValueError, match=r"00\.jpg"):
        tiny_model.predict([picture(SQUARE), *paths], batch_size=batch_size)
    assert readers() == []
    with pytest.warns(UserWarning, match="Skipped an image") as warned:
        found = tiny_model.predict(
            [picture(SQUARE), *paths], batch_size=batch_size, on_error="skip"
        )
    assert [path.name in str(w.message) for path, w in zip(paths, warned, strict=True)] == [
        True
    ] * 12
    assert [f is None for f in found] == [False] + [True] * 12


def test_an_interrupt_stops_the_readers_and_restores_the_modes(tiny_model: RetinaNet) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    tiny_model.train()
    hook = tiny_model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.predict([picture(SQUARE)] * 30, batch_size=2)
    assert readers() == []
    assert all(module.training for module in tiny_model.modules())
    hook.remove()
    assert len(tiny_model.predict(picture(SQUARE))) == 1


def test_results_are_the_same_in_several_threads_and_in_every_run(
    tiny_model: RetinaNet,
) -> None:
    images = [picture((40 + 7 * (i % 5), 60), i) for i in range(10)]
    expected = tiny_model.predict(images, batch_size=2)
    tiny_model.train()  # every thread must find it in evaluation mode until the last one is done
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: tiny_model.predict(images, batch_size=2), range(12)))
    for found in runs:
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours.boxes, theirs.boxes, rtol=0, atol=0)
            assert_close(ours.scores, theirs.scores, rtol=0, atol=0)
    assert all(module.training for module in tiny_model.modules())


def test_images_that_require_gradients_leave_no_graph(tiny_model: RetinaNet) -> None:
    image = torch.rand(3, 64, 64, requires_grad=True)
    [found] = tiny_model.predict(image)
    assert not found.boxes.requires_grad


def test_a_preprocessed_batch_is_used_unchanged(tiny_model: RetinaNet) -> None:
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 96)]
    batch = tiny_model.preprocess(images)
    expected, found = tiny_model(images), tiny_model(batch)
    assert found.sizes == expected.sizes
    assert found.original_sizes == [(64, 80), (50, 96)]
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert_close(ours, theirs)
