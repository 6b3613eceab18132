"""Numbers and names as text, for formats that are not JSON."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from focaldet._checks import shortened
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["check_class_names", "is_control", "number_text"]

_EXACT = 2**53  # the largest integers that all have a float64
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # control characters, surrogates, ends of lines and paragraphs


def is_control(character: str) -> bool:
    """Return whether a line of text or an XML file cannot hold a character."""
    return unicodedata.category(character) in _CONTROLS or character in "\ufffe\uffff"


def number_text(value: float) -> str:
    """Return the shortest text that is read as the same number.

    >>> number_text(12.0), number_text(0.1)
    ('12', '0.1')
    """
    return str(int(value)) if value == int(value) and abs(value) < _EXACT else repr(float(value))


def check_class_names(class_names: Sequence[str], format_name: str) -> None:
    """Raise ``AnnotationError`` unless names alone can identify the classes in a text file."""
    for label, name in enumerate(class_names):
        if not name or name != name.strip() or any(map(is_control, name)):
            reason = "is empty, or contains control characters or spaces at its ends"
        elif name in class_names[:label]:
            reason = "is the name of an earlier class, too"
        else:
            continue
        raise AnnotationError(
            f"class_names[{label}], {shortened(name)}, {reason}. {format_name} annotations contain the "
            "names of classes and no numbers. Rename the class."
        )
