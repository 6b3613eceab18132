"""Draw a gallery of a dataset: photos with their annotated objects, on one sheet.

A look at it shows most mistakes in annotations, such as boxes in the wrong
format, names that are mixed up, and photos of which only some objects are
annotated.

Examples:
  focaldet show data
  focaldet show train.json --images photos --output train.png --count 40
  focaldet show data --split val --class cat --class dog --seed 1
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet.cli._arguments import add_data, positive, read_data

if TYPE_CHECKING:
    import argparse

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "draw the photos and objects of a dataset on one sheet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_data(parser, split="train")
    group = parser.add_argument_group("gallery")
    group.add_argument(
        "--output",
        type=Path,
        default=Path("gallery.png"),
        metavar="FILE",
        help="picture to write, which is replaced if it exists (default: gallery.png)",
    )
    group.add_argument(
        "--count",
        type=positive,
        default=24,
        metavar="N",
        help="number of photos, chosen at random (default: 24)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random choice (default: 0)"
    )
    group.add_argument(
        "--class",
        dest="class_names",
        action="append",
        metavar="NAME",
        help="draw only objects of this class, and only photos that have one; can be repeated "
        "(default: all)",
    )


def run(options: argparse.Namespace) -> int:
    """Draw the gallery."""
    from focaldet.datasets import draw_gallery

    table = read_data(options, prefer="train")
    drawn = draw_gallery(
        table,
        options.output,
        count=options.count,
        seed=options.seed,
        class_names=options.class_names,
    )
    sys.stdout.write(f"Drew {len(drawn):,} of {len(table):,} photos to {options.output}.\n")
    return 0
