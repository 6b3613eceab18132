"""Choose a subcommand, run it, and turn its errors into a line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, Protocol, cast

from focaldet._version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "FAILED", "FOUND_ERRORS", "OK", "main"]

COMMANDS = ("train", "split", "convert", "models", "runs")
"""The subcommands in the order of the help, each a module ``focaldet.cli._NAME``."""

OK, FOUND_ERRORS, FAILED, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\
exit status: 0 on success, 1 if `check` finds errors, 2 if a command fails, 130 after Ctrl-C.
"""


class _Command(Protocol):
    """A subcommand."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the subcommand."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the subcommand and return the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``focaldet``.

    Args:
        arguments: The command line. None uses ``sys.argv``.

    Returns:
        The exit status: 0 on success, 1 if ``check`` finds errors, 2 if a command fails, 130 after
        Ctrl-C.
    """
    # Waiting threads sleep instead of spinning; this must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"error: {_one_line(error)}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    return status


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="focaldet",
        description="RetinaNet for PyTorch: train, evaluate, predict and export.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"focaldet {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = cast("_Command", importlib.import_module(f"focaldet.cli._{name}"))
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _one_line(error: Exception) -> str:
    from focaldet._checks import printable

    return printable(str(error))
