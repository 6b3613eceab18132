"""Compare training runs.

The table has a row for each run below FOLDER with its best AP in percent, its
epochs, and a column for each option, field of the model's configuration and
dataset that is not the same in all runs.

Examples:
  focaldet runs
  focaldet runs runs/owls --json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "compare training runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="FOLDER",
        help="folder to search for runs, with all folders below it (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    from focaldet.training import list_runs

    table = list_runs(options.folder)
    text = json.dumps(table.to_dict(), indent=2) if options.json else str(table)
    sys.stdout.write(f"{text}\n")
    return 0
