"""``predict`` on an accelerator: the next batch is launched before the results of the last one are read.

There is no GPU here. Prediction runs on the CPU as if it were one, with the steps recorded, and on fake
CUDA tensors with fake streams.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from focaldet import RetinaNet, _prediction, _streams
from focaldet._detector import RetinaNetDetector
from focaldet._streams import CudaTransfers, Transfers
from tests.helpers.fake_cuda import Counts, fake_cuda
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from focaldet import Detections

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*create_unbacked_symint:FutureWarning"
)  # torchvision's
LAND, PORTRAIT, SQUARE = (48, 96), (96, 48), (64, 64)


def picture(size: tuple[int, int] = SQUARE, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def tiny_model(**options: Any) -> RetinaNet:
    config = TINY_CONFIG.replace(**options)
    return RetinaNet.from_config(config, backbone=TinyBackbone()).eval()


class Recorded(Transfers):
    """Lets batches overlap, as on a GPU, and records the order of the steps."""

    copies = overlaps = True

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.pinned: list[torch.Tensor] = []
        self.outputs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._batches = itertools.count()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor)
        return tensor

    def mark(self) -> int:
        batch = next(self._batches)
        self.steps.append(f"launch {batch}")
        return batch

    @contextlib.contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        self.steps.append(f"read {mark}")
        yield


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(RetinaNetDetector, "_transfers", lambda _: recorded)
    return recorded


def assert_equal(found: Sequence[Detections], expected: Sequence[Detections]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs) > 0
        assert ours.image_size == theirs.image_size
        for name in ("boxes", "scores", "labels"):
            assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


def test_a_batch_is_launched_before_the_last_one_is_read(transfers: Recorded) -> None:
    tiny_model().predict([picture()] * 6, batch_size=2)
    assert transfers.steps == ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "read 2"]


@pytest.mark.parametrize("options", [{}, {"round_pixels": True}], ids=str)
@pytest.mark.parametrize(("batch_size", "read_ahead"), [(1, 1), (2, 1), (2, 3), (3, None)])
def test_results_are_the_same_to_the_last_bit(
    options: Any, batch_size: int, read_ahead: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**options)
    sizes = [(LAND, SQUARE, SQUARE, PORTRAIT, (50, 64))[i % 5] for i in range(11)]
    images: list[Any] = [picture(size, seed) for seed, size in enumerate(sizes)]
    images[3:5] = [torch.rand(3, 48, 96), torch.rand(3, 20, 96, dtype=torch.float64)]
    call: dict[str, Any] = {"batch_size": batch_size, "read_ahead": read_ahead}
    expected = list(model.predict_iter(images, **call))
    monkeypatch.setattr(RetinaNetDetector, "_transfers", lambda _: Recorded())
    assert_equal(list(model.predict_iter(images, **call)), expected)


@pytest.mark.parametrize(
    ("batch_size", "read_ahead", "overlaps"),
    [(1, 0, False), (1, 1, True), (1, 3, True), (3, 2, False), (3, 3, True), (3, 7, True)],
)
def test_a_batch_in_flight_counts_as_read_ahead(
    transfers: Recorded, batch_size: int, read_ahead: int, overlaps: bool
) -> None:
    requested = 0

    def camera() -> Iterator[Any]:
        nonlocal requested
        while True:
            requested += 1
            yield picture()

    call: dict[str, Any] = {"batch_size": batch_size, "read_ahead": read_ahead}
    found = tiny_model().predict_iter(camera(), **call)
    for index in range(7):
        next(found)
        first_of_batch = index - index % batch_size
        assert requested == first_of_batch + batch_size + read_ahead
    found.close()
    assert (transfers.steps[1] == "launch 1") == overlaps


@pytest.mark.parametrize(("batch_size", "read_ahead"), [(1, 1), (2, 2), (2, 4), (3, 4)])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_batch_in_flight_does_not_wait_for_images_of_other_sizes(
    transfers: Recorded, batch_size: int, read_ahead: int, skipped: bool
) -> None:
    requested = 0

    def camera() -> Iterator[Any]:
        nonlocal requested
        for index in itertools.count():
            requested += 1
            width = 64 if index < batch_size else 64 + 32 * index
            yield b"no image" if skipped and index >= batch_size else picture((64, width))

    model = tiny_model(max_size=10_000)
    call: dict[str, Any] = {"batch_size": batch_size, "read_ahead": read_ahead}
    found = model.predict_iter(camera(), on_error="skip", **call)
    with pytest.warns(UserWarning, match="Skipped") if skipped else contextlib.nullcontext():
        assert next(found) is not None
    assert requested <= 1 + read_ahead + batch_size - 1
    assert transfers.steps[-1] == "read 0"
    found.close()


def test_an_image_of_a_rare_size_comes_after_the_promised_number_of_others(
    transfers: Recorded,
) -> None:
    requested = 0

    def camera() -> Iterator[Any]:
        nonlocal requested
        for size in itertools.chain([LAND], itertools.repeat(SQUARE)):
            requested += 1
            yield picture(size)

    found = tiny_model().predict_iter(camera(), batch_size=2, read_ahead=3)
    assert next(found).image_size == LAND
    assert requested <= 1 + 3 + 16 * 2
    assert "launch 1" in transfers.steps[:3]
    found.close()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_results_before_an_unreadable_image_come_first(
    transfers: Recorded, batch_size: int
) -> None:
    images = [picture(LAND), picture(), picture(), b"no image", picture()]
    found = tiny_model().predict_iter(images, batch_size=batch_size)
    assert [next(found).image_size for _ in range(3)] == [LAND, SQUARE, SQUARE]
    with pytest.raises(ValueError, match=r"sources\[3\]"):
        next(found)
    assert len(transfers.steps) % 2 == 0  # each batch was read


def fail_in_call(number: int, function: Any) -> Any:
    calls = itertools.count()

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise RuntimeError("the network failed")
        return function(*args, **options)

    return failing


def test_a_network_that_fails_does_not_lose_the_batch_in_flight(
    transfers: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "forward", fail_in_call(2, model.forward))
    found = model.predict_iter([picture()] * 5, read_ahead=3)
    assert [len(next(found)) > 0 for _ in range(2)] == [True, True]
    with pytest.raises(RuntimeError, match="the network failed"):
        next(found)
    assert transfers.steps == ["launch 0", "launch 1", "read 0", "read 1"]


def test_nothing_is_read_after_a_batch_that_could_not_be_read(
    transfers: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "detections", fail_in_call(1, model.detections))
    found = model.predict_iter([picture()] * 5, read_ahead=3)
    next(found)
    with pytest.raises(RuntimeError, match="the network failed"):
        next(found)
    assert transfers.steps == ["launch 0", "launch 1", "read 0", "launch 2", "read 1"]
    with pytest.raises(StopIteration):
        next(found)


def test_the_mode_between_results_is_the_callers(transfers: Recorded) -> None:
    model = tiny_model()
    expected = model.predict([picture(seed=seed) for seed in range(4)])
    model.train()
    modes = []
    model.head.register_forward_pre_hook(lambda *_: modes.append(model.training))
    found = []
    for one in model.predict_iter(picture(seed=seed) for seed in range(4)):
        assert all(module.training for module in model.modules())
        found.append(one)
    assert modes == [False] * 4
    assert_equal(found, expected)
    assert "launch 1" in transfers.steps[:2]


def test_closing_the_generator_drops_the_batch_in_flight(transfers: Recorded) -> None:
    model = tiny_model()
    outputs: list[weakref.ref[Any]] = []
    model.head.register_forward_hook(lambda _, __, maps: outputs.append(weakref.ref(maps[0][0])))
    found = model.predict_iter([picture()] * 9, read_ahead=2)
    for index in range(3):
        next(found)
        gc.collect()
        alive = [ref() is not None for ref in outputs]
        assert alive == [False] * (index + 1) + [True]
    found.close()
    gc.collect()
    assert outputs[-1]() is None
    assert transfers.steps[-2:] == ["launch 3", "read 2"]


def test_images_are_pinned_in_bytes_where_pixels_are_rounded(transfers: Recorded) -> None:
    images = [picture(), torch.rand(3, 64, 64), torch.rand(3, 64, 64, dtype=torch.float64)]
    tiny_model(round_pixels=True).predict(images)
    found = Counter(one.dtype for one in transfers.pinned)  # in the order of the threads
    assert found == {torch.uint8: 2, torch.float64: 1}
    transfers.pinned.clear()
    tiny_model().predict(images)
    found = Counter(one.dtype for one in transfers.pinned)
    assert found == {torch.float32: 2, torch.float64: 1}


def test_tiles_and_augmented_views_are_the_same(
    transfers: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(max_detections=5)
    images = [picture((64, 100), seed) for seed in range(2)]
    options: dict[str, Any] = {"tile": (64, 64), "augment": True, "batch_size": 2}
    found = model.predict(images, **options)
    assert "launch 1" in transfers.steps[:2]
    monkeypatch.setattr(RetinaNetDetector, "_transfers", lambda _: Transfers())
    assert_equal(found, model.predict(images, **options))


# With fake CUDA tensors:


class FakeStream:
    """A stream that records what is called while it is the current one, and what it waits for."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"an event of {self.name}"


