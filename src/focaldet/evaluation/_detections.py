"""The detections of an evaluation, from a results file or from ``Detections``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from focaldet._checks import shortened
from focaldet._coco_json import read_detections
from focaldet.boxes import xyxy_to_xywh
from focaldet.detections import Detections
from focaldet.evaluation._ground_truth import check_known, checked_ids

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from focaldet.evaluation._ground_truth import GroundTruth

Results: TypeAlias = (
    "str | os.PathLike[str] | Mapping[int, Detections] | Sequence[Mapping[str, Any]]"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionTable:
    """M detections of several images; those of one image are in the order they were given in.

    Attributes:
        covered_ids: Ids of the images that the results cover, ascending. An image may be covered
            without having detections.
        image_ids: ``[M]``, int64.
        category_ids: ``[M]``, int64.
        boxes: ``[M, 4]``, float64; x, y, width, height.
        scores: ``[M]``, float64.
    """

    covered_ids: npt.NDArray[np.int64]
    image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def only(self, rows: npt.NDArray[np.bool_]) -> DetectionTable:
        """Return the detections for which ``rows`` is true."""
        return DetectionTable(
            covered_ids=self.covered_ids,
            image_ids=self.image_ids[rows],
            category_ids=self.category_ids[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
        )


def read_results(
    results: Results, truth: GroundTruth, category_ids: Sequence[int] | None
) -> DetectionTable:
    """Read detections in any of the forms that `evaluate_coco` accepts.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If the results have an unsupported type.
        AnnotationError: If a results file, or its content, is not in COCO format.
        ValueError: If images or categories are not in the annotations, or labels do not fit them.
    """
    if isinstance(results, Mapping):
        table = _from_detections(results, truth, category_ids)
    elif isinstance(results, str | os.PathLike | Sequence):
        columns = read_detections(results)
        table = DetectionTable(
            covered_ids=np.unique(columns.image_ids),
            image_ids=columns.image_ids,
            category_ids=columns.category_ids,
            boxes=columns.boxes,
            scores=columns.scores,
        )
    else:
        raise TypeError(
            "results must be the path of a results file, a list of its entries, or Detections by "
            f"image id, got {type(results).__name__}."
        )
    check_known("results", table.covered_ids, truth.image_ids, "image")
    check_known("results", table.category_ids, truth.category_ids, "category")
    return table


def join(shares: Sequence[DetectionTable]) -> DetectionTable:
    """Join the detections of several ranks; of an image that several cover, the first counts."""
    kept: list[DetectionTable] = []
    covered = np.zeros(0, np.int64)
    for share in shares:
        kept.append(share.only(~np.isin(share.image_ids, covered)))
        covered = np.union1d(covered, share.covered_ids)
    return DetectionTable(
        covered_ids=covered,
        image_ids=np.concatenate([share.image_ids for share in kept]),
        category_ids=np.concatenate([share.category_ids for share in kept]),
        boxes=np.concatenate([share.boxes for share in kept]),
        scores=np.concatenate([share.scores for share in kept]),
    )


def _from_detections(
    results: Mapping[int, Detections], truth: GroundTruth, category_ids: Sequence[int] | None
) -> DetectionTable:
    _check_types(results)
    _warn_of_sizes(results, truth)
    image_ids = checked_ids("results", results)
    boxes = [xyxy_to_xywh(found.boxes.detach()).cpu().double() for found in results.values()]
    scores = [found.scores.detach().cpu().double() for found in results.values()]
    labels = [found.labels.cpu() for found in results.values()]
    image_id_of_each = np.repeat(image_ids, [len(one) for one in labels])
    all_boxes = torch.cat([torch.zeros(0, 4, dtype=torch.float64), *boxes]).numpy()
    _check_boxes(all_boxes, image_id_of_each, results)
    all_labels = torch.cat([torch.zeros(0, dtype=torch.int64), *labels]).numpy()
    return DetectionTable(
        covered_ids=np.unique(image_ids),
        image_ids=image_id_of_each,
        category_ids=_categories(all_labels, image_id_of_each, results, truth, category_ids),
        boxes=all_boxes,
        scores=torch.cat([torch.zeros(0, dtype=torch.float64), *scores]).numpy(),
    )


def _check_types(results: Mapping[int, Detections]) -> None:
    items: Iterable[tuple[Any, Any]] = results.items()
    for image_id, found in items:
        if isinstance(image_id, bool) or not isinstance(image_id, int | np.integer):
            raise TypeError(
                f"The keys of results must be integer image ids, got {shortened(image_id)}."
            )
        if not isinstance(found, Detections):
            raise TypeError(
                f"results[{image_id}] must be a Detections, got {type(found).__name__}."
            )


def _check_boxes(
    boxes: npt.NDArray[np.float64],
    image_ids: npt.NDArray[np.int64],
    results: Mapping[int, Detections],
) -> None:
    inverted = (boxes[:, 2:] < 0).any(axis=1)
    if inverted.any():
        row = int(inverted.argmax())
        image_id = int(image_ids[row])
        index = int((image_ids[:row] == image_id).sum())
        raise ValueError(
            f"boxes[{index}] of results[{image_id}] has a negative width or height "
            f"(x1, y1, x2, y2 = {results[image_id].boxes[index].tolist()})."
        )


def _categories(
    labels: npt.NDArray[np.int64],
    image_ids: npt.NDArray[np.int64],
    results: Mapping[int, Detections],
    truth: GroundTruth,
    category_ids: Sequence[int] | None,
) -> npt.NDArray[np.int64]:
    """Return the category id of each label."""
    if category_ids is None:
        ids, owner = truth.category_ids, "the annotations have"
        _check_names(results, truth)
    else:
        ids, owner = checked_ids("category_ids", category_ids), "category_ids has"
        check_known("category_ids", ids, truth.category_ids, "category")
    beyond = labels >= len(ids)
    if beyond.any():
        first = int(beyond.argmax())
        count = "1 category" if len(ids) == 1 else f"{len(ids)} categories"
        raise ValueError(
            f"results[{image_ids[first]}] has the label {labels[first]}, but {owner} only {count}. "
            "Labels count from 0."
        )
    return ids[labels]


def _check_names(results: Mapping[int, Detections], truth: GroundTruth) -> None:
    """Raise if the class names of detections are in a different order from the categories."""
    ids = truth.category_ids.tolist()
    by_name = dict(zip(truth.category_names, ids, strict=True))
    by_id = dict(zip(ids, truth.category_names, strict=True))
    for names in {found.class_names for found in results.values()} - {None}:
        for label, (category, name) in enumerate(zip(ids, names or (), strict=False)):
            if by_id[category] != name and name in by_name:
                listed = [by_name.get(each) for each in names or ()]
                remedy = (
                    f"Pass category_ids={listed}."
                    if None not in listed
                    else "Pass category_ids, the category id of each label."
                )
                raise ValueError(
                    "The class names of the detections are in a different order from the category "
                    f"ids: label {label} is {name!r}, but category {category} is "
                    f"{by_id[category]!r}. {remedy}"
                )


def _warn_of_sizes(results: Mapping[int, Detections], truth: GroundTruth) -> None:
    """Warn if boxes seem to be in pixels of a resized image."""
    mismatched = [
        (image_id, tuple(found.image_size), truth.image_sizes[image_id])
        for image_id, found in results.items()
        if image_id in truth.image_sizes and tuple(found.image_size) != truth.image_sizes[image_id]
    ]
    if mismatched:
        image_id, (height, width), (true_height, true_width) = mismatched[0]
        total = "1 image differs" if len(mismatched) == 1 else f"{len(mismatched)} images differ"
        message = (
            f"{total} in size from the annotations. The first is image {image_id}: its detections "
            f"are for {height}x{width} (height x width), the annotations for "
            f"{true_height}x{true_width}. Boxes are compared without scaling."
        )
        warnings.warn(message, UserWarning, stacklevel=7)
