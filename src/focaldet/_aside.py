"""Files that get their name only when they are whole."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["written_aside"]


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a new file beside a target, to be written and renamed; remove it unless it was renamed.

    Its name is its own, so that two processes which write the same target don't meet, and its
    permissions are those of any new file.
    """
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    aside.touch(exist_ok=False)
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)
