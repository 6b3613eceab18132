"""Context managers around calls into PyTorch's exporters and the runtimes."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING

from focaldet.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["exporter_warnings_ignored", "raising_export_errors"]


@contextlib.contextmanager
def raising_export_errors(step: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception of an exporter or runtime into an ``ExportError``.

    Args:
        step: The call that may fail, as the start of the message: "Running the ONNX file".
        remedy: A sentence that ends the message.
    """
    try:
        yield
    except Exception as error:
        # Exporters append pages of details after a blank line.
        reason = str(error).strip().split("\n\n")[0]
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise ExportError(f"{step} failed: {reason} {remedy}".rstrip()) from error


@contextlib.contextmanager
def exporter_warnings_ignored() -> Iterator[None]:
    """Ignore warnings about the internals of the exporters, on which a caller cannot act."""
    log = logging.getLogger("onnx_ir")  # reports each empty list that it takes for one of integers
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
