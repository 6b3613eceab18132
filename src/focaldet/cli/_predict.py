"""Detect objects in photos: print them, draw them, and write them to files.

The --output folder receives a picture per photo and detections.json, which
has the boxes, scores and labels of every photo. With --format, the detections
are also written as annotations, to correct them in a labelling tool or to
train on them.

Examples:
  focaldet predict runs/a photo.jpg holidays/ --output found
  focaldet predict torchvision/retinanet_resnet50_fpn_v2_coco photo.jpg
  focaldet predict runs/a photos --score-threshold 0.3 --format coco
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet.cli._arguments import (
    add_batch_size,
    add_device,
    add_model,
    add_output,
    load_model,
    score,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from focaldet import Detections

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "detect objects in photos"

_ANNOTATIONS = {
    "coco": "annotations.json",
    "yolo": "yolo",
    "voc": "voc",
    "csv": "annotations.csv",
    "labelme": "labelme",
}
"""The formats of --format, each with the file or folder that is written into the output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_model(parser)
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE", help="photo, or folder of photos"
    )
    group = parser.add_argument_group("detection")
    group.add_argument(
        "--score-threshold",
        type=score,
        default=0.5,
        metavar="SCORE",
        help="keep detections that score above this, between 0 and 1 (default: 0.5)",
    )
    add_batch_size(group)
    add_device(group)
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="what to do about a photo that is missing or damaged: stop, or skip it with a warning "
        "(default: raise)",
    )
    group = parser.add_argument_group("output")
    add_output(group, "predictions")
    group.add_argument(
        "--format",
        choices=list(_ANNOTATIONS),
        help="also write the detections, without scores, as annotations in this format",
    )
    group.add_argument("--no-pictures", action="store_true", help="do not draw the photos")


def run(options: argparse.Namespace) -> int:
    """Detect, print, draw and write."""
    from focaldet.images import list_images

    paths = list_images(options.sources)
    results = load_model(options).predict(
        paths,
        batch_size=options.batch_size,
        score_threshold=options.score_threshold,
        on_error=options.on_error,
    )
    found = [one for one in results if one is not None]
    if not found:
        raise ValueError("No photo could be read.")
    _print(found)
    written = _write(found, options)
    skipped = f", skipped {len(results) - len(found):,}" if len(found) < len(results) else ""
    sys.stdout.write(
        f"Found {sum(map(len, found)):,} objects in {_counted(len(found))}{skipped}. "
        f"Wrote {', '.join(written)} to {options.output}.\n"
    )
    return 0


def _print(found: Sequence[Detections]) -> None:
    from focaldet._checks import printable

    for one in found:
        count = "1 object" if len(one) == 1 else f"{len(one)} objects"
        sys.stdout.write(f"{printable(one.source or '')}: {count}\n")
        for name, value, box in zip(
            one.label_names, one.scores.tolist(), one.boxes.tolist(), strict=True
        ):
            corners = "  ".join(f"{corner:7.1f}" for corner in box)
            sys.stdout.write(f"  {value:.2f}  {corners}  {printable(name)}\n")


def _write(found: Sequence[Detections], options: argparse.Namespace) -> list[str]:
    """Write the files of a command, and return their names for the last line."""
    from focaldet._atomic import atomic_write, atomic_write_text

    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    written = ["detections.json"]
    text = json.dumps([one.to_dict() for one in found], indent=1)
    atomic_write_text(folder / "detections.json", text)
    if options.format is not None:
        from focaldet.datasets import AnnotationTable, write_annotations

        table = AnnotationTable.from_detections(found)
        target = folder / _ANNOTATIONS[options.format]
        write_annotations(table, target, options.format, overwrite=True)
        written.append(_ANNOTATIONS[options.format])
    if not options.no_pictures:
        for name, one in zip(_picture_names(found), found, strict=True):
            with atomic_write(folder / name) as temporary:
                one.draw().save(temporary, format="PNG")
        written.append("1 picture" if len(found) == 1 else f"{len(found):,} pictures")
    return written


def _picture_names(found: Sequence[Detections]) -> list[str]:
    """Return a name for each picture; the number tells photos of one name in two folders apart."""
    stems = [Path(one.source or "").stem for one in found]
    counts = Counter(stem.lower() for stem in stems)
    return [
        f"{stem}.png" if counts[stem.lower()] == 1 else f"{stem}_{number}.png"
        for number, stem in enumerate(stems)
    ]


def _counted(number: int) -> str:
    return "1 photo" if number == 1 else f"{number:,} photos"
