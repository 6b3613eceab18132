"""Detections: the objects that a detector found in an image."""

from __future__ import annotations

import copy
import logging
import operator
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import check_boxes, check_names, is_number, printable, shortened
from focaldet._extras import import_extra
from focaldet.boxes import as_xyxy, xywh_to_xyxy, xyxy_to_xywh

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import PIL.Image
    from torch import Tensor

    from focaldet.images import ImageSource

__all__ = ["Detections"]

_logger = logging.getLogger(__name__)


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
        object.__setattr__(self, "source", _checked_source(self.source))

    def _check_values(self) -> None:
        """Check the values. If they are on a GPU and valid, the host waits once."""
        if not self.boxes.device == self.scores.device == self.labels.device:
            self._check_each_value()
            return
        known = self.labels >= 0
        if self.class_names is not None:
            known &= self.labels < len(self.class_names)
        in_range = (self.scores >= 0) & (self.scores <= 1)
        if not (self.boxes.isfinite().all(dim=1) & in_range & known).all():
            self._check_each_value()

    def _check_each_value(self) -> None:
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

    @classmethod
    def empty(
        cls,
        image_size: tuple[int, int],
        *,
        class_names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Return the detections of an image in which nothing was found.

        Args:
            image_size: ``(height, width)`` of the image.
            class_names: The name of every label, or None.
            source: The path of the image, if it was read from a file.

        Raises:
            TypeError: If an argument has the wrong type.

        .. versionadded:: 0.3.0

        >>> Detections.empty((100, 200))
        Detections(0 in 100x200)
        """
        nothing = torch.zeros(0)
        return _build(
            nothing.view(0, 4),
            nothing,
            nothing.long(),
            image_size,
            class_names=class_names,
            source=source,
        )

    @classmethod
    def merge(cls, parts: Iterable[Detections]) -> Detections:
        """Combine detections of the same image, such as those of several models, best score first.

        Nothing is suppressed: an object that is in two parts is in the result twice.

        Args:
            parts: At least one. All must have the same ``image_size``, ``class_names``, ``source`` and
                device.

        Raises:
            ValueError: If there are no parts, or they differ in one of these. The message says in
                which.

        .. versionadded:: 0.3.0

        >>> box = torch.tensor([[10.0, 20.0, 50.0, 80.0]])
        >>> first = Detections(box, torch.tensor([0.4]), torch.tensor([1]), (100, 200))
        >>> second = Detections(box, torch.tensor([0.7]), torch.tensor([0]), (100, 200))
        >>> Detections.merge([first, second])
        Detections(2 in 100x200: 0 0.70, 1 0.40)
        """
        parts = list(parts)
        if not parts:
            raise ValueError(
                "parts is empty; pass at least one Detections, or use Detections.empty."
            )
        first = parts[0]
        for index, part in enumerate(parts):
            _check_same_image(first, part, index)
        scores = torch.cat([part.scores for part in parts])
        merged = replace(
            first,
            boxes=torch.cat([part.boxes for part in parts]),
            scores=scores,
            labels=torch.cat([part.labels for part in parts]),
        )
        return merged[scores.argsort(descending=True, stable=True)]

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
            f"{printable(name)} {score:.2f}"
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
        copied = copy.copy(self)
        object.__setattr__(copied, "source", _checked_source(source))
        return copied

    def to(self, device: torch.device | str) -> Detections:
        """Return a copy with the tensors on a device."""
        return with_tensors(
            self, self.boxes.to(device), self.scores.to(device), self.labels.to(device)
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

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, class_names: Sequence[str] | None = None
    ) -> Detections:
        """Read what :meth:`to_dict` returned, or the same from JSON.

        Args:
            data: A dictionary with ``boxes``, ``scores``, ``labels`` and ``image_size``. ``source``
                and ``label_names`` are optional, and other keys are ignored.
            class_names: The name of every label. Required if ``label_names`` contains names, because
                those of the other labels are not in the dictionary.

        Returns:
            Detections on the CPU, in the same order. Their numbers are float32, so those of float32
            detections are unchanged.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If a key is missing, a value is invalid, or ``label_names`` does not fit
                ``class_names``.

        .. versionadded:: 0.3.0

        >>> data = {"image_size": [9, 9], "boxes": [[0, 1, 5, 6]], "scores": [0.5], "labels": [0]}
        >>> Detections.from_dict(data, class_names=["cat"])
        Detections(1 in 9x9: cat 0.50)
        """
        missing = [name for name in ("image_size", "boxes", "scores", "labels") if name not in data]
        if missing:
            raise ValueError(f"data has no {missing[0]!r}, only {shortened(list(data))}.")
        labels = _integers("data['labels']", data["labels"])
        found = _build(
            _numbers("data['boxes']", data["boxes"], "[D, 4]"),
            _numbers("data['scores']", data["scores"], "[D]"),
            labels,
            data["image_size"],
            class_names=class_names,
            source=data.get("source"),
        )
        if "label_names" in data:
            _check_label_names("data['label_names']", data["label_names"], found)
        return found

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

    @classmethod
    def from_coco(
        cls,
        entries: Sequence[Mapping[str, Any]],
        image_id: int,
        image_size: tuple[int, int],
        category_ids: Sequence[int] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Read the detections of one image from the entries of a COCO results file.

        Args:
            entries: Dictionaries with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height)
                and ``score``. Those of other images are ignored.
            image_id: The id of the image in the annotations.
            image_size: ``(height, width)`` of the image.
            category_ids: The category id of each label. None uses the ids as labels.
            class_names: The name of every label, or None.
            source: The path of the image.

        Returns:
            Detections in the order of the entries. The entries of :meth:`to_coco` give the same
            scores and labels, and the same boxes except for rounding in float32 of the right and
            lower edges.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If an entry lacks a key, has a negative size or a category that is not in
                ``category_ids``, or a value is invalid. The message names the entry.

        .. versionadded:: 0.3.0

        >>> entry = {"image_id": 7, "category_id": 3, "bbox": [0, 1, 5, 6], "score": 0.5}
        >>> Detections.from_coco([entry], 7, (9, 9), category_ids=[1, 3])
        Detections(1 in 9x9: 1 0.50)
        """
        label_of = None
        if category_ids is not None:
            label_of = {category: label for label, category in enumerate(category_ids)}
        boxes, scores, labels = [], [], []
        for index, entry in enumerate(entries):
            name = f"entries[{index}]"
            if _value_of(name, entry, "image_id") != image_id:
                continue
            boxes.append(_coco_box(name, entry))
            scores.append(_value_of(name, entry, "score"))
            category = _value_of(name, entry, "category_id")
            if label_of is not None and category not in label_of:
                raise ValueError(
                    f"{name} has the category_id {shortened(category)}, which is not in category_ids: "
                    f"{shortened(list(label_of))}."
                )
            labels.append(category if label_of is None else label_of[category])
        return _build(
            xywh_to_xyxy(_numbers("bbox", boxes, "[D, 4]")),
            _numbers("score", scores, "[D]"),
            _integers("category_id", labels),
            image_size,
            class_names=class_names,
            source=source,
        )

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

    @classmethod
    def from_supervision(
        cls,
        detections: Any,
        image_size: tuple[int, int],
        *,
        class_names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Convert a ``supervision.Detections``.

        Its masks, tracker ids and data other than ``class_name`` have no place here. They are left
        out, which the log mentions.

        Args:
            detections: Detections of one image with ``confidence`` and ``class_id``.
            image_size: ``(height, width)`` of the image, which supervision does not keep.
            class_names: The name of every label. Required if the detections have a ``class_name``.
            source: The path of the image.

        Returns:
            Detections in the same order, on the CPU, in float32.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If the detections have no confidence or class ids, a value is invalid, or
                their class names do not fit ``class_names``.

        .. versionadded:: 0.3.0
        """
        if not len(detections):
            return cls.empty(image_size, class_names=class_names, source=source)
        for name in ("confidence", "class_id"):
            if getattr(detections, name) is None:
                raise ValueError(f"detections.{name} is None; set it for every box.")
        dropped = [name for name in ("mask", "tracker_id") if getattr(detections, name) is not None]
        dropped += [f"data[{key!r}]" for key in detections.data if key != "class_name"]
        if dropped:
            _logger.warning(
                "Detections.from_supervision left out %s of %d detections.",
                ", ".join(dropped),
                len(detections),
            )
        found = _build(
            _numbers("detections.xyxy", detections.xyxy, "[D, 4]"),
            _numbers("detections.confidence", detections.confidence, "[D]"),
            _integers("detections.class_id", detections.class_id),
            image_size,
            class_names=class_names,
            source=source,
        )
        if "class_name" in detections.data:
            names = list(map(str, detections.data["class_name"]))
            _check_label_names("detections.data['class_name']", names, found)
        return found

    def to_dataframe(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per detection (``pip install pandas``).

        Returns:
            A table with the columns ``source``, ``image_height``, ``image_width``, ``x1``, ``y1``,
            ``x2``, ``y2`` (pixels), ``score``, ``label`` and ``label_name``. To get one table of many
            images, pass their tables to ``pandas.concat``.

        Raises:
            ImportError: If pandas is not installed.

        .. versionadded:: 0.3.0
        """
        pandas = import_extra("pandas", purpose="Detections.to_dataframe", install="pandas")
        height, width = self.image_size
        count = len(self)
        corners = self.boxes.detach().float().cpu().numpy().T
        return pandas.DataFrame(
            {
                "source": pandas.Series([self.source] * count, dtype=object),
                "image_height": pandas.Series([height] * count, dtype="int64"),
                "image_width": pandas.Series([width] * count, dtype="int64"),
                **dict(zip(_CORNERS, corners, strict=True)),
                "score": self.scores.detach().float().cpu().numpy(),
                "label": self.labels.cpu().numpy(),
                "label_name": pandas.Series(self.label_names, dtype=object),
            }
        )

    @classmethod
    def from_dataframe(
        cls,
        frame: Any,
        image_size: tuple[int, int] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        source: str | None = None,
    ) -> Detections:
        """Read the detections of one image from a table like that of :meth:`to_dataframe`.

        Args:
            frame: A ``pandas.DataFrame`` with the columns ``x1``, ``y1``, ``x2``, ``y2``, ``score``
                and ``label``. ``source``, ``image_height``, ``image_width`` and ``label_name`` are
                optional, and other columns are ignored.
            image_size: ``(height, width)`` of the image. None takes it from the table, which must
                then have a row.
            class_names: The name of every label. Required if ``label_name`` contains names.
            source: The path of the image. None takes it from the table.

        Returns:
            Detections in the order of the rows, on the CPU, in float32.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If a column is missing, rows belong to different images or to a different one
                than the arguments say, a value is invalid, or ``label_name`` does not fit
                ``class_names``.

        .. versionadded:: 0.3.0
        """
        columns = {str(name): frame[name].tolist() for name in frame.columns}
        for name in (*_CORNERS, "score", "label"):
            if name not in columns:
                raise ValueError(f"frame has no column {name!r}, only {shortened(list(columns))}.")
        source = _agreed("source", source, _only_value("source", columns.get("source", [])))
        if "image_height" in columns and "image_width" in columns:
            sizes = list(zip(columns["image_height"], columns["image_width"], strict=True))
            image_size = _agreed("image_size", image_size, _only_value("image size", sizes))
        if image_size is None:
            raise ValueError("frame does not say the size of the image, so image_size is required.")
        corners = list(zip(*(columns[name] for name in _CORNERS), strict=True))
        found = _build(
            _numbers("the corners in frame", corners, "[D, 4]"),
            _numbers("frame['score']", columns["score"], "[D]"),
            _integers("frame['label']", columns["label"]),
            image_size,
            class_names=class_names,
            source=source,
        )
        if "label_name" in columns:
            _check_label_names("frame['label_name']", columns["label_name"], found)
        return found

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


_CORNERS = ("x1", "y1", "x2", "y2")


def with_tensors(found: Detections, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """Return a copy with the same tensors on a different device, without checking them again.

    Checking values would wait for a GPU.
    """
    copied = copy.copy(found)
    for name, value in (("boxes", boxes), ("scores", scores), ("labels", labels)):
        object.__setattr__(copied, name, value)
    return copied


def _checked_source(source: Any) -> str | None:
    if source is None:
        return None
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path or None, got {shortened(source)}.")
    path: str = os.fspath(source)
    return path


def _build(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_size: Any,
    *,
    class_names: Sequence[str] | None,
    source: str | None,
) -> Detections:
    names = None if class_names is None else check_names("class_names", class_names)
    return Detections(boxes, scores, labels, image_size, class_names=names, source=source)


def _check_same_image(first: Detections, part: Detections, index: int) -> None:
    """Raise unless two detections can be merged."""
    if not isinstance(part, Detections):
        raise TypeError(f"parts[{index}] must be a Detections, got {type(part).__name__}.")
    for name in ("image_size", "source", "class_names"):
        mine, other = getattr(part, name), getattr(first, name)
        if mine != other:
            remedy = " Set it with with_source." if name == "source" else ""
            raise ValueError(
                f"Only detections of the same image and classes can be merged, but parts[{index}] has "
                f"the {name} {shortened(mine)} and parts[0] has {shortened(other)}.{remedy}"
            )
    if part.boxes.device != first.boxes.device:
        raise ValueError(
            f"parts[{index}] is on {part.boxes.device}, but parts[0] is on {first.boxes.device}. Move "
            "them to one device with .to(device)."
        )


def _numbers(name: str, values: Any, shape: str) -> Tensor:
    """Return nested lists or an array as a float32 tensor, ``[D, 4]`` or ``[D]``."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers of shape {shape} ({error}).") from None
    return tensor.reshape(0, 4) if not tensor.numel() and shape == "[D, 4]" else tensor


def _integers(name: str, values: Any) -> Tensor:
    """Return a list or an array of integers as an int64 tensor."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    for i, value in enumerate(listed):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}[{i}] must be an integer, got {shortened(value)}.")
    return torch.tensor(listed, dtype=torch.int64)


def _check_label_names(name: str, label_names: Sequence[str], found: Detections) -> None:
    """Raise unless the names that came with detections are those of ``class_names``."""
    expected = found.label_names
    if len(label_names) != len(expected):
        raise ValueError(f"{name} has {len(label_names)} names for {len(expected)} detections.")
    for i, (given, own) in enumerate(zip(label_names, expected, strict=True)):
        if given == own:
            continue
        label = int(found.labels[i])
        if found.class_names is None:
            raise ValueError(
                f"{name}[{i}] is {shortened(given)}, so class_names is required: pass the name of "
                "every label."
            )
        raise ValueError(
            f"{name}[{i}] is {shortened(given)}, but label {label} is {shortened(own)} in class_names."
        )


def _value_of(name: str, entry: Mapping[str, Any], key: str) -> Any:
    if key not in entry:
        raise ValueError(f"{name} has no {key!r}, only {shortened(list(entry))}.")
    return entry[key]


def _coco_box(name: str, entry: Mapping[str, Any]) -> list[float]:
    box = list(_value_of(name, entry, "bbox"))
    if len(box) != 4 or not all(map(is_number, box)) or min(box[2:]) < 0:
        raise ValueError(
            f"The bbox of {name} must be four numbers (x, y, width, height), the last two at least 0, "
            f"got {shortened(box)}."
        )
    return box


def _only_value(what: str, values: Sequence[Any]) -> Any:
    """Return the value that all rows of a table have, or None if there is none."""
    values = [value if isinstance(value, str | tuple) else None for value in values]  # NaN is None
    for value in values:
        if value != values[0]:
            raise ValueError(
                f"frame has rows of more than one image: its first {what} is {shortened(values[0])}, and "
                f"another is {shortened(value)}. Pass the rows of one image."
            )
    return values[0] if values else None


def _agreed(name: str, argument: Any, in_frame: Any) -> Any:
    """Return an argument, or what the table says if it is None; raise if both differ."""
    if argument is None or in_frame is None:
        return in_frame if argument is None else argument
    if type(in_frame)(argument) != in_frame:
        raise ValueError(f"{name} is {shortened(argument)}, but frame has {shortened(in_frame)}.")
    return argument
