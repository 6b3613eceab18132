"""Pascal VOC folders: one XML file per image, and lists of image names for the splits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from focaldet.datasets.writers._places import (
    check_suffixes,
    image_paths,
    known_sizes,
    place_images,
    places_of,
    without_suffix,
)
from focaldet.datasets.writers._table_parts import lose_outlines
from focaldet.datasets.writers._text import check_class_names, number_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._writer import ImageFiles, Output

__all__ = ["FILE_SUFFIX", "HOLDS_IDS", "IMAGE_FILES", "NAME", "write"]

NAME = "Pascal VOC"
FILE_SUFFIX: str | None = None
IMAGE_FILES: ImageFiles = "link"
HOLDS_IDS = False

_IMAGES = "JPEGImages"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")

_logger = logging.getLogger(__name__)


def write(tables: Mapping[str, AnnotationTable], output: Output) -> None:
    """Write the XML files, and a list of images for each split."""
    check_class_names(next(iter(tables.values())).class_names, NAME)
    paths = {split: image_paths(table) for split, table in tables.items()}
    # The splits share their folders, and may share images: VOC itself has train, val and trainval.
    distinct = list(dict.fromkeys(path for some in paths.values() for path in some))
    places = dict(zip(distinct, places_of(distinct, flat=True), strict=True))
    check_suffixes(distinct)
    output.folder.make_folder(_IMAGES)
    written: dict[str, str] = {}
    for split, table in tables.items():
        names = [places[path] for path in paths[split]]
        place_images(table, paths[split], names, _IMAGES, output)
        sizes = known_sizes(table, paths[split], missing="zero").tolist()
        if unknown := sum(not height for height, _ in sizes):
            output.losses["images without a known size"] += unknown
        lose_outlines(table, output.losses)
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            text = _as_xml(table, index, name, size)
            if written.setdefault(name, text) != text:
                raise AnnotationError(
                    f"The image {str(paths[split][index])!r} is listed twice with different annotations, "
                    "but Pascal VOC has one file per image. Correct the annotations."
                )
        listed = "".join(f"{without_suffix(name)}\n" for name in names)
        output.folder.write_text(f"ImageSets/Main/{split}.txt", listed)
    for name, text in written.items():
        output.folder.write_text(f"Annotations/{without_suffix(name)}.xml", text)
    if output.image_files == "keep":
        _logger.warning(
            "The images were left where they are. Readers of Pascal VOC look for them in %s.",
            output.folder.path / _IMAGES,
        )


def _as_xml(table: AnnotationTable, index: int, name: str, size: tuple[int, int]) -> str:
    height, width = size
    lines = ["<annotation>", f"  <folder>{_IMAGES}</folder>"]
    lines.append(f"  <filename>{escape(name)}</filename>")
    if height:
        lines.append(
            f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        )
    lines.append("  <segmented>0</segmented>")
    rows = table.boxes_of(index)
    boxes, labels = table.boxes[rows].tolist(), table.labels[rows].tolist()
    for box, label, crowd in zip(boxes, labels, table.crowd[rows].tolist(), strict=True):
        corners = zip(_CORNERS, map(number_text, box), strict=True)
        inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
        lines += [
            "  <object>",
            f"    <name>{escape(table.class_names[label])}</name>",
            f"    <pose>Unspecified</pose><truncated>0</truncated><difficult>{int(crowd)}</difficult>",
            f"    <bndbox>{inside}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
