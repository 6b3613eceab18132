"""COCO average precision: the twelve numbers, the numbers of each class, and their curves."""

from focaldet.evaluation._curve import PrecisionRecall
from focaldet.evaluation._evaluate import evaluate_coco
from focaldet.evaluation._result import ClassResult, CocoResult
from focaldet.evaluation._results import coco_results, write_coco_results

__all__ = [
    "ClassResult",
    "CocoResult",
    "PrecisionRecall",
    "coco_results",
    "evaluate_coco",
    "write_coco_results",
]
