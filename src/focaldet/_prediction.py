"""Predict the objects in images: read ahead, run in batches, yield in order, show progress.

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
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from focaldet._checks import check_choice, check_integer, check_range
from focaldet.images import (
    SKIPPED_ERRORS,
    count_images,
    is_encoded,
    load_image,
    named_sources,
    read_encoded,
)
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from contextlib import AbstractContextManager

    from focaldet.detections import Detections
    from focaldet.images import ImageSource
    from focaldet.transforms import Preprocess

__all__ = ["DetectionModel", "Predictor"]

_MANY_IMAGES = 10  # from this many images on, a progress bar is shown by default
_MAX_READERS = 4  # threads that read files, if there are that many cores
_MAX_WAITING = 4  # batches' worth of images that may wait for others of the same padded size
_MAX_AGE = 16  # batches' worth of images that are read while one waits

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
    """Base class that adds :meth:`predict` and :meth:`predict_iter` to a detector.

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
        allow_urls: bool = ...,
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
        allow_urls: bool = ...,
    ) -> list[Detections | None]: ...

    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        score_threshold: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
        allow_urls: bool = False,
    ) -> list[Detections] | list[Detections | None]:
        """Detect objects in one or more images.

        :meth:`predict_iter` does the same for a stream of images that may have no end.

        A PyTorch model runs in evaluation mode without gradients and is then restored to its
        previous mode. Several threads may call this method at the same time, as long as none of them
        trains the model or changes its weights, device or options.

        Args:
            sources: A path, the bytes of an image file, a file that is open in binary mode, a PIL
                image, an ``[H, W, 3]`` uint8 array, a ``[3, H, W]`` tensor (uint8, or floating-point
                in [0, 1]), a list or generator of these, or a folder, whose images are read in name
                order. See :func:`focaldet.images.load_image`.
            batch_size: Images per forward pass. Only images with equal padded sizes share a batch;
                up to ``4 * batch_size`` of them wait to fill one while others are read ahead, none
                for more than ``16 * batch_size`` other images. None uses 1, except for an exported
                file with a fixed shape, which uses the batch size it was exported with: it always
                runs a full batch, filled up with blank images.
            score_threshold: Keep detections that score above this. None uses the config's. An
                exported file that includes the post-processing accepts no lower one than its own.
            on_error: "raise", or "skip" to warn about missing or unreadable files and return None.
            progress: Whether to show a progress bar, if tqdm is installed. None shows one on a
                terminal for ten or more images.
            allow_urls: Whether to download http and https URLs among the sources, with limits on
                size and time. See :func:`focaldet.images.load_image`.

                .. versionadded:: 0.3.0

        Returns:
            One :class:`~focaldet.Detections` per image, in input order, on the CPU, with boxes in
            pixels of the input image and ``source`` set for paths and URLs. A single image gives a
            list of one.

        Raises:
            FileNotFoundError: If a file does not exist. Every message names the source.
            DownloadError: If an image cannot be downloaded.
            ValueError: If an option is invalid, a source is damaged or has a wrong shape or values,
                or an image does not fit an exported file with a fixed shape.
            TypeError: If a source has an unsupported type or dtype.
        """
        model, batch_size = self._check_options(batch_size, score_threshold, on_error)
        total = count_images(sources)
        images = _read_ahead(
            model.preprocess,
            named_sources(sources),
            _default_read_ahead(batch_size),
            skip=on_error == "skip",
            allow_urls=allow_urls,
        )
        results = []
        with (
            _evaluation_mode(model),  # once, because it visits every module
            _progress_bar(total, wanted=progress) as advance,
            contextlib.closing(_predict(model, images, batch_size, score_threshold)) as stream,
        ):
            for found in stream:
                results.append(found)
                advance(1)
        return results

    @overload
    def predict_iter(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["raise"] = ...,
        read_ahead: int | None = ...,
        allow_urls: bool = ...,
    ) -> Generator[Detections]: ...

    @overload
    def predict_iter(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["skip"],
        read_ahead: int | None = ...,
        allow_urls: bool = ...,
    ) -> Generator[Detections | None]: ...

    def predict_iter(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        score_threshold: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        read_ahead: int | None = None,
        allow_urls: bool = False,
    ) -> Generator[Detections] | Generator[Detections | None]:
        """Detect objects in a stream of images, and yield the results in order as they are found.

        The detections are those of :meth:`predict`. ``sources`` may be a generator without an end,
        such as the frames of a camera, or millions of files: the images and results in memory stay
        few. If reading an image raises an error, the results of all images before it come first.

        The threads that read images start with the first result, and stop when the generator ends or
        is closed. A PyTorch model is in evaluation mode only while the network runs, so between two
        results its mode is the caller's.

        Args:
            sources: As for :meth:`predict`. The items are requested in the caller's thread, and only
                while it waits for a result. Open files are read immediately, but an array or tensor
                must not be changed before its result has come.
            batch_size: As for :meth:`predict`.
            score_threshold: As for :meth:`predict`.
            on_error: "raise", or "skip" to warn about missing or unreadable files and yield None.
            read_ahead: Number of images that are read in other threads while the network runs. When
                an image has the same padded size as those before it, its result comes after at most
                ``read_ahead + batch_size - 1`` more images have been requested; otherwise, after at
                most ``read_ahead + 16 * batch_size``. With 0 and a batch size of 1, each result comes
                before the next image is requested, as suits a live source. None uses
                ``batch_size + 3``, or less on a computer with fewer than four cores.
            allow_urls: As for :meth:`predict`.

        Returns:
            A generator of one :class:`~focaldet.Detections` per image, as :meth:`predict` returns
            them.

        Raises:
            OSError, ValueError, TypeError: As :meth:`predict`. Invalid options raise immediately, and
                images when the generator reaches them.

        .. versionadded:: 0.3.0
        """
        model, batch_size = self._check_options(batch_size, score_threshold, on_error)
        if read_ahead is None:
            read_ahead = _default_read_ahead(batch_size)
        else:
            check_integer("read_ahead", read_ahead)
            check_range("read_ahead", read_ahead, 0)
        images = _read_ahead(
            model.preprocess,
            named_sources(sources),
            read_ahead,
            skip=on_error == "skip",
            allow_urls=allow_urls,
        )
        running = partial(_evaluation_mode, model)
        return _predict(model, images, batch_size, score_threshold, running)

    def _check_options(
        self, batch_size: int | None, score_threshold: float | None, on_error: str
    ) -> tuple[DetectionModel[Any], int]:
        """Check the options that all methods share, and return the model and its batch size."""
        check_choice("on_error", on_error, ("raise", "skip"))
        if batch_size is not None:
            check_range("batch_size", batch_size, 1)
        if score_threshold is not None:
            check_range("score_threshold", score_threshold, 0, 1)
        return self._choose_model(batch_size, score_threshold)

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
    """An image ready for the network: a batch of one, and the path or URL it was read from."""

    batch: ImageBatch
    path: str | None

    @property
    def shape(self) -> tuple[object, ...]:
        """What images must have in common to share a batch."""
        return self.batch.tensor.shape, self.batch.tensor.device


