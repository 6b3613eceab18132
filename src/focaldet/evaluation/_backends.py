"""The backends that compute COCO's curves: pycocotools and two faster packages.

Images, categories and objects are renumbered from 1 for all of them. This changes no result, and
keeps pycocotools from counting an object with the annotation id 0 as missed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from focaldet._checks import check_choice
from focaldet._extras import import_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    import numpy.typing as npt

    from focaldet.evaluation._detections import DetectionTable
    from focaldet.evaluation._ground_truth import GroundTruth

Backend: TypeAlias = Literal["pycocotools", "hotcoco", "faster-coco-eval", "auto"]

_SHAPE = (10, 101, 4, 3)  # IoU thresholds, recalls, area ranges, limits on detections


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves:
    """Precision, recall and scores as pycocotools accumulates them; -1 where there are no objects.

    Attributes:
        precision: ``[10, 101, K, 4, 3]``.
        recall: ``[10, K, 4, 3]``.
        scores: ``[10, 101, K, 4, 3]``.
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def stats(self) -> tuple[float, ...]:
        """Return the twelve numbers, summarised by pycocotools."""
        evaluation = pycocotools.cocoeval.COCOeval(iouType="bbox")
        evaluation.eval = {"precision": self.precision, "recall": self.recall}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the summary
            evaluation.summarize()
        return tuple(float(value) for value in evaluation.stats)


_Compute: TypeAlias = (
    "Callable[[GroundTruth, DetectionTable, npt.NDArray[np.int64], npt.NDArray[np.int64]], Curves]"
)


def resolve(backend: Backend) -> Backend:
    """Return the backend to use; "auto" is the fastest one with exactly pycocotools' numbers.

    Raises:
        ImportError: If the backend is not installed.
        ValueError: If the backend is unknown.
    """
    check_choice("backend", backend, (*_BACKENDS, "auto"))
    if backend == "auto":
        return "hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools"
    if backend != "pycocotools":
        _import(backend)
    return backend


def compute_curves(truth: GroundTruth, detections: DetectionTable, backend: Backend) -> Curves:
    """Compare detections with the ground truth, which must have all their images and categories."""
    if not len(truth.image_ids) or not len(truth.category_ids):
        limits, count = _SHAPE[2:], len(truth.category_ids)
        return Curves(
            precision=np.full((*_SHAPE[:2], count, *limits), -1.0),
            recall=np.full((_SHAPE[0], count, *limits), -1.0),
            scores=np.full((*_SHAPE[:2], count, *limits), -1.0),
        )
    images = np.searchsorted(truth.image_ids, detections.image_ids) + 1
    categories = np.searchsorted(truth.category_ids, detections.category_ids) + 1
    return _BACKENDS[backend](truth, detections, images, categories)


def _import(backend: Literal["hotcoco", "faster-coco-eval"]) -> ModuleType:
    install = "focaldet[fast]" if backend == "hotcoco" else backend
    return import_extra(backend.replace("-", "_"), purpose=f"backend={backend!r}", install=install)


def _pycocotools(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> Curves:
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = pycocotools.coco.COCO(), pycocotools.coco.COCO()
        objects.dataset, found.dataset = _datasets(truth, detections, images, categories)
        objects.createIndex()
        found.createIndex()
        evaluation = pycocotools.cocoeval.COCOeval(objects, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return _curves(evaluation.eval)


def _faster_coco_eval(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> Curves:
    package = _import("faster-coco-eval")
    objects, found = package.COCO(), package.COCO()
    objects.dataset, found.dataset = _datasets(truth, detections, images, categories)
    objects.createIndex()
    found.createIndex()
    evaluation = package.COCOeval_faster(objects, found, "bbox", print_function=_print_nothing)
    evaluation.evaluate()
    evaluation.accumulate()
    return _curves(evaluation.eval)


def _hotcoco(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> Curves:
    package = _import("hotcoco")
    objects = package.COCO.from_arrays(
        _images(truth),
        _categories(truth),
        truth.images + 1,
        truth.categories + 1,
        truth.boxes,
        ids=np.arange(1, len(truth.images) + 1),
        area=truth.areas,
        iscrowd=truth.crowd.astype(np.int64),
    )
    rows = np.column_stack([images, detections.boxes, detections.scores, categories])
    evaluation = package.COCOeval(objects, objects.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return _curves(evaluation.eval)


_BACKENDS: Mapping[str, _Compute] = {
    "pycocotools": _pycocotools,
    "hotcoco": _hotcoco,
    "faster-coco-eval": _faster_coco_eval,
}


def _datasets(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ground truth and detections in pycocotools' format, without outlines."""
    common = {"info": {}, "images": _images(truth), "categories": _categories(truth)}
    objects = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": c,
        }
        for i, (image, category, box, area, c) in enumerate(
            zip(
                (truth.images + 1).tolist(),
                (truth.categories + 1).tolist(),
                truth.boxes.tolist(),
                truth.areas.tolist(),
                truth.crowd.astype(int).tolist(),
                strict=True,
            ),
            start=1,
        )
    ]
    with np.errstate(over="ignore"):  # a huge box may have an infinite area
        areas = detections.boxes[:, 2] * detections.boxes[:, 3]
    entries = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": s}
        for i, (image, category, box, area, s) in enumerate(
            zip(
                images.tolist(),
                categories.tolist(),
                detections.boxes.tolist(),
                areas.tolist(),
                detections.scores.tolist(),
                strict=True,
            ),
            start=1,
        )
    ]
    return {**common, "annotations": objects}, {**common, "annotations": entries}


def _images(truth: GroundTruth) -> list[dict[str, int]]:
    return [{"id": i, "height": 1, "width": 1} for i in range(1, len(truth.image_ids) + 1)]


def _categories(truth: GroundTruth) -> list[dict[str, Any]]:
    return [{"id": i, "name": name} for i, name in enumerate(truth.category_names, start=1)]


def _curves(accumulated: Mapping[str, Any]) -> Curves:
    precision = np.asarray(accumulated["precision"], np.float64)
    return Curves(
        precision=precision,
        recall=np.asarray(accumulated["recall"], np.float64),
        scores=np.asarray(accumulated["scores"], np.float64).reshape(precision.shape),
    )


def _print_nothing(*_: object) -> None:
    """Replace the print function of a backend."""