class FakeStreams:
    """Replaces the streams of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = FakeStream("main", self.events)
        side = FakeStream("side", self.events)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._switch)
        monkeypatch.setattr(_streams, "_side_stream", lambda _: side)
        monkeypatch.setattr(
            torch.Tensor,
            "record_stream",
            lambda _, stream: self.events.append(f"{stream.name} uses a copy"),
        )

    @contextlib.contextmanager
    def _switch(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class InlinePool:
    """Runs functions immediately: fake tensors exist only in the thread that makes them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_: Any) -> None:
        pass


@contextlib.contextmanager
def on_fake_cuda(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[tuple[RetinaNet, Counts, FakeStreams]]:
    """Yield a model on a fake CUDA device that has predicted before, so that constants are there."""
    monkeypatch.setattr(_prediction, "ThreadPoolExecutor", InlinePool)
    monkeypatch.setattr(_prediction, "load_image", lambda source, *_, **__: source)
    streams = FakeStreams(monkeypatch)
    with torch.no_grad(), fake_cuda() as counts:
        with torch.device("cuda:0"):
            model = tiny_model(**options)
        model.predict([torch.rand(3, 64, 64)])
        counts.clear()
        streams.events.clear()
        yield model, counts, streams


@pytest.mark.parametrize(
    ("batch_size", "num_batches", "round_pixels"), [(1, 3, False), (8, 2, True)]
)
def test_a_batch_has_two_waits_and_one_copy_per_image(
    batch_size: int, num_batches: int, round_pixels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_fake_cuda(monkeypatch, round_pixels=round_pixels) as (model, counts, _):
        images = [torch.rand(3, 64, 64) for _ in range(batch_size * num_batches)]
        model.predict(images, batch_size=batch_size)
    assert counts.num_waits == 2 * num_batches, counts.report()
    kinds = [kind for kind, _ in counts.uploads.elements()]
    assert kinds == ["pinned"] * (len(images) + num_batches), counts.report()  # and the sizes


def test_the_copy_and_detection_are_in_a_stream_beside_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with on_fake_cuda(monkeypatch) as (model, _, streams):
        events = streams.events

        def record(name: str) -> Any:
            return lambda *_: events.append(f"{name} in {streams.current.name}")

        model.head.register_forward_hook(record("network"))
        model.postprocess.register_forward_hook(record("detection"))
        model.predict([torch.rand(3, 64, 64)] * 2)
    copy = ["main waits for side", "main uses a copy"]
    read = ["side waits for an event of main", "detection in side", "main waits for side"]
    assert events == [*copy, "network in main", *copy, "network in main", *read, *read]


def test_images_on_the_gpu_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_fake_cuda(monkeypatch, round_pixels=True) as (model, counts, streams):
        image = torch.rand(3, 64, 64, device="cuda:0")
        model.predict([image, torch.rand(3, 64, 64), image], batch_size=2)
    assert sum(event == "main uses a copy" for event in streams.events) == 1
    assert counts.num_waits == 4, counts.report()


class OwnMaps(RetinaNet):
    """Its forward pass might return the same memory each time."""

    def forward_maps(self, images: torch.Tensor) -> Any:
        return super().forward_maps(images)


class OwnDetections(RetinaNet):
    """Its detections might depend on more than the output."""

    def detections(self, output: Any, **options: Any) -> list[Detections]:
        return super().detections(output, **options)


@pytest.mark.parametrize("change", ["none", "maps", "detections", "attribute", "part", "in place"])
def test_batches_overlap_unless_an_output_might_be_overwritten(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeStreams(monkeypatch)
    with fake_cuda(), torch.device("cuda:0"):
        model = tiny_model()
    assert isinstance(model._transfers(), CudaTransfers)
    if change in ("maps", "detections"):
        model.__class__ = OwnMaps if change == "maps" else OwnDetections
    elif change == "attribute":
        model.forward_maps = torch.compile(model.forward_maps, backend="eager")  # type: ignore[method-assign]
    elif change == "part":
        model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
    elif change == "in place":
        model.head.compile(backend="eager")
    assert model._transfers().overlaps == (change == "none")


def test_nothing_is_in_flight_if_an_output_might_be_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with on_fake_cuda(monkeypatch) as (model, counts, streams):
        model.__class__ = OwnDetections
        model.head.register_forward_hook(lambda *_: streams.events.append("network"))
        model.postprocess.register_forward_hook(
            lambda *_: streams.events.append(f"detection in {streams.current.name}")
        )
        model.predict([torch.rand(3, 64, 64)] * 2)
    copy = ["main waits for side", "main uses a copy"]
    assert streams.events == [*copy, "network", "detection in main"] * 2
    assert counts.num_blocking_uploads == 0


def test_on_a_cpu_nothing_is_copied_and_nothing_overlaps() -> None:
    transfers = tiny_model()._transfers()
    assert type(transfers) is Transfers
    assert not transfers.copies
    assert not transfers.overlaps
    tensor = torch.rand(3)
    assert transfers.pin(tensor) is transfers.to_device([tensor])[0] is tensor
