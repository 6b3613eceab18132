"""The error of a run that had to stop, and what the system's own errors mean for one."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from focaldet.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["explaining"]


@contextlib.contextmanager
def explaining(folder: Path, last: Path) -> Iterator[None]:
    """Turn a full disk and a killed data worker into a :class:`TrainingError` that says so.

    Args:
        folder: of the run.
        last: its last checkpoint, which is whole if it is there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"No space is left in {str(folder)!r}."
        raise TrainingError(f"{what} {_how_to_go_on('Make room', last)}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = (
            "A data worker was killed from outside, most likely because the machine ran out of "
            f"memory ({str(error).splitlines()[0]})."
        )
        remedy = "Take fewer workers or a smaller batch"
        raise TrainingError(f"{what} {_how_to_go_on(remedy, last)}") from error


def _how_to_go_on(remedy: str, last: Path) -> str:
    if last.is_file():
        return f"{remedy}, then resume from the last checkpoint, {str(last)!r}, which is whole."
    return f"{remedy}, then start again: there was no checkpoint yet."
