"""List the published RetinaNets that `focaldet` can download by name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "list the published models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    del parser


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    del options
    from focaldet import pretrained

    sys.stdout.write(f"{pretrained.list()}\n")
    return 0
