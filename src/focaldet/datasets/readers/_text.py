"""Text files in UTF-8, with or without a byte order mark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file without its byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        AnnotationError: If it is not in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"Cannot read {str(path)!r} as UTF-8 text ({error}).") from error
