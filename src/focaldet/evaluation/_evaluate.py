"""COCO average precision of detections."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from focaldet.evaluation._backends import compute_curves
from focaldet.evaluation._distributed import gather_and_compute
from focaldet.evaluation._inputs import join_shares, reader
from focaldet.evaluation._result import ClassResult, CocoResult

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from focaldet.detections import Detections
    from focaldet.evaluation._backends import Backend
    from focaldet.evaluation._detections import DetectionTable
    from focaldet.evaluation._ground_truth import GroundTruth, SupportsToCoco

__all__ = ["evaluate_coco"]


def evaluate_coco(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | SupportsToCoco,
    results: (str | os.PathLike[str] | Mapping[int, Detections] | Sequence[Mapping[str, Any]]),
    *,
    backend: Literal["pycocotools", "hotcoco", "faster-coco-eval", "auto"] = "pycocotools",
    image_ids: Iterable[int] | None = None,
    category_ids: Sequence[int] | None = None,
    max_detections: int = 100,
) -> CocoResult:
    """Compute the COCO average precision of boxes.

    Every image in the annotations counts. If one has no results, its objects are missed and AP
    falls. To evaluate only the images processed so far, pass their ids as ``image_ids``.

    If ``torch.distributed`` is initialised with several ranks, all of them must call this, each with
    the results for its own share of the images. The first rank joins them, and all ranks get the
    same result. An image for which several ranks have results, as a padded ``DistributedSampler``
    causes, counts once, with those of the lowest rank. ``image_ids`` are joined too, and if one rank
    passes None, all images count. An error on one rank is raised on all.

    Args:
        annotations: Ground truth: the path of a COCO JSON file, its content, or an
            :class:`~focaldet.datasets.AnnotationTable`, whose ``to_coco()`` is used. It is checked as
            in :func:`focaldet.datasets.read_coco`; file names are not needed. A missing or negative
            ``area`` means the area of the box.

            .. versionchanged:: 0.3.0
               Tables are accepted. A negative ``area`` used to drop the object from the evaluation.
        results: Detections by image id; the path of a COCO results file, which is a JSON list of
            objects with ``image_id``, ``category_id``, ``bbox`` as x, y, width, height, and
            ``score``; or such a list.
        backend: What computes the numbers. "pycocotools" is the reference. "hotcoco" (extra
            ``fast``) gives exactly the same numbers many times faster. "faster-coco-eval" gives
            precisions that differ in the last bit. "auto" is hotcoco if it is installed, and
            pycocotools otherwise.
        image_ids: Ids of the images to evaluate; results for others are ignored. None evaluates all.
        category_ids: Category id of each label of ``Detections``. None uses the ids in the
            annotations in ascending order. A results file has category ids already.
        max_detections: Maximum number of detections that count per image and class, those with the
            highest scores; at least 100. With 100, the numbers are COCO's. With more, all numbers
            except AR 1 and AR 10 use it: AR 100 becomes AR 500, for example. They are higher where
            images have more than 100 objects or detections of a class, and cannot be compared with
            published ones.

            .. versionadded:: 0.3.0

    Raises:
        FileNotFoundError: If a file does not exist.
        ImportError: If the backend is not installed.
        TypeError: If ``annotations`` or ``results`` has an unsupported type, or an id is not an
            integer, or ``max_detections`` is not.
        AnnotationError: If the annotations or the results are not in COCO format,
            or a result has a number that is not finite or a negative width or height.
        ValueError: If the results have images or categories that are not in the annotations, or
            labels that do not fit the categories: too high, or in a different order according to
            ``class_names``. If ``max_detections`` is below 100.

    Warns:
        UserWarning: If annotations are left out because their box is not finite or has a negative
            size or their category is not declared, if an image is listed more than once, or if
            ``Detections`` are for a different image size than annotated. If images have more objects
            of a class than ``max_detections``, so that even perfect detections would miss some.

    Note:
        pycocotools counts an object with the annotation id 0 as missed, even if it was found, and
        confuses annotations that share an id. Neither happens here, because annotation ids are not
        used.

    References:
        Lin et al., Microsoft COCO. ECCV 2014. arXiv:1405.0312; cocodataset.org, "Evaluate".

    >>> from focaldet import Detections
    >>> import torch
    >>> image = {"id": 7, "height": 50, "width": 50}
    >>> box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 5, 40, 40]}
    >>> truth = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "cat"}]}
    >>> found = Detections(
    ...     torch.tensor([[5.0, 5, 45, 45]]),
    ...     torch.tensor([0.9]),
    ...     torch.tensor([0]),
    ...     image_size=(50, 50),
    ... )
    >>> result = evaluate_coco(truth, {7: found})
    >>> round(result.ap, 3), result.of_class("cat").objects
    (1.0, 1)
    """
    return gather_and_compute(
        reader(
            annotations,
            results,
            image_ids=image_ids,
            category_ids=category_ids,
            max_detections=max_detections,
            backend=backend,
        ),
        lambda shares: _evaluate(*join_shares(shares), shares[0].backend, max_detections),
    )


def _evaluate(
    truth: GroundTruth, detections: DetectionTable, backend: Backend, max_detections: int
) -> CocoResult:
    _warn_of_objects_beyond_limit(truth, max_detections)
    curves = compute_curves(truth, detections, backend, max_detections)
    objects = np.bincount(truth.categories[~truth.crowd], minlength=len(truth.category_ids))
    return CocoResult(
        stats=curves.stats(),
        precision=curves.precision,
        recall=curves.recall,
        scores=curves.scores,
        classes=tuple(
            ClassResult(
                id=int(category),
                name=name,
                ap=_mean(curves.precision[:, :, k, 0, -1]),
                ap50=_mean(curves.precision[0, :, k, 0, -1]),
                ap75=_mean(curves.precision[5, :, k, 0, -1]),
                ar100=_mean(curves.recall[:, k, 0, 2]),
                ar_max=_mean(curves.recall[:, k, 0, -1]),
                objects=int(objects[k]),
                detections=int((detections.category_ids == category).sum()),
            )
            for k, (category, name) in enumerate(
                zip(truth.category_ids, truth.category_names, strict=True)
            )
        ),
        num_images=len(truth.image_ids),
        backend=backend,
        max_detections=max_detections,
    )


def _warn_of_objects_beyond_limit(truth: GroundTruth, max_detections: int) -> None:
    """Warn if even perfect detections would miss objects, because too few of them count."""
    shape = (len(truth.image_ids), len(truth.category_ids))
    pairs = truth.images[~truth.crowd] * shape[1] + truth.categories[~truth.crowd]
    pairs, counts = np.unique(pairs, return_counts=True)
    beyond = counts > max_detections
    if not beyond.any():
        return
    most = int(counts.argmax())
    image, category = divmod(int(pairs[most]), shape[1])
    objects = np.bincount(pairs % shape[1], counts, shape[1])
    reachable = np.bincount(pairs % shape[1], counts.clip(max=max_detections), shape[1])
    best = (reachable[objects > 0] / objects[objects > 0]).mean()
    images = len(np.unique(pairs[beyond] // shape[1]))
    have = "1 image has" if images == 1 else f"{images:,} images have"
    warnings.warn(
        f"{have} more than {max_detections} objects of one class; the most are {counts[most]:,} of "
        f"{truth.category_names[category]!r} in image {truth.image_ids[image]}. Only "
        f"{max_detections} detections per image and class count, so even perfect detections reach "
        f"an average recall of only {best:.3f}. Pass a higher max_detections, such as "
        f"{counts[most]}.",
        UserWarning,
        stacklevel=6,
    )


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float("nan") if (values < 0).any() else float(values.mean())
