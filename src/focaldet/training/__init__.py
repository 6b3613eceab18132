"""Training loop, callbacks and data module, built on PyTorch Lightning (extra ``train``).

:func:`train` trains a RetinaNet on a dataset and writes everything about the run to one folder. Its
parts are ordinary Lightning classes, which also work in a ``Trainer`` of your own:
:class:`RetinaNetModule`, :class:`DetectionDataModule` and the callbacks.

References:
    Lin et al., Focal Loss for Dense Object Detection, section 4.1. arXiv:1708.02002.
    Goyal et al., Accurate, Large Minibatch SGD (linear scaling, warm-up). arXiv:1706.02677.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import focaldet.training._requirements  # noqa: F401  # before modules that import the packages
from focaldet._deprecation import moved
from focaldet.errors import TrainingError
from focaldet.training._checkpoints import AtomicCheckpointIO, BestModel, LastCheckpoint
from focaldet.training._coco_ap import CocoAP
from focaldet.training._curves import Curves, draw_curves
from focaldet.training._data_module import DetectionDataModule
from focaldet.training._lightning_module import RetinaNetModule
from focaldet.training._metrics_file import MetricsFile
from focaldet.training._nonfinite import NonFiniteGuard
from focaldet.training._optimisation import PAPER_BATCH, PAPER_LR, lr_factor, parameter_groups
from focaldet.training._options import TrainingOptions
from focaldet.training._pictures import Pictures
from focaldet.training._recipe import RECIPES, Recipe, recipe
from focaldet.training._runs import Run, RunTable, list_runs, read_run
from focaldet.training._train import TrainingSummary, train
from focaldet.training._weight_average import AverageWeights

__all__ = [
    "PAPER_BATCH",
    "PAPER_LR",
    "RECIPES",
    "AtomicCheckpointIO",
    "AverageWeights",
    "BestModel",
    "CocoAP",
    "Curves",
    "DetectionDataModule",
    "LastCheckpoint",
    "MetricsFile",
    "NonFiniteGuard",
    "Pictures",
    "Recipe",
    "RetinaNetModule",
    "Run",
    "RunTable",
    "TrainingError",
    "TrainingOptions",
    "TrainingSummary",
    "draw_curves",
    "list_runs",
    "lr_factor",
    "parameter_groups",
    "read_run",
    "recipe",
    "train",
]

if not TYPE_CHECKING:  # a module with __getattr__ would have every name for a type checker
    __getattr__ = moved(__name__, {"WholeFiles": f"{__name__}.AtomicCheckpointIO"})
