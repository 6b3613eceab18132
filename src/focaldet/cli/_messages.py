"""Warnings and log lines of the library, each shown as one line on a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["error", "messages_on_stderr", "note", "warn"]


def error(message: str) -> None:
    """Write an error to stderr."""
    _write("error: ", message)


def warn(message: str) -> None:
    """Write a warning to stderr."""
    _write("warning: ", message)


def note(message: str) -> None:
    """Write what a command has decided to stderr, where it is not mixed with the results."""
    _write("", message)


def _write(prefix: str, message: str) -> None:
    lines = "\n".join(_printable(line) for line in message.splitlines())
    sys.stderr.write(f"{prefix}{lines}\n")
    sys.stderr.flush()


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    from focaldet._checks import printable  # imports torch

    return printable(line)


class _Handler(logging.Handler):
    """Writes a log record as a line, to what ``sys.stderr`` is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        prefixes = ((logging.ERROR, "error: "), (logging.WARNING, "warning: "))
        prefix = next((text for level, text in prefixes if record.levelno >= level), "")
        try:
            _write(prefix, record.getMessage())
        except Exception:  # noqa: BLE001  # as every handler of logging does
            self.handleError(record)


@contextlib.contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Show warnings and the log of focaldet as lines on stderr, without the place in the source."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        warn(" ".join(str(message).split()))

    logger = logging.getLogger("focaldet")
    level, propagates, handler = logger.level, logger.propagate, _Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
