"""A progress bar over images, if tqdm is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]

_MANY_IMAGES = 10  # from this many images on, a progress bar is shown by default


@contextlib.contextmanager
def progress_bar(total: int | None, *, wanted: bool | None) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a progress bar, or does nothing if there is none.

    Args:
        total: Number of images, or None if it is not known.
        wanted: Whether to show the bar. None shows it on a terminal for ten or more images.
    """
    many = total is None or total >= _MANY_IMAGES
    installed = importlib.util.find_spec("tqdm") is not None
    if not installed or wanted is False or (wanted is None and not many):
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    # disable=None: tqdm shows the bar only on a terminal.
    with tqdm(total=total, unit="image", disable=False if wanted else None) as bar:
        yield bar.update
