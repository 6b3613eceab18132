"""COCO's average precision of detections, judged by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focaldet._checks import must_be

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from focaldet.detections import Detections

__all__ = ["CocoResult", "evaluate_coco"]

_STATS = (
    *("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    *("AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large"),
)


@dataclass(frozen=True)
class CocoResult:
    """COCO's twelve numbers.

    Attributes:
        stats: in pycocotools' order: AP over IoU .50:.95, AP50, AP75, AP of small, medium and large
            objects, average recall with 1, 10 and 100 detections an image, and of small, medium and
            large objects. -1 where there are no such objects.
    """

    stats: tuple[float, ...]

    @property
    def ap(self) -> float:
        """AP over IoU .50:.95."""
        return self.stats[0]

    def __str__(self) -> str:
        return "  ".join(
            f"{name} {'-' if value < 0 else f'{value:.3f}'}"
            for name, value in zip(_STATS, self.stats, strict=True)
        )


def evaluate_coco(
    annotations: str | os.PathLike[str] | Mapping[str, Any],
    results: Mapping[int, Detections] | Sequence[Mapping[str, Any]],
) -> CocoResult:
    """Compute COCO's average precision.

    Args:
        annotations: ground truth in COCO's form, a JSON file or its content.
        results: detections by image id, labels being positions in the ascending list of category
            ids; or entries in the form of a COCO results file.

    Raises:
        ValueError: a result of an image that is not in the annotations, or a label without category.

    References:
        Lin et al., Microsoft COCO. ECCV 2014. arXiv:1405.0312; cocodataset.org, "Evaluate".

    >>> from focaldet import Detections
    >>> import torch
    >>> image = {"id": 7, "height": 50, "width": 50}
    >>> box = {
    ...     "id": 1,
    ...     "image_id": 7,
    ...     "category_id": 3,
    ...     "bbox": [5, 5, 40, 40],
    ...     "area": 1600,
    ...     "iscrowd": 0,
    ... }
    >>> truth = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "cat"}]}
    >>> found = Detections(
    ...     torch.tensor([[5.0, 5, 45, 45]]),
    ...     torch.tensor([0.9]),
    ...     torch.tensor([0]),
    ...     image_size=(50, 50),
    ... )
    >>> round(evaluate_coco(truth, {7: found}).ap, 3)
    1.0
    """
    if isinstance(annotations, Mapping):
        content = dict(annotations)
    else:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    # pycocotools writes into the annotations: let it do so in copies
    content["annotations"] = [dict(annotation) for annotation in content["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        entries = _entries(truth, results)
        judge = COCOeval(
            truth, truth.loadRes(entries) if entries else _nothing_found(truth), "bbox"
        )
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return CocoResult(tuple(float(value) for value in judge.stats))


def _nothing_found(truth: COCO) -> COCO:
    found = COCO()  # pycocotools' own loadRes can't take an empty list
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def _entries(
    truth: COCO, results: Mapping[int, Detections] | Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if not isinstance(results, Mapping):
        entries = [dict(entry) for entry in results]
    else:
        category_ids = sorted(truth.getCatIds())
        entries = []
        for image_id, detections in results.items():
            if len(detections) and int(detections.labels.max()) >= len(category_ids):
                condition = f"below the number of categories ({len(category_ids)})"
                got = f"{int(detections.labels.max())} in image {image_id}"
                raise ValueError(must_be("labels", condition, got))
            entries += detections.to_coco(image_id, category_ids)
    unknown = sorted({entry["image_id"] for entry in entries} - set(truth.getImgIds()))
    if unknown:
        raise ValueError(must_be("results", "of images in the annotations", f"ids {unknown[:5]}"))
    return entries
