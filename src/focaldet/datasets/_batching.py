"""Batches of images of like shape, the same in every run with one seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from focaldet._checks import check_range, must_be

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from torch import Tensor

__all__ = ["AspectRatioBatchSampler", "collate", "seed_worker"]


class AspectRatioBatchSampler(Sampler[list[int]]):
    """Batches of upright or of lying images, so that little of a batch is padding.

    Every image is in one batch an epoch. What is left over of both shapes fills one batch together,
    so there are as many batches as without grouping. In distributed training a batch of
    ``batch_size * num_replicas`` images is made and each rank takes its part of it: the ranks work on
    images of like shape, together on the batch that one process would have.

    Args:
        aspect_ratios: height / width of each image, as :class:`DetectionDataset` has them.
        batch_size: images of a batch, on each rank.
        shuffle: draw a new order each epoch; else images keep theirs, but for the grouping.
        seed: the order depends on it and the epoch, on nothing else.
        drop_last: leave out the last batch if it isn't full.
        rank: of this process.
        num_replicas: number of processes. Each gets the same number of batches; where images don't
            divide, up to ``num_replicas - 1`` of them come twice.

    Raises:
        ValueError: a number out of its range, or ratios that are not positive.

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
            got = f"{ratios[wrong][0]} at index {int(wrong.argmax())}"
            raise ValueError(must_be("aspect_ratios", "finite and > 0", got))
        self.upright = ratios > 1
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.num_replicas = num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next."""
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
        """Return the batches of all ranks together."""
        together = self.batch_size * self.num_replicas
        draw = np.random.default_rng([self.seed, self.epoch])
        images = len(self.upright)
        order = draw.permutation(images) if self.shuffle else np.arange(images)
        batches, rest = [], []
        for group in (order[self.upright[order]], order[~self.upright[order]]):
            full = len(group) // together * together
            batches += list(group[:full].reshape(-1, together))
            rest.append(group[full:])
        left = np.concatenate(rest)
        batches += [left[start : start + together] for start in range(0, len(left), together)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == together]
        if self.shuffle:
            return [batches[place] for place in draw.permutation(len(batches))]
        return sorted(batches, key=lambda batch: int(batch.min()))


def collate(
    batch: Sequence[tuple[Tensor, dict[str, Any]]],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the images and the targets of a batch as two lists, as the model takes them.

    For ``DataLoader(collate_fn=collate)``. Images of unlike sizes are padded by the model.
    """
    return [image for image, _ in batch], [target for _, target in batch]


def seed_worker(worker: int) -> None:
    """Seed Python's and NumPy's random numbers in a worker of a ``DataLoader`` from torch's.

    For ``DataLoader(worker_init_fn=seed_worker, generator=torch.Generator().manual_seed(0))``: torch
    seeds itself in each worker, from the generator; the others would start alike in all of them.

    Args:
        worker: its number, which torch's seed already holds.
    """
    del worker
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what transforms of others may draw from)
