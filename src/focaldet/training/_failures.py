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

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SIGNS_OF_FULL_DISK = (
    *(f"(os error {number})" for number in (*_FULL, 112)),  # safetensors; 112 is Windows' disk full
    "unexpected pos ",  # torch.save to a path
    "PytorchStreamWriter failed writing",
)
_SHARED_MEMORY = "</torch_"  # a file in /dev/shm, through which workers send images


@contextlib.contextmanager
def explain_failures(folder: Path, last: Path) -> Iterator[None]:
    """Raise :class:`TrainingError` with the cause and a remedy for a full disk or a killed worker.

    Args:
        folder: Folder of the run.
        last: Path of the last checkpoint, which is complete if it exists.
    """
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        if _is_full_disk(error):
            what, remedy = f"No space left in {str(folder)!r}.", "Free some space"
        elif isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            what = (
                "A data worker was killed, most likely because the machine ran out of memory "
                f"({str(error).splitlines()[0]})."
            )
            remedy = "Use fewer workers or a smaller batch"
        else:
            raise
        raise TrainingError(f"{what} {_how_to_continue(remedy, last)}") from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Return whether a full disk or an exhausted quota caused an error, directly or indirectly.

    torch's writer of zip files reports only that it wrote less than it should have, and safetensors
    has an error class of its own, which is not an ``OSError``.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        text = str(error)
        if _SHARED_MEMORY not in text and any(sign in text for sign in _SIGNS_OF_FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _how_to_continue(remedy: str, last: Path) -> str:
    if last.is_file():
        return f"{remedy}, then resume from the last checkpoint, {str(last)!r}, which is complete."
    return f"{remedy}, then start again: no checkpoint had been written yet."
