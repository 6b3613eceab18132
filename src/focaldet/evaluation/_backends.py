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

_SHAPE = (10, 101, 4)  # IoU thresholds, recalls, area ranges


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves:
    """Precision, recall and scores as pycocotools accumulates them; -1 where there are no objects.

    Attributes:
        precision: ``[10, 101, K, 4, M]``, for the M limits of `detection_limits`.
        recall: ``[10, K, 4, M]``.
        scores: ``[10, 101, K, 4, M]``.
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def stats(self) -> tuple[float, ...]:
        """Return the twelve numbers, summarised by pycocotools.

        Its summary is written for the limits 1, 10 and 100. The highest limit takes the place of 100.
        """
        evaluation = pycocotools.cocoeval.COCOeval(iouType="bbox")
        limits = [0, 1, -1]
        evaluation.eval = {
            "precision": self.precision[..., limits],
            "recall": self.recall[..., limits],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the summary
            evaluation.summarize()
        return tuple(float(value) for value in evaluation.stats)


_Compute: TypeAlias = (
    "Callable[[GroundTruth, DetectionTable, npt.NDArray[np.int64], npt.NDArray[np.int64], list[int]], "
    "Curves]"
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


def detection_limits(max_detections: int) -> list[int]:
    """Return the limits on detections per image and class: COCO's three, and a higher one."""
    return [1, 10, 100] if max_detections == 100 else [1, 10, 100, max_detections]


def compute_curves(
    truth: GroundTruth, detections: DetectionTable, backend: Backend, max_detections: int = 100
) -> Curves:
    """Compare detections with the ground truth, which must have all their images and categories."""
    limits = detection_limits(max_detections)
    if not len(truth.image_ids) or not len(truth.category_ids):
        thresholds, recalls, areas = _SHAPE
        rest = (len(truth.category_ids), areas, len(limits))
        return Curves(
            precision=np.full((thresholds, recalls, *rest), -1.0),
            recall=np.full((thresholds, *rest), -1.0),
            scores=np.full((thresholds, recalls, *rest), -1.0),
        )
    images = np.searchsorted(truth.image_ids, detections.image_ids) + 1
    categories = np.searchsorted(truth.category_ids, detections.category_ids) + 1
    return _BACKENDS[backend](truth, detections, images, categories, limits)


def _import(backend: Literal["hotcoco", "faster-coco-eval"]) -> ModuleType:
    install = "focaldet[fast]" if backend == "hotcoco" else backend
    return import_extra(backend.replace("-", "_"), purpose=f"backend={backend!r}", install=install)


def _pycocotools(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
    limits: list[int],
) -> Curves:
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = pycocotools.coco.COCO(), pycocotools.coco.COCO()
        objects.dataset, found.dataset = _datasets(truth, detections, images, categories)
        objects.createIndex()
        found.createIndex()
        evaluation = pycocotools.cocoeval.COCOeval(objects, found, "bbox")
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    return _curves(evaluation.eval)


def _faster_coco_eval(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
    limits: list[int],
) -> Curves:
    package = _import("faster-coco-eval")
    objects, found = package.COCO(), package.COCO()
    objects.dataset, found.dataset = _datasets(truth, detections, images, categories)
    objects.createIndex()
    found.createIndex()
    evaluation = package.COCOeval_faster(objects, found, "bbox", print_function=_print_nothing)
    evaluation.params.maxDets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    return _curves(evaluation.eval)


def _hotcoco(
    truth: GroundTruth,
    detections: DetectionTable,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
    limits: list[int],
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
    evaluation.params.maxDets = limits
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
