"""Divide a dataset into parts such as train and val.

All classes are in the same proportions in all parts, which are written to the
folder OUT. The same seed gives the same parts. Nothing is overwritten without
--overwrite, and images are not copied unless asked for.

Examples:
  focaldet split annotations.json divided --images photos
  focaldet split data divided --fractions train=.7 val=.2 test=.1 --format yolo
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from focaldet.cli._arguments import add_data, named_number
from focaldet.cli._written import FORMATS, add_output, write

if TYPE_CHECKING:
    import argparse

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "divide a dataset into train and val at random, balanced by class"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_data(parser)
    add_output(parser, "folder to write")
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=named_number,
        default=[("train", 0.8), ("val", 0.2)],
        metavar="NAME=FRACTION",
        help="fraction of the images in each part; they sum to 1 (default: train=.8 val=.2)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random choice (default: 0)"
    )
    parser.add_argument(
        "--format", default="coco", choices=FORMATS, help="format to write (default: coco)"
    )


def run(options: argparse.Namespace) -> int:
    """Read, divide, write, and print what was written."""
    from focaldet.datasets import read_annotations, split_dataset

    fractions = dict(options.fractions)
    if len(fractions) < len(options.fractions):
        raise ValueError("--fractions contains a name twice. Name each part once.")
    table = read_annotations(options.data, options.images, split=options.split, exif=options.exif)
    tables = split_dataset(table, fractions, options.seed)
    write(tables, options)
    return 0
