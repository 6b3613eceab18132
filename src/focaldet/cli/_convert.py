"""Write a dataset in a different annotation format.

All splits of DATA are written to OUT, or only the one given with --split.
Nothing is overwritten without --overwrite, and images are not copied unless
asked for.

Examples:
  focaldet convert voc as_yolo --format yolo
  focaldet convert train.json train.csv --images photos --format csv
  focaldet convert labelled out --format coco --image-files copy
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from focaldet.cli._arguments import add_data
from focaldet.cli._written import FORMATS, add_output, write

if TYPE_CHECKING:
    import argparse

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "write a dataset as COCO, YOLO, Pascal VOC, CSV or LabelMe files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_data(parser)
    add_output(parser, "file or folder to write; a .json or .csv file holds a single split")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format to write")


def run(options: argparse.Namespace) -> int:
    """Read, write, and print what was written."""
    from focaldet.datasets import read_annotations, read_splits

    if options.split is None:
        tables = read_splits(options.data, options.images, exif=options.exif)
    else:
        table = read_annotations(
            options.data, options.images, split=options.split, exif=options.exif
        )
        tables = {options.split: table}
    write(tables, options)
    return 0
