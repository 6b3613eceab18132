"""Repeat factor sampling: images with rare classes occur several times per epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import check_range
from focaldet.datasets import AspectRatioBatchSampler
from focaldet.datasets._table import have_area_inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from focaldet.datasets import DetectionDataset

    Floats = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]

__all__ = ["RepeatFactorBatchSampler", "image_share_of_classes", "objects_of", "repeat_factors"]


def objects_of(data: DetectionDataset) -> tuple[Integers, Integers]:
    """Return the image and the label of each object that a dataset trains on."""
    table = data.table
    used = have_area_inside(table, data.sizes) & ~table.crowd
    return table.image_indices[used], table.labels[used]


def image_share_of_classes(data: DetectionDataset) -> Floats:
    """Return the share of the images that have an object of each class, ``[K]``."""
    images, labels = objects_of(data)
    pairs = np.unique(images * data.num_classes + labels)
    return np.bincount(pairs % data.num_classes, minlength=data.num_classes) / len(data)


def repeat_factors(data: DetectionDataset, threshold: float) -> Floats:
    """Return how many times each image should occur per epoch on average, at least 1.

    The factor of a class that occurs in a share f of the images is ``max(1, sqrt(threshold / f))``,
    and that of an image is the largest of its classes.

    Args:
        data: The training dataset.
        threshold: The share of images below which a class is rare, in (0, 1].

    Returns:
        ``[I]``.

    References:
        Gupta et al., LVIS: A Dataset for Large Vocabulary Instance Segmentation (repeat factor
        sampling). arXiv:1908.03195.
    """
    share = image_share_of_classes(data)
    of_class = np.sqrt(np.maximum(threshold / np.where(share > 0, share, 1), 1))
    images, labels = objects_of(data)
    factors = np.ones(len(data))
    np.maximum.at(factors, images, of_class[labels])
    return factors


class RepeatFactorBatchSampler:
    """Batches of similar shapes in which images are repeated by their factors.

    An image with factor 2.3 occurs twice, and in 30 % of the epochs three times. Which epochs those
    are depends only on the seed and the epoch. All epochs have the same number of batches.

    Deviation: LVIS decides for each image on its own whether its factor is rounded up, so that epochs
    differ in length. Here the number of images that are rounded up is fixed, because the schedule of
    the learning rate and resuming within an epoch need to know the length of an epoch. The
    probability of each image is the same, except that the number is a whole one.

    Args:
        aspect_ratios: ``[I]``, height / width of each image.
        factors: ``[I]``, from `repeat_factors`.
        batch_size, seed, rank, num_replicas: See
            :class:`~focaldet.datasets.AspectRatioBatchSampler`.

    Yields:
        Indices. ``i + r * I`` is repeat r of image i, counted from 0.
    """

    def __init__(
        self,
        aspect_ratios: Floats,
        factors: Floats,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.aspect_ratios = aspect_ratios
        self.whole = np.floor(factors).astype(np.int64)
        self.rest = factors - self.whole
        # Rounded down, so that no image is chosen twice; one image is better than none.
        self.extra = int(self.rest.sum()) or int(self.rest.any())
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_replicas = num_replicas
        self.epoch = 0

    @property
    def images_per_epoch(self) -> int:
        """Number of images in an epoch, with repeats."""
        return int(self.whole.sum()) + self.extra

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which determines the repeats and the order."""
        check_range("epoch", epoch, 0)
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.images_per_epoch / (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        counts = self._counts()
        images = np.repeat(np.arange(len(counts)), counts)
        repeats = np.arange(len(images)) - np.repeat(counts.cumsum() - counts, counts)
        batches = AspectRatioBatchSampler(
            self.aspect_ratios[images],
            self.batch_size,
            seed=self.seed,
            rank=self.rank,
            num_replicas=self.num_replicas,
        )
        batches.set_epoch(self.epoch)
        indices = images + repeats * len(counts)
        for batch in batches:
            yield indices[batch].tolist()

    def _counts(self) -> Integers:
        """Return how many times each image occurs in this epoch.

        The images to round up are drawn systematically: the fractions are laid end to end in a random
        order, and every image is chosen in whose fraction one of `extra` evenly spaced points falls.
        """
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        order = rng.permutation(len(self.rest))
        ends = self.rest[order].cumsum()
        points = (np.arange(self.extra) + rng.random()) * (ends[-1] / max(self.extra, 1))
        places = np.searchsorted(ends, points, side="right")
        chosen = order[np.minimum(places, len(order) - 1)]
        counts = self.whole.copy()
        counts[chosen] += 1
        return counts
