"""What the subcommands that write datasets have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from focaldet.datasets import AnnotationTable

__all__ = ["FORMATS", "add_output", "write"]

FORMATS = ("coco", "yolo", "voc", "csv", "labelme")


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the positional argument OUT, which ``what`` describes, and how files are written."""
    parser.add_argument("out", type=Path, metavar="OUT", help=what)
    parser.add_argument(
        "--image-files",
        choices=("keep", "link", "copy"),
        help="keep images where they are, or link or copy them into OUT (default: link for yolo and "
        "voc, whose readers look for images in the folder of the dataset; keep otherwise)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that is not empty, and replace files of the same name",
    )


def write(tables: Mapping[str, AnnotationTable], options: argparse.Namespace) -> None:
    """Write the splits of a dataset as the options say, and print a line for each."""
    from focaldet._checks import printable
    from focaldet.datasets import write_annotations

    path = write_annotations(
        tables,
        options.out,
        options.format,
        image_files=options.image_files,
        overwrite=options.overwrite,
    )
    lines = [
        f"{split}: {len(table):,} images, {len(table.boxes):,} objects, "
        f"{len(table.class_names):,} classes"
        for split, table in tables.items()
    ]
    sys.stdout.write("".join(f"{printable(line)}\n" for line in [*lines, f"Written to {path}"]))
