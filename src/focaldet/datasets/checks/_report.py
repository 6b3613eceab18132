"""What the checks of a data set found, and how it is printed."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet.datasets.checks._anchors import AnchorReach

__all__ = ["KINDS", "BoxSizes", "ClassCount", "DatasetReport", "Finding", "Kind"]

_EXAMPLES = 3  # of each kind, in print
_MOST, _LEAST = 10, 5  # classes of a long table, in print

Severity = Literal["error", "warning", "note"]


class Kind(NamedTuple):
    """What findings of one kind have in common.

    Attributes:
        severity: "error" for what stops or spoils training, "warning" for what most likely is
            a mistake, "note" for what is good to know.
        meaning: in one sentence, with what comes of it.
    """

    severity: Severity
    meaning: str


KINDS = {
    "image-missing": Kind("error", "no such file; is the folder of images the right one?"),
    "image-unreadable": Kind("error", "the file is damaged, cut short, or no image"),
    "image-size": Kind(
        "error", "the image has another size than annotated, so boxes do not fit it"
    ),
    "image-id-duplicate": Kind("error", "several images have one id"),
    "annotation-id-duplicate": Kind(
        "error", "several annotations have one id; COCO's API keeps one"
    ),
    "box-format": Kind("error", "the boxes as a whole look as if read in another format"),
    "box-not-finite": Kind("error", "a coordinate is NaN or infinite; training drops the box"),
    "box-no-area": Kind("error", "no width or no height; training drops the box"),
    "box-outside": Kind("error", "wholly outside its image; training drops the box"),
    "category-unknown": Kind("error", "its category is not declared"),
    "image-file-duplicate": Kind("warning", "one file is listed as several images"),
    "image-content-duplicate": Kind("warning", "files of different names have equal content"),
    "box-overhang": Kind(
        "warning", "reaches more than a pixel out of its image; training clips it"
    ),
    "box-duplicate": Kind("warning", "one object annotated twice: same class, IoU above 0.99"),
    "category-unused": Kind(
        "warning", "no object of this class: it can be neither learnt nor tested"
    ),
    "anchor-unreached": Kind("warning", "no anchor overlaps the object enough to be a positive"),
    "class-mismatch": Kind(
        "note", "the model's classes are others; its class head must be trained"
    ),
    "image-size-unknown": Kind(
        "note", "not annotated, and images were not read: boxes may lie outside"
    ),
    "image-empty": Kind("note", "no boxes: the image trains as background alone"),
    "image-only-crowds": Kind("note", "only crowds, which are no objects to train on"),
}
"""Every kind of finding, in the order in which they are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing found.

    Attributes:
        kind: a key of :data:`KINDS`.
        message: what is wrong with this one, with its numbers.
        file: the image's file, relative to the folder of images.
        image_id: as in the annotations.
        annotation_id: as in the annotations; where they have none, the place in the image, from 0.
    """

    kind: str
    message: str
    file: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None

    @property
    def severity(self) -> Severity:
        """How bad it is: "error", "warning" or "note"."""
        return KINDS[self.kind].severity

    def __str__(self) -> str:
        where = [] if self.file is None else [self.file]
        where += [] if self.image_id is None else [f"image {self.image_id}"]
        where += [] if self.annotation_id is None else [f"annotation {self.annotation_id}"]
        return f"{', '.join(where)}: {self.message}" if where else self.message


class ClassCount(NamedTuple):
    """How often a class occurs, crowds not counted."""

    name: str
    boxes: int
    images: int


class BoxSizes(NamedTuple):
    """How large the objects are, in pixels of the images; crowds and boxes without area left out.

    Attributes:
        small: objects of an area below 32^2.
        medium: up to 96^2.
        large: above.
        sides: smallest, 5 %, median, 95 % and greatest square root of the boxes' areas.
        aspect_ratios: the same of height / width.
    """

    small: int
    medium: int
    large: int
    sides: tuple[float, ...]
    aspect_ratios: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What :func:`~focaldet.datasets.check_dataset` found. ``print(report)`` shows it.

    Attributes:
        source: the annotations.
        num_images: all that are annotated.
        num_boxes: all, crowds and wrong ones too.
        num_crowds: those that stand for a group.
        findings: every one, grouped by kind in the order of :data:`KINDS`.
        classes: how often each class occurs, by label.
        box_sizes: how large the objects are.
        anchors: what a model's anchors reach; None if no configuration was given.
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
        """Whether there are no errors; there may be warnings and notes."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings there are of each kind that occurs."""
        groups = itertools.groupby(self.findings, key=lambda finding: finding.kind)
        return {kind: len(list(group)) for kind, group in groups}

    def to_json(self) -> str:
        """Return everything as the text of a JSON object."""
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
        return json.dumps(values, indent=1, ensure_ascii=False)

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
            f"{self.source}: {_number(self.num_images, 'image')}, "
            f"{_number(self.num_boxes, 'box', 'boxes')}{crowds}, "
            f"{_number(len(self.classes), 'class', 'classes')}"
        )
        if not self.findings:
            return head + "\nNothing found that is wrong."
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
            lines += [f"  {finding}" for finding in found[:_EXAMPLES]]
            if len(found) > _EXAMPLES:
                lines.append(f"  and {len(found) - _EXAMPLES:,} more")
            yield "\n".join(lines)


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _class_table(classes: tuple[ClassCount, ...]) -> str:
    if not classes:
        return ""
    ordered = sorted(classes, key=lambda one: -one.boxes)
    rows = [f"{one.boxes:>9,} {one.images:>9,}  {one.name}" for one in ordered]
    if len(rows) > _MOST + _LEAST + 1:
        left_out = len(rows) - _MOST - _LEAST
        rows[_MOST:-_LEAST] = [f"{'...':>9} {'...':>9}  ({left_out} classes between)"]
    return "\n".join(["Classes", f"{'objects':>9} {'images':>9}  name", *rows])


def _size_table(sizes: BoxSizes) -> str:
    if not sizes.sides:
        return ""
    counts = {"small": sizes.small, "medium": sizes.medium, "large": sizes.large}
    total = sum(counts.values())
    shares = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items())
    head = "".join(f"{name:>9}" for name in ("least", "5 %", "median", "95 %", "most"))
    rows = [
        f"  {name:<18}" + "".join(f"{value:>9{form}}" for value in values)
        for name, values, form in (
            ("side, pixels", sizes.sides, ".1f"),
            ("height / width", sizes.aspect_ratios, ".2f"),
        )
    ]
    return "\n".join([f"Objects by COCO's sizes: {shares}", f"  {'':<18}{head}", *rows])
