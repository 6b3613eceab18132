"""Batches for training and validation that are reproducible and can be resumed in mid-epoch."""

from __future__ import annotations

import atexit
import itertools
import random
import signal
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from focaldet._checks import check_choice, check_image, check_range, shortened
from focaldet.datasets import AspectRatioBatchSampler, DetectionDataset, collate
from focaldet.datasets._dataset import index_of_failure
from focaldet.errors import TrainingError, UnreadableImageError
from focaldet.images import to_float
from focaldet.structures import check_targets
from focaldet.training._logging import log_on_rank_zero, warn_on_rank_zero
from focaldet.training._repeat_factor import (
    RepeatFactorBatchSampler,
    image_share_of_classes,
    repeat_factors,
)
from focaldet.training._resuming import check_count
from focaldet.training._skipped import SkippedImages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["DetectionDataModule", "read_first_image"]

_StandIn: TypeAlias = Literal["none", "other", "black"]

_COLLECT_EVERY = 10  # batches; ranks tell each other only so often which images they skip
_MAX_STAND_INS = 20  # images to try in place of one that cannot be read
_GRACE_PERIOD = 300  # seconds that a worker keeps running after SIGTERM


class _Key(NamedTuple):
    """Index of an item in the dataset, with what its random transforms depend on.

    Attributes:
        epoch: The epoch, counted from 0.
        item: Index of the item.
        repeat: How many times the item has occurred in the epoch before.
    """

    epoch: int
    item: int
    repeat: int = 0

    def seeds(self, seed: int) -> tuple[int, ...]:
        """Return the seeds of the item in the run with this seed."""
        numbers = (seed, self.epoch, self.item)
        return (*numbers, self.repeat) if self.repeat else numbers


class _Failure(NamedTuple):
    """Error of an item, sent from the worker to the main process, which raises or counts it."""

    message: str
    trace: str
    item: int
    unreadable: bool  # whether the image file is missing or unreadable


class _Sample(NamedTuple):
    """Image and target, and the failures of those that it stands in for."""

    image: Tensor
    target: dict[str, Any]
    skipped: tuple[_Failure, ...] = ()


class _Batch(NamedTuple):
    """Images and targets of a batch, and the failures of those that were skipped."""

    images: list[Tensor]
    targets: list[dict[str, Any]]
    skipped: list[_Failure]


