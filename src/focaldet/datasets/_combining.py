"""Transforms of a dataset's items, including those that combine several of its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from focaldet.boxes import as_xyxy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ImageCombiner", "Sample", "Transform", "transformed_item"]

Sample: TypeAlias = tuple[Tensor, dict[str, Any]]
"""An image and its target."""

Transform: TypeAlias = "Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]"
"""A function that takes an image and its target, and returns both."""


class ImageCombiner(ABC):
    """A transform that can combine an image with others of the dataset.

    All random numbers must come from torch's global generator, which the data module seeds for each
    item.
    """

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Raise ``TypeError``, because only a dataset has the other images."""
        del image, target
        raise TypeError(
            f"{type(self).__name__} needs other images of the dataset. Pass it as the transform of a DetectionDataset, "
            "not as a step of a different transform."
        )

    @abstractmethod
    def draw_others(self, count: int) -> list[int]:
        """Draw the images to combine the next one with.

        Args:
            count: Number of images in the dataset.

        Returns:
            Their indices, often none.
        """

    @abstractmethod
    def combine(self, samples: Sequence[Sample]) -> tuple[Any, dict[str, Any]]:
        """Transform an image and its target, followed by those that `draw_others` has drawn."""


def transformed_item(
    transform: Transform, index: int, count: int, read: Callable[[int], Sample]
) -> Sample:
    """Read an item of a dataset and transform it.

    Args:
        transform: The transform, which takes images and boxes as torchvision's ``tv_tensors``.
        index: Index of the item.
        count: Number of items in the dataset.
        read: Function that reads an item, which may be called for others as well.

    Returns:
        The transformed image and target as plain tensors.

    Raises:
        TypeError: If the transform does not return an image and its target.
    """
    result: Any
    if isinstance(transform, ImageCombiner):
        others = transform.draw_others(count)
        result = transform.combine([_wrapped(*read(each)) for each in (index, *others)])
    else:
        result = transform(*_wrapped(*read(index)))
    image, target = _checked_pair(result)
    plain = {
        key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value
        for key, value in target.items()
    }
    if "boxes" in target:
        plain["boxes"] = as_xyxy(target["boxes"], "the boxes of the transformed target")
    return image.as_subclass(Tensor), plain


def _wrapped(image: Tensor, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from focaldet.datasets._tensors import tv_tensors

    size = (int(image.shape[1]), int(image.shape[2]))
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    return tv_tensors.Image(image), {**target, "boxes": boxes}


def _checked_pair(result: Any) -> Sample:
    """Return what a transform returned, or raise unless it is an image and a target."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(
            f"transform must return an image and its target, got {type(result).__name__}."
        )
    image, target = result
    if not isinstance(image, Tensor):
        raise TypeError(
            f"transform must return the image as a tensor, got {type(image).__name__}. Convert it "
            "with torchvision.transforms.v2.ToImage()."
        )
    if not isinstance(target, dict):
        raise TypeError(
            f"transform must return the target as a dictionary, got {type(target).__name__}."
        )
    return image, target
