"""The error of an export that can't be made or is not what it should be."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from typing import TYPE_CHECKING

from focaldet.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

__all__ = ["explaining", "hushed", "needed"]


def needed(package: str) -> ModuleType:
    """Import a package of the extra ``export``.

    Raises:
        ImportError: it is not installed, or broken; the message says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = package if package == "openvino" else "'focaldet[export]'"
        raise ImportError(
            f"focaldet.export needs the package {package} ({error}): pip install {extra}"
        ) from error


@contextlib.contextmanager
def explaining(step: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever torch's exporters and the runtimes raise into one kind of error.

    Args:
        step: what is being done, to begin the message with.
        remedy: to end it with.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n\n")[0] or type(error).__name__
        raise ExportError(
            f"{step} failed: {type(error).__name__}: {reason} {remedy}".rstrip()
        ) from error


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep back warnings of the exporters' own insides, which no caller could act on."""
    log = logging.getLogger("onnx_ir")  # says that it takes an empty list for one of integers
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
