"""The photos that INT8 files are calibrated on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from focaldet.export._file_model import fit_to_shape
from focaldet.images import is_encoded, load_image, named_sources, read_encoded, to_float

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from focaldet.export._metadata import ExportMetadata
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet
    from focaldet.structures import ImageBatch

__all__ = ["CalibrationImages"]

_FEW_IMAGES = 16
_THUMBNAIL = 16  # pixels per side
_SAME = 0.02  # mean difference of thumbnails, in [0, 1], up to which two images are alike


class CalibrationImages:
    """The images that the caller named, read again each time they are needed.

    Args:
        sources: The images, as :meth:`focaldet.RetinaNet.predict` accepts them. A generator is read
            once and its items are kept.
        model: The model, on the CPU, whose preprocessing is used.
        metadata: The metadata of the file.

    Raises:
        FileNotFoundError: If a file does not exist.
        TypeError: If a source has an unsupported type.
        ValueError: If there is no image, or one cannot be read.

    Warns:
        UserWarning: If there are few images that differ from each other.
    """

    def __init__(
        self,
        sources: ImageSource | Iterable[ImageSource],
        model: RetinaNet,
        metadata: ExportMetadata,
    ) -> None:
        # An open file can only be read once.
        self.sources: list[Any] = [
            read_encoded(source, name) if is_encoded(source) else source
            for name, source in named_sources(sources, "calibration")
        ]
        if not self.sources:
            raise ValueError("calibration is empty; pass at least one image.")
        self._model, self._metadata = model, metadata
        self._warn_if_few_differ()

    def __len__(self) -> int:
        return len(self.sources)

    def batches(self, most: int | None = None) -> Iterator[ImageBatch]:
        """Preprocess the images, each in a batch by itself.

        Args:
            most: Maximum number of images, which are spread evenly over all. None uses all.
        """
        for image in self._images(self.some(most)):
            batch = self._model.preprocess([to_float(image)])
            if self._metadata.fixed_shape is not None:
                batch = fit_to_shape(batch, self._metadata.fixed_shape)
            yield batch

    def some(self, most: int | None) -> list[Any]:
        """Return at most this many of the sources, spread evenly over all. None returns all."""
        count = len(self.sources)
        if most is None or count <= most:
            return self.sources
        return [self.sources[index * count // most] for index in range(most)]

    def _images(self, sources: Sequence[Any]) -> Iterator[Tensor]:
        for name, source in named_sources(sources, "calibration"):
            yield load_image(source, name, channels=self._metadata.num_channels)

    def _warn_if_few_differ(self) -> None:
        different: list[Tensor] = []

        for image in self._images(self.sources):
            pixels = to_float(image)[None]
            small = torch.nn.functional.adaptive_avg_pool2d(pixels, _THUMBNAIL)
            if all(float((small - other).abs().mean()) > _SAME for other in different):
                different.append(small)
            if len(different) == _FEW_IMAGES:
                return
        count = len(self.sources)
        what = (
            f"calibration has only {count} image{'s' * (count != 1)}"
            if len(different) == count
            else f"calibration has {count} images, but only {len(different)} that differ visibly"
        )
        warnings.warn(
            f"{what}, so the ranges of the INT8 maps may not suit other images. Pass at least "
            f"{_FEW_IMAGES} different images that are like those the file will see.",
            UserWarning,
            stacklevel=4,  # the caller of export_onnx
        )
