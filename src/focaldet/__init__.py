"""RetinaNet and the focal loss for PyTorch, as small parts that work alone or together.

``import focaldet`` imports nothing heavy. Public names are imported on first use, so that
``from focaldet import FocalLoss`` takes no longer than ``import torch``.

References:
    Lin, Goyal, Girshick, He, Dollár. Focal Loss for Dense Object Detection. ICCV 2017.
    arXiv:1708.02002.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from focaldet._version import __version__

if TYPE_CHECKING:
    from focaldet.anchors import AnchorGenerator
    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections
    from focaldet.fpn import FPN
    from focaldet.heads import RetinaNetHead
    from focaldet.losses import (
        FocalLoss,
        SoftmaxFocalLoss,
        focal_star_loss,
        sigmoid_focal_loss,
        sigmoid_focal_loss_maps,
        softmax_focal_loss,
    )
    from focaldet.retinanet import RetinaNet

__all__ = [
    "FPN",
    "AnchorGenerator",
    "Detections",
    "FocalLoss",
    "RetinaNet",
    "RetinaNetConfig",
    "RetinaNetHead",
    "SoftmaxFocalLoss",
    "__version__",
    "focal_star_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_maps",
    "softmax_focal_loss",
]

_HOME = {
    "AnchorGenerator": "anchors",
    "Detections": "detections",
    "FPN": "fpn",
    "FocalLoss": "losses",
    "RetinaNet": "retinanet",
    "RetinaNetConfig": "config",
    "RetinaNetHead": "heads",
    "SoftmaxFocalLoss": "losses",
    "focal_star_loss": "losses",
    "sigmoid_focal_loss": "losses",
    "sigmoid_focal_loss_maps": "losses",
    "softmax_focal_loss": "losses",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use (PEP 562)."""
    if name == "pretrained":  # so that focaldet.pretrained.list() needs no other import
        return importlib.import_module(f"{__name__}.pretrained")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
