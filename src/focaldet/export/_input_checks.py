"""Checks of the tensors that are passed to an exported file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from focaldet.export._metadata import ExportMetadata

__all__ = ["check_images", "check_sizes"]


def check_images(images: Tensor, metadata: ExportMetadata) -> None:
    """Raise unless a file accepts these images.

    Raises:
        TypeError: If ``images`` is not a tensor, or not float32.
        ValueError: If the number of dimensions or channels is wrong, or height or width is not a
            multiple of ``size_divisor``, or the shape is not the one that the file is fixed to.
    """
    _check_tensor("images", images, torch.float32)
    shape, channels = list(images.shape), metadata.num_channels
    if len(shape) != 4 or shape[1] != channels or 0 in shape:
        raise ValueError(f"images must have shape [B, {channels}, H, W], got {shape}.")
    if metadata.fixed_shape is not None:
        batch, height, width = metadata.fixed_shape
        if shape != [batch, channels, height, width]:
            raise ValueError(
                f"The file only accepts images of shape {[batch, channels, height, width]}, got "
                f"{shape}. Export the model without fixed_shape to pass others."
            )
    divisor = metadata.config.size_divisor
    if shape[2] % divisor or shape[3] % divisor:
        raise ValueError(
            f"The height and width of images must be multiples of size_divisor={divisor}, got shape "
            f"{shape}. Pad the images with zeros on the right and at the bottom."
        )


def check_sizes(sizes: Tensor, images: Tensor) -> None:
    """Raise unless ``sizes`` has a valid ``(height, width)`` for each image.

    Raises:
        TypeError: If ``sizes`` is not a tensor, or not int64.
        ValueError: If the shape is not ``[B, 2]``, or a size exceeds that of the batch.
    """
    _check_tensor("sizes", sizes, torch.int64)
    if list(sizes.shape) != [len(images), 2]:
        raise ValueError(
            f"sizes must have shape [{len(images)}, 2], (height, width) of each image, got "
            f"{list(sizes.shape)}."
        )
    height, width = images.shape[2:]
    wrong = ((sizes < 1) | (sizes > sizes.new_tensor([height, width]))).any(dim=1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"sizes[{index}] must be between (1, 1) and the size of the batch, ({height}, {width}), "
            f"got {tuple(sizes[index].tolist())}."
        )


def _check_tensor(name: str, value: object, dtype: torch.dtype) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}.")
