"""Training (``pip install 'focaldet[train]'``): a RetinaNet, a data set, one folder a run.

:func:`train` does it all. Its parts are plain pytorch-lightning ones and work alone:
:class:`RetinaNetModule`, :class:`DetectionDataModule` and the callbacks.

References:
    Lin et al., Focal Loss for Dense Object Detection, section 4.1. arXiv:1708.02002.
    Goyal et al., Accurate, Large Minibatch SGD (linear scaling, warm-up). arXiv:1706.02677.
"""

from __future__ import annotations

try:
    import matplotlib  # noqa: ICN001, F401
    import pytorch_lightning  # noqa: F401
    import safetensors  # noqa: F401
    import tensorboard  # type: ignore[import-untyped]  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"focaldet.training needs the package {error.name}: pip install 'focaldet[train]'"
    ) from error

from focaldet.errors import TrainingError
from focaldet.training._average import AverageWeights
from focaldet.training._checkpoints import BestModel, LastCheckpoint, WholeFiles
from focaldet.training._data import DetectionDataModule
from focaldet.training._evaluation import CocoAP
from focaldet.training._guard import NonFiniteGuard
from focaldet.training._metrics import MetricsFile
from focaldet.training._module import RetinaNetModule
from focaldet.training._optimisation import PAPER_BATCH, PAPER_LR, lr_factor, parameter_groups
from focaldet.training._options import TrainingOptions
from focaldet.training._pictures import Curves, Pictures, draw_curves
from focaldet.training._run import TrainingSummary, train

__all__ = [
    "PAPER_BATCH",
    "PAPER_LR",
    "AverageWeights",
    "BestModel",
    "CocoAP",
    "Curves",
    "DetectionDataModule",
    "LastCheckpoint",
    "MetricsFile",
    "NonFiniteGuard",
    "Pictures",
    "RetinaNetModule",
    "TrainingError",
    "TrainingOptions",
    "TrainingSummary",
    "WholeFiles",
    "draw_curves",
    "lr_factor",
    "parameter_groups",
    "train",
]
