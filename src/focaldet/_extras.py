"""Imports of optional packages, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["import_extra"]


def import_extra(module: str, *, purpose: str, install: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: The module to import, such as ``"yaml"``.
        purpose: What needs it, as the subject of the message: ``"Reading data.yaml"``.
        install: What to install: an extra of focaldet such as ``"focaldet[train]"``, or a package.

    Raises:
        ImportError: If the module is missing or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # A package that is installed but broken says so itself, so its own message is kept.
        reason = "" if error.name == module.partition(".")[0] else f" ({error})"
        raise ImportError(
            f"{purpose} requires {module}{reason}. Install it with: pip install '{install}'",
            name=error.name,
        ) from error