def _predict(
    model: DetectionModel[Any],
    images: Generator[_Prepared | None],
    batch_size: int,
    score_threshold: float | None,
    running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Generator[Any]:
    """Yield the detections of each image, or None if it was skipped, in order.

    The network runs in a context that ``running`` returns.
    """
    found: dict[int, Detections | None] = {}
    upcoming = 0
    with contextlib.closing(images):
        for group in _group(images, batch_size):
            with running():
                found.update(_predict_group(model, group, score_threshold))
            group.clear()  # so that the images are not in memory while the caller works
            while upcoming in found:
                yield found.pop(upcoming)
                upcoming += 1


@torch.no_grad()
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

    Once a few batches' worth of images wait, the shape that has waited longest is yielded, and so is
    a shape that has waited while many others came. If reading fails, all that wait come first.
    """
    waiting: dict[object, dict[int, _Prepared | None]] = {}  # the longest waiting first
    try:
        for index, image in enumerate(images):
            if image is None:
                yield {index: None}
            else:
                waiting.setdefault(image.shape, {})[index] = image
                if len(waiting[image.shape]) == batch_size:
                    yield waiting.pop(image.shape)
                elif sum(map(len, waiting.values())) >= _MAX_WAITING * batch_size:
                    yield _pop_oldest(waiting)
            del image
            while waiting and index - _first(waiting) >= _MAX_AGE * batch_size:
                yield _pop_oldest(waiting)
    except Exception:
        while waiting:
            yield _pop_oldest(waiting)
        raise
    while waiting:
        yield _pop_oldest(waiting)


def _first(waiting: dict[object, dict[int, _Prepared | None]]) -> int:
    """Return the index of the image that has waited longest."""
    return next(iter(next(iter(waiting.values()))))


def _pop_oldest(
    waiting: dict[object, dict[int, _Prepared | None]],
) -> dict[int, _Prepared | None]:
    return waiting.pop(next(iter(waiting)))


def _count_readers() -> int:
    return min(_MAX_READERS, os.cpu_count() or 1)


def _default_read_ahead(batch_size: int) -> int:
    return _count_readers() + batch_size - 1


def _read_ahead(
    preprocess: Preprocess,
    sources: Iterator[tuple[str, ImageSource]],
    read_ahead: int,
    *,
    skip: bool,
    allow_urls: bool,
) -> Generator[_Prepared | None]:
    """Read and resize images in a few threads, and yield them in order.

    The caller's thread iterates over ``sources``, which therefore need not be thread-safe. At most
    ``read_ahead`` images are requested beyond the one that is yielded. If ``sources`` fails, the
    images before it are yielded first.
    """
    pending: deque[Future[_Prepared]] = deque()
    pool = ThreadPoolExecutor(_count_readers(), thread_name_prefix="focaldet-reader")
    prepare = partial(_prepare, preprocess, allow_urls=allow_urls)
    try:
        while True:
            try:
                name, source = next(sources)
            except StopIteration:
                break
            except Exception:
                while pending:
                    yield _result(pending, skip=skip)
                raise
            pending.append(_start(pool, prepare, source, name))
            del source
            if len(pending) > read_ahead:
                yield _result(pending, skip=skip)
        while pending:
            yield _result(pending, skip=skip)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(
    pool: ThreadPoolExecutor,
    prepare: Callable[[ImageSource, str], _Prepared],
    source: ImageSource,
    name: str,
) -> Future[_Prepared]:
    """Prepare an image in a thread of the pool, except for what must happen in the caller's."""
    done: Future[_Prepared] = Future()
    try:
        if isinstance(source, Tensor) and source.device.type != "cpu":
            # Another thread would not wait for pending work on the device.
            done.set_result(prepare(source, name))
            return done
        if is_encoded(source):
            # The caller may close the file, or use the buffer again, before a thread reads it.
            source = read_encoded(source, name)
    except Exception as error:  # noqa: BLE001  # raised when it is this image's turn
        done.set_exception(error)
        return done
    return pool.submit(prepare, source, name)


@torch.no_grad()  # gradient mode is set per thread
def _prepare(
    preprocess: Preprocess, source: ImageSource, name: str, *, allow_urls: bool
) -> _Prepared:
    image = load_image(source, name, channels=preprocess.in_channels, allow_urls=allow_urls)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    # load_image has checked the values.
    return _Prepared(preprocess([image], validate=False), path)


def _result(pending: deque[Future[_Prepared]], *, skip: bool) -> _Prepared | None:
    try:
        return pending.popleft().result()
    except SKIPPED_ERRORS as error:
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
