"""Text files in UTF-8, with or without a byte order mark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focaldet._files import decode_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """Return the content of a text file without its byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If it is not in UTF-8, nor in what a byte order mark says. The message names
            the line.
    """
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise AnnotationError(f"Cannot read {str(path)!r} as UTF-8 text: {error}.") from error
