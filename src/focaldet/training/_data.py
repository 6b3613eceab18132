"""Batches for training and validation that depend on nothing but the seed, the epoch and the image."""

from __future__ import annotations

import itertools
import random
import signal
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from focaldet._checks import check_image, check_range, must_be
from focaldet.datasets import AspectRatioBatchSampler, DetectionDataset, collate
from focaldet.errors import TrainingError
from focaldet.structures import check_targets

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DetectionDataModule"]

_PATIENCE = 300  # seconds that a worker serves on after SIGTERM


class _Key(NamedTuple):
    """Which item of a data set, and for which epoch; epochs differ in what transforms draw."""

    epoch: int
    item: int


class _Failure(NamedTuple):
    """An item that could not be had: brought from the worker to the main process, and raised there."""

    message: str
    trace: str


class DetectionDataModule(pl.LightningDataModule):
    """Training and validation batches of one or several processes.

    Which images meet in a batch, and what a transform draws for each, follows from the seed, the
    epoch and the image alone: not from the number of workers, nor from whether the run was
    interrupted. A run that resumes in mid-epoch goes on with the batch after the checkpoint's.

    Batches are grouped by aspect ratio. Every image and target is checked where it is read, and an
    error names the image. Among ranks each image is trained on by one; validation repeats a few
    images where they don't divide evenly, and evaluation counts them once.

    The Trainer needs ``use_distributed_sampler=False``.

    Args:
        train_data: to train on.
        val_data: to validate on, or None.
        batch_size: images a batch, on each rank.
        workers: processes that read images, on each rank; 0 reads them in the process itself.
        seed: of order and transforms.

    Raises:
        ValueError: a number out of its range, no images, or data sets whose classes differ.
    """

    def __init__(
        self,
        train_data: DetectionDataset,
        val_data: DetectionDataset | None = None,
        *,
        batch_size: int = 16,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1)
        check_range("workers", workers, 0)
        check_range("seed", seed, 0)
        for name, data in (("train_data", train_data), ("val_data", val_data)):
            if data is not None and not len(data):
                raise ValueError(must_be(name, "of at least one image", "none"))
        if val_data is not None and val_data.class_names != train_data.class_names:
            condition = f"of the training data's classes, {list(train_data.class_names)}"
            raise ValueError(must_be("val_data", condition, list(val_data.class_names)))
        self.train_data = train_data
        self.val_data = val_data
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self._place: dict[str, int] | None = None
        self._train_loader: _Loader | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches, those of the checkpoint's epoch that are left after resuming."""
        self._train_loader = self._loader(self.train_data, shuffle=True)
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches in order."""
        return [] if self.val_data is None else self._loader(self.val_data, shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the training data, which checkpoints keep.

        pytorch-lightning keeps that of the loader as well, but gives it back only after the loader's
        first use where the number of steps was asked for.
        """
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place."""
        self._place = state_dict or None

    def _loader(self, data: DetectionDataset, *, shuffle: bool) -> _Loader:
        trainer = self.trainer
        batches = AspectRatioBatchSampler(
            data.aspect_ratios,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            num_replicas=trainer.world_size if trainer else 1,
        )
        return _Loader(
            _Seeded(data, self.seed),
            batch_sampler=_Batches(batches),
            collate_fn=_collate,
            worker_init_fn=_outlast_signals,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it draws from the process's own random numbers
        )


class _Epochs(Protocol):
    """Batches of indices in an order that differs from epoch to epoch."""

    def __iter__(self) -> Iterator[list[int]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""


class _Batches(Sampler[list[_Key]]):
    """The batches of an epoch, or the rest of them."""

    def __init__(self, batches: _Epochs) -> None:
        self.batches = batches
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> _Batches:
        """Itself: pytorch-lightning calls ``batch_sampler.sampler.set_epoch`` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[_Key]]:
        self.batches.set_epoch(self.epoch)
        for indices in itertools.islice(self.batches, self.start, None):
            yield [_Key(self.epoch, index) for index in indices]

    def __len__(self) -> int:
        return len(self.batches)  # also where a part is skipped: Lightning counts with it


class _Loader(DataLoader[Any]):
    """A loader whose place is saved in checkpoints: pytorch-lightning asks for its state dict."""

    batch_sampler: _Batches
    given = 0  # batches of this epoch that were handed out

    def __iter__(self) -> Any:
        self.given = self.batch_sampler.start
        batches = super().__iter__()
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, _Failure):
                error = TrainingError(batch.message)
                error.add_note(batch.trace)
                raise error
            self.given += 1
            yield batch

    @staticmethod
    def _next(batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except (OSError, EOFError) as error:  # errors of images come as a _Failure
            raise RuntimeError("DataLoader worker gone while it handed over a batch") from error

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batch_sampler.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        whole = state["given"] >= len(self.batch_sampler)
        self.batch_sampler.epoch = state["epoch"] + whole
        self.batch_sampler.start = 0 if whole else state["given"]


class _Seeded(Dataset[Any]):
    """A data set each of whose items draws from random numbers of its own."""

    def __init__(self, data: DetectionDataset, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: _Key) -> tuple[Tensor, dict[str, Any]] | _Failure:
        with isolate_rng(include_cuda=False):
            _seed_everything((self.seed, key.epoch, key.item))
            try:
                image, target = self.data[key.item]
                self._check(image, target)
            except (OSError, TypeError, ValueError) as error:
                name = f"image {self.data.image_ids[key.item]}"
                message = str(error)
                if name not in message:
                    message = f"{name}: {message}"
                return _Failure(message, traceback.format_exc())
        return image, target

    def _check(self, image: Tensor, target: Any) -> None:
        check_image("image", image, uint8=False, channels=None)
        check_targets([target], [(image.shape[1], image.shape[2])], self.data.num_classes)


def _seed_everything(numbers: tuple[int, ...]) -> None:
    words = np.random.SeedSequence(numbers).generate_state(3)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002 - transforms of others may draw from it


def _collate(items: list[Any]) -> Any:
    for item in items:
        if isinstance(item, _Failure):
            return item
    return collate(items)


def _outlast_signals(worker: int) -> None:
    """Let a worker serve on where a whole process group is told to stop: its run has a step to end.

    Ctrl-C, ``timeout`` and batch systems tell all processes of a group.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_PATIENCE))
