"""Old spellings of public names, which keep working for a while with a warning."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["moved"]


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Build a module-level ``__getattr__`` (PEP 562) for names that have moved.

    Args:
        module: The module that had the names, for the messages.
        names: Each old name with its new full path, such as ``"focaldet.class_names.COCO_CLASS_NAMES"``.
    """

    def __getattr__(name: str) -> object:  # noqa: N807  # what PEP 562 asks for
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        warnings.warn(
            f"{module}.{name} is deprecated and will be removed in focaldet 1.0; use {new}.",
            DeprecationWarning,
            stacklevel=2,
        )
        home, _, attribute = new.rpartition(".")
        value: object = getattr(importlib.import_module(home), attribute)
        return value

    return __getattr__
