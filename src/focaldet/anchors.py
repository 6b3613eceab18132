"""Anchors: the boxes that every cell of every pyramid level starts from."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from focaldet._checks import check_choice, check_range, must_be

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["AnchorGenerator"]

_CACHED_BATCH_SIZES = 16  # sets of anchors kept; 3.2 MB each at 800x1344


class AnchorGenerator(nn.Module):
    """Lay anchors of several sizes and shapes over every cell of a feature pyramid.

    Args:
        sizes: side in pixels of the square anchor at octave scale 1, one a level, > 0.
        octave_scales: factors on ``sizes``, the same at every level, > 0.
        aspect_ratios: height / width, > 0; the area does not depend on it.
        strides: pixels from one cell to the next, one a level, > 0.
        offset: where in its cell an anchor's centre lies, in cells, in [0, 1].
        mode: "exact"; or "rounded", as in the older releases of NVIDIA's RetinaNet, where the width
            and height of ``sizes`` at every ratio are rounded to integers (half to even) before
            ``octave_scales`` multiplies them; or "torchvision" to repeat that library's anchors to the
            bit. It truncates ``size * scale`` to an integer, rounds the corners to integers (half to
            even), puts centres at the cells' corners (``offset`` must be 0), and derives strides as
            ``padded image size // feature size`` instead of taking ``strides``: 61 and 114 pixels
            where 64 and 128 were meant at 800x1344.
        plus_one: make every anchor a pixel wider and higher, to the right and below. Detectors whose
            boxes include their last pixel (width ``x2 - x1 + 1``) but whose anchors were laid out
            without it have such anchors.

    Convention: anchor ``i = r * S + s`` of a cell has ratio ``r`` and scale ``s`` of S (ratio-major).
    Stride 8, offset 0.5: the first anchor's centre is (4, 4). Anchors are in pixels of the padded
    batch, xyxy, and not clipped to the image.

    Deviation: the paper does not say where in its cell an anchor lies. 0.5 is the place where a
    cell's receptive field is centred; torchvision, Detectron2 and MMDetection use 0.

    Raises:
        ValueError: a number out of its range, or ``sizes`` and ``strides`` of different lengths.

    References:
        Lin et al., Focal Loss for Dense Object Detection, section 4 "Anchors". arXiv:1708.02002.

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
        mode: Literal["exact", "rounded", "torchvision"] = "exact",
        plus_one: bool = False,
    ) -> None:
        super().__init__()
        for name, values in (
            ("sizes", sizes),
            ("octave_scales", octave_scales),
            ("aspect_ratios", aspect_ratios),
            ("strides", strides),
        ):
            if not values:
                raise ValueError(must_be(name, "not empty", values))
            for value in values:
                check_range(name, value, 0, low_open=True)
        if len(sizes) != len(strides):
            raise ValueError(
                must_be("strides", f"one a level ({len(sizes)} sizes)", f"{len(strides)} strides")
            )
        check_range("offset", offset, 0, 1)
        check_choice("mode", mode, ("exact", "rounded", "torchvision"))
        if mode == "torchvision" and offset != 0:
            raise ValueError(must_be("offset", "0 in mode 'torchvision'", offset))
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
        """Anchors per cell, the A of the head's ``A * K`` channels."""
        return len(self.octave_scales) * len(self.aspect_ratios)

    def cell_anchors(self, level: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the anchors of one cell, centred on (0, 0): ``[A, 4]``."""
        width, height = self._sides(self.sizes[level], dtype)
        half_w, half_h = width.flatten() / 2, height.flatten() / 2
        cells = torch.stack((-half_w, -half_h, half_w, half_h), dim=1)
        if self.mode == "torchvision":
            cells = cells.round()
        return cells + cells.new_tensor((0, 0, 1, 1)) if self.plus_one else cells

    def _sides(self, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the widths and heights of a cell's anchors, ``[ratios, scales]`` each."""
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
            feature_sizes: ``(height, width)`` of every level's feature map, in cells.
            image_size: ``(height, width)`` of the padded images; needed in mode "torchvision".
            device: where the anchors are wanted.
            dtype: of the anchors; geometry should stay float32 under autocast.

        Returns:
            One ``[H * W * A, 4]`` a level: row by row, cell by cell, anchor by anchor. The tensors
            are kept for the next call with the same arguments and must not be changed in place.

        Raises:
            ValueError: as many ``feature_sizes`` as levels are needed, and ``image_size`` in mode
                "torchvision".
        """
        if len(feature_sizes) != len(self.sizes):
            raise ValueError(
                must_be("feature_sizes", f"one a level ({len(self.sizes)})", list(feature_sizes))
            )
        if self.mode == "torchvision" and image_size is None:
            raise ValueError(must_be("image_size", "given in mode 'torchvision'", None))
        grids = tuple((int(height), int(width)) for height, width in feature_sizes)
        image = None
        if image_size is not None and self.mode == "torchvision":
            image = tuple(image_size)
        key = (grids, image, torch.device(device), dtype)
        anchors = self._cache.pop(key, None)
        if anchors is None:
            # Anchors made under inference_mode could not be used by a later training step.
            with torch.inference_mode(mode=False):
                anchors = [
                    self._level_anchors(level, grid, image, dtype).to(device)
                    for level, grid in enumerate(grids)
                ]
        self._cache[key] = anchors  # the last used comes last; other threads do the same meanwhile
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
        return {**self.__dict__, "_cache": OrderedDict()}  # copies and pickles go without the cache

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        scales = tuple(round(scale, 4) for scale in self.octave_scales)
        return (
            f"sizes={self.sizes}, octave_scales={scales}, aspect_ratios={self.aspect_ratios}, "
            f"strides={self.strides}, offset={self.offset}, mode={self.mode!r}"
            f"{', plus_one=True' if self.plus_one else ''}"
        )
