"""What common failures of the system mean for a training run."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from focaldet.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["CurrentBatch", "explain_failures"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SIGNS_OF_FULL_DISK = (
    *(f"(os error {number})" for number in (*_FULL, 112)),  # safetensors; 112 is Windows' disk full
    "unexpected pos ",  # torch.save to a path
    "PytorchStreamWriter failed writing",
)
_SIGNS_OF_FULL_MEMORY = (  # in errors other than torch.OutOfMemoryError
    "can't allocate memory",  # a CPU
    "not enough memory",
    "out of memory",  # MPS, and libraries of CUDA
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_MAX_SIZES = 8  # images whose sizes an error lists
_SHARED_MEMORY = "</torch_"  # a file in /dev/shm, through which workers send images


class CurrentBatch(pl.Callback):
    """Remember the sizes of the images of the current batch, for an error that its size causes."""

    def __init__(self) -> None:
        self._sizes: list[tuple[int, int]] = []
        self._phase = ""

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember a batch of training images."""
        del trainer, module, batch_idx
        self._remember("training", batch)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Remember a batch of validation images."""
        del trainer, module, batch_idx
        self._remember("validation", batch)

    def describe(self) -> str:
        """Return the number of images and their sizes, or "" before the first batch."""
        if not self._sizes:
            return ""
        shown = ", ".join(f"{height}x{width}" for height, width in self._sizes[:_MAX_SIZES])
        more = len(self._sizes) - _MAX_SIZES
        return (
            f" in a {self._phase} batch with {len(self._sizes)} image"
            f"{'' if len(self._sizes) == 1 else 's'} of {shown}"
            f"{f' and {more} more' if more > 0 else ''} (height x width)"
        )

    def _remember(self, phase: str, batch: Any) -> None:
        self._phase = phase
        self._sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in batch[0]]


@contextlib.contextmanager
def explain_failures(
    folder: Path, last: Path, *, batch: CurrentBatch | None = None, lower: str = ""
) -> Iterator[None]:
    """Raise :class:`TrainingError` with the cause and a remedy for what the system does not provide.

    This is space on the disk, memory, and a worker that was killed.

    Args:
        folder: Folder of the run.
        last: Path of the last checkpoint, which is complete if it exists.
        batch: The batch in progress, for an error about memory.
        lower: What uses memory in this run and can be lowered.
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
        elif _is_full_memory(error):
            where = "" if batch is None else batch.describe()
            what = f"Out of memory{where} ({_first_sentence(error)})."
            remedy = lower or "Use a smaller batch"
        else:
            raise
        raise TrainingError(f"{what} {_how_to_continue(remedy, last)}") from error


def _is_full_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_FULL_MEMORY)


def _first_sentence(error: BaseException) -> str:
    """Return the beginning of an error, without the advice and the state of the allocator after it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ". ".join(lines[0].split(". ")[:2]).rstrip(".")


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
