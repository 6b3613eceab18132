"""The focal losses, each as a function and, for the two common ones, as a module.

* `sigmoid_focal_loss` / `FocalLoss`: independent classes, as RetinaNet has them.
* `sigmoid_focal_loss_maps`: the same loss read straight from the maps of a dense head.
* `softmax_focal_loss` / `SoftmaxFocalLoss`: exclusive classes.
* `focal_star_loss`: the variant FL* of the paper's appendix A.

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
