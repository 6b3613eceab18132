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

from focaldet._checks import check_choice, check_integer, check_range, shortened
from focaldet._tiles import WindowSources, check_tile
from focaldet.images import UnreadableImageError, count_images, load_image, named_sources
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections
    from focaldet.images import ImageSource
    from focaldet.postprocess import PostProcess
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
        tile: tuple[int, int] | None = None,
        overlap: float = 0.25,
        augment: bool = False,
        classes: Sequence[int | str] | None = None,
        max_detections: int | None = None,
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
                terminal for ten or more images. With ``tile`` or ``augment``, it counts passes through
                the network.
            tile: ``(height, width)`` in pixels of the input image. Larger images are cut into
                overlapping windows of this size, each of which is resized and predicted like an image,
                and the detections are merged as described below. Of an array, such as a
                ``numpy.memmap`` or an array of zarr or h5py, only the windows are read. None does not
                cut images.

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
            pixels of the input image and ``source`` set for files. A single image gives a list of
            one.

        Raises:
            FileNotFoundError: If a file does not exist. Every message names the source.
            ValueError: If an option is invalid, ``classes`` contains an unknown class, a source is
                damaged or has a wrong shape or values, or an image does not fit an exported file with
                a fixed shape.
            TypeError: If a source or an option has an unsupported type or dtype.

        References:
            Gidaris and Komodakis, Object detection via a multi-region & semantic segmentation-aware
            CNN model, section 5 (averaging of boxes). ICCV 2015. arXiv:1505.01749.
        """
        check_choice("on_error", on_error, ("raise", "skip"))
        if batch_size is not None:
            check_range("batch_size", batch_size, 1)
        if score_threshold is not None:
            check_range("score_threshold", score_threshold, 0, 1)
        if max_detections is not None:
            check_integer("max_detections", max_detections)
            check_range("max_detections", max_detections, 1)
        tile = check_tile(tile, overlap)
        skip = on_error == "skip"
        model, batch_size = self._choose_model(batch_size, score_threshold, max_detections)
        options: dict[str, Any] = {"score_threshold": score_threshold}
        if classes is not None:
            options["labels"] = _labels_of(classes, model.config)
        if max_detections is not None:
            options["max_detections"] = max_detections
        windows = None
        if tile is not None or augment:
            suppression = model.postprocess
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
                skip=skip,
            )
        return _predict(
            model,
            sources,
            batch_size=batch_size,
            options=options,
            windows=windows,
            skip=skip,
            progress=progress,
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
    options: dict[str, Any],
    windows: WindowSources | None,
    skip: bool,
    progress: bool | None,
) -> list[Detections | None]:
    if windows is not None:
        sources = windows.windows(sources)
    images = _read_ahead(model.preprocess, sources, batch_size, skip=skip)
    found: dict[int, Detections | None] = {}
    with (
        _evaluation_mode(model),
        _progress_bar(count_images(sources), wanted=progress) as advance,
        contextlib.closing(images),
    ):
        for group in _group(images, batch_size):
            found.update(_predict_group(model, group, options))
            advance(len(group))
    results = [found[index] for index in range(len(found))]
    if windows is None:
        return results
    # None is only for files that cannot be read, which `windows` has left out.
    return list(windows.merge(one for one in results if one is not None))


def _predict_group(
    model: DetectionModel[Any], group: dict[int, _Prepared | None], options: dict[str, Any]
) -> dict[int, Detections | None]:
    prepared = [image for image in group.values() if image is not None]
    if not prepared:
        return dict.fromkeys(group)
    batch = ImageBatch(
        torch.cat([image.batch.tensor for image in prepared]),
        [size for image in prepared for size in image.batch.sizes],
        [size for image in prepared for size in image.batch.original_sizes],
    )
    results = model.detections(model(batch), **options)
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
