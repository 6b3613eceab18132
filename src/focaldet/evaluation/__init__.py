"""COCO average precision, its curves, and what kinds of errors cost it."""

from focaldet.evaluation._confusion import ConfusionMatrix
from focaldet.evaluation._curve import PrecisionRecall
from focaldet.evaluation._errors import ClassErrors, ErrorAnalysis, ErrorKind, analyse_errors
from focaldet.evaluation._evaluate import evaluate_coco
from focaldet.evaluation._report import write_report
from focaldet.evaluation._result import ClassResult, CocoResult
from focaldet.evaluation._results import coco_results, write_coco_results
from focaldet.evaluation._worst import ImageErrors

__all__ = [
    "ClassErrors",
    "ClassResult",
    "CocoResult",
    "ConfusionMatrix",
    "ErrorAnalysis",
    "ErrorKind",
    "ImageErrors",
    "PrecisionRecall",
    "analyse_errors",
    "coco_results",
    "evaluate_coco",
    "write_coco_results",
    "write_report",
]
