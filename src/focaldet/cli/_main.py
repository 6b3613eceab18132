"""Choose a subcommand, run it, and turn its errors into a line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Protocol, cast

from focaldet._version import __version__
from focaldet.cli import _messages
from focaldet.errors import FocaldetError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "FAILED", "FOUND_ERRORS", "OK", "build_parser", "main"]

COMMANDS = (
    *("train", "predict", "evaluate", "check", "show", "split", "convert", "export"),
    *("models", "runs", "completion"),
)
"""The subcommands in the order of the help, each a module ``focaldet.cli._NAME``."""

OK, FOUND_ERRORS, FAILED = 0, 1, 2
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # 128 + the number of the signal, as shells report them

_ISSUES = "https://github.com/focaldet/focaldet/issues"

_EPILOG = """\
`focaldet COMMAND --help` explains a command.

exit status:
  0 on success, 1 if `check` finds errors, 2 if a command fails, 130 after Ctrl-C,
  141 if the program that reads the output stops reading
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
        Ctrl-C, 141 if the reader of a pipe has closed it.
    """
    # Waiting threads sleep instead of spinning; this must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = build_parser().parse_args(arguments)
    with _messages.messages_on_stderr():
        return _run(options)


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


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
        sys.stdout.flush()  # so that a closed pipe is noticed here
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001  # an unexpected one is printed with its traceback
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return _PIPE_CLOSED
        _messages.error(_describe(error))
        return FAILED
    return status


def _describe(error: Exception) -> str:
    """Return the line that reports an error. If the error is unexpected, print its traceback."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FocaldetError | OSError | ValueError | ImportError):
        return text
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        reason = text.partition(". ")[0].rstrip(".")
        return f"{reason}. Use a smaller --batch-size, smaller images, or --device cpu."
    traceback.print_exception(error)
    return f"This is a bug in focaldet. Please report it with the lines above: {_ISSUES}"


def _stdout_is_closed() -> bool:
    """Return whether nobody reads stdout any more. If so, what is still buffered is dropped."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
