"""Images that are skipped because their files cannot be read, counted over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from focaldet.errors import TrainingError
from focaldet.training._logging import warn_on_rank_zero

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["SkippedImages", "check_share_skipped"]

_MAX_SKIPPED = 10  # images per dataset, or the share below if that is more
_MAX_SKIPPED_SHARE = 0.01


class SkippedImages:
    """The images of one dataset that cannot be read.

    In distributed training each rank notices only its own images. The ranks exchange them in
    `collect`, so that each is logged once and all ranks stop together if there are too many. If one
    rank stopped alone, the others would wait for it.

    Args:
        file_names: File name of each image.

    Attributes:
        ranks: Number of ranks that count together.
        in_pass: Indices of the images that have been skipped in the current pass over the dataset, on
            this rank, and on the others until the last call of `collect`.
    """

    def __init__(self, file_names: Sequence[str]) -> None:
        self.ranks = 1
        self.in_pass: set[int] = set()
        self._file_names = file_names
        self._found: set[int] = set()  # in all passes, on all ranks
        self._new: dict[int, str] = {}  # not collected yet, with the error

    def start_pass(self) -> None:
        """Forget which images were skipped in the previous pass."""
        self.in_pass.clear()

    def add(self, index: int, error: str) -> None:
        """Count an image. In a single process, log it if it is new, and raise if there are too many.

        Raises:
            TrainingError: If there are too many, in a single process.
        """
        self.in_pass.add(index)
        if index not in self._found:
            self._new.setdefault(index, error)
        if not self._distributed():
            self._report()

    def collect(self) -> None:
        """Exchange the images with the other ranks, log new ones, and raise if there are too many.

        In distributed training, all ranks must call it after the same batch.

        Raises:
            TrainingError: If there are too many, on all ranks.
        """
        if not self._distributed():
            return
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (self.in_pass, self._new))
        for in_pass, new in of_ranks:
            self.in_pass |= in_pass
            for index, error in new.items():
                self._new.setdefault(index, error)
        self._report()

    def names_in_pass(self) -> list[str]:
        """Return the file names of the images that have been skipped in the current pass."""
        return sorted(self._file_names[index] for index in self.in_pass)

    def restore_pass(self, names: Iterable[str]) -> None:
        """Continue a pass in which some images have been skipped already."""
        indices = {name: index for index, name in enumerate(self._file_names)}
        self.in_pass = {indices[name] for name in names if name in indices}

    def _distributed(self) -> bool:
        return self.ranks > 1 and dist.is_available() and dist.is_initialized()

    def _report(self) -> None:
        new, self._new = self._new, {}
        total = len(self._file_names)
        for index, error in sorted(new.items()):
            self._found.add(index)
            warn_on_rank_zero("Skipping an image: %s", error)
        if new:
            check_share_skipped(len(self._found), total, max(new.items())[1])


def check_share_skipped(count: int, total: int, last: str) -> None:
    """Raise if so many of the images of a dataset cannot be read that skipping them is no remedy.

    Args:
        count: Number of images that cannot be read.
        total: Number of images in the dataset.
        last: Error of one of them.

    Raises:
        TrainingError: If there are too many.
    """
    if count > max(_MAX_SKIPPED, total * _MAX_SKIPPED_SHARE):
        raise TrainingError(
            f"{count} of {total} images cannot be read, more than on_error='skip' allows "
            f"({_MAX_SKIPPED_SHARE:.0%}, or {_MAX_SKIPPED} if that is more). The last is: {last}"
        )
