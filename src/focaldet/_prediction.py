"""From files to detections: read, run in batches, show how far it is."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from typing import TYPE_CHECKING, Literal

import torch

from focaldet._checks import check_range
from focaldet.images import count_images, iter_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from focaldet.detections import Detections
    from focaldet.images import ImageSource, LoadedImage
    from focaldet.retinanet import RetinaNet

__all__ = ["predict_images"]

_LONG_INPUT = 10  # images from which a progress bar is shown by itself


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
    images = iter_images(sources, on_error=on_error)
    found: list[Detections | None] = []
    with _evaluating(model), _progress_bar(count_images(sources), wanted=progress) as advance:
        while batch := list(itertools.islice(images, batch_size)):
            found += _predict_batch(model, batch, score_threshold)
            advance(len(batch))
    return found


def _predict_batch(
    model: RetinaNet, batch: Sequence[LoadedImage | None], score_threshold: float | None
) -> list[Detections | None]:
    loaded = [item for item in batch if item is not None]
    if not loaded:
        return [None] * len(batch)
    device = model.head.class_logits.weight.device
    pixels = [item.image.to(device) for item in loaded]
    images = [p if p.is_floating_point() else p.float() / 255 for p in pixels]
    output = model(images, validate=False)  # load_image has checked their values
    results = iter(model.detections(output, score_threshold=score_threshold))
    return [
        None if item is None else next(results).to("cpu").with_source(item.name) for item in batch
    ]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
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
