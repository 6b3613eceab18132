"""Files that get their name only when they are whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["written_aside"]


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a new file beside a target, to be written and renamed; remove it unless it was renamed.

    Its name is its own, so that two processes which write the same target don't meet.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    aside = Path(name)
    try:
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)  # mkstemp's files are the owner's alone
        yield aside
    finally:
        aside.unlink(missing_ok=True)
