"""Reproducible batches of images with similar shapes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from focaldet._checks import check_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from torch import Tensor

__all__ = ["AspectRatioBatchSampler", "collate", "seed_worker"]


class AspectRatioBatchSampler(Sampler[list[int]]):
    """Sample batches that are all portrait or all landscape, which keeps padding small.

    Every image is in one batch per epoch. The images left over from both groups share the last
    batches, so there are as many batches as without grouping. In distributed training, the sampler
    forms batches of ``batch_size * num_replicas`` images and gives each rank its share. All ranks then
    work on images of similar shape, and together on the batch that a single process would have.

    Args:
        aspect_ratios: Height / width of each image, such as :attr:`DetectionDataset.aspect_ratios`.
        batch_size: Images per batch on each rank.
        shuffle: Whether to draw a new order for each epoch. Otherwise, images keep their order except
            for the grouping.
        seed: Seed of the order, which depends only on it and the epoch.
        drop_last: Whether to leave out the last batch if it is not full.
        rank: Rank of this process.
        num_replicas: Number of processes. Each gets the same number of batches. If the images cannot
            be divided evenly, up to ``num_replicas - 1`` of them are repeated.

    Raises:
        ValueError: If a number is out of range, or a ratio is not positive.

    >>> list(AspectRatioBatchSampler([1.5, 0.7, 1.4, 0.8, 0.6], batch_size=2, shuffle=False))
    [[0, 2], [1, 3], [4]]
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | npt.NDArray[np.float64],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        check_range("batch_size", batch_size, 1)
        check_range("seed", seed, 0)
        check_range("num_replicas", num_replicas, 1)
        check_range("rank", rank, 0, num_replicas - 1)
        ratios = np.asarray(aspect_ratios, np.float64)
        wrong = ~(np.isfinite(ratios) & (ratios > 0))
        if wrong.any():
            raise ValueError(
                f"aspect_ratios must be finite and positive, got {ratios[wrong][0]} at index "
                f"{int(wrong.argmax())}."
            )
        self.upright = ratios > 1
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.num_replicas = num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which determines the order."""
        check_range("epoch", epoch, 0)
        self.epoch = epoch

    def __len__(self) -> int:
        together = self.batch_size * self.num_replicas
        images = len(self.upright)
        return images // together if self.drop_last else -(-images // together)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches():
            repeated = np.resize(batch, -len(batch) % self.num_replicas)
            yield np.concatenate([batch, repeated])[self.rank :: self.num_replicas].tolist()

    def _batches(self) -> list[npt.NDArray[np.int64]]:
        """Return the batches that the ranks share."""
        together = self.batch_size * self.num_replicas
        rng = np.random.default_rng([self.seed, self.epoch])
        images = len(self.upright)
        order = rng.permutation(images) if self.shuffle else np.arange(images)
        batches, rest = [], []
        for group in (order[self.upright[order]], order[~self.upright[order]]):
            full = len(group) // together * together
            batches += list(group[:full].reshape(-1, together))
            rest.append(group[full:])
        leftovers = np.concatenate(rest)
        batches += [
            leftovers[start : start + together] for start in range(0, len(leftovers), together)
        ]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == together]
        if self.shuffle:
            return [batches[place] for place in rng.permutation(len(batches))]
        return sorted(batches, key=lambda batch: int(batch.min()))


def collate(
    batch: Sequence[tuple[Tensor, dict[str, Any]]],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the images and the targets of a batch as two lists, which the model takes.

    For ``DataLoader(collate_fn=collate)``. The model pads images of different sizes.
    """
    return [image for image, _ in batch], [target for _, target in batch]


def seed_worker(worker: int) -> None:
    """Seed Python's and NumPy's random numbers in a ``DataLoader`` worker from torch's seed.

    For ``DataLoader(worker_init_fn=seed_worker, generator=torch.Generator().manual_seed(0))``. torch
    seeds itself in each worker from the generator. Without this function, Python and NumPy could draw
    the same numbers in all workers.

    Args:
        worker: Number of the worker, which is already part of torch's seed.
    """
    del worker
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (transforms from other libraries may use it)
