"""From images of any sizes to the one batch that the network takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from focaldet._checks import check_choice, check_image, check_range, must_be
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Preprocess", "resize_factor", "resized_size"]

_HALF = {"floor": 0.0, "round": 0.5}  # added before the fraction is cut off


def resize_factor(size: tuple[int, int], min_size: int, max_size: int) -> float:
    """Return the factor that brings an image's short side to ``min_size``.

    If the long side would then exceed ``max_size``, it is the one that brings that to ``max_size``.

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
    """Return the size of an image after its short side is brought to ``min_size``.

    The ratio of the sides stays; if the long side would exceed ``max_size``, that becomes its
    length. Sizes are at least 1.

    Args:
        size: ``(height, width)``.
        min_size: wanted length of the short side, in pixels.
        max_size: greatest length of the long side, in pixels.
        rounding: "floor", as in torchvision, or "round" to the nearest (halves up), as in Detectron2
            and MMDetection.

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
        min_size: length in pixels to which the short side is brought, up or down.
        max_size: greatest length of the long side, in pixels.
        mean: of the three channels, subtracted from images in 0-1.
        std: of the three channels, > 0.
        size_divisor: the batch's height and width are padded to multiples of this, right and below,
            with zeros (after normalisation).
        size_rounding: "floor" or "round"; see :func:`resized_size`.
        antialias: widen the bilinear filter where an image shrinks, as Pillow does.
        round_pixels: resize images of 256 levels to images of 256 levels, before normalisation, as
            Pillow and OpenCV do; images of finer levels lose them. Otherwise normalised values are
            resized, as in torchvision. With ``antialias``, on the CPU, the result is Pillow's but for
            single levels.
        always_pad: pad by at least one pixel on each axis: what divides already grows by
            ``size_divisor``.

    Deviation: the paper gives the short side alone; 1333 for the long one, bilinear resizing without
    antialiasing and sizes rounded down are torchvision's.

    Raises:
        ValueError: a number out of its range.

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
        check_range("max_size", max_size, min_size)
        check_range("size_divisor", size_divisor, 1)
        check_choice("size_rounding", size_rounding, _HALF)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(must_be(name, "three numbers (red, green, blue)", values))
        for value in std:
            check_range("std", value, 0, low_open=True)
        self.min_size = min_size
        self.max_size = max_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.size_divisor = size_divisor
        self.size_rounding = size_rounding
        self.antialias = antialias
        self.round_pixels = round_pixels
        self.always_pad = always_pad

    def forward(
        self, images: Sequence[Tensor] | Tensor, *, resize: bool = True, validate: bool = True
    ) -> ImageBatch:
        """Return the batch; its ``scale_targets`` brings targets into its pixels.

        Args:
            images: ``[3, H, W]`` each, RGB, floating-point in 0-1, of any sizes; or ``[B, 3, H, W]``.
            resize: False leaves images at the size they have, for training on images that a
                transform has brought to the sizes it wants.
            validate: check the images' values too, which waits for a GPU to finish.

        Raises:
            TypeError: images that are not floating-point tensors.
            ValueError: images of another shape, without pixels, not finite or not in 0-1.
        """
        if not len(images):
            raise ValueError(must_be("images", "not empty", "no images"))
        for index, image in enumerate(images):
            check_image(f"images[{index}]", image, uint8=False, values=validate)
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
        if self.antialias and levels.device.type == "cpu":  # torch's own way with bytes is Pillow's
            levels = self._resize(levels.byte())
        else:
            levels = (self._resize(levels) + 0.5).floor()  # halves up, as OpenCV rounds
        return (levels.float() / 255).to(image.dtype)

    def _pad(self, images: Sequence[Tensor]) -> Tensor:
        height, width = (
            self._padded(max(image.shape[axis] for image in images)) for axis in (1, 2)
        )
        batch = images[0].new_zeros(len(images), 3, height, width)
        for padded, image in zip(batch, images, strict=True):
            padded[:, : image.shape[1], : image.shape[2]] = image
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
