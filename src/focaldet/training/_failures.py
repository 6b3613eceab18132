"""What common failures of the system mean for a training run."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from focaldet.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["explain_failures"]


@contextlib.contextmanager
def explain_failures(folder: Path, last: Path) -> Iterator[None]:
    """Raise :class:`TrainingError` with the cause and a remedy for a full disk or a killed worker.

    Args:
        folder: Folder of the run.
        last: Path of the last checkpoint, which is complete if it exists.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"No space left in {str(folder)!r}."
        raise TrainingError(f"{what} {_how_to_continue('Free some space', last)}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = (
            "A data worker was killed, most likely because the machine ran out of memory "
            f"({str(error).splitlines()[0]})."
        )
        remedy = "Use fewer workers or a smaller batch"
        raise TrainingError(f"{what} {_how_to_continue(remedy, last)}") from error


def _how_to_continue(remedy: str, last: Path) -> str:
    if last.is_file():
        return f"{remedy}, then resume from the last checkpoint, {str(last)!r}, which is complete."
    return f"{remedy}, then start again: no checkpoint had been written yet."
