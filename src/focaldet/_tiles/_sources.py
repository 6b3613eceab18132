"""Turn images into windows for prediction, and the detections of windows into those of images."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import warnings
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from focaldet._checks import check_range, shortened
from focaldet._tiles._grid import make_grid
from focaldet._tiles._merging import WindowDetections, merge_windows
from focaldet._tiles._tiff import open_tiff
from focaldet._tiles._views import NUM_VIEWS, iter_views, merge_views
from focaldet.images import (
    SKIPPED_ERRORS,
    check_array,
    count_images,
    load_image,
    named_sources,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from focaldet._tiles._grid import Window
    from focaldet.detections import Detections
    from focaldet.images import ImageSource

__all__ = ["WindowSources", "check_tile"]

_logger = logging.getLogger(__name__)

_MAX_OVERLAP = 0.9  # beyond it, the number of windows explodes


def check_tile(tile: object, overlap: float) -> tuple[int, int] | None:
    """Return the ``(height, width)`` of a tile as integers, or None if there is none.

    Raises:
        TypeError: If ``tile`` is not two integers, or ``overlap`` not a number.
        ValueError: If ``tile`` is not above 0, or ``overlap`` is out of range.
    """
    check_range("overlap", overlap, 0, _MAX_OVERLAP)
    if tile is None:
        return None
    try:
        height, width = map(operator.index, tile)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(
            f"tile must be two integers (height, width), got {shortened(tile)}."
        ) from None
    check_range("tile[0]", height, 1)
    check_range("tile[1]", width, 1)
    return height, width


class _Pixels(Protocol):
    """An image of which windows can be read, until it is closed."""

    @property
    def size(self) -> tuple[int, int]:
        """The ``(height, width)`` of the image."""

    def read(self, window: Window) -> Tensor | npt.NDArray[Any]:
        """Return the pixels of a window."""

    def close(self) -> None:
        """Free what the image holds."""


class _ArrayWindows:
    """Windows of an ``[H, W, C]`` array, or of an array of another library."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.size = (int(array.shape[0]), int(array.shape[1]))

    def read(self, window: Window) -> npt.NDArray[Any]:
        y, x = window.slices
        # An array of another library is read here. One of NumPy is only sliced.
        return np.asanyarray(self._array[y, x])

    def close(self) -> None:
        del self._array


class _TensorWindows:
    """Windows of a ``[C, H, W]`` tensor."""

    def __init__(self, image: Tensor) -> None:
        self._image = image
        self.size = (image.shape[1], image.shape[2])

    def read(self, window: Window) -> Tensor:
        y, x = window.slices
        return self._image[:, y, x]

    def close(self) -> None:
        del self._image


@dataclass
class _OpenImage:
    """An image some of whose windows are not predicted yet.

    Args:
        name: What messages call the image.
        path: Its file, if it was read from one.
        grid: Its windows. None if it is skipped, or not open yet.
        num_windows: The number of windows to predict. If an image is skipped because a part of its
            file is damaged, these are the windows before that part.
        num_read: The number of windows that were read.
        views: The detections in the views of the window that is not complete.
        found: The detections in the windows that are complete. None if there are none yet.
    """

    name: str
    path: str | None
    grid: list[list[Window]] | None = None
    num_windows: int | None = None
    num_read: int = 0
    views: list[Detections] = field(default_factory=list)
    found: WindowDetections | None = None

    @property
    def complete(self) -> bool:
        return (0 if self.found is None else len(self.found)) == self.num_windows

    def start(self, grid: list[list[Window]]) -> None:
        self.grid, self.num_windows = grid, len(grid) * len(grid[0])

    def skip(self) -> None:
        self.grid, self.num_windows = None, self.num_read


