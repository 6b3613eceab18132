"""Padding of convolutions and poolings with stride 2, as TensorFlow pads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pad_same"]


def pad_same(x: Tensor, kernel_size: int) -> Tensor:
    """Pad a map with zeros for a layer of stride 2, as TensorFlow does for ``padding="same"``.

    An odd side is padded by ``kernel_size // 2`` before and after, as in PyTorch. An even side is
    padded by one less before, so the cells are one pixel further to the right or below.

    Args:
        x: ``[B, C, H, W]``.
        kernel_size: The size of the layer's kernel, odd and at least 3.

    >>> import torch
    >>> pad_same(torch.ones(1, 1, 1, 2), kernel_size=3)
    tensor([[[[0., 0., 0.],
              [1., 1., 0.],
              [0., 0., 0.]]]])
    """
    after = kernel_size // 2
    height, width = x.shape[-2:]
    left, top = after - 1 + width % 2, after - 1 + height % 2
    return F.pad(x, (left, after, top, after))
