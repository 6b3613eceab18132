"""Anchors: the reference boxes of every cell of every pyramid level."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from focaldet._checks import check_choice, check_range, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["AnchorGenerator"]

_LARGEST = 10**9  # so that areas do not overflow in float32
_CACHED_BATCH_SIZES = 16  # sets of anchors in the cache; 3.2 MB each at 800x1344


class AnchorGenerator(nn.Module):
    """Generate anchors of several sizes and shapes for every cell of a feature pyramid.

    Args:
        sizes: Side of the square anchor at octave scale 1, in pixels, one per level, each above 0 and
            at most 1e9, as are the next three.
        octave_scales: Factors on ``sizes``, the same at every level, each above 0.
        aspect_ratios: Height / width, each above 0. The area does not depend on it.
        strides: Distance between neighbouring cells in pixels, one per level, each above 0.
        offset: Position of the anchors' centres in their cell, in cells, in [0, 1].
        mode: "exact", "rounded", "torchvision" or "inclusive_rounded". "rounded" is for older releases of NVIDIA's
            RetinaNet: the width and height of ``sizes`` at every ratio are rounded to integers (half
            to even) and then multiplied by ``octave_scales``. "torchvision" gives anchors that are
            bitwise identical to torchvision's: it truncates ``size * scale`` to an integer, rounds
            the corners to integers (half to even), puts centres at the cells' corners (``offset``
            must be 0), and infers strides as ``padded image size // feature size`` instead of using
            ``strides``. At 800x1344 this gives 61 and 114 pixels instead of 64 and 128.
            "inclusive_rounded" is for MMDetection 1.x: the first and last pixels of a box of the exact
            size about the cell's centre are rounded to integers (half to even), and the box extends to
            the end of its last pixel (``offset`` must be 0.5).
        plus_one: Whether to extend every anchor by one pixel to the right and to the bottom. This is
            for detectors whose boxes include their last pixel (width ``x2 - x1 + 1``) but whose
            anchors were computed without it.

    Convention: anchor ``i = r * S + s`` of a cell has ratio ``r`` and scale ``s`` of S (ratio-major).
    With stride 8 and offset 0.5, the centre of the first anchor is (4, 4). Anchors are in pixels of
    the padded batch, xyxy, and are not clipped to the image.

    In mode "inclusive_rounded", a square anchor of 32 pixels at stride 8 has its first pixel at
    ``3.5 - 15.5 = -12`` and its last one at ``3.5 + 15.5 = 19``, so it is (-12, -12, 20, 20).

    Deviation: the paper does not give the position of anchors in their cell. With 0.5 they are at the
    centre of the cell's receptive field; torchvision, Detectron2 and MMDetection use 0.

    Raises:
        TypeError: If an argument is not a sequence of numbers.
        ValueError: If a number is out of range, ``sizes`` and ``strides`` differ in length, or ``offset``
            or ``plus_one`` contradicts ``mode``.

    References:
        Lin et al., Focal Loss for Dense Object Detection, section 4 "Anchors". arXiv:1708.02002.

    .. versionchanged:: 0.3.0
        Added mode "inclusive_rounded".

    >>> anchors = AnchorGenerator()([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)])
    >>> sum(len(level) for level in anchors)
    201600
    >>> AnchorGenerator(sizes=(32,), strides=(8,), octave_scales=(1,), aspect_ratios=(1,))([(1, 2)])
    [tensor([[-12., -12.,  20.,  20.],
            [ -4., -12.,  28.,  20.]])]
    """

    def __init__(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        *,
        octave_scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        offset: float = 0.5,
        mode: Literal["exact", "rounded", "torchvision", "inclusive_rounded"] = "exact",
        plus_one: bool = False,
    ) -> None:
        super().__init__()
        for name, values in (
            ("sizes", sizes),
            ("octave_scales", octave_scales),
            ("aspect_ratios", aspect_ratios),
            ("strides", strides),
        ):
            if not isinstance(values, Iterable):
                raise TypeError(f"{name} must be a sequence of numbers, got {shortened(values)}.")
            if not values:
                raise ValueError(f"{name} is empty; pass at least one number.")
            for i, value in enumerate(values):
                check_range(f"{name}[{i}]", value, 0, _LARGEST, low_open=True)
        if len(sizes) != len(strides):
            raise ValueError(
                f"sizes and strides must each have one number per level, got {len(sizes)} sizes and "
                f"{len(strides)} strides."
            )
        check_range("offset", offset, 0, 1)
        check_choice("mode", mode, ("exact", "rounded", "torchvision", "inclusive_rounded"))
        required = {"torchvision": 0, "inclusive_rounded": 0.5}.get(mode, offset)
        if offset != required:
            raise ValueError(f"mode={mode!r} requires offset={required}, got offset={offset}.")
        if mode == "inclusive_rounded" and plus_one:
            raise ValueError(
                "mode='inclusive_rounded' already extends anchors to the end of their last pixel, so it "
                "requires plus_one=False."
            )
        self.sizes = tuple(sizes)
        self.octave_scales = tuple(octave_scales)
        self.aspect_ratios = tuple(aspect_ratios)
        self.strides = tuple(strides)
        self.offset = offset
        self.mode = mode
        self.plus_one = plus_one
        self._cache: OrderedDict[tuple[object, ...], list[Tensor]] = OrderedDict()

    @property
    def num_anchors(self) -> int:
        """Number of anchors per cell, the A of the head's ``A * K`` channels."""
        return len(self.octave_scales) * len(self.aspect_ratios)

    def cell_anchors(self, level: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the anchors of one cell, centred on (0, 0): ``[A, 4]``."""
        width, height = self._sides(self.sizes[level], dtype)
        if self.mode == "inclusive_rounded":
            return self._inclusive_cells(self.strides[level], width.flatten(), height.flatten())
        half_w, half_h = width.flatten() / 2, height.flatten() / 2
        cells = torch.stack((-half_w, -half_h, half_w, half_h), dim=1)
        if self.mode == "torchvision":
            cells = cells.round()
        return cells + cells.new_tensor((0, 0, 1, 1)) if self.plus_one else cells

    @staticmethod
    def _inclusive_cells(stride: float, width: Tensor, height: Tensor) -> Tensor:
        """Return the anchors of a cell from its rounded first and last pixels."""
        centre = 0.5 * (stride - 1)  # of the cell's pixels, counted from 0
        half_w, half_h = 0.5 * (width - 1), 0.5 * (height - 1)
        first_and_last = torch.stack((-half_w, -half_h, half_w, half_h), dim=1) + centre
        corners = first_and_last.round() + width.new_tensor((0, 0, 1, 1))
        return corners - 0.5 * stride

    def _sides(self, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the widths and heights of the anchors of a cell, each ``[ratios, scales]``."""
        ratios = torch.tensor(self.aspect_ratios, dtype=dtype)[:, None]
        if self.mode == "rounded":
            width = (size / ratios.sqrt()).round()
            scales = torch.tensor(self.octave_scales, dtype=dtype)[None, :]
            return width * scales, (width * ratios).round() * scales
        scaled = [size * scale for scale in self.octave_scales]
        if self.mode == "torchvision":
            scaled = [int(size) for size in scaled]
        heights = ratios.sqrt()
        sides = torch.tensor(scaled, dtype=dtype)[None, :]
        return 1 / heights * sides, heights * sides

    def forward(
        self,
        feature_sizes: Sequence[tuple[int, int]],
        image_size: tuple[int, int] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Return the anchors of every level.

        Args:
            feature_sizes: ``(height, width)`` of each level's feature map, in cells.
            image_size: ``(height, width)`` of the padded images; required by mode "torchvision".
            device: Device of the anchors.
            dtype: Dtype of the anchors. Use float32 for geometry under autocast, too.

        Returns:
            One ``[H * W * A, 4]`` per level, in row, column and anchor order. The tensors are cached
            for later calls with the same arguments, so do not change them in place.

        Raises:
            ValueError: If there is not one feature size per level, or mode "torchvision" gets no
                ``image_size``.
        """
        if len(feature_sizes) != len(self.sizes):
            raise ValueError(
                f"feature_sizes must have one (height, width) per level ({len(self.sizes)} levels), "
                f"got {list(feature_sizes)}."
            )
        if self.mode == "torchvision" and image_size is None:
            raise ValueError(
                "mode='torchvision' infers strides from the image, so image_size is required."
            )
        grids = tuple((int(height), int(width)) for height, width in feature_sizes)
        image = None
        if image_size is not None and self.mode == "torchvision":
            image = tuple(image_size)
        key = (grids, image, torch.device(device), dtype)
        anchors = self._cache.pop(key, None)
        if anchors is None:
            # Anchors created in inference mode cannot be used by a later training step.
            with torch.inference_mode(mode=False):
                anchors = [
                    self._level_anchors(level, grid, image, dtype).to(device)
                    for level, grid in enumerate(grids)
                ]
        self._cache[key] = anchors  # most recently used last; other threads may do the same at once
        while len(self._cache) > _CACHED_BATCH_SIZES:
            with contextlib.suppress(KeyError):
                self._cache.popitem(last=False)
        return list(anchors)

    def _level_anchors(
        self, level: int, grid: tuple[int, int], image: tuple[int, ...] | None, dtype: torch.dtype
    ) -> Tensor:
        height, width = grid
        stride_y = stride_x = self.strides[level]
        if image is not None:
            stride_y, stride_x = image[0] // height, image[1] // width
        y = (torch.arange(height, dtype=dtype) + self.offset) * stride_y
        x = (torch.arange(width, dtype=dtype) + self.offset) * stride_x
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack((x, y, x, y), dim=-1)
        return (centres[:, :, None, :] + self.cell_anchors(level, dtype)).reshape(-1, 4)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_cache": OrderedDict(),
        }  # copies and pickles do not need the cache

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        scales = tuple(round(scale, 4) for scale in self.octave_scales)
        return (
            f"sizes={self.sizes}, octave_scales={scales}, aspect_ratios={self.aspect_ratios}, "
            f"strides={self.strides}, offset={self.offset}, mode={self.mode!r}"
            f"{', plus_one=True' if self.plus_one else ''}"
        )
