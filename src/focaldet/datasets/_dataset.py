"""A dataset of images and the objects that can be used for training."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from focaldet._checks import check_choice, printable, shortened
from focaldet.datasets._combining import transformed_item
from focaldet.datasets._table import clipped, have_area_inside
from focaldet.errors import AnnotationError
from focaldet.images import load_channels_last, load_image, read_image_size, to_float

if TYPE_CHECKING:
    import numpy.typing as npt

    from focaldet.datasets._combining import Sample, Transform
    from focaldet.datasets._table import AnnotationTable

__all__ = ["DetectionDataset", "index_of_failure"]

_INDEX = "index_of_image"  # attribute of errors that are raised while an image is read


class DetectionDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and targets in the format that :class:`~focaldet.RetinaNet` takes.

    ``dataset[i]`` is ``(image, target)``. The image is ``[3, H, W]``, float32 in [0, 1], upright. The
    target is a dictionary with ``boxes`` (``[G, 4]``, float32, xyxy in pixels of that image),
    ``labels`` (``[G]``, int64) and ``image_id`` (int). Images without objects are kept and train as
    negatives. Crowds are left out, because they are not single objects.

    Args:
        table: Annotations from a reader such as :func:`~focaldet.datasets.read_coco`.
        transform: A function that takes the image as a uint8 ``tv_tensors.Image`` and the target with
            its boxes as ``tv_tensors.BoundingBoxes``, and returns both. See
            :func:`~focaldet.datasets.train_transform`.
        invalid_boxes: What to do with boxes that are not finite or have no area inside their image.
            "drop" leaves them out, with one warning that counts them. "raise" raises an error. Other
            boxes that extend beyond the image are clipped to it.

    Attributes:
        table: The annotations, with every box.
        class_names: Names of the labels.
        category_ids: Category ids of the labels in the annotation files.
        num_classes: Number of labels.
        num_objects: Number of objects in the targets, without crowds and dropped boxes.
        image_ids: ``[I]``, the id of each image.
        sizes: ``[I, 2]``, ``(height, width)`` of each image. Sizes that the annotations lack are read
            from the headers of the images when the dataset is created.
        aspect_ratios: ``[I]``, height / width.

    Raises:
        AnnotationError: If boxes belong to undeclared categories, or are invalid and
            ``invalid_boxes`` is "raise". This is a ``ValueError``.
        ValueError: If ``invalid_boxes`` is unknown.
        TypeError: If the transform does not accept an image and its target.
        FileNotFoundError: If an image whose size is not annotated does not exist.
        UnreadableImageError: If the size of such an image cannot be read.

    Warns:
        UserWarning: If boxes are dropped.
    """

    def __init__(
        self,
        table: AnnotationTable,
        transform: Transform | None = None,
        *,
        invalid_boxes: Literal["drop", "raise"] = "drop",
    ) -> None:
        check_choice("invalid_boxes", invalid_boxes, ("drop", "raise"))
        if transform is not None:
            _check_takes_a_target(transform)
        self.table = table
        self.transform = transform
        self.sizes = _complete_sizes(table)
        objects = ~table.crowd
        _check_labels(table, objects)
        self._used = objects & have_area_inside(table, self.sizes)
        if (self._used < objects).any():
            self._report(self._used < objects, invalid_boxes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.table.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category ids of the labels in the annotation files."""
        return self.table.category_ids

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.table.class_names)

    @property
    def num_objects(self) -> int:
        """Number of objects in the targets, without crowds and dropped boxes.

        .. versionadded:: 0.3.0
        """
        return int(np.count_nonzero(self._used))

    @property
    def image_ids(self) -> npt.NDArray[np.int64]:
        """``[I]``, the id of each image."""
        return self.table.image_ids

    @property
    def aspect_ratios(self) -> npt.NDArray[np.float64]:
        """``[I]``, height / width of each image."""
        ratios: npt.NDArray[np.float64] = self.sizes[:, 0] / self.sizes[:, 1]
        return ratios

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Read one image and its target.

        Raises:
            FileNotFoundError: If the image does not exist. The message names the file and the image id.
            UnreadableImageError: If the image cannot be decoded.
            TypeError: If the transform does not return an image and its target.
            AnnotationError: If its size differs from the annotated size. This is a ``ValueError``.
        """
        image, target = self.read(index)
        return to_float(image), target

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Read one item like ``dataset[index]``, but leave the values of the image as they are.

        Returns:
            The image is ``[3, H, W]``, uint8 unless the transform converts it. The target is that of
            ``dataset[index]``.

        Raises:
            FileNotFoundError, UnreadableImageError, TypeError, AnnotationError: As ``dataset[index]``.

        .. versionadded:: 0.3.0
        """
        index = range(len(self))[index]
        if self.transform is None:
            return self._sample(index)
        return transformed_item(self.transform, index, len(self), self._sample)

    def _sample(self, index: int) -> Sample:
        """Return an image and its target before the transform."""
        try:
            image = self._load(index)
        except Exception as error:
            vars(error)[_INDEX] = index
            raise
        span = self.table.boxes_of(index)
        used = self._used[span]
        boxes = clipped(self.table.boxes[span][used], self.sizes[index])
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(self.table.labels[span][used]),
            "image_id": int(self.image_ids[index]),
        }
        return image, target

    def _load(self, index: int) -> Tensor:
        path = self.table.image_path(index)
        name = f"image {self.image_ids[index]}"
        load = load_image if self.transform is None else load_channels_last
        try:
            image = load(path, name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} {self.table.describe_folder()}") from error
        height, width = self.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            remedy = "The boxes would not fit. Correct the annotated size, or replace the file."
            if image.shape[1:] == (width, height):
                remedy = (
                    "The file may be stored on its side. Images are turned upright by their EXIF "
                    "orientation, and the annotated size and boxes must fit the upright image. If they "
                    "were made for the stored pixels, read the annotations with "
                    "read_annotations(..., exif='stored'), or exif='auto' if only some were."
                )
            raise AnnotationError(
                f"{name} is annotated as {width}x{height}, but {str(path)!r} is "
                f"{image.shape[2]}x{image.shape[1]}. {remedy}"
            )
        return image

    def _report(self, wrong: npt.NDArray[np.bool_], invalid_boxes: str) -> None:
        table = self.table
        row = int(wrong.argmax())
        index = int(table.image_indices[row])
        height, width = self.sizes[index].tolist()
        first = (
            f"{table.boxes[row].tolist()} (annotation {table.annotation_ids[row]} of "
            f"{printable(table.file_names[index])}, {width}x{height})"
        )
        what = "are not finite or have no area inside their image"
        if invalid_boxes == "raise":
            raise AnnotationError(
                f"{wrong.sum()} of {len(wrong)} boxes in {str(table.source)!r} {what}. The first is "
                f"{first}. Correct the boxes, or leave them out with invalid_boxes='drop'."
            )
        warnings.warn(
            f"Dropped {wrong.sum()} of {len(wrong)} boxes in {str(table.source)!r}, because they "
            f"{what}. The first is {first}.",
            UserWarning,
            stacklevel=3,
        )


def index_of_failure(error: Exception, item: int) -> int:
    """Return the index of the image that could not be read when an item was read.

    It can differ from that of the item, because a transform may combine several images.
    """
    index: int = getattr(error, _INDEX, item)
    return index


def _complete_sizes(table: AnnotationTable) -> npt.NDArray[np.int32]:
    """Return the annotated sizes, after reading the missing ones from the images."""
    sizes = table.image_sizes.copy()
    for index in np.flatnonzero(sizes.min(axis=1) <= 0).tolist():
        try:
            sizes[index] = read_image_size(table.image_path(index))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} {table.describe_folder()}") from error
    return sizes


def _check_labels(table: AnnotationTable, objects: npt.NDArray[np.bool_]) -> None:
    unknown = objects & (table.labels < 0)
    if unknown.any():
        row = int(unknown.argmax())
        raise AnnotationError(
            f"Annotation {table.annotation_ids[row]} of "
            f"{printable(table.file_names[table.image_indices[row]])} in {str(table.source)!r} has an undeclared category (boxes affected: {unknown.sum()}). "
            f"The declared categories are {printable(', '.join(table.class_names)) or 'none'}."
        )


def _check_takes_a_target(transform: Transform) -> None:
    try:
        signature = inspect.signature(transform)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"transform must accept an image and its target, but {shortened(transform)} does not "
            f"({error}). To transform only images, ignore and return the target."
        ) from error
