"""Layers of stride 2 that pad as TensorFlow does for ``padding="same"``.

An odd side is padded by ``kernel_size // 2`` before and after, as in PyTorch. An even side is padded by
one less before, so that the windows are one pixel further to the right or below. With symmetric padding,
the windows of an even side use one row or column less of the padding after it. So TensorFlow's padding is
the symmetric one of the mirrored map, for both kinds of sides. Nothing here depends on the size, which
exporters could not follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SameConv2d", "SameMaxPool2d", "widened"]

_AXES = (2, 3)


class SameConv2d(nn.Conv2d):
    """A convolution with stride 2 and an odd kernel that pads as TensorFlow does.

    ``padding`` must be half the kernel's size, rounded down.

    >>> import torch
    >>> conv = SameConv2d(1, 1, 3, stride=2, padding=1, bias=False)
    >>> _ = conv.weight.data.copy_(torch.arange(9.0).view(1, 1, 3, 3))
    >>> conv(torch.ones(1, 1, 1, 2))  # the window begins at the first column: 3 + 4
    tensor([[[[7.]]]], grad_fn=<FlipBackward0>)
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.Conv2d
        """Return the convolution of a map, ``[B, C, H, W]``."""
        mirrored = input.flip(_AXES)
        if self.training:
            mirrored = widened(mirrored)
        kernel = self.weight.flip(_AXES)
        return F.conv2d(mirrored, kernel, self.bias, self.stride, self.padding).flip(_AXES)


class SameMaxPool2d(nn.MaxPool2d):
    """A maximum over windows with stride 2 and an odd size that pads as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.MaxPool2d
        """Return the maxima of a map, ``[B, C, H, W]``."""
        return super().forward(input.flip(_AXES)).flip(_AXES)  # type: ignore[no-any-return]


def widened(x: Tensor) -> Tensor:
    """Add a column of zeros to a map one cell wide, which does not change a convolution of stride 2.

    In training it is needed: without it, oneDNN (torch 2.15, bfloat16, stride 2) leaves parts of the
    weight's gradient uninitialised.
    """
    return F.pad(x, (0, 1)) if x.shape[-1] == 1 else x