class DetectionDataModule(pl.LightningDataModule):
    """Training and validation batches for one or more processes.

    The composition of each batch and the random transforms of each image depend only on the seed,
    the epoch and the image, not on the number of workers or on interruptions. A run that is resumed
    in mid-epoch continues with the batch after the checkpoint.

    Batches are grouped by aspect ratio. Every image and target is checked when it is read, and
    errors name the image. In distributed training each image is trained on by one rank. In
    validation a few images are repeated if they don't divide evenly among the ranks; the evaluation
    counts them once.

    With ``on_error="skip"``, image files that are missing or unreadable don't stop the run. Each is
    logged once, and once more after the run is resumed. In training, an image of the same orientation
    takes its place, which depends only on the seed, the epoch and the image. In validation a black
    image takes its place, so that its objects count as missed. If more than 1 % of the images of a
    dataset, and more than 10, cannot be read, the run stops after all. In distributed training the
    ranks count together, every 10 batches and at the end of a pass, and stop together. Other errors,
    such as a size that differs from the annotated size, always stop the run.

    The ``Trainer`` needs ``use_distributed_sampler=False``.

    Args:
        train_data: Training dataset.
        val_data: Validation dataset, or None for no validation.
        batch_size: Images per batch on each rank.
        workers: Number of processes per rank that read images; 0 reads them in the main process.
        on_error: "raise", or "skip" to continue without missing or unreadable image files.
        seed: Seed of the order of the images and of random transforms, at least 0.
        sampler: "shuffle", or "repeat_factor" to repeat images with rare classes; see
            :class:`TrainingOptions`.
        repeat_threshold: Share of the images below which a class counts as rare.

    .. versionadded:: 0.3.0
        ``on_error``, ``sampler`` and ``repeat_threshold``.

    Raises:
        ValueError: If an option is out of range, a dataset has no images or no objects, or the two
            datasets have different classes.
    """

    def __init__(
        self,
        train_data: DetectionDataset,
        val_data: DetectionDataset | None = None,
        *,
        batch_size: int = 16,
        workers: int = 2,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int = 0,
        sampler: Literal["shuffle", "repeat_factor"] = "shuffle",
        repeat_threshold: float = 0.001,
    ) -> None:
        super().__init__()
        check_range("batch_size", batch_size, 1)
        check_range("workers", workers, 0)
        check_choice("on_error", on_error, ("raise", "skip"))
        check_range("seed", seed, 0)
        check_choice("sampler", sampler, ("shuffle", "repeat_factor"))
        check_range("repeat_threshold", repeat_threshold, 0, 1, low_open=True)
        for name, data in (("train_data", train_data), ("val_data", val_data)):
            if data is not None and not len(data):
                raise ValueError(f"{name} is empty; pass a dataset with at least one image.")
            if data is not None and (reason := data.table.why_nothing_to_learn(data.sizes)):
                remedy = " val_data=None skips validation." if name == "val_data" else ""
                raise ValueError(
                    f"{name} from {str(data.table.source)!r} cannot be used. {reason}{remedy}"
                )
        if val_data is not None and val_data.class_names != train_data.class_names:
            raise ValueError(
                "train_data and val_data must have the same classes in the same order. train_data "
                f"has {shortened(list(train_data.class_names))}, val_data has "
                f"{shortened(list(val_data.class_names))}."
            )
        self.train_data = train_data
        self.val_data = val_data
        self.batch_size = batch_size
        self.workers = workers
        self.on_error = on_error
        self.seed = seed
        self.sampler = sampler
        self.repeat_threshold = repeat_threshold
        self._position: dict[str, Any] | None = None
        self._skipped = {
            part: SkippedImages(data.table.file_names)
            for part, data in (("train", train_data), ("val", val_data))
            if data is not None
        }
        self._train_loader: _Loader | None = None
        self._loaders: weakref.WeakSet[_Loader] = weakref.WeakSet()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches; after resuming, the rest of the checkpoint's epoch first."""
        self._train_loader = self._loader(self.train_data, shuffle=True)
        if self._position is not None:
            self._train_loader.load_state_dict(self._position)
            self._skipped["train"].restore_pass(self._position.get("skipped", ()))
        return self._train_loader

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move the images to a device. Targets stay on the host, where the criterion collects them."""
        images, targets = batch
        return super().transfer_batch_to_device(images, device, dataloader_idx), targets

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches that are not shuffled."""
        return [] if self.val_data is None else self._loader(self.val_data, shuffle=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, and the images skipped so far in this epoch.

        Lightning also saves the state of the loader. It restores that state too late, however, when
        the number of steps has been estimated before training.
        """
        if self._train_loader is None:
            return {}
        skipped = self._skipped["train"].names_in_pass()
        return self._train_loader.state_dict() | ({"skipped": skipped} if skipped else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the training data.

        Raises:
            ValueError: If a value cannot be right.
        """
        if state_dict:
            _check_position(state_dict)
            skipped = state_dict.get("skipped", [])
            if not all(isinstance(name, str) for name in skipped):
                raise ValueError(f"the skipped images are {shortened(skipped)}")
        self._position = state_dict or None

    @property
    def num_skipped(self) -> int:
        """Number of images that were skipped in the last pass over each dataset.

        In distributed training, images that other ranks have skipped since the last call of
        `collect_skipped` are missing.

        .. versionadded:: 0.3.0
        """
        return sum(len(skipped.in_pass) for skipped in self._skipped.values())

    def collect_skipped(self) -> None:
        """Tell the other ranks which images this one has skipped; all must call it together.

        The loaders do so every 10 batches and after the last batch.

        Raises:
            TrainingError: If too many images cannot be read, on all ranks.

        .. versionadded:: 0.3.0
        """
        for skipped in self._skipped.values():
            skipped.collect()

    def on_exception(self, exception: BaseException) -> None:
        """Shut down the workers of all loaders; the exception would keep them running."""
        del exception
        self.teardown()

    def teardown(self, stage: str | None = None) -> None:
        """Shut down the workers of all loaders."""
        del stage
        for loader in tuple(self._loaders):
            loader.shut_down_workers()

    def _loader(self, data: DetectionDataset, *, shuffle: bool) -> _Loader:
        trainer = self.trainer
        ranks = trainer.world_size if trainer else 1
        rank = trainer.global_rank if trainer else 0
        batches: _Epochs
        if shuffle and self.sampler == "repeat_factor":
            batches = self._repeated(rank, ranks)
        else:
            batches = AspectRatioBatchSampler(
                data.aspect_ratios,
                self.batch_size,
                shuffle=shuffle,
                seed=self.seed,
                rank=rank,
                num_replicas=ranks,
            )
        skipped = self._skipped["train" if shuffle else "val"]
        skipped.ranks = ranks if self.on_error == "skip" else 1
        loader = _Loader(
            _Seeded(data, self.seed, stand_in=self._stand_in(shuffle=shuffle)),
            batch_sampler=_Batches(batches, len(data)),
            collate_fn=_collate,
            worker_init_fn=_outlast_signals,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise the global random state would advance
            skipped=skipped,
        )
        self._loaders.add(loader)
        return loader

    def _repeated(self, rank: int, ranks: int) -> RepeatFactorBatchSampler:
        """Return the batches with repeats of images with rare classes, and log how many there are."""
        data = self.train_data
        factors = repeat_factors(data, self.repeat_threshold)
        batches = RepeatFactorBatchSampler(
            data.aspect_ratios,
            factors,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            num_replicas=ranks,
        )
        repeated = int((factors > 1).sum())
        if repeated:
            log_on_rank_zero(
                f"Repeat factor sampling: {repeated} of {len(data)} images are repeated, up to "
                f"{factors.max():.2f} times; an epoch has {batches.images_per_epoch} images."
            )
        else:
            rarest = image_share_of_classes(data)
            rarest = rarest[rarest > 0].min()
            warn_on_rank_zero(
                "Repeat factor sampling repeats nothing: every class occurs in at least %.3g of the "
                "images, and repeat_threshold is %g. Set it above that share.",
                rarest,
                self.repeat_threshold,
            )
        return batches

    def _stand_in(self, *, shuffle: bool) -> _StandIn:
        if self.on_error == "raise":
            return "none"
        return "other" if shuffle else "black"


def _check_position(state: dict[str, Any]) -> None:
    for name in ("epoch", "given"):
        check_count(f"{name} of the position in the data", state[name])


class _Epochs(Protocol):
    """Batches of indices in an order that differs from epoch to epoch.

    With I items, index ``i + r * I`` is repeat r of item i.
    """

    def __iter__(self) -> Iterator[list[int]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""


class _Batches(Sampler[list[_Key]]):
    """The batches of an epoch, or the rest of them.

    Args:
        batches: The batches of indices.
        num_items: Number of items in the dataset.
    """

    def __init__(self, batches: _Epochs, num_items: int) -> None:
        self.batches = batches
        self.num_items = num_items
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> _Batches:
        """This object: Lightning calls ``batch_sampler.sampler.set_epoch`` before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[_Key]]:
        self.batches.set_epoch(self.epoch)
        for indices in itertools.islice(self.batches, self.start, None):
            yield [
                _Key(self.epoch, index % self.num_items, index // self.num_items)
                for index in indices
            ]

    def __len__(self) -> int:
        return len(self.batches)  # including skipped batches, because Lightning counts them


class _Loader(DataLoader[Any]):
    """A data loader whose position Lightning saves in checkpoints, through its state dict.

    It also shuts down its workers as soon as an iteration ends in any way. torch does so only when its
    iterator is deleted, but the traceback of an error can keep the iterator alive until Python exits.
    Python then sends SIGTERM to the workers, which outlast it, and waits for them.
    """

    batch_sampler: _Batches
    given = 0  # batches of this epoch that have been returned

    def __init__(self, *args: Any, skipped: SkippedImages, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._iterators: weakref.WeakSet[Any] = weakref.WeakSet()
        self._skipped = skipped

    def __iter__(self) -> Any:
        self.given = self.batch_sampler.start
        if not self.given:  # not in the rest of a resumed epoch
            self._skipped.start_pass()
        batches = super().__iter__()
        if self.num_workers:
            self._iterators.add(batches)
            _RUNNING.add(batches)
        try:
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, _Failure):
                    error = TrainingError(batch.message)
                    error.add_note(batch.trace)
                    raise error
                self.given += 1
                self._count(batch.skipped)
                yield batch.images, batch.targets
        finally:
            if self.num_workers:
                _shut_down_workers([batches])

    def shut_down_workers(self) -> None:
        """Shut down the workers of iterations that have not ended."""
        _shut_down_workers(self._iterators)

    def _count(self, failures: Iterable[_Failure]) -> None:
        """Count the images that were skipped in a batch."""
        for failure in failures:
            self._skipped.add(failure.item, failure.message)
        if self.given % _COLLECT_EVERY == 0 or self.given == len(self.batch_sampler):
            self._skipped.collect()

    @staticmethod
    def _next(batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except (OSError, EOFError) as error:  # errors in reading an image arrive as a _Failure
            raise RuntimeError("DataLoader worker exited while it was sending a batch") from error

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batch_sampler.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        _check_position(state)
        epoch_done = state["given"] >= len(self.batch_sampler)
        self.batch_sampler.epoch = state["epoch"] + epoch_done
        self.batch_sampler.start = 0 if epoch_done else state["given"]


class _Seeded(Dataset[Any]):
    """A dataset in which each item is read with its own random seed.

    Args:
        data: Dataset to read from.
        seed: Seed of all items.
        stand_in: What takes the place of an image file that cannot be read: "other" image, a "black"
            image without objects, or "none".
    """

    def __init__(self, data: DetectionDataset, seed: int, *, stand_in: _StandIn = "none") -> None:
        self.data = data
        self.seed = seed
        self.stand_in = stand_in

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: _Key) -> _Sample | _Failure:
        sample = self._read(key, key.item)
        if isinstance(sample, _Sample) or not sample.unreadable or self.stand_in == "none":
            return sample
        if self.stand_in == "black":
            height, width = self.data.sizes[key.item].tolist()
            target = {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
                "image_id": int(self.data.image_ids[key.item]),
            }
            return _Sample(torch.zeros(3, height, width), target, (sample,))
        return self._other_sample(key, sample)

    def _other_sample(self, key: _Key, failure: _Failure) -> _Sample | _Failure:
        """Return another item in place of one whose image cannot be read.

        If the image is one of the others of a mosaic, it is the same item with a different mosaic.
        """
        failures = [failure]
        items = iter(self._others(key))
        item, redraws = key.item, 0
        for _ in range(_MAX_STAND_INS):
            if failures[-1].item != item:
                redraws += 1
            else:
                following = next(items, None)
                if following is None:
                    break
                item = following
            sample = self._read(key, item, redraws)
            if isinstance(sample, _Sample):
                return sample._replace(skipped=tuple(failures))
            if not sample.unreadable:
                return sample
            failures.append(sample)
        return failures[-1]

    def _others(self, key: _Key) -> list[int]:
        """Return a few items of the same orientation, in an order that depends only on the key."""
        upright = self.data.aspect_ratios > 1
        similar = np.flatnonzero(upright == upright[key.item])
        rng = np.random.default_rng(key.seeds(self.seed))
        count = min(_MAX_STAND_INS, len(similar))
        items: list[int] = rng.choice(similar, count, replace=False).tolist()
        return [item for item in items if item != key.item]

    def _read(self, key: _Key, item: int, redraws: int = 0) -> _Sample | _Failure:
        name = f"image {self.data.image_ids[item]}"
        seeds = key.seeds(self.seed)
        with isolate_rng(include_cuda=False):
            _seed_everything((*seeds, 0, redraws) if redraws else seeds)
            target: Any
            try:
                image, target = _checked_item(self.data, item, name)
                check_targets([target], [(image.shape[1], image.shape[2])], self.data.num_classes)
            except (OSError, TypeError, ValueError) as error:
                message = str(error)
                item = index_of_failure(error, item)
                name = f"image {self.data.image_ids[item]}"
                if name not in message:
                    message = f"{name}: {message}"
                unreadable = isinstance(error, (OSError, UnreadableImageError))
                return _Failure(message, traceback.format_exc(), item, unreadable)
        return _Sample(image, target)


def read_first_image(data: DetectionDataset, seed: int) -> Tensor | None:
    """Read the first item of a dataset as a run does, and return its image.

    Returns:
        ``[C, H, W]``, or None if the image file is missing or unreadable.

    Raises:
        TrainingError: If the item is not an image and a target that fits it.
    """
    item = _Seeded(data, seed)[_Key(0, 0)]
    if isinstance(item, _Sample):
        return item.image
    if item.unreadable:
        return None
    error = TrainingError(item.message)
    error.add_note(item.trace)
    raise error


def _checked_item(data: DetectionDataset, item: int, name: str) -> tuple[Tensor, dict[str, Any]]:
    """Return an item after checking its image.

    An image that is uint8 stays so until the model divides it by 255: it is sent from worker to main
    process, and to a GPU, in a quarter of the bytes.
    """
    own = type(data).__getitem__ is not DetectionDataset.__getitem__
    image, target = data[item] if own else data.read(item)
    if image.dtype != torch.uint8:
        image = to_float(image)
    check_image(name, image, channels=None)
    return image, target


def _seed_everything(numbers: tuple[int, ...]) -> None:
    words = np.random.SeedSequence(numbers).generate_state(3)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002 - third-party transforms may use it


def _collate(items: list[_Sample | _Failure]) -> _Batch | _Failure:
    samples = []
    for item in items:
        if isinstance(item, _Failure):
            return item
        samples.append(item)
    images, targets = collate([(sample.image, sample.target) for sample in samples])
    return _Batch(images, targets, [failure for sample in samples for failure in sample.skipped])


def _shut_down_workers(iterators: Iterable[Any]) -> None:
    """Shut down the workers of torch's iterators, for which torch has no public function."""
    if get_worker_info() is not None:  # a forked worker has inherited the iterators of its parent
        return
    for iterator in tuple(iterators):
        iterator._shutdown_workers()  # noqa: SLF001
        for worker in iterator._workers:  # noqa: SLF001 - those that were busy for longer than torch waits
            if worker.is_alive():
                worker.kill()
                worker.join()


_RUNNING: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators that have workers
atexit.register(_shut_down_workers, _RUNNING)


def _outlast_signals(worker: int) -> None:
    """Keep a worker running after SIGINT and SIGTERM, so that the run can finish its step.

    Ctrl-C, ``timeout`` and batch systems send these signals to all processes of a group.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_PERIOD))
