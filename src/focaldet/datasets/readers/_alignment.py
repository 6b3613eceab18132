"""Giving all splits of a dataset the same classes in the same order."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import printable, shortened
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from focaldet.datasets._table import AnnotationTable

__all__ = ["aligned", "joined_class_names"]

_logger = logging.getLogger(__name__)


def joined_class_names(tables: Iterable[AnnotationTable]) -> list[str]:
    """Return the class names of all tables, in alphabetical order."""
    return sorted({name for table in tables for name in table.class_names})


def aligned(
    tables: Mapping[str, AnnotationTable], *, names_from_objects: bool, source: str
) -> dict[str, AnnotationTable]:
    """Return the tables with the same class names, category ids and labels.

    Args:
        tables: The table of each split.
        names_from_objects: Whether the class names are those that the objects of a split have. If so,
            those of all splits are joined. Otherwise, every split must declare the same classes;
            their order is that of the first.
        source: The dataset, for messages.

    Raises:
        AnnotationError: If the splits declare different classes. The message says which.
    """
    first_name, first = next(iter(tables.items()))
    if all(_classes(table) == _classes(first) for table in tables.values()):
        return dict(tables)
    for name, table in tables.items():
        if len(set(table.class_names)) < len(table.class_names):
            raise AnnotationError(
                f"The splits of {source!r} number their classes differently, and {name!r} has two "
                f"classes of the same name, so they cannot be matched: {shortened(table.class_names)}."
            )
    if names_from_objects:
        names: Sequence[str] = joined_class_names(tables.values())
        ids: Sequence[int] = range(len(names))
        for name, table in tables.items():
            if missing := [one for one in names if one not in table.class_names]:
                _logger.warning(
                    "%s: the split %r has no object of %s.",
                    printable(source),
                    name,
                    printable(shortened(missing)),
                )
    else:
        names, ids = _declared(tables, source)
        _logger.warning(
            "%s: the splits number their categories differently; matched them by name, in the order "
            "of %r.",
            printable(source),
            first_name,
        )
    return {name: _relabelled(table, names, ids) for name, table in tables.items()}


def _classes(table: AnnotationTable) -> list[tuple[int, str]]:
    return list(zip(table.category_ids, table.class_names, strict=True))


def _declared(
    tables: Mapping[str, AnnotationTable], source: str
) -> tuple[Sequence[str], Sequence[int]]:
    """Return the class names and ids of the first split, after checking that all have the same."""
    first_name, first = next(iter(tables.items()))
    names, ids = first.class_names, first.category_ids
    optional: set[str] = set()
    # A category of id 0 that groups the others is left out of the splits where no box has it.
    most = max(tables.values(), key=lambda table: len(table.class_names))
    if most.category_ids[:1] == (0,) and any(
        _classes(table) == _classes(most)[1:] for table in tables.values()
    ):
        names, ids, optional = most.class_names, most.category_ids, {most.class_names[0]}
    for name, table in tables.items():
        missing = sorted(set(names) - set(table.class_names) - optional)
        extra = sorted(set(table.class_names) - set(names))
        if missing or extra:
            parts = [f"{name!r} lacks {shortened(missing)}"] if missing else []
            parts += [f"{name!r} also has {shortened(extra)}"] if extra else []
            raise AnnotationError(
                f"The splits of {source!r} have different classes: compared with {first_name!r}, "
                f"{' and '.join(parts)}. Declare the same categories in every split."
            )
    return names, ids


def _relabelled(
    table: AnnotationTable, names: Sequence[str], ids: Sequence[int]
) -> AnnotationTable:
    places = {name: label for label, name in enumerate(names)}
    new = np.array([*(places[name] for name in table.class_names), -1], np.int64)
    return replace(
        table,
        class_names=tuple(names),
        category_ids=tuple(ids),
        labels=new[table.labels],  # the label -1 of an undeclared category finds the last entry
    )
