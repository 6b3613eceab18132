"""Names of splits: in error messages, and of the usual splits as different tools write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = [
    "USUAL_SPLITS",
    "missing_split",
    "split_of",
    "split_of_file",
    "unknown_split",
    "usual_splits",
]

USUAL_SPLITS = ("train", "val", "test")

_SHOWN = 10
_OTHER_NAMES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}
_YEAR = re.compile(r"[-_]?(19|20)\d\d$")
_WORDS = re.compile(r"[\W_]+")
_SAYING_NOTHING = frozenset({"", "annotation", "annotations", "coco", "instances", "labels"})


def split_of(name: str) -> str | None:
    """Return which of the usual splits a name stands for, or None.

    >>> split_of("valid"), split_of("train2017"), split_of("trainval"), split_of("Test")
    ('val', 'train', None, 'test')
    """
    plain = _YEAR.sub("", name.lower())
    plain = _OTHER_NAMES.get(plain, plain)
    return plain if plain in USUAL_SPLITS else None


def split_of_file(stem: str) -> str:
    """Return the split that the name of an annotation file contains, as the file writes it.

    >>> (
    ...     split_of_file("instances_val2017"),
    ...     split_of_file("train_annotations"),
    ...     split_of_file("cells"),
    ... )
    ('val2017', 'train', 'cells')
    """
    words = [word for word in _WORDS.split(stem) if word.lower() not in _SAYING_NOTHING]
    return words[0] if len(words) == 1 and split_of(words[0]) else stem


def usual_splits(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the name in the dataset of each usual split that it has, in the order of these.

    Raises:
        AnnotationError: If two names stand for the same split.

    >>> from pathlib import Path
    >>> usual_splits(Path("data"), ["valid", "train", "trainval"])
    {'train': 'train', 'val': 'valid'}
    """
    found: dict[str, str] = {}
    for name in names:
        usual = split_of(name)
        if usual is None:
            continue
        if usual in found:
            raise AnnotationError(
                f"{str(path)!r} has two splits that can be {usual!r}: {found[usual]!r} and {name!r}. "
                f"Read one of them with split={name!r}, or remove the other."
            )
        found[usual] = name
    return {usual: found[usual] for usual in USUAL_SPLITS if usual in found}


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
