"""BatchNorm with fixed statistics and scales, and the conversion of networks to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from focaldet._torchvision import torchvision

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FrozenBatchNorm2d", "FrozenBatchNormAct2d", "freeze_norms", "split_norms"]


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):  # type: ignore[misc]  # has no types
    """BatchNorm with fixed statistics and scales, computed in one pass over the map.

    Deviation: maps in half precision, as under autocast, keep their dtype although the scales are
    float32. torchvision's module returns float32 and reads the map twice.

    >>> norm = FrozenBatchNorm2d(3)
    >>> norm(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` maps."""
        if x.dtype != self.weight.dtype:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # Unlike batch_norm, addcmul keeps no map for the backward pass.
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """The frozen form of timm's ``BatchNormAct2d``, which applies its activation itself.

    It has the same keys in its state dict as the module that it replaces.

    Args:
        norm: A ``timm.layers.BatchNormAct2d``.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        self.drop = norm.drop
        self.act = norm.act

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, H, W]`` maps and apply the activation."""
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


def freeze_norms(network: nn.Module) -> None:
    """Replace each BatchNorm of a network by its frozen form, with new statistics and scales.

    Modules of other classes, LayerNorm and GroupNorm among them, stay as they are.
    """
    for name, module in list(network.named_modules()):
        if type(module) is nn.BatchNorm2d:
            frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            network.set_submodule(name, frozen)
        elif _is_norm_with_activation(module):
            network.set_submodule(name, FrozenBatchNormAct2d(module))


def split_norms(network: nn.Module) -> None:
    """Replace each norm that applies its activation itself by a plain norm and the activation.

    The plain norm can then be folded into the convolution before it. The state dict's keys change.
    """
    for name, module in list(network.named_modules()):
        if _is_norm_with_activation(module) or isinstance(module, FrozenBatchNormAct2d):
            network.set_submodule(name, nn.Sequential(_plain(module), module.drop, module.act))


def _is_norm_with_activation(module: nn.Module) -> bool:
    """Whether a module is timm's ``BatchNormAct2d``, which is asked without importing timm."""
    return isinstance(module, nn.BatchNorm2d) and type(module).__name__ == "BatchNormAct2d"


def _plain(norm: Any) -> nn.Module:
    plain: Any
    if isinstance(norm, FrozenBatchNorm2d):
        plain = FrozenBatchNorm2d(len(norm.weight), eps=norm.eps)
    else:
        plain = nn.BatchNorm2d(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
    plain.load_state_dict(norm.state_dict())
    return plain.to(norm.weight).train(norm.training)  # type: ignore[no-any-return]