class WindowSources:
    """The windows of some images, as sources of images themselves.

    :meth:`windows` reads the images one after another and cuts them. :meth:`merge` takes the detections
    in these windows, in order, and returns those in the images.

    Args:
        tile: The ``(height, width)`` of a window in pixels of the image. With None, images are processed whole.
        overlap: The minimum overlap of neighbouring windows, as a fraction of a window's side.
        augment: Whether to predict in several views of each window.
        mean: The mean of each channel of the images.
        nms_threshold: Threshold of suppression in the merged detections.
        class_agnostic: Whether suppression ignores the class.
        window_limit: Number of detections at which a window may have lost some. None if there is none.
        max_detections: Number of detections to keep per image. None keeps all.
        skip: Whether to warn about files that cannot be read and return None for them.
        allow_urls: Whether to download http and https URLs.
    """

    def __init__(
        self,
        *,
        tile: tuple[int, int] | None,
        overlap: float,
        augment: bool,
        mean: Sequence[float],
        nms_threshold: float,
        class_agnostic: bool,
        window_limit: int | None,
        max_detections: int | None,
        skip: bool,
        allow_urls: bool = False,
    ) -> None:
        self._tile, self._overlap, self._augment = tile, overlap, augment
        self._mean = mean
        self._nms_threshold, self._class_agnostic = nms_threshold, class_agnostic
        self._window_limit, self._max_detections = window_limit, max_detections
        self._skip, self._allow_urls = skip, allow_urls
        self._images: deque[_OpenImage] = deque()

    def count(self, sources: ImageSource | Iterable[ImageSource]) -> int | None:
        """Return the number of images, or None if it is not known."""
        return 1 if _is_array_like(sources) else count_images(sources)

    def windows(self, sources: ImageSource | Iterable[ImageSource]) -> Iterator[ImageSource]:
        """Yield the windows of each image, row by row, and the views of each window.

        Raises:
            FileNotFoundError, ValueError, TypeError: As :func:`focaldet.images.load_image`.
        """
        named: Iterator[tuple[str, Any]]
        named = iter([("sources", sources)]) if _is_array_like(sources) else named_sources(sources)
        for name, source in named:
            path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
            image = _OpenImage(name, path)
            self._images.append(image)
            try:
                with contextlib.closing(self._open(source, name)) as pixels:
                    grid = make_grid(pixels.size, self._tile or pixels.size, self._overlap)
                    image.start(grid)
                    for number, window in enumerate(itertools.chain.from_iterable(grid)):
                        image.num_read = number
                        part = pixels.read(window)
                        yield from iter_views(part, self._mean) if self._augment else (part,)
            except SKIPPED_ERRORS as error:
                if not self._skip:
                    raise
                warnings.warn(f"Skipped an image: {error}", UserWarning, stacklevel=2)
                image.skip()

    def _open(self, source: Any, name: str) -> _Pixels:
        channels = len(self._mean)
        if isinstance(source, np.ndarray) or _is_array_like(source):
            if channels == 1 and source.ndim == 2 and isinstance(source, np.ndarray):
                source = source[..., None]
            check_array(name, source, channels)
            return _ArrayWindows(source)
        if self._tile is not None and isinstance(source, str | os.PathLike):
            file = open_tiff(os.fspath(source), name, channels)
            if file is not None:
                return file
        return _TensorWindows(
            load_image(source, name, channels=channels, allow_urls=self._allow_urls)
        )

    def merge(self, found: Iterable[Detections]) -> Iterator[Detections | None]:
        """Yield the detections in each image, or None for one that was skipped.

        Args:
            found: The detections in each source that :meth:`windows` has yielded, in order.
        """
        for one in found:
            yield from self._finished()  # skipped images before this one
            image = self._images[0]
            image.views.append(one)
            if len(image.views) == (NUM_VIEWS if self._augment else 1):
                window = self._merged_views(image)
                if image.found is None:
                    image.found = WindowDetections(window)
                else:
                    image.found.add(window)
                image.views = []
            yield from self._finished()
        yield from self._finished()

    def _finished(self) -> Iterator[Detections | None]:
        while self._images and self._images[0].complete:
            image = self._images.popleft()
            yield None if image.grid is None else self._merged_windows(image, image.grid)

    def _merged_views(self, image: _OpenImage) -> Detections:
        if len(image.views) == 1:
            return image.views[0]
        return merge_views(
            image.views, nms_threshold=self._nms_threshold, class_agnostic=self._class_agnostic
        )

    def _merged_windows(self, image: _OpenImage, grid: list[list[Window]]) -> Detections:
        found = image.found
        assert found is not None  # noqa: S101  # an image that is not skipped has a window
        merged = found.first
        if len(found) > 1:
            self._warn_about_full_windows(image, found.counts)
            merged = merge_windows(
                grid,
                found,
                nms_threshold=self._nms_threshold,
                class_agnostic=self._class_agnostic,
            )
        return replace(merged[: self._max_detections], source=image.path)

    def _warn_about_full_windows(self, image: _OpenImage, counts: Sequence[int]) -> None:
        limit = self._window_limit
        full = 0 if limit is None else sum(count >= limit for count in counts)
        if full:
            _logger.warning(
                "%s: %d of %d windows hold as many detections as are kept per window (%d), so "
                "objects may be missing. Pass a larger max_detections or a smaller tile.",
                image.path or image.name,
                full,
                len(counts),
                limit,
            )


def _is_array_like(source: object) -> bool:
    """Return whether a source is a sliceable array of another library, such as zarr or h5py."""
    return (
        not isinstance(source, np.ndarray | Tensor)
        and isinstance(getattr(source, "shape", None), tuple)
        and hasattr(source, "dtype")
        and hasattr(source, "ndim")
        and hasattr(source, "__getitem__")
    )
