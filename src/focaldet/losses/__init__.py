"""Focal losses as functions, and the two common ones also as modules.

* `sigmoid_focal_loss` / `FocalLoss`: independent classes, as in RetinaNet.
* `sigmoid_focal_loss_maps`: the same loss, computed directly from the maps of a dense head.
* `softmax_focal_loss` / `SoftmaxFocalLoss`: mutually exclusive classes.
* `focal_star_loss`: the variant FL* from the paper's appendix A.

References:
    Lin, Goyal, Girshick, He, Dollár. Focal Loss for Dense Object Detection. ICCV 2017.
    arXiv:1708.02002.
"""

from focaldet.losses._maps import sigmoid_focal_loss_maps
from focaldet.losses._sigmoid import FocalLoss, sigmoid_focal_loss
from focaldet.losses._softmax import SoftmaxFocalLoss, softmax_focal_loss
from focaldet.losses._star import focal_star_loss

__all__ = [
    "FocalLoss",
    "SoftmaxFocalLoss",
    "focal_star_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_maps",
    "softmax_focal_loss",
]
