"""The detections of an evaluation, read from COCO's form or from `Detections`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from focaldet._checks import must_be
from focaldet.boxes import xyxy_to_xywh
from focaldet.detections import Detections
from focaldet.evaluation._ground_truth import places_of
from focaldet.evaluation._rows import Rows, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from focaldet.evaluation._ground_truth import Truth

Results: TypeAlias = (
    "str | os.PathLike[str] | Mapping[int, Detections] | Sequence[Mapping[str, Any]]"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """M detections, those of an image in the order in which they were given.

    Attributes:
        seen: ids of the images that were looked at, ascending, with detections or without.
        image_ids: ``[M]``, int64.
        category_ids: ``[M]``, int64.
        boxes: ``[M, 4]``, float64: x, y, width, height.
        scores: ``[M]``, float64.
    """

    seen: npt.NDArray[np.int64]
    image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def only(self, rows: npt.NDArray[np.bool_]) -> Found:
        """Return the detections for which ``rows`` is true."""
        return Found(
            seen=self.seen,
            image_ids=self.image_ids[rows],
            category_ids=self.category_ids[rows],
            boxes=self.boxes[rows],
            scores=self.scores[rows],
        )


def read_found(results: Results, truth: Truth, category_ids: Sequence[int] | None) -> Found:
    """Read detections in any of the forms that `evaluate_coco` takes.

    Raises:
        TypeError: they are of another type.
        ValueError: values that are wrong, images or categories that are not in the annotations.
    """
    if isinstance(results, Mapping):
        found = _from_detections(results, truth, category_ids)
    else:
        found = _from_entries(results)
    places_of(found.seen, truth.image_ids, "results", "images in the annotations")
    places_of(found.category_ids, truth.category_ids, "results", "categories in the annotations")
    return found


def join(shares: Sequence[Found]) -> Found:
    """Join what several ranks found; an image that several saw counts as the first saw it."""
    kept: list[Found] = []
    seen = np.zeros(0, np.int64)
    for share in shares:
        kept.append(share.only(~np.isin(share.image_ids, seen)))
        seen = np.union1d(seen, share.seen)
    return Found(
        seen=seen,
        image_ids=np.concatenate([share.image_ids for share in kept]),
        category_ids=np.concatenate([share.category_ids for share in kept]),
        boxes=np.concatenate([share.boxes for share in kept]),
        scores=np.concatenate([share.scores for share in kept]),
    )


def _from_entries(results: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> Found:
    source = "the results"
    if isinstance(results, str | os.PathLike):
        quick = _quickly(Path(results))
        if quick is not None:
            return quick
        source, results = Path(results).name, read_json("results", results)
    if not isinstance(results, Sequence) or isinstance(results, str):
        got = f"{type(results).__name__} in {source}"
        raise ValueError(must_be("results", "a list of entries, or Detections by image id", got))
    rows = Rows(results, "entry", source)
    image_ids = rows.integers("image_id")
    return Found(
        seen=np.unique(image_ids),
        image_ids=image_ids,
        category_ids=rows.integers("category_id"),
        boxes=rows.boxes(),
        scores=rows.numbers("score"),
    )


def _quickly(path: Path) -> Found | None:
    """Read a results file with msgspec; None if that is not installed or anything is amiss.

    What is amiss is then found and named by the ordinary reader.
    """
    try:
        import msgspec
    except ImportError:
        return None
    box = tuple[float, float, float, float]
    entry = msgspec.defstruct(
        "Entry",
        [("image_id", int), ("category_id", int), ("bbox", box), ("score", float)],
        gc=False,
    )
    try:
        entries: list[Any] = msgspec.json.decode(path.read_bytes(), type=list[entry])  # type: ignore[valid-type]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not entries:
        return None
    image_ids = np.array([one.image_id for one in entries])
    category_ids = np.array([one.category_id for one in entries])
    boxes = np.array([one.bbox for one in entries], np.float64)
    scores = np.array([one.score for one in entries], np.float64)
    sound = image_ids.dtype == category_ids.dtype == np.int64 and np.isfinite(scores).all()
    if not (sound and np.isfinite(boxes).all() and (boxes[:, 2:] >= 0).all()):
        return None
    return Found(
        seen=np.unique(image_ids),
        image_ids=image_ids,
        category_ids=category_ids,
        boxes=boxes,
        scores=scores,
    )


def _from_detections(
    results: Mapping[int, Detections], truth: Truth, category_ids: Sequence[int] | None
) -> Found:
    items: Iterable[tuple[Any, Any]] = results.items()
    for image_id, found in items:
        if isinstance(image_id, bool) or not isinstance(image_id, int | np.integer):
            raise TypeError(must_be("results", "keyed by integer image ids", repr(image_id)))
        if not isinstance(found, Detections):
            got = f"{type(found).__name__} for image {image_id}"
            raise TypeError(must_be("results", "Detections by image id", got))
    image_ids = np.array(list(results), np.int64).reshape(-1)
    _warn_of_sizes(results, truth)
    boxes = [xyxy_to_xywh(found.boxes.detach()).cpu().double() for found in results.values()]
    scores = [found.scores.detach().cpu().double() for found in results.values()]
    labels = [found.labels.cpu() for found in results.values()]
    of_images = np.repeat(image_ids, [len(one) for one in labels])
    all_boxes = torch.cat([torch.zeros(0, 4, dtype=torch.float64), *boxes]).numpy()
    all_labels = torch.cat([torch.zeros(0, dtype=torch.int64), *labels]).numpy()
    turned = (all_boxes[:, 2:] < 0).any(axis=1)
    if turned.any():
        got = (
            f"{all_boxes[turned][0].tolist()} (x, y, width, height) in image {of_images[turned][0]}"
        )
        raise ValueError(must_be("boxes", "of width and height >= 0", got))
    return Found(
        seen=np.unique(image_ids),
        image_ids=of_images,
        category_ids=_categories(all_labels, of_images, results, truth, category_ids),
        boxes=all_boxes,
        scores=torch.cat([torch.zeros(0, dtype=torch.float64), *scores]).numpy(),
    )


def _categories(
    labels: npt.NDArray[np.int64],
    image_ids: npt.NDArray[np.int64],
    results: Mapping[int, Detections],
    truth: Truth,
    category_ids: Sequence[int] | None,
) -> npt.NDArray[np.int64]:
    if category_ids is None:
        ids, called = truth.category_ids, "the number of categories"
        _check_names(results, truth)
    else:
        ids, called = np.array(category_ids, np.int64).reshape(-1), "the number of `category_ids`"
        places_of(ids, truth.category_ids, "category_ids", "categories in the annotations")
    beyond = labels >= len(ids)
    if beyond.any():
        got = f"{labels[beyond][0]} in image {image_ids[beyond][0]}"
        raise ValueError(must_be("labels", f"below {called} ({len(ids)})", got))
    return ids[labels]


def _check_names(results: Mapping[int, Detections], truth: Truth) -> None:
    """Raise if the detections' class names say that labels stand for categories in another order."""
    ids = truth.category_ids.tolist()
    by_name = dict(zip(truth.category_names, ids, strict=True))
    by_id = dict(zip(ids, truth.category_names, strict=True))
    for names in {found.class_names for found in results.values()} - {None}:
        for label, (category, name) in enumerate(zip(ids, names or (), strict=False)):
            if by_id[category] != name and name in by_name:
                listed = [by_name.get(each) for each in names or ()]
                remedy = (
                    f"Pass category_ids={listed}."
                    if None not in listed
                    else "Say with `category_ids` which category each label is."
                )
                got = f"label {label}, {name!r}, where category {category} is {by_id[category]!r}"
                raise ValueError(
                    must_be("class_names", "in the order of the category ids", got, remedy)
                )


def _warn_of_sizes(results: Mapping[int, Detections], truth: Truth) -> None:
    """Warn if the detections' boxes seem to be in pixels of other images than the annotated ones."""
    other = [
        (image_id, tuple(found.image_size), truth.image_sizes[image_id])
        for image_id, found in results.items()
        if image_id in truth.image_sizes and tuple(found.image_size) != truth.image_sizes[image_id]
    ]
    if other:
        image_id, (height, width), (true_height, true_width) = other[0]
        message = (
            f"{len(other)} images are of another size than annotated, first image {image_id}: "
            f"{height}x{width} against {true_height}x{true_width} (height x width). Boxes are "
            "compared in pixels as they are."
        )
        warnings.warn(message, UserWarning, stacklevel=2)
