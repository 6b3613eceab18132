"""Print a script that completes the commands and options of focaldet in a shell.

It requires shtab: pip install 'focaldet[completion]'

Examples:
  eval "$(focaldet completion bash)"             in ~/.bashrc
  focaldet completion zsh > ~/.zfunc/_focaldet   where $fpath has ~/.zfunc
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "print a script for completion in a shell"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("shell", choices=["bash", "zsh"], help="the shell")


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    from focaldet._extras import import_extra
    from focaldet.cli._main import build_parser

    shtab = import_extra("shtab", purpose="Shell completion", install="focaldet[completion]")
    parser = build_parser()
    _complete_files(parser, shtab.FILE)
    sys.stdout.write(f"{shtab.complete(parser, shell=options.shell)}\n")
    return 0


def _complete_files(parser: argparse.ArgumentParser, complete: object) -> None:
    """Mark the arguments that take paths, also those that take a model, in all subcommands."""
    for action in parser._actions:  # noqa: SLF001  # argparse has no public list of arguments
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for subparser in action.choices.values():
                _complete_files(subparser, complete)
        elif action.type is Path or action.metavar in {"MODEL", "PHOTO", "SOURCE"}:
            action.complete = complete  # type: ignore[attr-defined]  # where shtab looks for it
