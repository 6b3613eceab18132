"""Old spellings of public names, which keep working for a while with a warning."""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
import warnings
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["moved", "renamed_argument", "run_moved_command", "warn_renamed"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


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
        warn_renamed(f"{module}.{name}", new)
        home, _, attribute = new.rpartition(".")
        value: object = getattr(importlib.import_module(home), attribute)
        return value

    return __getattr__


def warn_renamed(old: str, new: str) -> None:
    """Warn that the caller's caller uses an old name."""
    warnings.warn(
        f"{old} is deprecated and will be removed in focaldet 1.0; use {new}.",
        DeprecationWarning,
        stacklevel=3,
    )


def renamed_argument(old: str, new: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Build a decorator that keeps the old name of a keyword argument working.

    Args:
        old: The old name, which the function's signature no longer has.
        new: The new name.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{new} and its old name {old} were both given; use {new}.")
                name = function.__qualname__.removesuffix(".__init__")
                warn_renamed(f"{old}= of {name}", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def run_moved_command(old: str, command: str) -> None:
    """Say that a command line has moved to ``focaldet COMMAND``, and run that with its arguments.

    Args:
        old: The old command line without its arguments.
        command: The subcommand of ``focaldet``.
    """
    sys.stderr.write(
        f"warning: `{old}` is now `focaldet {command}`; the old name will be removed in focaldet 1.0.\n"
    )
    sys.argv[1:1] = [command]
    runpy.run_module("focaldet", run_name="__main__", alter_sys=True)
