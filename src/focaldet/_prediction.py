"""Predict the objects in images: read ahead, run in batches, show progress.

Works with any :class:`DetectionModel`, whether PyTorch or an exported file runs the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from focaldet._checks import check_choice, check_range
from focaldet.images import UnreadableImageError, count_images, load_image, named_sources
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from focaldet.detections import Detections
    from focaldet.images import ImageSource
    from focaldet.transforms import Preprocess

__all__ = ["DetectionModel", "Predictor"]

_MANY_IMAGES = 10  # from this many images on, a progress bar is shown by default
_MAX_READERS = 4  # threads that read files, if there are that many cores
_MAX_WAITING = 4  # batches' worth of images that may wait for others of the same padded size

Output = TypeVar("Output")


class DetectionModel(Protocol[Output]):
    """What prediction needs of a model.

    A model that is an ``nn.Module`` is also switched to evaluation mode and back.
    """

    @property
    def preprocess(self) -> Preprocess:
        """Turns a list of images into an :class:`~focaldet.structures.ImageBatch`."""

    def __call__(self, batch: ImageBatch, /) -> Output:
        """Run the network on a preprocessed batch."""

    def detections(
        self, output: Output, *, score_threshold: float | None = None
    ) -> list[Detections]:
        """Return the objects in each image of the batch, in pixels of the input image."""


class Predictor(ABC):
    """Base class that adds :meth:`predict` to a detector.

    A subclass implements :meth:`_choose_model`.
    """

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["raise"] = ...,
        progress: bool | None = ...,
    ) -> list[Detections]: ...

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["skip"],
        progress: bool | None = ...,
    ) -> list[Detections | None]: ...

    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        score_threshold: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> list[Detections] | list[Detections | None]:
        """Detect objects in one or more images.

        A PyTorch model runs in evaluation mode without gradients and is then restored to its
        previous mode. Several threads may call this method at the same time, as long as none of them
        trains the model or changes its weights, device or options.

        Args:
            sources: A path, a PIL image, an ``[H, W, 3]`` uint8 array, a ``[3, H, W]`` tensor
                (uint8, or floating-point in [0, 1]), a list or generator of these, or a folder,
                whose images are read in name order. See :func:`focaldet.images.load_image`.
            batch_size: Images per forward pass. Only images with equal padded sizes share a batch;
                up to ``4 * batch_size`` of them wait to fill one while others are read ahead. None
                uses 1, except for an exported file with a fixed shape, which uses the batch size it
                was exported with: it always runs a full batch, filled up with blank images.
            score_threshold: Keep detections that score above this. None uses the config's. An
                exported file that includes the post-processing accepts no lower one than its own.
            on_error: "raise", or "skip" to warn about missing or unreadable files and return None.
            progress: Whether to show a progress bar, if tqdm is installed. None shows one on a
                terminal for ten or more images.

        Returns:
            One :class:`~focaldet.Detections` per image, in input order, on the CPU, with boxes in
            pixels of the input image and ``source`` set for files. A single image gives a list of
            one.

        Raises:
            FileNotFoundError: If a file does not exist. Every message names the source.
            ValueError: If an option is invalid, a source is damaged or has a wrong shape or values,
                or an image does not fit an exported file with a fixed shape.
            TypeError: If a source has an unsupported type or dtype.
        """
        check_choice("on_error", on_error, ("raise", "skip"))
        if batch_size is not None:
            check_range("batch_size", batch_size, 1)
        if score_threshold is not None:
            check_range("score_threshold", score_threshold, 0, 1)
        model, batch_size = self._choose_model(batch_size, score_threshold)
        return _predict(
            model,
            sources,
            batch_size=batch_size,
            score_threshold=score_threshold,
            skip=on_error == "skip",
            progress=progress,
        )

    @abstractmethod
    def _choose_model(
        self, batch_size: int | None, score_threshold: float | None
    ) -> tuple[DetectionModel[Any], int]:
        """Return the model that :meth:`predict` runs, and its batch size.

        Args:
            batch_size: The caller's, at least 1. None asks for the default.
            score_threshold: The caller's, in [0, 1], or None.

        Raises:
            ValueError: If the model does not support these values.
        """


class _Prepared(NamedTuple):
    """An image ready for the network: a batch of one, and the path it was read from."""

    batch: ImageBatch
    path: str | None

    @property
    def shape(self) -> tuple[object, ...]:
        """What images must have in common to share a batch."""
        return self.batch.tensor.shape, self.batch.tensor.device


@torch.no_grad()
def _predict(
    model: DetectionModel[Any],
    sources: ImageSource | Iterable[ImageSource],
    *,
    batch_size: int,
    score_threshold: float | None,
    skip: bool,
    progress: bool | None,
) -> list[Detections | None]:
    images = _read_ahead(model.preprocess, sources, batch_size, skip=skip)
    found: dict[int, Detections | None] = {}
    with (
        _evaluation_mode(model),
        _progress_bar(count_images(sources), wanted=progress) as advance,
        contextlib.closing(images),
    ):
        for group in _group(images, batch_size):
            found.update(_predict_group(model, group, score_threshold))
            advance(len(group))
    return [found[index] for index in range(len(found))]


def _predict_group(
    model: DetectionModel[Any], group: dict[int, _Prepared | None], score_threshold: float | None
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
    """Group images of the same shape, keyed by their index. A skipped image forms its own group.

    Once a few batches' worth of images wait, the shape that has waited longest is yielded.
    """
    waiting: dict[object, dict[int, _Prepared | None]] = {}
    for index, image in enumerate(images):
        if image is None:
            yield {index: None}
            continue
        waiting.setdefault(image.shape, {})[index] = image
        if len(waiting[image.shape]) == batch_size:
            yield waiting.pop(image.shape)
        elif sum(map(len, waiting.values())) >= _MAX_WAITING * batch_size:
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
    """Read and resize images in a few threads, up to a batch ahead, and yield them in order.

    The caller's thread iterates over ``sources``, which therefore need not be thread-safe.
    """
    readers = min(_MAX_READERS, os.cpu_count() or 1)
    pending: deque[Future[_Prepared]] = deque()
    pool = ThreadPoolExecutor(readers, thread_name_prefix="focaldet-reader")
    try:
        for name, source in named_sources(sources):
            if isinstance(source, Tensor) and source.device.type != "cpu":
                # Not in another thread, which would not wait for pending work on the device.
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


@torch.no_grad()  # gradient mode is set per thread
def _prepare(preprocess: Preprocess, source: ImageSource, name: str) -> _Prepared:
    image = load_image(source, name, channels=preprocess.in_channels)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    # load_image has checked the values.
    return _Prepared(preprocess([image], validate=False), path)


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
def _evaluation_mode(model: object) -> Iterator[None]:
    """Put a module in evaluation mode, and restore the mode of each submodule afterwards.

    If several threads predict with the same model, the last one to finish restores the modes.
    """
    if not isinstance(model, nn.Module):
        yield
        return
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
    """Yield a function that advances a progress bar, or does nothing if there is none."""
    many = total is None or total >= _MANY_IMAGES
    installed = importlib.util.find_spec("tqdm") is not None
    if not installed or wanted is False or (wanted is None and not many):
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # disable=None: tqdm shows the bar only on a terminal.
    with tqdm(total=total, unit="image", disable=False if wanted else None) as bar:
        yield bar.update
