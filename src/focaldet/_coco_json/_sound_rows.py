"""The rows of an annotation file that can be read, after the others were reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from focaldet._coco_json._rows import Rows, describe_row
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["sound_rows"]

_CHUNK = 1024  # rows; only chunks with a wrong row are read row by row

ReadFields: TypeAlias = Callable[[Rows], object]
Report: TypeAlias = Callable[[Exception], object]


def sound_rows(
    sections: Mapping[str, Sequence[Any]],
    read_fields: Mapping[str, ReadFields],
    source: str,
    report: Report,
    *,
    valid_text: bool,
) -> dict[str, list[Any]]:
    """Return the rows of each section that are right by themselves and refer to such rows.

    Args:
        sections: The rows of "images", "annotations" and "categories".
        read_fields: For each section, a function that reads all its fields.
        source: The path of the file, for messages.
        report: Called with an error for each row that is left out.
        valid_text: Whether the whole file was valid text.
    """

    def is_right(rows: Sequence[Any], section: str, start: int, tell: Report | None) -> bool:
        try:
            read_fields[section](Rows(rows, section, source, valid_text=valid_text, start=start))
        except AnnotationError as error:
            if tell is not None:
                tell(error)
            return False
        return True

    right: dict[str, dict[int, Any]] = {section: {} for section in read_fields}
    for section, found in right.items():
        for start in range(0, len(sections[section]), _CHUNK):
            chunk = dict(enumerate(sections[section][start : start + _CHUNK], start=start))
            if is_right(list(chunk.values()), section, start, None):
                found.update(chunk)
            else:
                found.update(
                    {i: row for i, row in chunk.items() if is_right([row], section, i, report)}
                )
    for section in ("images", "categories"):
        _leave_out_other_rows_of_an_id(right[section], section, source, report)
    image_ids = {int(row["id"]) for row in right["images"].values()}
    for index, row in list(right["annotations"].items()):
        if int(row["image_id"]) not in image_ids:
            where = describe_row("annotations", index, source, row.get("id"))
            problem = f"image_id {row['image_id']} is not the id of an image that can be read."
            report(AnnotationError(f"{where}: {problem}"))
            del right["annotations"][index]
    return {section: list(rows.values()) for section, rows in right.items()}


def _leave_out_other_rows_of_an_id(
    rows: dict[int, Any], section: str, source: str, report: Report
) -> None:
    """Leave out rows that have the id of an earlier one, unless an image is repeated exactly."""
    first: dict[int, int] = {}
    for index, row in list(rows.items()):
        earlier = first.setdefault(int(row["id"]), index)
        if earlier == index or (section == "images" and row == rows[earlier]):
            continue
        where = describe_row(section, index, source, row["id"])
        report(AnnotationError(f"{where} has the same id as {section}[{earlier}]."))
        del rows[index]
