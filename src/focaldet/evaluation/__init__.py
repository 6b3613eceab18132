"""COCO's average precision: the twelve numbers, each class, and the curves behind them."""

from focaldet.evaluation._coco import evaluate_coco
from focaldet.evaluation._result import ClassResult, CocoResult, PrecisionRecall

__all__ = ["ClassResult", "CocoResult", "PrecisionRecall", "evaluate_coco"]
