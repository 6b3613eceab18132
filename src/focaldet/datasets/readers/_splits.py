"""Names of splits in error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["missing_split", "unknown_split"]

_SHOWN = 10


def missing_split(path: Path, splits: Sequence[str]) -> str:
    """Return the message for a call without a split.

    >>> from pathlib import Path
    >>> missing_split(Path("voc"), ["train", "val"])
    "split is required for 'voc'. Its splits are 'train' and 'val'."
    """
    return f"split is required for {str(path)!r}. {_listed(splits)}"


def unknown_split(split: str, path: Path, splits: Sequence[str]) -> str:
    """Return the message for a split that does not exist.

    >>> from pathlib import Path
    >>> unknown_split("test", Path("voc"), ["train"])
    "Unknown split 'test' in 'voc'. Its only split is 'train'."
    """
    return f"Unknown split {split!r} in {str(path)!r}. {_listed(splits)}"


def _listed(splits: Sequence[str]) -> str:
    if not splits:
        return "It has no splits."
    if len(splits) == 1:
        return f"Its only split is {splits[0]!r}."
    *others, last = map(repr, splits[:_SHOWN])
    if len(splits) > _SHOWN:
        others, last = [*others, last], f"{len(splits) - _SHOWN} more"
    return f"Its splits are {', '.join(others)} and {last}."
