"""What surrounds the network of an exported file: the parts that prepare images, and checks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from focaldet._assembly import build_parts
from focaldet._checks import must_be

if TYPE_CHECKING:
    from torch import Tensor

    from focaldet._assembly import Parts
    from focaldet.export._metadata import FileFacts

__all__ = ["check_images", "check_sizes", "parts_around"]


class _Strides(nn.Module):
    """Stands for a backbone where only its strides are wanted."""

    def __init__(self, strides: tuple[int, int, int]) -> None:
        super().__init__()
        self.channels, self.strides = (1, 1, 1), strides


def parts_around(facts: FileFacts) -> Parts:
    """Build a file's preprocessing, anchors and post-processing; the network among the parts is a stub."""
    return build_parts(facts.config.replace(fpn_channels=32, head_depth=0), _Strides(facts.strides))


def check_images(images: Tensor, facts: FileFacts) -> None:
    """Raise unless a file takes these images.

    Raises:
        TypeError: no tensor, or not float32.
        ValueError: not three channels, sides that ``size_divisor`` does not divide, or other than the
            shape to which the file is fixed.
    """
    _check_tensor("images", images)
    if images.dtype != torch.float32:
        raise TypeError(must_be("images", "of dtype torch.float32", images.dtype))
    shape = list(images.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(must_be("images", "of shape [B, 3, H, W]", shape))
    fixed, divisor = facts.fixed_shape, facts.config.size_divisor
    if fixed is not None and (shape[0], shape[2], shape[3]) != fixed:
        condition = f"of shape {[fixed[0], 3, *fixed[1:]]}, to which the file is fixed"
        raise ValueError(must_be("images", condition, shape))
    if shape[2] % divisor or shape[3] % divisor:
        condition = f"of a height and width that size_divisor={divisor} divides"
        remedy = "Pad them right and below with zeros."
        raise ValueError(must_be("images", condition, shape, remedy))


def check_sizes(sizes: Tensor, images: Tensor) -> None:
    """Raise unless there is a ``(height, width)`` within the batch for each image.

    Raises:
        TypeError: no tensor, or not int64.
        ValueError: not ``[B, 2]``, or beyond the batch.
    """
    _check_tensor("sizes", sizes)
    if sizes.dtype != torch.int64:
        raise TypeError(must_be("sizes", "of dtype torch.int64", sizes.dtype))
    if list(sizes.shape) != [len(images), 2]:
        condition = f"of shape {[len(images), 2]}, (height, width) of each image"
        raise ValueError(must_be("sizes", condition, list(sizes.shape)))
    height, width = images.shape[2:]
    if bool((sizes < 1).any() or (sizes > sizes.new_tensor([height, width])).any()):
        condition = f"from 1 to the images' {height}x{width}"
        raise ValueError(must_be("sizes", condition, sizes.tolist()))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(must_be(name, "a tensor", type(value).__name__))
