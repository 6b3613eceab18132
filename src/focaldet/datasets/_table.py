"""All annotations of a dataset, as its files contain them, in a few arrays."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from focaldet._checks import check_names, existing_folder, printable, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from focaldet.detections import Detections

__all__ = [
    "AnnotationTable",
    "PackedStrings",
    "clipped",
    "have_area_inside",
    "not_finite_or_negative",
]

_logger = logging.getLogger(__name__)

_BLOCK = 2**15  # boxes per block, so that its temporary arrays stay in the CPU cache
_MAX_SIDE = 2**31 - 1  # image sizes are int32


class PackedStrings(Sequence[str]):
    """An immutable sequence of strings, stored in one block of bytes.

    It needs little memory, is fast to pickle, and can be shared between processes.

    >>> list(PackedStrings.pack(["a.jpg", "é.png"]))
    ['a.jpg', 'é.png']
    """

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        """Pack strings."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        data = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(data, np.cumsum([len(piece) for piece in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self.ends[place - 1]) if place else 0
        return self.data[start : int(self.ends[place])].tobytes().decode("utf-8", "surrogatepass")


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotationTable:
    """The annotations of I images with N boxes in total, with nothing dropped, clipped or corrected.

    Attributes:
        source: The file or folder that was read, for messages.
        image_folder: The folder to which ``file_names`` are relative.
        file_names: File name of each image.
        image_ids: ``[I]``, int64; the ids that evaluation uses.
        image_sizes: ``[I, 2]``, int32; annotated ``(height, width)``, 0 (or -1) if not annotated.
        class_names: Names of the labels.
        category_ids: Category ids of the labels in the annotation files.
        boxes: ``[N, 4]``, float64; xyxy in pixels of the image.
        labels: ``[N]``, int64; -1 for a category that is not declared.
        areas: ``[N]``, float64; area of the object's outline if the file contains it, otherwise of
            the box. Negative numbers and NaN also stand for the area of the box.
        crowd: ``[N]``, bool; whether a box surrounds a group of objects, which evaluation ignores.
        annotation_ids: ``[N]``, int64; the ids in the file, or the position of the box within its
            image, from 0.
        image_indices: ``[N]``, int64, ascending; the index of the image of each box.
        tried_folders: The folders in which a reader looked for the images, if it was not told the
            folder and did not find any of the first images. ``image_folder`` is one of them.

            .. versionadded:: 0.3.0
    """

    source: Path
    image_folder: Path
    file_names: Sequence[str]
    image_ids: npt.NDArray[np.int64]
    image_sizes: npt.NDArray[np.int32]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool]
    annotation_ids: npt.NDArray[np.int64]
    image_indices: npt.NDArray[np.int64]
    tried_folders: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.image_folder / self.file_names[index]

    def describe_folder(self) -> str:
        """Return a sentence about the folder of the images, for errors about a missing image.

        .. versionadded:: 0.3.0
        """
        if not self.tried_folders:
            return f"The folder of images is {str(self.image_folder)!r}."
        tried = ", ".join(repr(str(folder)) for folder in self.tried_folders)
        return (
            f"None of the first images of {str(self.source)!r} was found. Looked in {tried}. "
            "Pass the folder of the images."
        )

    def boxes_of(self, index: int) -> slice:
        """Return the rows that belong to one image in the arrays of N boxes."""
        first, last = np.searchsorted(self.image_indices, [index, index + 1])
        return slice(int(first), int(last))

    @classmethod
    def from_detections(
        cls,
        detections: Iterable[Detections | None],
        *,
        class_names: Sequence[str] | None = None,
        image_folder: str | os.PathLike[str] | None = None,
    ) -> AnnotationTable:
        """Turn detections into annotations, for example to correct them in a labelling tool.

        A table has no scores, so they are dropped. Filter the detections first:
        ``[one.filter(score_threshold=0.5) for one in model.predict("photos")]``.
        :meth:`Detections.to_coco <focaldet.Detections.to_coco>` keeps the scores.

        Args:
            detections: The detections of each image, with ``source`` set. None stands for an image
                that could not be read, as in the result of ``predict(..., on_error="skip")``. These
                are left out, and counted in the log.
            class_names: Names of labels 0, 1, ... None uses the ``class_names`` of the detections.
            image_folder: The folder to which the file names are relative. None uses the innermost
                folder that contains all images.

        Returns:
            A table with image ids 1, 2, ... and category ids 0, 1, ... Boxes are float64, in pixels of
            the image, as they were detected.

        Raises:
            FileNotFoundError: If ``image_folder`` does not exist.
            ValueError: If there are no detections, an image has no ``source``, class names are missing
                or differ between images, or a label has no name.

        >>> import torch
        >>> from focaldet import Detections
        >>> found = Detections(
        ...     boxes=torch.tensor([[10.0, 8.0, 30.0, 28.0]]),
        ...     scores=torch.tensor([0.9]),
        ...     labels=torch.tensor([0]),
        ...     image_size=(48, 64),
        ...     class_names=("cat",),
        ...     source="photos/cat.jpg",
        ... )
        >>> table = AnnotationTable.from_detections([found])
        >>> table.file_names[0], table.boxes.tolist()
        ('cat.jpg', [[10.0, 8.0, 30.0, 28.0]])

        .. versionadded:: 0.3.0
        """
        given = list(detections)
        found = [one for one in given if one is not None]
        if not found:
            raise ValueError("detections contains no image; pass the detections of at least one.")
        if len(found) < len(given):
            _logger.warning(
                "Images without detections (None) left out: %d.", len(given) - len(found)
            )
        paths = _source_paths(given)
        names = _names_of_detections(given, class_names)
        if image_folder is None:
            folder = Path(os.path.commonpath([path.parent for path in paths]))
        else:
            folder = existing_folder("image_folder", image_folder)
        base = Path(os.path.abspath(folder))  # noqa: PTH100  (resolve() would follow links)
        counts = [len(one) for one in found]
        boxes = np.concatenate([_as_array(one.boxes.double()) for one in found])
        if boxes.size:
            _logger.info("Scores dropped, which annotations do not have: %d.", len(boxes))
        return cls(
            source=folder,
            image_folder=folder,
            file_names=PackedStrings.pack(
                str(path.relative_to(base) if path.is_relative_to(base) else path) for path in paths
            ),
            image_ids=np.arange(1, len(found) + 1),
            image_sizes=np.array([one.image_size for one in found], np.int32),
            class_names=names,
            category_ids=tuple(range(len(names))),
            boxes=boxes,
            labels=np.concatenate([_as_array(one.labels) for one in found]),
            areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
            crowd=np.zeros(len(boxes), np.bool_),
            annotation_ids=np.concatenate([np.arange(count) for count in counts]),
            image_indices=np.repeat(np.arange(len(found)), counts),
        )

    def select(self, indices: Sequence[int] | npt.NDArray[Any]) -> AnnotationTable:
        """Return a table of some of the images, with all of their boxes.

        Ids, classes and the order of the boxes within an image stay as they are.

        Args:
            indices: The indices of the images, in the order that the new table shall have, or ``[I]``,
                bool, whether to keep each image. Negative indices count from the end.

        Raises:
            IndexError: If an index is out of range, or a mask has the wrong length.
            TypeError: If the indices are neither integers nor a mask.
            ValueError: If an image is selected more than once, because ids must be unique.

        .. versionadded:: 0.3.0
        """
        images = self._as_indices(indices)
        first = np.searchsorted(self.image_indices, images)
        counts = np.searchsorted(self.image_indices, images, side="right") - first
        new_first = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) + np.repeat(first - new_first, counts)
        return replace(
            self.take_boxes(rows),
            file_names=PackedStrings.pack(self.file_names[index] for index in images.tolist()),
            image_ids=self.image_ids[images],
            image_sizes=self.image_sizes[images],
            image_indices=np.repeat(np.arange(len(images)), counts),
        )

    def take_boxes(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool]) -> AnnotationTable:
        """Return a table of all images and some of the boxes.

        Args:
            rows: The ascending indices of the boxes to keep, or ``[N]``, whether to keep each.

        .. versionadded:: 0.3.0
        """
        return replace(
            self,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            annotation_ids=self.annotation_ids[rows],
            image_indices=self.image_indices[rows],
        )

    def _as_indices(self, indices: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return checked indices of images, none of them negative."""
        given = np.asarray(indices if len(indices) else np.empty(0, np.int64))
        if given.ndim != 1 or given.dtype.kind not in "biu":
            raise TypeError(
                f"indices must be a sequence of integers or bools, got {shortened(indices)}."
            )
        if given.dtype.kind == "b":
            if len(given) != len(self):
                raise IndexError(
                    f"indices is a mask of {len(given)} images, but the table has {len(self)}."
                )
            return np.flatnonzero(given)
        images = given.astype(np.int64)
        wrong = (images < -len(self)) | (images >= len(self))
        if wrong.any():
            raise IndexError(
                f"indices contains {images[wrong][0]}, which is out of range for {len(self)} images."
            )
        images = images % max(1, len(self))
        values, counts = np.unique(images, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"indices contains image {values[counts > 1][0]} more than once. The ids of images must "
                "be unique."
            )
        return images

    def why_nothing_to_learn(self, sizes: npt.NDArray[np.int32] | None = None) -> str:
        """Return why training has no object to learn from, and what to do; "" if it has one.

        An object can be learned from if it is not a crowd, its category is declared, and its box is
        finite and has an area inside its image, as far as the size of the image is known.

        Args:
            sizes: ``[I, 2]``, ``(height, width)`` of each image, 0 where it is unknown. None uses the
                annotated sizes.

        .. versionadded:: 0.3.0
        """
        if not len(self):
            return "There are no images."
        images = _counted(len(self), "image")
        if not len(self.boxes):
            return (
                f"There are no objects in {images}. Check that the annotations are complete and "
                "belong to these images."
            )
        sizes = self.image_sizes if sizes is None else sizes
        known = (sizes > 0).all(axis=1, keepdims=True)
        inside = have_area_inside(self, np.where(known, sizes, np.int32(_MAX_SIDE)))
        if (inside & (self.labels >= 0) & ~self.crowd).any():
            return ""
        with np.errstate(invalid="ignore", over="ignore"):
            boxes = self.boxes.astype(np.float32)  # as in targets
            finite = np.isfinite(self.boxes).all(axis=1)
            valid = finite & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        faults = {
            "crowd or difficult": self.crowd,
            "of an undeclared category": self.labels < 0,
            "not finite or without area": ~valid,
            "outside their image": valid & ~inside,
        }
        counts = ", ".join(f"{fault.sum()} {name}" for name, fault in faults.items() if fault.any())
        objects = _counted(len(self.boxes), "object")
        return f"None of {objects} in {images} can be learned from ({counts}). Correct the annotations."

    def to_coco(self) -> dict[str, Any]:
        """Return the ground truth in COCO format, for :func:`focaldet.evaluation.evaluate_coco`.

        Crowds are included. Boxes without a width or height count as objects, as in pycocotools.
        Boxes that are not finite or have a negative size, and boxes of undeclared categories, are left
        out with a warning, as :func:`~focaldet.evaluation.evaluate_coco` does when it reads a file.
        Annotations keep their ids if these are positive and unique, as pycocotools requires.
        Otherwise, they are numbered from 1.

        .. versionchanged:: 0.3.0
           Boxes without a width or height are included. They used to be left out silently, as were
           the boxes that now cause a warning.

        Warns:
            UserWarning: If boxes are left out.
        """
        with np.errstate(invalid="ignore", over="ignore"):  # boxes may be NaN, infinite or huge
            return self._to_coco()

    def _to_coco(self) -> dict[str, Any]:
        widths_heights = self.boxes[:, 2:] - self.boxes[:, :2]
        unusable = not_finite_or_negative(self.boxes)
        undeclared = self.labels < 0
        (rows,) = (~unusable & ~undeclared).nonzero()
        if len(rows) < len(self.boxes):
            self._warn_of_left_out(unusable, undeclared)
        ids = self.annotation_ids[rows]
        if len(np.unique(ids)) < len(ids) or (ids <= 0).any():
            ids = np.arange(1, len(rows) + 1)
        areas = self.areas[rows]
        corners_sizes = np.concatenate([self.boxes[rows, :2], widths_heights[rows]], axis=1)
        columns = {
            "id": ids.tolist(),
            "image_id": self.image_ids[self.image_indices[rows]].tolist(),
            "category_id": np.asarray(self.category_ids)[self.labels[rows]].tolist()
            if len(rows)
            else [],
            "bbox": corners_sizes.tolist(),
            "area": np.where(areas >= 0, areas, widths_heights[rows].prod(1)).tolist(),
            "iscrowd": self.crowd[rows].astype(int).tolist(),
        }
        images = zip(
            self.image_ids.tolist(), self.file_names, self.image_sizes.tolist(), strict=True
        )
        return {
            "images": [
                {"id": image_id, "file_name": name, "height": height, "width": width}
                for image_id, name, (height, width) in images
            ],
            "annotations": [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }

    def _warn_of_left_out(
        self, unusable: npt.NDArray[np.bool], undeclared: npt.NDArray[np.bool]
    ) -> None:
        """Warn about boxes that are left out of the ground truth."""
        left_out = unusable | undeclared
        row = int(left_out.argmax())
        faults = {
            "not finite or of negative size": unusable,
            "of an undeclared category": undeclared & ~unusable,
        }
        counts = ", ".join(f"{fault.sum()} {name}" for name, fault in faults.items() if fault.any())
        warnings.warn(
            f"The ground truth leaves out {left_out.sum()} of {len(left_out)} annotations in "
            f"{str(self.source)!r}: {counts}. The first is annotation {self.annotation_ids[row]} of "
            f"{printable(self.file_names[self.image_indices[row]])}, with the box "
            f"{self.boxes[row].tolist()} (x1, y1, x2, y2).",
            UserWarning,
            stacklevel=4,
        )


def not_finite_or_negative(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool]:
    """Return which boxes have a corner or a size that is not finite, or a negative size, ``[N]``."""
    with np.errstate(invalid="ignore", over="ignore"):
        sizes = boxes[:, 2:] - boxes[:, :2]
        finite = np.isfinite(np.concatenate([boxes, sizes], axis=1)).all(axis=1)
        sound: npt.NDArray[np.bool] = np.logical_and(finite, (sizes >= 0).all(axis=1))
        return ~sound


def clipped(
    boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Clip boxes to images, given one size for all boxes or one per box."""
    limits = np.concatenate([sizes[..., ::-1]] * 2, axis=-1, dtype=np.float32)
    return np.clip(boxes.astype(np.float32), 0, limits)


def have_area_inside(table: AnnotationTable, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.bool]:
    """Return which boxes are finite and have an area inside their image, ``[N]``.

    Args:
        table: The annotations.
        sizes: ``[I, 2]``, ``(height, width)`` of each image.
    """
    valid = np.empty(len(table.boxes), np.bool_)
    for start in range(0, len(valid), _BLOCK):
        rows = slice(start, start + _BLOCK)
        boxes = table.boxes[rows]
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.isfinite(boxes @ np.ones(4))  # row sums, which pass on NaN and infinity
            x1, y1, x2, y2 = clipped(boxes, sizes.take(table.image_indices[rows], axis=0)).T
            valid[rows] = finite & (x2 > x1) & (y2 > y1)
    return valid


def _as_array(tensor: Any) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return values


def _source_paths(detections: Sequence[Detections | None]) -> list[Path]:
    """Return the absolute path of each image, without those that are None."""
    paths: list[Path] = []
    for index, one in enumerate(detections):
        if one is not None and one.source is None:
            raise ValueError(
                f"detections[{index}] has no source, so its image is unknown. Set it with "
                "with_source(path)."
            )
        if one is not None:
            paths.append(Path(os.path.abspath(one.source or "")))  # noqa: PTH100
    return paths


def _names_of_detections(
    detections: Sequence[Detections | None], class_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names of the classes, after checking that every label has one."""
    names = None if class_names is None else check_names("class_names", class_names)
    for index, one in enumerate(detections):
        if one is None:
            continue
        if class_names is None:
            if one.class_names is None:
                raise ValueError(f"detections[{index}] has no class_names, so pass class_names.")
            if names not in (None, one.class_names):
                raise ValueError(
                    f"detections[{index}] has the class names {shortened(one.class_names)}, but those "
                    f"before have {shortened(names)}. Pass class_names if the labels agree."
                )
            names = one.class_names
        highest = int(one.labels.max()) if len(one) else -1
        if names is not None and highest >= len(names):
            raise ValueError(
                f"detections[{index}] contains the label {highest}, but class_names has names for "
                f"labels 0 to {len(names) - 1} only."
            )
    return names or ()


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
