"""Preprocessing: resize, normalise and pad images of any sizes to a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from focaldet._checks import check_choice, check_image, check_range
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Preprocess", "resize_factor", "resized_size"]

_HALF = {"floor": 0.0, "round": 0.5}  # added before rounding down


def resize_factor(size: tuple[int, int], min_size: int, max_size: int) -> float:
    """Return the factor that resizes an image's short side to ``min_size``.

    If the long side would then exceed ``max_size``, return the factor that resizes that to
    ``max_size``.

    >>> resize_factor((400, 600), min_size=800, max_size=1333)
    2.0
    """
    return min(min_size / min(size), max_size / max(size))


def resized_size(
    size: tuple[int, int],
    min_size: int,
    max_size: int,
    *,
    rounding: Literal["floor", "round"] = "floor",
) -> tuple[int, int]:
    """Return the size of an image after its short side is resized to ``min_size``.

    The aspect ratio is kept, so the short side becomes shorter if the long one would otherwise exceed
    ``max_size``. Both sides are at least 1.

    Args:
        size: ``(height, width)``.
        min_size: Target length of the short side, in pixels.
        max_size: Maximum length of the long side, in pixels.
        rounding: "floor", as in torchvision, or "round" to the nearest integer (halves up), as in
            Detectron2 and MMDetection.

    >>> resized_size((480, 640), min_size=800, max_size=1333)
    (800, 1066)
    >>> resized_size((480, 640), min_size=800, max_size=1333, rounding="round")
    (800, 1067)
    """
    scale = resize_factor(size, min_size, max_size)
    height, width = (max(1, math.floor(float(side) * scale + _HALF[rounding])) for side in size)
    return height, width


class Preprocess(nn.Module):
    """Normalise, resize and pad images to a batch.

    Args:
        min_size: Length to which the short side is resized, up or down, in pixels.
        max_size: Maximum length of the long side, in pixels. It prevails where it conflicts with
            ``min_size``.
        mean: The mean of each channel, which is subtracted from images in [0, 1]. The number of
            values is the number of channels.
        std: The standard deviation of each channel, greater than 0.
        size_divisor: The batch is padded to a height and width that are multiples of this, to the
            right and below, with zeros (after normalisation).
        size_rounding: "floor" or "round"; see :func:`resized_size`.
        antialias: Whether to widen the bilinear filter where an image shrinks, as Pillow does.
        round_pixels: Whether to round to 256 levels before and after resizing, and to normalise last,
            as Pillow and OpenCV do. Otherwise normalised values are resized, as in torchvision. With
            ``antialias`` on the CPU, the result is Pillow's except for differences of one level.
        always_pad: Whether to pad by at least one pixel on each axis, so that a side that is a
            multiple of ``size_divisor`` grows by ``size_divisor``.

    Deviation: the paper specifies only the short side. The limit of 1333 for the long one, bilinear
    resizing without antialiasing and sizes rounded down follow torchvision.

    Raises:
        ValueError: If a number is out of range, or ``mean`` and ``std`` differ in length.

    >>> import torch
    >>> preprocess = Preprocess(min_size=32, max_size=64)
    >>> batch = preprocess([torch.rand(3, 16, 20), torch.rand(3, 64, 64)])
    >>> batch.tensor.shape, batch.sizes
    (torch.Size([2, 3, 32, 64]), [(32, 40), (32, 32)])
    """

    def __init__(
        self,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        size_divisor: int = 32,
        size_rounding: Literal["floor", "round"] = "floor",
        antialias: bool = False,
        round_pixels: bool = False,
        always_pad: bool = False,
    ) -> None:
        super().__init__()
        check_range("min_size", min_size, 1)
        check_range("max_size", max_size, 1)
        check_range("size_divisor", size_divisor, 1)
        check_choice("size_rounding", size_rounding, _HALF)
        if not mean or len(mean) != len(std):
            raise ValueError(
                f"mean and std must have one value per channel, but have {len(mean)} and {len(std)}."
            )
        for index, value in enumerate(std):
            check_range(f"std[{index}]", value, 0, low_open=True)
        self.min_size = min_size
        self.max_size = max_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.size_divisor = size_divisor
        self.size_rounding = size_rounding
        self.antialias = antialias
        self.round_pixels = round_pixels
        self.always_pad = always_pad

    @property
    def in_channels(self) -> int:
        """The number of channels of the images.

        .. versionadded:: 0.3.0
        """
        return len(self.mean)

    def forward(
        self, images: Sequence[Tensor] | Tensor, *, resize: bool = True, validate: bool = True
    ) -> ImageBatch:
        """Make a batch of images. Its ``scale_targets`` converts targets to its pixels.

        Args:
            images: ``[C, H, W]`` tensors of any sizes, floating-point in [0, 1], with one channel for
                each value of ``mean``, such as RGB; or a ``[B, C, H, W]`` tensor.
            resize: Whether to resize the images. False is for training on images that a transform has
                already resized.
            validate: Whether to check the images' values too, which synchronises a GPU.

        Raises:
            TypeError: If an image is not a floating-point tensor.
            ValueError: If there are no images, or one has a wrong shape, no pixels, or values that
                are not finite or not in [0, 1].
        """
        if not len(images):
            raise ValueError("images is empty; pass at least one image.")
        for index, image in enumerate(images):
            check_image(
                f"images[{index}]",
                image,
                channels=self.in_channels,
                uint8=False,
                values=validate,
            )
        prepared = [self._prepared(image, resize=resize) for image in images]
        sizes = [_size(image) for image in prepared]
        return ImageBatch(self._pad(prepared), sizes, [_size(image) for image in images])

    def _prepared(self, image: Tensor, *, resize: bool) -> Tensor:
        if not resize:
            return self._normalize(image)
        if self.round_pixels:
            return self._normalize(self._resize_levels(image))
        return self._resize(self._normalize(image))

    def _normalize(self, image: Tensor) -> Tensor:
        mean, std = image.new_tensor(self.mean), image.new_tensor(self.std)
        return (image - mean[:, None, None]) / std[:, None, None]

    def _resize(self, image: Tensor) -> Tensor:
        size = resized_size(_size(image), self.min_size, self.max_size, rounding=self.size_rounding)
        return F.interpolate(
            image[None], size=size, mode="bilinear", align_corners=False, antialias=self.antialias
        )[0]

    def _resize_levels(self, image: Tensor) -> Tensor:
        levels = (image.float() * 255).round().clamp(0, 255)
        if self.antialias and levels.device.type == "cpu":  # torch resizes bytes as Pillow does
            levels = self._resize(levels.byte())
        else:
            levels = (self._resize(levels) + 0.5).floor()  # OpenCV rounds halves up
        return (levels.float() / 255).to(image.dtype)

    def _pad(self, images: Sequence[Tensor]) -> Tensor:
        height, width = (
            self._padded(max(image.shape[axis] for image in images)) for axis in (1, 2)
        )
        batch = images[0].new_zeros(len(images), self.in_channels, height, width)
        for index, image in enumerate(images):  # not by views, which cannot carry gradients
            batch[index, :, : image.shape[1], : image.shape[2]] = image
        return batch

    def _padded(self, side: int) -> int:
        return math.ceil((side + self.always_pad) / self.size_divisor) * self.size_divisor

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return (
            f"min_size={self.min_size}, max_size={self.max_size}, mean={self.mean}, "
            f"std={self.std}, size_divisor={self.size_divisor}, "
            f"size_rounding={self.size_rounding!r}, antialias={self.antialias}, "
            f"round_pixels={self.round_pixels}, always_pad={self.always_pad}"
        )


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return int(height), int(width)
