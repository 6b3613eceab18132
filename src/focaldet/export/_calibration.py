"""The photos that INT8 files are calibrated on, and what the calibration found."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from focaldet._checks import is_number, shortened
from focaldet.export._file_model import fit_to_shape
from focaldet.images import is_encoded, iter_images, named_sources, read_encoded, to_float

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from focaldet.export._metadata import ExportMetadata
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet
    from focaldet.structures import ImageBatch

__all__ = ["Calibration", "CalibrationImages", "LayerGroup"]

FEW_IMAGES = 16
_THUMBNAIL = 16  # pixels per side
_SAME = 0.02  # mean difference of thumbnails, in [0, 1], up to which two images are alike


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Convolutions that are computed in INT8 together or not at all.

    Attributes:
        name: Where they are in the model, such as "backbone.layer1" or "head.class_tower".
        convolutions: Number of convolutions. One that runs on five levels counts five times.
        score_error: Error of the scores if only this group is in INT8: the mean difference over the
            best candidates of the calibration images, weighted by their scores.
        box_error: The same for boxes, as 1 - IoU.
        precision: "int8", or "float32" if the group was left in floating point.

    .. versionadded:: 0.3.0
    """

    name: str
    convolutions: int
    score_error: float
    box_error: float
    precision: Literal["int8", "float32"]

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.score_error, self.box_error)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.convolutions} convolutions in {self.precision}; alone in int8, scores "
            f"are off by {self.score_error:.4f} and boxes by {self.box_error:.4f}"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How an INT8 file was calibrated.

    Attributes:
        images: Number of calibration images.
        method: How the range of each map was chosen.
        groups: All groups of convolutions.
        score_error: Error of the scores of the whole file, as in :class:`LayerGroup`.
        box_error: Error of the boxes of the whole file.

    .. versionadded:: 0.3.0
    """

    images: int
    method: str
    groups: tuple[LayerGroup, ...]
    score_error: float
    box_error: float

    @property
    def float_groups(self) -> tuple[str, ...]:
        """Names of the groups that were left in floating point."""
        return tuple(group.name for group in self.groups if group.precision == "float32")

    def to_json(self) -> str:
        """Return the calibration as the metadata of a file stores it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: If the text is damaged.
        """
        try:
            values = json.loads(text)
            groups = tuple(LayerGroup(**group) for group in values.pop("groups"))
            found = cls(groups=groups, **values)
            errors = [found.score_error, found.box_error]
            for group in groups:
                errors += [group.score_error, group.box_error, group.convolutions]
            texts = [found.method, *(group.name for group in groups)]
            damaged = (
                not all(map(is_number, [found.images, *errors]))
                or not all(isinstance(text, str) for text in texts)
                or any(group.precision not in ("int8", "float32") for group in groups)
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"calibration is damaged ({error})") from error
        if damaged:
            raise ValueError(f"calibration is damaged ({shortened(text)})")
        return found

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        first = (
            f"calibrated on {images} ({self.method}): scores are off by {self.score_error:.4f} and "
            f"boxes by {self.box_error:.4f}"
        )
        return "\n".join([first, *(f"  {group}" for group in self.groups)])


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
        try:
            items = [*named_sources(sources)]
        except ValueError as error:  # a folder without images
            raise ValueError(str(error).replace("(sources)", "(calibration)")) from error
        # An open file can only be read once.
        self.sources: list[Any] = [
            read_encoded(source, name) if is_encoded(source) else source for name, source in items
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
        for loaded in iter_images(sources, channels=self._metadata.num_channels):
            assert loaded is not None  # noqa: S101  # on_error is "raise"
            yield loaded.image

    def _warn_if_few_differ(self) -> None:
        different: list[Tensor] = []

        for image in self._images(self.sources):
            pixels = to_float(image)[None]
            small = torch.nn.functional.adaptive_avg_pool2d(pixels, _THUMBNAIL)
            if all(float((small - other).abs().mean()) > _SAME for other in different):
                different.append(small)
            if len(different) == FEW_IMAGES:
                return
        count = len(self.sources)
        what = (
            f"calibration has only {count} image{'s' * (count != 1)}"
            if len(different) == count
            else f"calibration has {count} images, but only {len(different)} that differ visibly"
        )
        warnings.warn(
            f"{what}, so the ranges of the INT8 maps may not suit other images. Pass at least "
            f"{FEW_IMAGES} different images that are like those the file will see.",
            UserWarning,
            stacklevel=4,  # the caller of export_onnx
        )
