"""Preprocessing: resize, normalise and pad images of any sizes to a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focaldet._checks import (
    check_choice,
    check_image,
    check_image_values,
    check_range,
    check_size,
)
from focaldet._opencv_resizing import resize_as_opencv
from focaldet._pillow_resizing import resize_as_pillow
from focaldet._uploads import Constants
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["SIZE_ROUNDINGS", "Preprocess", "SizeRounding", "resize_factor", "resized_size"]

SizeRounding: TypeAlias = Literal[
    "floor", "round", "round_half_even", "round_two_step", "round_before_limit"
]
"""How :func:`resized_size` rounds.

.. versionadded:: 0.3.0
"""

SIZE_ROUNDINGS: tuple[SizeRounding, ...] = get_args(SizeRounding)
"""The values of :data:`SizeRounding`.

.. versionadded:: 0.3.0
"""


def resize_factor(
    size: tuple[int, int], min_size: int, max_size: int, *, rounding: SizeRounding = "floor"
) -> float:
    """Return the factor that resizes an image's short side to ``min_size``.

    If the long side would then exceed ``max_size``, return the factor that resizes that to
    ``max_size``. With the rounding "round_before_limit", the long side is rounded before it is
    compared.

    Raises:
        ValueError: If a side of the image is not above 0.

    >>> resize_factor((400, 600), min_size=800, max_size=1333)
    2.0
    """
    check_size("size", size)
    factor, limit = min_size / min(size), max_size / max(size)
    if rounding == "round_before_limit":
        return limit if round(factor * max(size)) > max_size else factor
    return min(factor, limit)


def resized_size(
    size: tuple[int, int],
    min_size: int,
    max_size: int,
    *,
    rounding: SizeRounding = "floor",
    keep_ratio: bool = True,
) -> tuple[int, int]:
    """Return the size of an image after its short side is resized to ``min_size``.

    The aspect ratio is kept, so the short side becomes shorter if the long one would otherwise exceed
    ``max_size``. Both sides are at least 1.

    Args:
        size: ``(height, width)``.
        min_size: Target length of the short side, in pixels.
        max_size: Maximum length of the long side, in pixels.
        rounding: "floor", as in torchvision; "round" to the nearest integer (halves up), as in
            MMDetection; "round_half_even" (halves to the even integer), as OpenCV does for a given
            factor; "round_two_step", as in Detectron2, which resizes the short side and then, if
            necessary, the long side, and rounds as "round" does after both, so that float arithmetic
            puts some halves on the other side; or "round_before_limit", as in Detectron, which rounds
            as "round_half_even" does, and rounds the long side before it compares it with
            ``max_size``.

            .. versionchanged:: 0.3.0
                Added "round_half_even", "round_two_step" and "round_before_limit".
        keep_ratio: Whether to keep the aspect ratio. If False, both sides become ``min_size``.

            .. versionadded:: 0.3.0

    >>> resized_size((480, 640), min_size=800, max_size=1333)
    (800, 1066)
    >>> resized_size((480, 640), min_size=800, max_size=1333, rounding="round")
    (800, 1067)
    """
    if not keep_ratio:
        return min_size, min_size
    if rounding == "round_two_step":
        factor = min_size / min(size)
        sides = [float(min_size) if side == min(size) else factor * side for side in size]
        factor = min(1.0, max_size / max(sides))
        sides = [side * factor for side in sides]
    else:
        factor = resize_factor(size, min_size, max_size, rounding=rounding)
        sides = [float(side) * factor for side in size]
    height, width = (max(1, _ROUND[rounding](side)) for side in sides)
    return height, width


def _round_half_up(side: float) -> int:
    return math.floor(side + 0.5)


_ROUND: dict[SizeRounding, Callable[[float], int]] = {
    "floor": math.floor,
    "round": _round_half_up,
    "round_half_even": round,
    "round_two_step": _round_half_up,
    "round_before_limit": round,
}


class Preprocess(nn.Module):
    """Normalise, resize and pad images to a batch.

    Args:
        min_size: Length to which the short side is resized, up or down, in pixels.
        max_size: Maximum length of the long side, in pixels. It prevails where it conflicts with
            ``min_size``.
        keep_ratio: Whether to keep the aspect ratio. If False, both sides are resized to ``min_size``,
            ``max_size`` has no effect, and no image of a batch needs padding beyond ``size_divisor``.

            .. versionadded:: 0.3.0
        mean: The mean of each channel, which is subtracted from images in [0, 1]. The number of
            values is the number of channels.
        std: The standard deviation of each channel, greater than 0.
        size_divisor: The batch is padded to a height and width that are multiples of this, to the
            right and below, with zeros (after normalisation).
        size_rounding: "floor", "round", "round_half_even", "round_two_step" or "round_before_limit";
            see :func:`resized_size`.
        antialias: Whether to widen the bilinear filter where an image shrinks, as Pillow does.
        round_pixels: Whether to round to 256 levels before and after resizing, and to normalise last,
            as Pillow and OpenCV do. Otherwise normalised values are resized, as in torchvision. With
            ``antialias``, the result is exactly Pillow's; without, it is bitwise that of OpenCV's
            ``cv2.resize``, on every device.
        always_pad: Whether to pad by at least one pixel on each axis, so that a side that is a
            multiple of ``size_divisor`` grows by ``size_divisor``.
        resize_by: What decides where pixels are sampled. "size" is the ratio of the new size, in whole
            pixels, to the old one; "factor" is :func:`resize_factor` itself, as
            ``cv2.resize(image, None, fx=factor, fy=factor)`` does in Detectron, keras-retinanet and
            PaddleDetection. At the right and lower edges, the two differ by up to half a pixel.

            .. versionadded:: 0.3.0

    Deviation: the paper specifies only the short side. The limit of 1333 for the long one, bilinear
    resizing without antialiasing and sizes rounded down follow torchvision.

    Raises:
        ValueError: If a number is out of range, ``mean`` and ``std`` differ in length, or
            ``resize_by`` is "factor" and ``antialias`` is True or ``keep_ratio`` is False.

    .. versionchanged:: 0.3.0
        ``round_pixels`` with ``antialias`` is exactly Pillow's resizing; before, up to 1% of the values
        were off by one level. ``round_pixels`` without ``antialias`` uses OpenCV's fixed-point arithmetic. Before, about one
        value in ten was off by one level.

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
        keep_ratio: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        size_divisor: int = 32,
        size_rounding: SizeRounding = "floor",
        antialias: bool = False,
        round_pixels: bool = False,
        always_pad: bool = False,
        resize_by: Literal["size", "factor"] = "size",
    ) -> None:
        super().__init__()
        check_range("min_size", min_size, 1)
        check_range("max_size", max_size, 1)
        check_range("size_divisor", size_divisor, 1)
        check_choice("size_rounding", size_rounding, SIZE_ROUNDINGS)
        check_choice("resize_by", resize_by, ("size", "factor"))
        if resize_by == "factor" and (antialias or not keep_ratio):
            raise ValueError(
                "resize_by='factor' requires antialias=False and keep_ratio=True, got "
                f"antialias={antialias} and keep_ratio={keep_ratio}."
            )
        if not mean or len(mean) != len(std):
            raise ValueError(
                f"mean and std must have one value per channel, but have {len(mean)} and {len(std)}."
            )
        for index, value in enumerate(std):
            check_range(f"std[{index}]", value, 0, low_open=True)
        self.min_size = min_size
        self.max_size = max_size
        self.keep_ratio = keep_ratio
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.size_divisor = size_divisor
        self.size_rounding = size_rounding
        self.resize_by = resize_by
        self.antialias = antialias
        self.round_pixels = round_pixels
        self.always_pad = always_pad
        self.resize_by = resize_by
        self._constants = Constants()

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
            images: ``[C, H, W]`` tensors of any sizes, floating-point in [0, 1] or uint8, with one
                channel for each value of ``mean``, such as RGB; or a ``[B, C, H, W]`` tensor.

                .. versionchanged:: 0.3.0
                    uint8 is accepted and divided by 255, in torch's default dtype.
            resize: Whether to resize the images. False is for training on images that a transform has
                already resized.
            validate: Whether to check the images' values too, for which the host waits for a GPU once.

        Raises:
            TypeError: If an image is not a floating-point or uint8 tensor.
            ValueError: If there are no images, or one has a wrong shape, no pixels, or values that
                are not finite or not in [0, 1].
        """
        if not len(images):
            raise ValueError("images is empty; pass at least one image.")
        for index, image in enumerate(images):
            check_image(f"images[{index}]", image, channels=self.in_channels, values=False)
        if validate:
            check_image_values("images", list(images))
        prepared = [self._prepared(_floating(image), resize=resize) for image in images]
        sizes = [_size(image) for image in prepared]
        return ImageBatch(self._pad(prepared), sizes, [_size(image) for image in images])

    def to_levels(self, image: Tensor) -> ImageBatch | None:
        """Resize and pad an image, but leave its values in bytes, to copy them to another device.

        They are a quarter of the bytes of the normalised image. :meth:`from_levels` continues on that
        device, with exactly the result of calling the module.

        Args:
            image: ``[C, H, W]``, floating-point in [0, 1] or uint8. Its values are not checked.

        Returns:
            A batch of one whose tensor is uint8, or None if bytes do not give the same result: if
            ``round_pixels`` is False, if the image would not be normalised in float32, or if the module
            is a subclass or has hooks.

        Raises:
            TypeError, ValueError: If the image has a wrong dtype or shape.

        .. versionadded:: 0.3.0

        >>> preprocess = Preprocess(min_size=32, max_size=64, round_pixels=True)
        >>> image = torch.rand(3, 16, 20)
        >>> levels = preprocess.to_levels(image)
        >>> levels.tensor.dtype, levels.sizes, levels.original_sizes
        (torch.uint8, [(32, 40)], [(16, 20)])
        >>> torch.equal(preprocess.from_levels(levels).tensor, preprocess([image]).tensor)
        True
        """
        check_image("image", image, channels=self.in_channels, values=False)
        dtype = image.dtype if image.is_floating_point() else torch.get_default_dtype()
        customised = type(self) is not Preprocess or self._forward_hooks or self._forward_pre_hooks
        if not self.round_pixels or dtype != torch.float32 or customised:
            return None
        levels = _to_bytes(image) if image.is_floating_point() else image
        resized = self._resized_levels(levels).byte()
        return ImageBatch(self._pad([resized]), [_size(resized)], [_size(image)])

    def from_levels(self, batch: ImageBatch) -> ImageBatch:
        """Normalise what :meth:`to_levels` returned, on the device of the tensor.

        Args:
            batch: The result of :meth:`to_levels`, or several of the same padded size, concatenated.

        Returns:
            The batch that the module itself returns: normalised float32, with padding of 0.

        .. versionadded:: 0.3.0
        """
        levels = batch.tensor.float()
        # A GPU would multiply by 1 / 255 instead of dividing by a Python number.
        tensor = self._normalize(levels / self._constants((255.0,), levels))
        for image, (height, width) in zip(tensor, batch.sizes, strict=True):
            image[:, height:].zero_()
            image[:, :, width:].zero_()
        return batch._replace(tensor=tensor)

    def _prepared(self, image: Tensor, *, resize: bool) -> Tensor:
        if not resize:
            return self._normalize(image)
        if self.round_pixels:
            return self._normalize(self._resize_levels(image))
        return self._resize(self._normalize(image))

    def _normalize(self, image: Tensor) -> Tensor:
        mean, std = self._constants(self.mean, image), self._constants(self.std, image)
        return (image - mean[:, None, None]) / std[:, None, None]

    def _new_size(self, image: Tensor) -> tuple[int, int]:
        return resized_size(
            _size(image),
            self.min_size,
            self.max_size,
            rounding=self.size_rounding,
            keep_ratio=self.keep_ratio,
        )

    def _factor(self, image: Tensor) -> float | None:
        """Return the factor that pixels are sampled by, or None for the ratio of the sizes."""
        if self.resize_by == "size":
            return None
        return resize_factor(
            _size(image), self.min_size, self.max_size, rounding=self.size_rounding
        )

    def _resize(self, image: Tensor) -> Tensor:
        size, factor = self._new_size(image), self._factor(image)
        if factor is None:
            return F.interpolate(
                image[None],
                size=size,
                mode="bilinear",
                align_corners=False,
                antialias=self.antialias,
            )[0]
        if size == _size(image):  # OpenCV does not resize by a factor that changes nothing
            return image
        # F.interpolate accepts a size or a factor, not both.
        resized: Tensor = torch.ops.aten.upsample_bilinear2d(
            image[None], list(size), align_corners=False, scales_h=factor, scales_w=factor
        )
        return resized[0]

    def _resize_levels(self, image: Tensor) -> Tensor:
        return (self._resized_levels(_to_bytes(image)).float() / 255).to(image.dtype)

    def _resized_levels(self, levels: Tensor) -> Tensor:
        """Resize an image of bytes. The result may have another integer type."""
        if self.antialias:
            return resize_as_pillow(levels, self._new_size(levels))
        return resize_as_opencv(levels, self._new_size(levels), factor=self._factor(levels))

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
            f"min_size={self.min_size}, max_size={self.max_size}, "
            f"{'' if self.keep_ratio else 'keep_ratio=False, '}mean={self.mean}, "
            f"std={self.std}, size_divisor={self.size_divisor}, "
            f"size_rounding={self.size_rounding!r}, resize_by={self.resize_by!r}, "
            f"antialias={self.antialias}, "
            f"round_pixels={self.round_pixels}, always_pad={self.always_pad}"
        )


def _to_bytes(image: Tensor) -> Tensor:
    return (image.float() * 255).round().clamp(0, 255).byte()


def _floating(image: Tensor) -> Tensor:
    if image.is_floating_point():
        return image
    from focaldet.images import to_float

    return to_float(image)


def _size(image: Tensor) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return int(height), int(width)
