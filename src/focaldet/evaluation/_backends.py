"""pycocotools and the two faster ones: from ground truth and detections to COCO's curves.

Each counts images, categories and objects from 1. That changes no number, and avoids that
pycocotools takes an object whose annotation id is 0 for one that was never found.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from focaldet._checks import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    import numpy.typing as npt

    from focaldet.evaluation._detections import Found
    from focaldet.evaluation._ground_truth import Truth

Backend: TypeAlias = Literal["pycocotools", "hotcoco", "faster-coco-eval", "auto"]

_SHAPE = (10, 101, 4, 3)  # IoU thresholds, recalls, ranges of area, limits of detections


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves:
    """What COCO's evaluation accumulates; -1 where there are no objects.

    Attributes:
        precision: ``[10, 101, K, 4, 3]``.
        recall: ``[10, K, 4, 3]``.
        scores: ``[10, 101, K, 4, 3]``.
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def stats(self) -> tuple[float, ...]:
        """Return the twelve numbers, by pycocotools' own summary of the curves."""
        judge = pycocotools.cocoeval.COCOeval(iouType="bbox")
        judge.eval = {"precision": self.precision, "recall": self.recall}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
            judge.summarize()
        return tuple(float(value) for value in judge.stats)


Judge: TypeAlias = "Callable[[Truth, Found, npt.NDArray[np.int64], npt.NDArray[np.int64]], Curves]"


def resolve(backend: Backend) -> Backend:
    """Return the backend that is meant, "auto" being the fastest with pycocotools' exact numbers.

    Raises:
        ImportError: it is not installed.
        ValueError: there is none of this name.
    """
    check_choice("backend", backend, (*_JUDGES, "auto"))
    if backend == "auto":
        return "hotcoco" if importlib.util.find_spec("hotcoco") else "pycocotools"
    _module(backend)
    return backend


def judge(truth: Truth, found: Found, backend: Backend) -> Curves:
    """Let a backend compare detections, all of images and categories of the truth, with it."""
    if not len(truth.image_ids) or not len(truth.category_ids):
        limits, count = _SHAPE[2:], len(truth.category_ids)
        return Curves(
            precision=np.full((*_SHAPE[:2], count, *limits), -1.0),
            recall=np.full((_SHAPE[0], count, *limits), -1.0),
            scores=np.full((*_SHAPE[:2], count, *limits), -1.0),
        )
    images = np.searchsorted(truth.image_ids, found.image_ids) + 1
    categories = np.searchsorted(truth.category_ids, found.category_ids) + 1
    return _JUDGES[backend](truth, found, images, categories)


def _module(backend: str) -> ModuleType:
    package = backend.replace("-", "_")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        remedy = (
            "pip install 'focaldet[fast]'" if backend == "hotcoco" else f"pip install {backend}"
        )
        raise ImportError(f"backend={backend!r} needs the package {backend}: {remedy}") from error


def _pycocotools(
    truth: Truth,
    found: Found,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> Curves:
    with contextlib.redirect_stdout(io.StringIO()):
        objects, detections = pycocotools.coco.COCO(), pycocotools.coco.COCO()
        objects.dataset, detections.dataset = _datasets(truth, found, images, categories)
        objects.createIndex()
        detections.createIndex()
        evaluation = pycocotools.cocoeval.COCOeval(objects, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return _curves(evaluation.eval)


def _faster_coco_eval(
    truth: Truth,
    found: Found,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> Curves:
    package = _module("faster-coco-eval")
    objects, detections = package.COCO(), package.COCO()
    objects.dataset, detections.dataset = _datasets(truth, found, images, categories)
    objects.createIndex()
    detections.createIndex()
    evaluation = package.COCOeval_faster(objects, detections, "bbox", print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    return _curves(evaluation.eval)


def _hotcoco(
    truth: Truth,
    found: Found,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> Curves:
    package = _module("hotcoco")
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
    rows = np.column_stack([images, found.boxes, found.scores, categories])
    evaluation = package.COCOeval(objects, objects.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return _curves(evaluation.eval)


_JUDGES: Mapping[str, Judge] = {
    "pycocotools": _pycocotools,
    "hotcoco": _hotcoco,
    "faster-coco-eval": _faster_coco_eval,
}


def _datasets(
    truth: Truth,
    found: Found,
    images: npt.NDArray[np.int64],
    categories: npt.NDArray[np.int64],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both sides as pycocotools holds them, without outlines, which boxes don't need."""
    frame = {"info": {}, "images": _images(truth), "categories": _categories(truth)}
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
    areas = found.boxes[:, 2] * found.boxes[:, 3]
    detections = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": s}
        for i, (image, category, box, area, s) in enumerate(
            zip(
                images.tolist(),
                categories.tolist(),
                found.boxes.tolist(),
                areas.tolist(),
                found.scores.tolist(),
                strict=True,
            ),
            start=1,
        )
    ]
    return {**frame, "annotations": objects}, {**frame, "annotations": detections}


def _images(truth: Truth) -> list[dict[str, int]]:
    return [{"id": i, "height": 1, "width": 1} for i in range(1, len(truth.image_ids) + 1)]


def _categories(truth: Truth) -> list[dict[str, Any]]:
    return [{"id": i, "name": name} for i, name in enumerate(truth.category_names, start=1)]


def _curves(accumulated: Mapping[str, Any]) -> Curves:
    precision = np.asarray(accumulated["precision"], np.float64)
    return Curves(
        precision=precision,
        recall=np.asarray(accumulated["recall"], np.float64),
        scores=np.asarray(accumulated["scores"], np.float64).reshape(precision.shape),
    )


def _silent(*_: object) -> None:
    """Print nothing."""
