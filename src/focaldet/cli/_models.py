"""List the published RetinaNets that focaldet downloads by name.

Pass a name of the table wherever a command takes a MODEL. The file is
downloaded once.

Examples:
  focaldet models
  focaldet models torchvision
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "list the published models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "family",
        nargs="?",
        metavar="FAMILY",
        help="project whose models are listed, e.g. torchvision (default: all)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from focaldet import pretrained

    sys.stdout.write(f"{pretrained.list(options.family)}\n")
    return 0
