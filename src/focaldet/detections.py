"""Detections: the objects that a detector found in an image."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import check_boxes, check_names, shortened
from focaldet._extras import import_extra
from focaldet.boxes import as_xyxy, xyxy_to_xywh

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import PIL.Image
    from torch import Tensor

    from focaldet.images import ImageSource

__all__ = ["Detections"]


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image, best score first.

    Args:
        boxes: ``[D, 4]``, floating-point, xyxy, in pixels of the input image. Boxes that state a
            different format are converted; see :func:`focaldet.boxes.as_xyxy`.
        scores: ``[D]``, floating-point in [0, 1].
        labels: ``[D]``, int64, 0-based.
        image_size: ``(height, width)`` of the input image.
        class_names: The name of every label, or None.
        source: The path of the image, if it was read from a file.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes do not match, a box is not finite, a score is outside [0, 1], or a
            label is negative or has no name in ``class_names``.

    >>> found = Detections(
    ...     boxes=torch.tensor([[10.0, 20.0, 50.0, 80.0], [0.0, 0.0, 9.0, 9.0]]),
    ...     scores=torch.tensor([0.9, 0.3]),
    ...     labels=torch.tensor([1, 0]),
    ...     image_size=(100, 200),
    ...     class_names=("cat", "dog"),
    ... )
    >>> found.label_names
    ['dog', 'cat']
    >>> found.filter(score_threshold=0.5)
    Detections(1 in 100x200: dog 0.90)
    >>> len(found[found.labels == 0])
    1
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_size: tuple[int, int]
    class_names: tuple[str, ...] | None = field(default=None, kw_only=True)
    source: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        boxes = as_xyxy(self.boxes)
        check_boxes("boxes", boxes)
        object.__setattr__(self, "boxes", boxes)
        self._check_description()
        count = len(boxes)
        for name, value in (("scores", self.scores), ("labels", self.labels)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
            if value.shape != (count,):
                raise ValueError(
                    f"{name} must have shape [{count}], one entry per box, got {list(value.shape)}."
                )
        if not self.scores.is_floating_point():
            raise TypeError(f"scores must be a floating-point tensor, got {self.scores.dtype}.")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels must have dtype torch.int64, got {self.labels.dtype}.")
        if count:
            self._check_values()

    def _check_description(self) -> None:
        """Check the arguments that are not tensors."""
        try:
            height, width = map(operator.index, self.image_size)
        except (TypeError, ValueError):
            raise TypeError(
                f"image_size must be two integers (height, width), got {shortened(self.image_size)}."
            ) from None
        object.__setattr__(self, "image_size", (height, width))
        if self.class_names is not None:
            names = check_names("class_names", self.class_names)
            object.__setattr__(self, "class_names", names)
        if self.source is not None:
            if not isinstance(self.source, str | os.PathLike):
                raise TypeError(f"source must be a path or None, got {shortened(self.source)}.")
            object.__setattr__(self, "source", os.fspath(self.source))

    def _check_values(self) -> None:
        if not self.boxes.isfinite().all():
            row = int((~self.boxes.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"boxes[{row}] is not finite: {self.boxes[row].tolist()}.")
        valid = (self.scores >= 0) & (self.scores <= 1)
        if not valid.all():
            row = int((~valid).nonzero()[0])
            raise ValueError(
                f"scores must be in [0, 1], but scores[{row}] is {self.scores[row]:g}."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0:
            raise ValueError(f"labels must be 0 or above, but contains {low}.")
        if self.class_names is not None and high >= len(self.class_names):
            raise ValueError(
                f"labels contains {high}, but class_names has names for labels 0 to "
                f"{len(self.class_names) - 1} only."
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Detections:
        """Select detections by a mask, indices, a slice, or a single index (which selects one)."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Index {index} is out of range for {len(self)} detections.")
            index = [index]
        if not isinstance(index, slice | torch.Tensor):
            index = torch.as_tensor(index, dtype=torch.int64)
        return replace(
            self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index]
        )

    def __iter__(self) -> Iterator[Detections]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.image_size
        names = self.label_names
        listed = ", ".join(
            f"{name} {score:.2f}"
            for name, score in zip(names[:5], self.scores.tolist(), strict=False)
        )
        more = ", …" if len(self) > 5 else ""
        return f"Detections({len(self)} in {height}x{width}{': ' if listed else ''}{listed}{more})"

    @property
    def label_names(self) -> list[str]:
        """The class name of each detection, or its label as a string without ``class_names``."""
        labels = self.labels.tolist()
        if self.class_names is None:
            return [str(label) for label in labels]
        return [self.class_names[label] for label in labels]

    def filter(
        self, *, score_threshold: float | None = None, labels: Sequence[int | str] | None = None
    ) -> Detections:
        """Keep detections by score and class.

        Args:
            score_threshold: Keep detections that score above this. None keeps all.
            labels: Labels or class names to keep. None keeps all.

        Raises:
            ValueError: If a class name is not in ``class_names``.
        """
        keep = torch.ones_like(self.labels, dtype=torch.bool)
        if score_threshold is not None:
            keep &= self.scores > score_threshold
        if labels is not None:
            wanted = [self._label_of(label) for label in labels]
            keep &= torch.isin(self.labels, torch.tensor(wanted, device=self.labels.device).long())
        return self[keep]

    def _label_of(self, label: int | str) -> int:
        if not isinstance(label, str):
            return label
        if self.class_names is None:
            raise ValueError(f"labels contains {label!r}, but the detections have no class_names.")
        if label not in self.class_names:
            names = shortened(self.class_names)
            raise ValueError(f"labels contains {label!r}, which is not in class_names: {names}.")
        return self.class_names.index(label)

    def with_source(self, source: str | None) -> Detections:
        """Return a copy with another ``source``."""
        return replace(self, source=source)

    def to(self, device: torch.device | str) -> Detections:
        """Return a copy with the tensors on a device."""
        return replace(
            self,
            boxes=self.boxes.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of lists, numbers and strings, ready for ``json.dump``."""
        return {
            "source": self.source,
            "image_size": list(self.image_size),
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "labels": self.labels.tolist(),
            "label_names": self.label_names,
        }

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return the detections as entries of a COCO results file.

        Args:
            image_id: The id of the image in the annotations.
            category_ids: The category id of each label. None uses the labels as ids.

        Returns:
            One dictionary per detection, with ``image_id``, ``category_id``, ``bbox`` (x, y, width,
            height) and ``score``.
        """
        ids = self.labels.tolist()
        if category_ids is not None:
            ids = [category_ids[label] for label in ids]
        boxes = xyxy_to_xywh(self.boxes).tolist()
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(ids, boxes, self.scores.tolist(), strict=True)
        ]

    def to_supervision(self) -> Any:
        """Return a ``supervision.Detections`` (``pip install 'focaldet[plot]'``).

        Raises:
            ImportError: If supervision is not installed.
        """
        import numpy as np

        supervision = import_extra(
            "supervision", purpose="Detections.to_supervision", install="focaldet[plot]"
        )

        return supervision.Detections(
            xyxy=self.boxes.detach().float().cpu().numpy(),
            confidence=self.scores.detach().float().cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.label_names, dtype=str)},
        )

    def draw(
        self,
        image: ImageSource | None = None,
        *,
        line_width: int | None = None,
        font_size: float | None = None,
        font: str | os.PathLike[str] | None = None,
    ) -> PIL.Image.Image:
        """Draw the detections on a copy of the image.

        Args:
            image: The image that the detections belong to, in any form that
                :func:`focaldet.images.load_picture` accepts. None reads ``source`` again.
            line_width: Line width in pixels. None adapts it to the image.
            font_size: Font size in pixels. None adapts it to the image.
            font: Path of a TrueType font, for scripts that the built-in font lacks.

        Returns:
            A new RGB image. Detections with higher scores are drawn over those with lower scores.

        Raises:
            ValueError: If there is neither an image nor a ``source``, or the size of the image is
                not ``image_size``.
        """
        from focaldet.images import load_picture
        from focaldet.visualization import draw_boxes

        if image is None:
            if self.source is None:
                raise ValueError("These detections have no source to read, so image is required.")
            image = self.source
        pixels = load_picture(image)
        if tuple(pixels.shape[-2:]) != tuple(self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"The detections are of a {height}x{width} image, but image is "
                f"{pixels.shape[-2]}x{pixels.shape[-1]}."
            )
        shown = self[self.scores.argsort()]
        texts = [
            f"{name} {score:.2f}"
            for name, score in zip(shown.label_names, shown.scores.tolist(), strict=True)
        ]
        return draw_boxes(
            pixels,
            shown.boxes,
            shown.labels,
            texts=texts,
            line_width=line_width,
            font_size=font_size,
            font=font,
        )
