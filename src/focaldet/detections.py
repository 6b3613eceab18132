"""What comes out of the detector: the objects found in an image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import check_boxes, must_be
from focaldet.boxes import xyxy_to_xywh

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import PIL.Image
    from torch import Tensor

    from focaldet.images import ImageSource

__all__ = ["Detections"]


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image, best score first.

    Args:
        boxes: ``[D, 4]``, floating-point, xyxy in pixels of the image as given.
        scores: ``[D]``, floating-point in [0, 1].
        labels: ``[D]``, int64, 0-based.
        image_size: ``(height, width)`` of the image as given.
        class_names: the name of every label, or None.
        source: the path of the image, if it was read from a file.

    Raises:
        TypeError: dtypes that differ from the above.
        ValueError: shapes that don't fit, NaN, scores outside [0, 1], labels below 0 or beyond
            ``class_names``.

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
        check_boxes("boxes", self.boxes)
        count = len(self.boxes)
        for name, value in (("scores", self.scores), ("labels", self.labels)):
            if value.shape != (count,):
                raise ValueError(must_be(name, f"of shape [{count}], one a box", list(value.shape)))
        if not self.scores.is_floating_point():
            raise TypeError(must_be("scores", "a floating-point tensor", self.scores.dtype))
        if self.labels.dtype != torch.int64:
            raise TypeError(must_be("labels", "of dtype torch.int64", self.labels.dtype))
        if count:
            self._check_values()

    def _check_values(self) -> None:
        if not self.boxes.isfinite().all():
            raise ValueError(must_be("boxes", "finite", "NaN or infinity"))
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise ValueError(must_be("scores", "in [0, 1]", self.scores.tolist()))
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0:
            raise ValueError(must_be("labels", ">= 0", low))
        if self.class_names is not None and high >= len(self.class_names):
            condition = f"in 0..{len(self.class_names) - 1}, one of `class_names`"
            raise ValueError(must_be("labels", condition, high))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Detections:
        """Select detections by a mask, indices, a slice, or one index (giving a length of 1)."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(must_be("index", f"in 0..{len(self) - 1}", index))
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
        """The name of each detection's class; the label's number where there are no names."""
        labels = self.labels.tolist()
        if self.class_names is None:
            return [str(label) for label in labels]
        return [self.class_names[label] for label in labels]

    def filter(
        self, *, score_threshold: float | None = None, labels: Sequence[int | str] | None = None
    ) -> Detections:
        """Keep detections whose score is above a threshold and whose class is wanted.

        Args:
            score_threshold: scores must be greater than this; None keeps all.
            labels: labels or class names to keep; None keeps all.

        Raises:
            ValueError: a class name that is not in ``class_names``.
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
        if self.class_names is None or label not in self.class_names:
            raise ValueError(must_be("labels", "known class names", repr(label)))
        return self.class_names.index(label)

    def with_source(self, source: str | None) -> Detections:
        """Return the same detections, said to be of the image at a path."""
        return replace(self, source=source)

    def to(self, device: torch.device | str) -> Detections:
        """Move the tensors to a device."""
        return replace(
            self,
            boxes=self.boxes.to(device),
            scores=self.scores.to(device),
            labels=self.labels.to(device),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, ready for ``json.dump``."""
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
            image_id: the image's id in the annotations.
            category_ids: the category id of each label; None takes the label itself.

        Returns:
            One dictionary a detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width,
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
            ImportError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                "to_supervision needs the package supervision: pip install 'focaldet[plot]'"
            ) from error
        import numpy as np

        return supervision.Detections(
            xyxy=self.boxes.float().cpu().numpy(),
            confidence=self.scores.float().cpu().numpy(),
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
            image: The image of size ``image_size``, as anything that
                :func:`focaldet.images.load_picture` accepts. None reads ``source`` again.
            line_width: in pixels; None fits the image.
            font_size: in pixels; None fits the image.
            font: path of a TrueType font, for scripts that the built-in font lacks.

        Returns:
            A new RGB picture; better scores are drawn over worse ones.

        Raises:
            ValueError: no image was given and there is no ``source``, or the image's size is not
                ``image_size``.
        """
        from focaldet.images import load_picture
        from focaldet.visualization import draw_boxes

        if image is None:
            if self.source is None:
                raise ValueError(must_be("image", "given for detections without a source", None))
            image = self.source
        pixels = load_picture(image)
        if tuple(pixels.shape[-2:]) != tuple(self.image_size):
            height, width = self.image_size
            got = f"{pixels.shape[-2]}x{pixels.shape[-1]}"
            raise ValueError(must_be("image", f"{height}x{width} as detected in", got))
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
