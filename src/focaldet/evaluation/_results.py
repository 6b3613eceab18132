"""Run a detector on all images of a dataset, and collect the entries of a results file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from focaldet._checks import shortened
from focaldet._progress_bar import progress_bar
from focaldet.results import model_fingerprint, predict_to_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections

__all__ = ["coco_results", "write_coco_results"]

_logger = logging.getLogger(__name__)


class _Model(Protocol):
    """A detector: a RetinaNet, its optimised copy, or an exported file."""

    @property
    def config(self) -> RetinaNetConfig:
        """Its configuration, with the names of its classes."""

    def predict(
        self,
        sources: Sequence[Path],
        *,
        batch_size: int | None,
        progress: bool | None,
        max_detections: int | None = ...,
    ) -> list[Detections]:
        """Detect objects in images."""


class _Images(Protocol):
    """Images with ids and categories, as in an ``AnnotationTable``."""

    @property
    def image_ids(self) -> npt.NDArray[np.int64]:
        """Ids of the images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels."""

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category id of each label."""

    def image_path(self, index: int, /) -> Path:
        """Return the path of an image."""


def coco_results(
    model: _Model,
    table: _Images,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
    max_detections: int | None = None,
) -> list[dict[str, Any]]:
    """Run a detector on all images of a dataset and return the entries of a COCO results file.

    Together with :func:`evaluate_coco` it measures a detector::

        result = evaluate_coco(table, coco_results(model, table))

    Detections are mapped to the categories of the dataset by class name. Those of a model without
    class names are taken to be in the order of ``table.class_names``, which is logged.

    Args:
        model: A :class:`focaldet.RetinaNet`, its optimised copy, or a detector that runs an exported
            file, such as :class:`focaldet.export.OnnxDetector`.
        table: The dataset, usually a :class:`focaldet.datasets.AnnotationTable`.
        batch_size: Images per forward pass; see :meth:`focaldet.RetinaNet.predict`.
        progress: Whether to show a progress bar. None shows one on a terminal for ten or more images.
        max_detections: Number of detections to keep per image, of all classes together. None uses the
            config's. :func:`evaluate_coco` with more than 100 per image and class needs more here, too.

    Returns:
        One dictionary per detection, with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height
        in pixels of the image) and ``score``, in the order of the images. Detections score above the
        ``score_threshold`` of the model's config.

    Raises:
        FileNotFoundError: If an image does not exist.
        ValueError: If the model has classes that are missing from the dataset, or no class names and
            a different number of classes, or an image cannot be read.

    Logs a warning (logger ``focaldet``) if the dataset has classes that the model does not have.

    .. versionadded:: 0.3.0
    """
    category_ids = _category_ids(model.config, table)
    image_ids = table.image_ids.tolist()
    paths = [table.image_path(index) for index in range(len(image_ids))]
    found = model.predict(paths, batch_size=batch_size, progress=progress, **_limit(max_detections))
    return [
        entry
        for image_id, detections in zip(image_ids, found, strict=True)
        for entry in detections.to_coco(image_id, category_ids)
    ]


def write_coco_results(
    model: _Model,
    table: _Images,
    folder: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    resume: bool = False,
    part_size: int | None = None,
    progress: bool | None = None,
    max_detections: int | None = None,
) -> Path | None:
    """Run a detector on all images of a dataset and write a COCO results file as they come.

    The file has the entries of :func:`coco_results`, but they are never in memory together, several
    processes can share the images, and a run that was killed can continue.

    Args:
        model: As for :func:`coco_results`.
        table: The dataset, usually a :class:`focaldet.datasets.AnnotationTable`.
        folder: The folder that receives ``results.json``. It is created if necessary.
        batch_size: Images per forward pass; see :meth:`focaldet.RetinaNet.predict`.
        rank: The number of this process, from 0.
        world_size: The number of processes that share the images and the folder.
        resume: Whether to continue an unfinished run in the folder. If there is none, a new run
            starts.
        part_size: Images per part; see :func:`focaldet.results.predict_to_folder`.
        progress: Whether to show a progress bar, on rank 0, over the images of all ranks. None shows
            one on a terminal for ten or more images.
        max_detections: As for :func:`coco_results`. A run only continues with the same number.

    Returns:
        The path of ``results.json`` on rank 0, for :func:`evaluate_coco`. None on other ranks.

    Raises:
        FileNotFoundError, ValueError: As :func:`coco_results`.
        FileExistsError, TimeoutError, FocaldetError: As
            :func:`focaldet.results.predict_to_folder`.

    .. versionadded:: 0.3.0
    """
    category_ids = _category_ids(model.config, table)
    image_ids = table.image_ids.tolist()
    paths = [table.image_path(index) for index in range(len(image_ids))]
    limit = _limit(max_detections)
    with progress_bar(len(paths), wanted=False if rank else progress) as advance:
        position = 0

        def move_to(index: int) -> None:
            nonlocal position
            advance(index - position)
            position = index

        summary = predict_to_folder(
            lambda part: model.predict(part, batch_size=batch_size, progress=False, **limit),
            paths,
            folder,
            format="coco",
            settings={"model weights": model_fingerprint(model), **limit},
            image_ids=image_ids,
            category_ids=category_ids,
            rank=rank,
            world_size=world_size,
            resume=resume,
            part_size=part_size,
            # Images of other ranks, or of parts that were done before, are passed over.
            on_result=lambda index, _: move_to(index + 1),
        )
        move_to(len(paths))
    return None if summary is None else summary.files[0]


def _limit(max_detections: int | None) -> dict[str, int]:
    """Return the option of ``predict``, which detectors without it do not get."""
    return {} if max_detections is None else {"max_detections": max_detections}


def _category_ids(config: RetinaNetConfig, table: _Images) -> list[int]:
    """Return the category id of each label of a model."""
    if config.class_names is None:
        if config.num_classes != len(table.class_names):
            raise ValueError(
                f"The model has {config.num_classes} classes without names, but the dataset has "
                f"{len(table.class_names)}, so they cannot be mapped. Load the model with "
                "class_names=."
            )
        _logger.warning(
            "The model has no class names. Its labels are taken to be those of the dataset, in "
            "order: %s.",
            shortened(list(table.class_names)),
        )
        return list(table.category_ids)
    unknown = sorted(set(config.class_names) - set(table.class_names))
    if unknown:
        raise ValueError(
            f"The model has classes that are missing from the annotations: {', '.join(unknown)}."
        )
    missing = sorted(set(table.class_names) - set(config.class_names))
    if missing:
        _logger.warning(
            "%d of the %d classes of the dataset are unknown to the model, so that their objects "
            "count as missed: %s.",
            len(missing),
            len(table.class_names),
            ", ".join(missing),
        )
    ids = dict(zip(table.class_names, table.category_ids, strict=True))
    return [ids[name] for name in config.class_names]
