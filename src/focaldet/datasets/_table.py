"""All boxes of a data set in a few arrays, just as its files have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

__all__ = ["AnnotationTable"]


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotationTable:
    """The annotations of I images, N boxes in all; nothing dropped, clipped or mended.

    Attributes:
        source: the file or folder that was read, for messages.
        image_folder: what ``file_names`` are relative to.
        file_names: of each image.
        image_ids: ``[I]``, int64; the ids that evaluation uses.
        image_sizes: ``[I, 2]``, int32; ``(height, width)`` as annotated, 0 where the files don't say.
        class_names: of each label.
        category_ids: the file's own id of each label.
        boxes: ``[N, 4]``, float64; xyxy in pixels of the image.
        labels: ``[N]``, int64; -1 for a category that is not declared.
        areas: ``[N]``, float64; of the object's outline where the file gives it, else of the box.
        crowd: ``[N]``, bool; one box around a group, which evaluation ignores.
        annotation_ids: ``[N]``, int64; the file's own, or the place in the image's file, from 0.
        image_indices: ``[N]``, int64, ascending; which image each box is of.
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
    crowd: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]
    image_indices: npt.NDArray[np.int64]
