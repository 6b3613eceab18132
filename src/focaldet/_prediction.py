"""From files to detections: read ahead, run in batches, show how far it is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from focaldet._checks import check_choice, check_range
from focaldet.images import UnreadableImageError, count_images, load_image, named_sources
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from torch import nn

    from focaldet.detections import Detections
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet
    from focaldet.transforms import Preprocess

__all__ = ["predict_images"]

_LONG_INPUT = 10  # images from which a progress bar is shown by itself
_READERS = 4  # threads that read files, where there are as many cores
_WAITING = 4  # batches' worth of images that may wait for others of their shape


class _Prepared(NamedTuple):
    """An image ready for the network: a batch of one, and the path it was read from."""

    batch: ImageBatch
    path: str | None

    @property
    def shape(self) -> tuple[object, ...]:
        """What images must share to go through the network together."""
        return self.batch.tensor.shape, self.batch.tensor.device


@torch.no_grad()
def predict_images(
    model: RetinaNet,
    sources: ImageSource | Iterable[ImageSource],
    *,
    batch_size: int,
    score_threshold: float | None,
    on_error: Literal["raise", "skip"],
    progress: bool | None,
) -> list[Detections | None]:
    """Do what ``RetinaNet.predict`` says."""
    check_range("batch_size", batch_size, 1)
    check_choice("on_error", on_error, ("raise", "skip"))
    images = _read_ahead(model.preprocess, sources, batch_size, skip=on_error == "skip")
    found: dict[int, Detections | None] = {}
    with (
        _evaluating(model),
        _progress_bar(count_images(sources), wanted=progress) as advance,
        contextlib.closing(images),
    ):
        for group in _group(images, batch_size):
            found.update(_predict_group(model, group, score_threshold))
            advance(len(group))
    return [found[index] for index in range(len(found))]


def _predict_group(
    model: RetinaNet, group: dict[int, _Prepared | None], score_threshold: float | None
) -> dict[int, Detections | None]:
    prepared = [image for image in group.values() if image is not None]
    if not prepared:
        return dict.fromkeys(group)
    batch = ImageBatch(
        torch.cat([image.batch.tensor for image in prepared]),
        [size for image in prepared for size in image.batch.sizes],
        [size for image in prepared for size in image.batch.original_sizes],
    )
    results = model.detections(model(batch), score_threshold=score_threshold)
    return {
        index: result.to("cpu").with_source(image.path)
        for index, image, result in zip(group, prepared, results, strict=True)
    }


def _group(
    images: Iterable[_Prepared | None], batch_size: int
) -> Iterator[dict[int, _Prepared | None]]:
    """Bring images of one shape together, each with its index; None comes by itself.

    No more than a few batches' worth wait for their like; then those that came first go.
    """
    waiting: dict[object, dict[int, _Prepared | None]] = {}
    for index, image in enumerate(images):
        if image is None:
            yield {index: None}
            continue
        waiting.setdefault(image.shape, {})[index] = image
        if len(waiting[image.shape]) == batch_size:
            yield waiting.pop(image.shape)
        elif sum(map(len, waiting.values())) >= _WAITING * batch_size:
            yield waiting.pop(next(iter(waiting)))
        del image
    while waiting:
        yield waiting.pop(next(iter(waiting)))


def _read_ahead(
    preprocess: Preprocess,
    sources: ImageSource | Iterable[ImageSource],
    batch_size: int,
    *,
    skip: bool,
) -> Generator[_Prepared | None]:
    """Read and resize images in a few threads, in order, by a batch further than they are taken.

    ``sources`` is advanced in the caller's thread.
    """
    readers = min(_READERS, os.cpu_count() or 1)
    pending: deque[Future[_Prepared]] = deque()
    pool = ThreadPoolExecutor(readers, thread_name_prefix="focaldet-reader")
    try:
        for name, source in named_sources(sources):
            if isinstance(source, Tensor) and source.device.type != "cpu":
                # At once: another thread would not wait for what the device still computes.
                pending.append(Future())
                pending[-1].set_result(_prepare(preprocess, source, name))
            else:
                pending.append(pool.submit(_prepare, preprocess, source, name))
            del source
            if len(pending) >= readers + batch_size:
                yield _result(pending, skip=skip)
        while pending:
            yield _result(pending, skip=skip)
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()  # a thread has a setting of its own
def _prepare(preprocess: Preprocess, source: ImageSource, name: str) -> _Prepared:
    image = load_image(source, name, channels=preprocess.in_channels)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    pixels = image if image.is_floating_point() else image.float() / 255
    return _Prepared(preprocess([pixels], validate=False), path)  # load_image has checked values


def _result(pending: deque[Future[_Prepared]], *, skip: bool) -> _Prepared | None:
    try:
        return pending.popleft().result()
    except (UnreadableImageError, FileNotFoundError) as error:
        if not skip:
            raise
        warnings.warn(f"Skipped an image: {error}", UserWarning, stacklevel=2)
        return None


_modes_lock = threading.Lock()
_modes: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back in its own mode afterwards.

    Of several threads at work the last one puts them back.
    """
    with _modes_lock:
        users, training = _modes.get(model, (0, []))
        training = training + [module for module in model.modules() if module.training]
        model.eval()
        _modes[model] = users + 1, training
    try:
        yield
    finally:
        with _modes_lock:
            users, training = _modes.pop(model)
            if users > 1:
                _modes[model] = users - 1, training
            else:
                for module in training:
                    module.training = True


@contextlib.contextmanager
def _progress_bar(total: int | None, *, wanted: bool | None) -> Iterator[Callable[[int], object]]:
    """Give a function that advances a progress bar, or does nothing where none is wanted."""
    long = total is None or total >= _LONG_INPUT
    installed = importlib.util.find_spec("tqdm") is not None
    if not installed or wanted is False or (wanted is None and not long):
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # disable=None: only where a person is watching
    with tqdm(total=total, unit="image", disable=False if wanted else None) as bar:
        yield bar.update
