"""Predict the objects in images: read ahead, run in batches, yield in order, show progress.

Works with any :class:`DetectionModel`, whether PyTorch or an exported file runs the network.
"""

from __future__ import annotations

import contextlib
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

from focaldet._checks import check_choice, check_integer, check_range, shortened
from focaldet._progress_bar import progress_bar
from focaldet._streams import Transfers
from focaldet._tiles import WindowSources, check_tile
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
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections
    from focaldet.images import ImageSource
    from focaldet.postprocess import PostProcess
    from focaldet.transforms import Preprocess

__all__ = ["DetectionModel", "Predictor"]

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

    @property
    def postprocess(self) -> PostProcess:
        """Its limits and thresholds apply where the caller gives none."""

    @property
    def config(self) -> RetinaNetConfig:
        """Describes the classes."""

    def __call__(self, batch: ImageBatch, /) -> Output:
        """Run the network on a preprocessed batch."""

    def detections(
        self,
        output: Output,
        *,
        score_threshold: float | None = None,
        labels: Sequence[int] | None = None,
        max_detections: int | None = None,
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
        tile: tuple[int, int] | None = ...,
        overlap: float = ...,
        augment: bool = ...,
        classes: Sequence[int | str] | None = ...,
        max_detections: int | None = ...,
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
        tile: tuple[int, int] | None = ...,
        overlap: float = ...,
        augment: bool = ...,
        classes: Sequence[int | str] | None = ...,
        max_detections: int | None = ...,
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
        tile: tuple[int, int] | None = None,
        overlap: float = 0.25,
        augment: bool = False,
        classes: Sequence[int | str] | None = None,
        max_detections: int | None = None,
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
            tile: ``(height, width)`` in pixels of the input image. It requires a model with
                ``suppression="hard"``, as ``augment`` does. Larger images are cut into
                overlapping windows of this size, each of which is resized and predicted like an image,
                and the detections are merged as described below. Of a TIFF file with tiles or strips,
                and of an array, such as a ``numpy.memmap`` or an array of zarr or h5py, only the
                windows are read. With None, images are processed whole.

                .. versionadded:: 0.3.0
            overlap: Minimum overlap of neighbouring windows, as a fraction of the tile's sides in
                [0, 0.9]. Only used with ``tile``.

                .. versionadded:: 0.3.0
            augment: Whether to predict three views of each image or window: as it is, mirrored, and at
                0.8 times the size, which takes three times as long. Boxes of the same object are
                averaged, weighted by their scores, and keep the highest score.

                .. versionadded:: 0.3.0
            classes: Labels or class names to keep. The other classes are ignored before any limit
                applies, except in an exported file that includes the post-processing: it has
                already applied its limits. None keeps all.

                .. versionadded:: 0.3.0
            max_detections: Number of detections to keep per image. None uses the config's. With
                ``tile``, None keeps all, and each window is limited by the larger of the config's
                number and this; a log line counts the windows that reach it. An exported file that
                includes the post-processing accepts no larger number than its own.

                .. versionadded:: 0.3.0

        Windows are merged so that an object that an edge cuts gives one box:

        1. A box is cut if it ends within a margin of an edge of its window that is not an edge of the
           image. The margin is 1% of the window's side, at least 2 pixels and at most a quarter of
           the overlap. A cut box is dropped if another window contains it and cuts it at fewer sides,
           because that window sees more of the object. So an object that is smaller than the overlap
           is taken from a window that sees it whole.
        2. Cut boxes of the same class from two windows are joined if each is cut where the other
           window continues, and their parts in the region that both windows see intersect by at least
           half of the smaller part. The joined box encloses them and has the highest of their scores.
        3. A cut box that was not joined is dropped if three quarters of it are inside a larger box of
           its class that scores at least as high.
        4. Non-maximum suppression within each class, at the config's threshold, removes duplicates.

        Limits: parts of an object larger than the overlap are only joined where the network finds
        them, and with ``overlap=0`` nothing is joined. Two objects of the same class that overlap
        each other and are both larger than the overlap can be joined by mistake.

        Returns:
            One :class:`~focaldet.Detections` per image, in input order, on the CPU, with boxes in
            pixels of the input image and ``source`` set for paths and URLs. A single image gives a
            list of one.

        Raises:
            FileNotFoundError: If a file does not exist. Every message names the source.
            DownloadError: If an image cannot be downloaded.
            ValueError: If an option is invalid, ``classes`` contains an unknown class, a source is
                damaged or has a wrong shape or values, or an image does not fit an exported file with
                a fixed shape.
            TypeError: If a source or an option has an unsupported type or dtype.

        References:
            Gidaris and Komodakis, Object detection via a multi-region & semantic segmentation-aware
            CNN model, section 5 (averaging of boxes). ICCV 2015. arXiv:1505.01749.
        """
        call = self._check_options(
            batch_size=batch_size,
            score_threshold=score_threshold,
            on_error=on_error,
            allow_urls=allow_urls,
            tile=tile,
            overlap=overlap,
            augment=augment,
            classes=classes,
            max_detections=max_detections,
        )
        results = []
        with (
            _evaluation_mode(call.model),  # once, because it visits every module
            progress_bar(call.count_images(sources), wanted=progress) as advance,
            contextlib.closing(_predict(call, sources)) as stream,
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
        tile: tuple[int, int] | None = ...,
        overlap: float = ...,
        augment: bool = ...,
        classes: Sequence[int | str] | None = ...,
        max_detections: int | None = ...,
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
        tile: tuple[int, int] | None = ...,
        overlap: float = ...,
        augment: bool = ...,
        classes: Sequence[int | str] | None = ...,
        max_detections: int | None = ...,
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
        tile: tuple[int, int] | None = None,
        overlap: float = 0.25,
        augment: bool = False,
        classes: Sequence[int | str] | None = None,
        max_detections: int | None = None,
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
                ``batch_size + 3``, or less on a computer with fewer than four cores, and ``batch_size``
                more on a CUDA device. There, if this is at least ``batch_size``, the next batch is
                launched before the results of the last one are read, and its images count as read
                ahead.
            allow_urls: As for :meth:`predict`.
            tile: As for :meth:`predict`. The result of an image comes after that of its last window.
            overlap: As for :meth:`predict`.
            augment: As for :meth:`predict`.
            classes: As for :meth:`predict`.
            max_detections: As for :meth:`predict`.

        Returns:
            A generator of one :class:`~focaldet.Detections` per image, as :meth:`predict` returns
            them.

        Raises:
            OSError, ValueError, TypeError: As :meth:`predict`. Invalid options raise immediately, and
                images when the generator reaches them.

        .. versionadded:: 0.3.0
        """
        call = self._check_options(
            batch_size=batch_size,
            score_threshold=score_threshold,
            on_error=on_error,
            allow_urls=allow_urls,
            tile=tile,
            overlap=overlap,
            augment=augment,
            classes=classes,
            max_detections=max_detections,
        )
        if read_ahead is not None:
            check_integer("read_ahead", read_ahead)
            check_range("read_ahead", read_ahead, 0)
        return _predict(call, sources, read_ahead, partial(_evaluation_mode, call.model))

    def _check_options(
        self,
        *,
        batch_size: int | None,
        score_threshold: float | None,
        on_error: str,
        allow_urls: bool,
        tile: tuple[int, int] | None,
        overlap: float,
        augment: bool,
        classes: Sequence[int | str] | None,
        max_detections: int | None,
    ) -> _Call:
        """Check the options that all methods share, and choose the model."""
        check_choice("on_error", on_error, ("raise", "skip"))
        if batch_size is not None:
            check_range("batch_size", batch_size, 1)
        if score_threshold is not None:
            check_range("score_threshold", score_threshold, 0, 1)
        if max_detections is not None:
            check_integer("max_detections", max_detections)
            check_range("max_detections", max_detections, 1)
        tile = check_tile(tile, overlap)
        model, batch_size = self._choose_model(batch_size, score_threshold, max_detections)
        options: dict[str, Any] = {"score_threshold": score_threshold, **self._detection_options()}
        if classes is not None:
            options["labels"] = _labels_of(classes, model.config)
        if max_detections is not None:
            options["max_detections"] = max_detections
        windows = None
        if tile is not None or augment:
            suppression = model.postprocess
            _check_hard(suppression, "tile" if tile is not None else "augment=True")
            limit = suppression.max_detections
            if max_detections is not None and limit is not None:
                limit = options["max_detections"] = max(limit, max_detections)
            windows = WindowSources(
                tile=tile,
                overlap=overlap,
                augment=augment,
                mean=model.preprocess.mean,
                nms_threshold=suppression.nms_threshold,
                class_agnostic=suppression.class_agnostic_nms,
                window_limit=limit,
                max_detections=max_detections if tile is not None else max_detections or limit,
                skip=on_error == "skip",
                allow_urls=allow_urls,
            )
        return _Call(
            model,
            batch_size,
            options,
            windows,
            self._transfers(),
            skip=on_error == "skip",
            allow_urls=allow_urls,
        )

    @abstractmethod
    def _choose_model(
        self,
        batch_size: int | None,
        score_threshold: float | None,
        max_detections: int | None,
    ) -> tuple[DetectionModel[Any], int]:
        """Return the model that :meth:`predict` runs, and its batch size.

        Args:
            batch_size: The caller's, at least 1. None asks for the default.
            score_threshold: The caller's, in [0, 1], or None.
            max_detections: The caller's, at least 1, or None.

        Raises:
            ValueError: If the model does not support these values.
        """

    def _detection_options(self) -> dict[str, Any]:  # subclasses use self
        """Return additional arguments for the model's ``detections``."""
        return {}

    def _transfers(self) -> Transfers:  # subclasses use self
        """Return how images get to the device of the model."""
        return Transfers()


def _labels_of(classes: Sequence[int | str], config: RetinaNetConfig) -> list[int]:
    """Return the labels of some classes, or raise unless all of them exist."""
    if isinstance(classes, str | int):
        raise TypeError(
            f"classes must be a sequence of labels or names, got {classes!r}. Pass one class as "
            f"[{classes!r}]."
        )
    labels = []
    for one in classes:
        if isinstance(one, str):
            names = config.class_names
            if names is None:
                raise ValueError(f"classes contains {one!r}, but the model has no class_names.")
            if one not in names:
                raise ValueError(
                    f"classes contains {one!r}, which is not in class_names: {shortened(names)}."
                )
            labels.append(names.index(one))
        else:
            check_integer("Each of classes that is not a name", one)
            if not 0 <= one < config.num_classes:
                raise ValueError(
                    f"classes contains {one}, but the model has labels 0 to "
                    f"{config.num_classes - 1}."
                )
            labels.append(one)
    if not labels:
        raise ValueError("classes is empty; pass at least one label or name, or None for all.")
    return labels


def _check_hard(postprocess: PostProcess, option: str) -> None:
    """Raise if detections are to be merged that soft suppression has left duplicates among."""
    if postprocess.suppression != "hard":
        raise ValueError(
            f"{option} cannot be combined with the model's suppression={postprocess.suppression!r}: "
            "merging removes boxes that overlap by more than nms_threshold, which soft suppression "
            "keeps. Load the model with suppression='hard'."
        )


class _Call(NamedTuple):
    """The model of a call and its options."""

    model: DetectionModel[Any]
    batch_size: int
    options: dict[str, Any]  # of the model's `detections`
    windows: WindowSources | None
    transfers: Transfers
    skip: bool
    allow_urls: bool

    def count_images(self, sources: ImageSource | Iterable[ImageSource]) -> int | None:
        """Return the number of images, or None if it is not known."""
        return count_images(sources) if self.windows is None else self.windows.count(sources)


class _Prepared(NamedTuple):
    """An image ready for the network: a batch of one, and the path or URL it was read from."""

    batch: ImageBatch
    path: str | None

    @property
    def shape(self) -> tuple[object, ...]:
        """What images must have in common to share a batch."""
        return self.batch.tensor.shape, self.batch.tensor.device, self.is_levels

    @property
    def is_levels(self) -> bool:
        """Whether the image still has to be normalised."""
        return self.batch.tensor.dtype == torch.uint8


class _Launched(NamedTuple):
    """A batch that the network runs on, perhaps later than the host."""

    paths: dict[int, str | None]  # by the index of the image
    output: Any
    mark: Any  # of the output; None if detection follows immediately


def _predict(
    call: _Call,
    sources: ImageSource | Iterable[ImageSource],
    read_ahead: int | None = None,
    running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Generator[Any]:
    """Return a generator of the detections of each image, or None if it was skipped, in order.

    The network runs in a context that ``running`` returns.
    """
    windows, transfers = call.windows, call.transfers
    if read_ahead is None:
        read_ahead = _default_read_ahead(call.batch_size)
        if transfers.overlaps:
            read_ahead += call.batch_size
    # The images of a batch in flight count as read ahead, so that no result comes later than promised.
    overlaps = transfers.overlaps and read_ahead >= call.batch_size
    images = _read_ahead(
        partial(_prepare, call.model.preprocess, transfers, allow_urls=call.allow_urls),
        named_sources(sources if windows is None else windows.windows(sources)),
        read_ahead - call.batch_size if overlaps else read_ahead,
        skip=call.skip,
    )
    found = _predict_images(call, images, running, overlaps=overlaps)
    return found if windows is None else _merge_windows(windows, found)


def _merge_windows(
    windows: WindowSources, stream: Generator[Detections | None]
) -> Generator[Detections | None]:
    # None is only for files that cannot be read, which `windows` has left out.
    with contextlib.closing(stream):
        yield from windows.merge(one for one in stream if one is not None)


def _predict_images(
    call: _Call,
    images: Generator[_Prepared | None],
    running: Callable[[], AbstractContextManager[None]],
    *,
    overlaps: bool,
) -> Generator[Detections | None]:
    found: dict[int, Detections | None] = {}
    upcoming = 0
    with contextlib.closing(images):
        for results in _predict_groups(call, images, running, overlaps=overlaps):
            found.update(results)
            while upcoming in found:
                yield found.pop(upcoming)
                upcoming += 1


def _predict_groups(
    call: _Call,
    images: Iterable[_Prepared | None],
    running: Callable[[], AbstractContextManager[None]],
    *,
    overlaps: bool,
) -> Iterator[dict[int, Detections | None]]:
    """Yield the results of each group of images.

    With ``overlaps``, a batch is in flight: its results are read after the next batch was launched, or
    after ``batch_size`` more images if these do not fill one, or before an error is raised.
    """
    in_flight: _Launched | None = None
    age = 0  # of the batch in flight: images since it was launched
    try:
        for group in _group(images, call.batch_size):
            has_images = any(group.values())
            if not has_images:  # one was skipped, or waits
                yield dict.fromkeys(group)
                age += 1
                if in_flight is None or age < call.batch_size:
                    continue
            with running():
                launched = _launch(call, group) if has_images else None
                group.clear()  # so that the images are not in memory while the caller works
                # While results are read, nothing is in flight, or else it would be read after an error.
                done, in_flight = (in_flight, None) if overlaps else (launched, None)
                results = _read(call, done)
            in_flight, age = (launched, 0) if overlaps else (None, 0)
            del launched, done
            yield results
    except Exception:
        if in_flight is not None:
            yield _read_in(running(), call, in_flight)
        raise
    if in_flight is not None:
        yield _read_in(running(), call, in_flight)


def _read_in(
    context: AbstractContextManager[None], call: _Call, launched: _Launched
) -> dict[int, Detections | None]:
    with context:
        return _read(call, launched)


@torch.no_grad()
def _launch(call: _Call, group: dict[int, _Prepared | None]) -> _Launched:
    """Call the network for a group without skipped images. The host does not wait for a GPU."""
    prepared = [image for image in group.values() if image is not None]
    batch = ImageBatch(
        torch.cat(call.transfers.to_device([image.batch.tensor for image in prepared])),
        [size for image in prepared for size in image.batch.sizes],
        [size for image in prepared for size in image.batch.original_sizes],
    )
    if prepared[0].is_levels:
        batch = call.model.preprocess.from_levels(batch)
    paths = {index: image.path for index, image in zip(group, prepared, strict=True)}
    return _Launched(paths, call.model(batch), call.transfers.mark())


@torch.no_grad()
def _read(call: _Call, launched: _Launched | None) -> dict[int, Detections | None]:
    """Return the detections of a batch, for which the host waits."""
    if launched is None:
        return {}
    with call.transfers.after(launched.mark):
        results = call.model.detections(launched.output, **call.options)
        return {
            index: result.to("cpu").with_source(path)
            for (index, path), result in zip(launched.paths.items(), results, strict=True)
        }


def _group(
    images: Iterable[_Prepared | None], batch_size: int
) -> Iterator[dict[int, _Prepared | None]]:
    """Group images of the same shape, keyed by their index. A skipped image forms its own group.

    An image that completes no group gives an empty one. Once a few batches' worth of images wait, the
    shape that has waited longest is yielded, and so is a shape that has waited while many others came.
    If reading fails, all that wait come first.
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
                else:
                    yield {}
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
    prepare: Callable[[ImageSource, str], _Prepared],
    sources: Iterator[tuple[str, ImageSource]],
    read_ahead: int,
    *,
    skip: bool,
) -> Generator[_Prepared | None]:
    """Prepare images in a few threads, and yield them in order.

    The caller's thread iterates over ``sources``, which therefore need not be thread-safe. At most
    ``read_ahead`` images are requested beyond the one that is yielded. If ``sources`` fails, the
    images before it are yielded first.
    """
    pending: deque[Future[_Prepared]] = deque()
    pool = ThreadPoolExecutor(_count_readers(), thread_name_prefix="focaldet-reader")
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
    preprocess: Preprocess,
    transfers: Transfers,
    source: ImageSource,
    name: str,
    *,
    allow_urls: bool,
) -> _Prepared:
    """Read and resize an image. What is left to do on the model's device is in :func:`_launch`."""
    image = load_image(source, name, channels=preprocess.in_channels, allow_urls=allow_urls)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    batch = None
    if transfers.copies and image.device.type == "cpu":
        batch = preprocess.to_levels(image)
    if batch is None:
        batch = preprocess([image], validate=False)  # load_image has checked the values
    return _Prepared(batch._replace(tensor=transfers.pin(batch.tensor)), path)


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
