"""The report of the dataset checker, and how it is printed."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from focaldet._checks import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet.datasets.checks._anchor_reach import AnchorReach

__all__ = ["KINDS", "BoxSizes", "ClassCount", "DatasetReport", "Finding", "Kind"]

_EXAMPLES = 3  # findings printed per kind
_UNREADABLE_EXAMPLES = 50  # findings printed of each of the next kinds, which stop the reading
_UNREADABLE = frozenset({"annotation-unreadable", "image-missing", "image-unreadable"})
_MOST_COMMON, _LEAST_COMMON = 10, 5  # classes printed of a long table

Severity = Literal["error", "warning", "note"]


class Kind(NamedTuple):
    """What findings of one kind have in common.

    Attributes:
        severity: "error" for what stops or spoils training, "warning" for what is probably a mistake,
            "note" for what is good to know.
        meaning: What is wrong, and its consequence.
    """

    severity: Severity
    meaning: str


KINDS = {
    "annotation-unreadable": Kind(
        "error", "a file, line or object is missing or damaged, so the dataset cannot be read"
    ),
    "nothing-to-learn": Kind("error", "training has no object to learn from"),
    "image-missing": Kind("error", "the file does not exist; is this the right folder of images?"),
    "image-unreadable": Kind("error", "the file is damaged, truncated, or not an image"),
    "image-size": Kind(
        "error", "the image size differs from the annotated size, so the boxes do not fit"
    ),
    "image-id-duplicate": Kind("error", "several images have the same id"),
    "annotation-id-duplicate": Kind(
        "error", "several annotations have the same id; COCO's API keeps only one"
    ),
    "box-format": Kind("error", "the boxes look as if they were read in the wrong format"),
    "box-not-finite": Kind("error", "a coordinate is NaN or infinite; training drops the box"),
    "box-no-area": Kind("error", "the box has no width or no height; training drops it"),
    "box-outside": Kind("error", "the box is completely outside its image; training drops it"),
    "category-unknown": Kind("error", "the category of the box is not declared"),
    "annotation-doubtful": Kind(
        "warning", "the annotations can be read, but perhaps not as they were meant"
    ),
    "image-file-duplicate": Kind("warning", "several images have the same file"),
    "image-content-duplicate": Kind("warning", "files with different names have the same content"),
    "box-overhang": Kind(
        "warning", "the box extends more than a pixel beyond its image; training clips it"
    ),
    "box-duplicate": Kind("warning", "an object is annotated twice: same class, IoU above 0.99"),
    "category-unused": Kind(
        "warning", "the class has no objects, so it can be neither learned nor evaluated"
    ),
    "anchor-unreached": Kind(
        "warning", "no anchor overlaps the object enough to become a positive"
    ),
    "class-mismatch": Kind(
        "note", "the model has different classes, so its class head must be retrained"
    ),
    "image-size-unknown": Kind(
        "note", "no size is annotated and images were not read, so boxes may be outside"
    ),
    "image-empty": Kind("note", "the image has no boxes and counts as background only"),
    "image-only-crowds": Kind("note", "the image has only crowds, which are not trained on"),
}
"""Every kind of finding, in the order in which they are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem found in a dataset.

    Attributes:
        kind: A key of :data:`KINDS`.
        message: What is wrong in this case, with the numbers.
        file: File of the image, relative to the folder of images.
        image_id: Id of the image in the annotations.
        annotation_id: Id of the annotation. If the format has none, the position of the box within its
            image, from 0.
    """

    kind: str
    message: str
    file: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None

    @property
    def severity(self) -> Severity:
        """How serious the finding is: "error", "warning" or "note"."""
        return KINDS[self.kind].severity

    def __str__(self) -> str:
        where = [] if self.file is None else [self.file]
        where += [] if self.image_id is None else [f"image {self.image_id}"]
        where += [] if self.annotation_id is None else [f"annotation {self.annotation_id}"]
        return printable(f"{', '.join(where)}: {self.message}" if where else self.message)


class ClassCount(NamedTuple):
    """How often a class occurs, without crowds."""

    name: str
    boxes: int
    images: int


class BoxSizes(NamedTuple):
    """How large the objects are, in pixels of the images, without crowds and boxes without area.

    Attributes:
        small: Number of objects with an area below 32^2.
        medium: Number of objects with an area from 32^2 to 96^2.
        large: Number of objects with a larger area.
        sides: Minimum, 5th percentile, median, 95th percentile and maximum of the square root of the
            area of the boxes.
        aspect_ratios: The same for height / width.
    """

    small: int
    medium: int
    large: int
    sides: tuple[float, ...]
    aspect_ratios: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """The result of :func:`~focaldet.datasets.check_dataset`. ``print(report)`` shows it.

    Attributes:
        source: Path of the annotations.
        num_images: Number of annotated images.
        num_boxes: Number of boxes, including crowds and invalid boxes.
        num_crowds: Number of boxes around groups of objects.
        findings: All findings, grouped by kind in the order of :data:`KINDS`.
        classes: How often each class occurs, by label.
        box_sizes: How large the objects are.
        anchors: What the anchors of the model reach. None if no configuration was given.
    """

    source: Path
    num_images: int
    num_boxes: int
    num_crowds: int
    findings: tuple[Finding, ...]
    classes: tuple[ClassCount, ...]
    box_sizes: BoxSizes
    anchors: AnchorReach | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no errors. There may be warnings and notes."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each kind that occurs."""
        groups = itertools.groupby(self.findings, key=lambda finding: finding.kind)
        return {kind: len(list(group)) for kind, group in groups}

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        values: dict[str, Any] = {
            "source": str(self.source),
            "ok": self.ok,
            "num_images": self.num_images,
            "num_boxes": self.num_boxes,
            "num_crowds": self.num_crowds,
            "counts": self.counts,
            "findings": [{"severity": one.severity, **asdict(one)} for one in self.findings],
            "classes": [one._asdict() for one in self.classes],
            "box_sizes": self.box_sizes._asdict(),
            "anchors": None if self.anchors is None else asdict(self.anchors),
        }
        text = json.dumps(values, indent=1, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be UTF-8

    def __str__(self) -> str:
        parts = [
            self._summary(),
            *self._groups(),
            _class_table(self.classes),
            _size_table(self.box_sizes),
        ]
        if self.anchors is not None:
            parts.append(str(self.anchors))
        return "\n\n".join(part for part in parts if part)

    def _summary(self) -> str:
        crowds = f" ({_number(self.num_crowds, 'crowd')})" if self.num_crowds else ""
        head = (
            f"{printable(str(self.source))}: {_number(self.num_images, 'image')}, "
            f"{_number(self.num_boxes, 'box', 'boxes')}{crowds}, "
            f"{_number(len(self.classes), 'class', 'classes')}"
        )
        if not self.findings:
            return head + "\nNo problems found."
        width = max(len(kind) for kind in self.counts)
        lines = [
            f"  {KINDS[kind].severity:7}  {kind:{width}}  {count:>7,}"
            for kind, count in self.counts.items()
        ]
        return "\n".join([head, *lines])

    def _groups(self) -> Iterator[str]:
        for kind, group in itertools.groupby(self.findings, key=lambda finding: finding.kind):
            found = list(group)
            severity, meaning = KINDS[kind]
            lines = [f"{severity.upper()} {kind} ({len(found):,}): {meaning}"]
            shown = _UNREADABLE_EXAMPLES if kind in _UNREADABLE else _EXAMPLES
            lines += [f"  {finding}" for finding in found[:shown]]
            if len(found) > shown:
                lines.append(f"  and {len(found) - shown:,} more")
            yield "\n".join(lines)


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _class_table(classes: tuple[ClassCount, ...]) -> str:
    if not classes:
        return ""
    ordered = sorted(classes, key=lambda one: -one.boxes)
    rows = [f"{one.boxes:>9,} {one.images:>9,}  {printable(one.name)}" for one in ordered]
    if len(rows) > _MOST_COMMON + _LEAST_COMMON + 1:
        left_out = len(rows) - _MOST_COMMON - _LEAST_COMMON
        rows[_MOST_COMMON:-_LEAST_COMMON] = [f"{'...':>9} {'...':>9}  ({left_out} more classes)"]
    return "\n".join(["Classes", f"{'objects':>9} {'images':>9}  name", *rows])


def _size_table(sizes: BoxSizes) -> str:
    if not sizes.sides:
        return ""
    counts = {"small": sizes.small, "medium": sizes.medium, "large": sizes.large}
    total = sum(counts.values())
    shares = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items())
    head = "".join(f"{name:>9}" for name in ("min", "5%", "median", "95%", "max"))
    rows = [
        f"  {name:<18}" + "".join(f"{value:>9{form}}" for value in values)
        for name, values, form in (
            ("side, pixels", sizes.sides, ".1f"),
            ("height / width", sizes.aspect_ratios, ".2f"),
        )
    ]
    return "\n".join([f"Object sizes by COCO's definition: {shares}", f"  {'':<18}{head}", *rows])
