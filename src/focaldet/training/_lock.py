"""A lock on the folder of a run, so that only one process at a time writes to it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import TYPE_CHECKING

from pytorch_lightning.utilities import rank_zero_only

from focaldet.errors import TrainingError
from focaldet.training._logging import LOG

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["LOCK_NAME", "locked_folder"]

LOCK_NAME = "run.lock"
_HELD: set[int] = set()  # file descriptors of the locks that this process holds


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Create the folder if necessary and hold a lock on it, on rank zero.

    The system releases the lock when the process ends, however it ends. Worker processes do not
    inherit it. The lock works across machines on NFS since Linux 2.6.12.

    Yields:
        Whether this process holds the lock: False on other ranks, on Windows, and on file systems
        without locks, which a warning reports.

    Raises:
        NotADirectoryError: If ``folder`` is a file.
        TrainingError: If another run holds the lock.
    """
    descriptor = _lock(folder)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            _unlock(descriptor, folder / LOCK_NAME)


@rank_zero_only
def _lock(folder: Path) -> int | None:
    """Return the file descriptor of the lock, or None if there are no locks."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder {str(folder)!r} is a file; choose a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        return None
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 300).decode(errors="replace")
            os.close(descriptor)
            raise TrainingError(
                f"folder {str(folder)!r} is in use by another run ({holder or 'just started'}). Wait "
                "until it has ended, or choose another folder."
            ) from None
        except OSError as error:
            LOG.warning(
                "Cannot lock the folder %r (%s). Make sure that no other run uses it.",
                str(folder),
                error.strerror,
            )
            os.close(descriptor)
            return None
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # the previous holder has removed the file in the meantime
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _HELD.add(descriptor)
    return descriptor


def _unlock(descriptor: int, path: Path) -> None:
    if _is_at(descriptor, path):
        path.unlink(
            missing_ok=True
        )  # before the lock is released, so that nobody else holds it yet
    _HELD.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the path still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _close_inherited() -> None:
    """Close a forked process's copies, which would keep the locks of a parent that was killed."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
