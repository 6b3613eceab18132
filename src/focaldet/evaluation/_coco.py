"""COCO's average precision of detections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from focaldet.evaluation._backends import judge, resolve
from focaldet.evaluation._detections import join, read_found
from focaldet.evaluation._ground_truth import read_truth
from focaldet.evaluation._ranks import over_ranks
from focaldet.evaluation._result import ClassResult, CocoResult

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from focaldet.detections import Detections
    from focaldet.evaluation._backends import Backend
    from focaldet.evaluation._detections import Found
    from focaldet.evaluation._ground_truth import Truth

__all__ = ["evaluate_coco"]


def evaluate_coco(
    annotations: str | os.PathLike[str] | Mapping[str, Any],
    results: (str | os.PathLike[str] | Mapping[int, Detections] | Sequence[Mapping[str, Any]]),
    *,
    backend: Literal["pycocotools", "hotcoco", "faster-coco-eval", "auto"] = "pycocotools",
    image_ids: Iterable[int] | None = None,
    category_ids: Sequence[int] | None = None,
) -> CocoResult:
    """Compute COCO's average precision of boxes.

    Every image of the annotations counts, also one without results: its objects are missed, and AP
    falls. For the images seen so far, pass their ids as ``image_ids``.

    Where ``torch.distributed`` is initialised with several ranks, all of them must call this, each
    with the results of its own share of the images. The first joins them, and all get the same
    result. An image that several ranks give, as a padded ``DistributedSampler`` makes them,
    counts once, as the lowest rank has it. ``image_ids`` are joined too; if one rank has None,
    all images count. An error on one rank is raised on all.

    Args:
        annotations: ground truth in COCO's form, a JSON file or its content. An annotation without
            ``area`` has that of its box, one without ``iscrowd`` is none.
        results: detections by image id; or a results file in COCO's form (a JSON list of objects
            with ``image_id``, ``category_id``, ``bbox`` as x, y, width, height, and ``score``); or
            the list itself.
        backend: who computes. "pycocotools", the reference; "hotcoco" (extra ``fast``), with exactly
            the same numbers many times faster; "faster-coco-eval", whose precisions differ from
            pycocotools' by the last bit; "auto", hotcoco if it is installed, else pycocotools.
        image_ids: the images to evaluate; None takes all. Results for others are left out.
        category_ids: the category id of each label of ``Detections``; None takes the ascending ids
            of the annotations. Entries of a results file have category ids already.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the backend is not installed.
        TypeError: results of another type.
        ValueError: a file that is not in COCO's form, numbers that are not finite, a negative width
            or height, images or categories that are not in the annotations, labels beyond the
            categories or, by ``class_names``, in another order.

    Warns:
        UserWarning: if `Detections` are of images of another size than annotated.

    Note:
        pycocotools counts an object whose annotation id is 0 as missed, whatever was found, and
        mixes up annotations of the same id. Here neither happens: the ids of annotations are not
        used. Of each image, the best 100 detections of each category count.

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
    wanted = None if image_ids is None else list(image_ids)

    def read() -> tuple[Backend, Truth, Found, list[int] | None]:
        resolved = resolve(backend)
        truth = read_truth(annotations)
        return resolved, truth, read_found(results, truth, category_ids), wanted

    return over_ranks(read, _evaluate)


def _evaluate(
    shares: Sequence[tuple[Backend, Truth, Found, list[int] | None]],
) -> CocoResult:
    backend, truth = shares[0][:2]
    found = join([share[2] for share in shares])
    wanted: list[int] = []
    for share in shares:
        if share[3] is None:
            break
        wanted += share[3]
    else:
        truth = truth.only(wanted)
    found = found.only(np.isin(found.image_ids, truth.image_ids))
    curves = judge(truth, found, backend)
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
                ap=_mean(curves.precision[:, :, k, 0, 2]),
                ap50=_mean(curves.precision[0, :, k, 0, 2]),
                ap75=_mean(curves.precision[5, :, k, 0, 2]),
                ar100=_mean(curves.recall[:, k, 0, 2]),
                objects=int(objects[k]),
                detections=int((found.category_ids == category).sum()),
            )
            for k, (category, name) in enumerate(
                zip(truth.category_ids, truth.category_names, strict=True)
            )
        ),
        num_images=len(truth.image_ids),
        backend=backend,
    )


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float("nan") if (values < 0).any() else float(values.mean())
