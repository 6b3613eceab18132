"""The ground truth of an evaluation, read from COCO's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._checks import must_be
from focaldet.evaluation._rows import Rows, read_json

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    import numpy.typing as npt

_SHOWN = 5  # ids in a message


@dataclass(frozen=True, eq=False, kw_only=True)
class Truth:
    """The objects of I images and K categories, N in all, in the order of the file.

    Attributes:
        image_ids: ``[I]``, ascending.
        image_sizes: (height, width) by image id, where the file says it.
        category_ids: ``[K]``, ascending.
        category_names: of each of them.
        images: ``[N]``, the place of each object's image in ``image_ids``.
        categories: ``[N]``, the place of its category in ``category_ids``.
        boxes: ``[N, 4]``: x, y, width, height.
        areas: ``[N]``, of the outlines, by which objects are small, medium or large.
        crowd: ``[N]``, whether the box is around a crowd.
    """

    image_ids: npt.NDArray[np.int64]
    image_sizes: Mapping[int, tuple[int, int]]
    category_ids: npt.NDArray[np.int64]
    category_names: tuple[str, ...]
    images: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]

    def only(self, image_ids: Iterable[int]) -> Truth:
        """Return what there is of some of the images.

        Raises:
            ValueError: an id that is not in the annotations.
        """
        kept = np.unique(np.array(list(image_ids), np.int64))
        places = places_of(kept, self.image_ids, "image_ids", "images in the annotations")
        place = np.full(len(self.image_ids), -1)
        place[places] = np.arange(len(kept))
        rows = place[self.images] >= 0
        return replace(
            self,
            image_ids=kept,
            images=place[self.images][rows],
            categories=self.categories[rows],
            boxes=self.boxes[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
        )


def read_truth(annotations: str | os.PathLike[str] | Mapping[str, Any]) -> Truth:
    """Read annotations in COCO's form, a JSON file or its content.

    Raises:
        ValueError: they are not in COCO's form; the annotation is named.
    """
    content: Any
    if isinstance(annotations, Mapping):
        source, content = "the annotations", annotations
    else:
        source, content = Path(annotations).name, read_json("annotations", annotations)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), list | tuple):
            got = f"{type(content).__name__} without a list of {key}"
            remedy = "A results file is the second argument."
            raise ValueError(must_be("annotations", "in COCO's form", got, remedy))
    images = Rows(content["images"], "image", source)
    categories = Rows(content["categories"], "category", source)
    objects = Rows(content["annotations"], "annotation", source)

    image_ids, category_ids = np.unique(images.integers("id")), categories.integers("id")
    order = np.argsort(category_ids, kind="stable")
    boxes = objects.boxes()
    return Truth(
        image_ids=image_ids,
        image_sizes=_sizes(content["images"]),
        category_ids=_distinct(category_ids[order], categories),
        category_names=tuple(
            str(content["categories"][i].get("name", category_ids[i])) for i in order
        ),
        images=_places(objects, "image_id", image_ids, "images"),
        categories=_places(objects, "category_id", category_ids[order], "categories"),
        boxes=boxes,
        areas=objects.numbers("area", default=boxes[:, 2] * boxes[:, 3]),
        crowd=np.array([bool(row.get("iscrowd")) for row in objects.rows], bool),
    )


def places_of(
    ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64], name: str, what: str
) -> npt.NDArray[np.int64]:
    """Return where ``ids`` stand in the ascending ``known``.

    Raises:
        ValueError: some are not there.
    """
    places, there = _look_up(ids, known)
    if not there.all():
        missing = np.unique(ids[~there]).tolist()
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(must_be(name, f"of {what}", f"ids {missing[:_SHOWN]}{more}"))
    return places


def _places(
    objects: Rows, key: str, known: npt.NDArray[np.int64], what: str
) -> npt.NDArray[np.int64]:
    ids = objects.integers(key)
    places, there = _look_up(ids, known)
    if not there.all():
        first = int(np.argmin(there))
        got = f"{ids[first]} in {objects.where(first)}"
        raise ValueError(must_be(key, f"one of the {what}' ids", got))
    return places


def _look_up(
    ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    if not len(known):
        return np.zeros_like(ids), np.zeros(len(ids), bool)
    places = np.searchsorted(known, ids).clip(max=len(known) - 1)
    return places, known[places] == ids


def _distinct(ids: npt.NDArray[np.int64], categories: Rows) -> npt.NDArray[np.int64]:
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        got = f"{twice[0]} twice in {categories.source}"
        raise ValueError(must_be("id", "each category's own", got))
    return ids


def _sizes(images: list[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    return {
        image["id"]: (image["height"], image["width"])
        for image in images
        if image.get("height") and image.get("width")
    }
