"""One call that trains, and the folder that it writes."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from focaldet._checks import must_be
from focaldet.pretrained import Checkpoint as Weights
from focaldet.pretrained import save_checkpoint
from focaldet.training._average import AverageWeights
from focaldet.training._checkpoints import BestModel, LastCheckpoint, WholeFiles, kept_weights
from focaldet.training._data import DetectionDataModule
from focaldet.training._errors import explaining
from focaldet.training._evaluation import CocoAP
from focaldet.training._folder import prepare, step_of
from focaldet.training._guard import NonFiniteGuard
from focaldet.training._metrics import MetricsFile
from focaldet.training._module import RetinaNetModule
from focaldet.training._options import TrainingOptions
from focaldet.training._pictures import Curves, Pictures
from focaldet.training._report import Report, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from focaldet.datasets import DetectionDataset
    from focaldet.retinanet import RetinaNet

__all__ = ["TrainingSummary", "train"]

_LOG = logging.getLogger("focaldet.training")
_CHATTER = (  # of pytorch-lightning and torch: nothing that a user could do better
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*WeightAveraging callback.*",
    r".*sync_dist=True.*",  # of AP, which all ranks have the whole of
)


class TrainingSummary(NamedTuple):
    """What came of a run.

    Attributes:
        folder: of the run.
        best_ap: the highest validation AP, or None without validation.
        best_epoch: of which it is, from 1.
        epochs: that the run has gone through, those before resuming included.
    """

    folder: Path
    best_ap: float | None
    best_epoch: int | None
    epochs: int


def train(
    model: RetinaNet,
    train_data: DetectionDataset,
    val_data: DetectionDataset | None = None,
    *,
    folder: str | os.PathLike[str],
    options: TrainingOptions | None = None,
    resume: bool = False,
    resize_images: bool | None = None,
) -> TrainingSummary:
    """Train a detector, and write all there is to know about it to one folder.

    The folder holds ``config.json`` (the model), ``run.json`` (the options), ``metrics.csv``,
    TensorBoard's events, ``curves.png``, ``pictures/`` (of validation images),
    ``checkpoints/last.ckpt``, and two models for ``RetinaNet.from_pretrained``: ``best/`` (highest
    validation AP) and ``last/`` (at the end).

    Args:
        model: trained in place, from the weights that it has. At the end it holds the last weights,
            or their average where the options ask for one.
        train_data: images and objects to train on.
        val_data: to measure AP and loss on after each epoch; None measures nothing.
        folder: of the run: a new or empty one, unless ``resume``.
        options: how to train; None takes the defaults.
        resume: go on from the folder's last checkpoint. Without a checkpoint the run begins anew.
        resize_images: whether the model brings training images to its own size. None does if
            ``train_data`` has no transform: :func:`focaldet.datasets.train_transform` has resized
            them already.

    Raises:
        FileExistsError: the folder holds another run.
        TrainingError: the run had to stop: a loss that is not finite, an image that can't be read, a
            full disk, a killed worker. The last checkpoint is whole.
        ValueError: data whose classes are not the model's, or a checkpoint of another model.
        SystemExit: after SIGTERM or Ctrl-C, once the state is saved.
    """
    options = options or TrainingOptions()
    folder = Path(folder)
    last = folder / "checkpoints" / "last.ckpt"
    if resize_images is None:
        resize_images = train_data.transform is None
    _check_classes(model, train_data)
    data = DetectionDataModule(
        train_data,
        val_data,
        batch_size=options.batch_size,
        workers=options.workers,
        seed=options.seed,
    )
    with _heard(), _quiet(), explaining(folder, last):
        prepare(folder, model.current_config(), options, resume=resume)
        step = step_of(last) if resume else None
        metrics = MetricsFile(folder / "metrics.csv", resume_step=step)
        best = BestModel(folder / "best")
        trainer = _trainer(
            options,
            folder=folder,
            metrics=metrics,
            best=best,
            last=last,
            val_data=val_data,
            step=step,
        )
        module = RetinaNetModule(model.train(), options, resize_images=resize_images)
        trainer.fit(module, data, ckpt_path=None if step is None else last, weights_only=True)
        if trainer.is_global_zero:
            weights = Weights(model.current_config(), kept_weights(trainer, module))
            save_checkpoint(weights, folder / "last")
            _LOG.info("%s", _conclusion(folder, best))
    model.eval()
    return TrainingSummary(folder, best.best, best.epoch, trainer.current_epoch)


def _trainer(
    options: TrainingOptions,
    *,
    folder: Path,
    metrics: MetricsFile,
    best: BestModel,
    last: Path,
    val_data: DetectionDataset | None,
    step: int | None,
) -> pl.Trainer:
    callbacks: list[pl.Callback] = [NonFiniteGuard(folder)]
    if options.ema_decay is not None:
        callbacks.append(AverageWeights(options.ema_decay))
    if val_data is not None:
        callbacks += [CocoAP(val_data), best]
        if options.pictures:
            callbacks.append(Pictures(folder / "pictures", val_data, count=options.pictures))
    callbacks += [
        Report(),
        Curves(metrics, folder / "curves.png"),
        LastCheckpoint(last, every=options.checkpoint_every),
    ]
    devices, nodes, strategy = _devices(options)
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=options.precision,
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip_norm,
        limit_val_batches=None if val_data is not None else 0,
        log_every_n_steps=options.log_every,
        logger=[
            metrics,
            TensorBoardLogger(folder, name="", version="tensorboard", purge_step=step),
        ],
        callbacks=callbacks,
        plugins=[WholeFiles()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        enable_model_summary=False,
        enable_progress_bar=watched(),
        default_root_dir=folder,
    )


def _devices(options: TrainingOptions) -> tuple[int | str, int, str]:
    """Return devices, machines and strategy: torchrun's, where it started this process."""
    devices: int | str = options.devices
    nodes = options.nodes
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if here is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        devices, nodes = int(here), int(os.environ["WORLD_SIZE"]) // int(here)
    several = nodes > 1 or (isinstance(devices, int) and devices > 1)
    return devices, nodes, "ddp" if several else "auto"


def _check_classes(model: RetinaNet, data: DetectionDataset) -> None:
    config = model.config
    if data.num_classes != config.num_classes:
        got = f"{data.num_classes} ({', '.join(data.class_names[:5])}, …)"
        condition = f"of the model's {config.num_classes} classes"
        raise ValueError(must_be("train_data", condition, got))
    if config.class_names is not None and config.class_names != tuple(data.class_names):
        condition = f"of the model's classes, {list(config.class_names)}"
        raise ValueError(must_be("train_data", condition, list(data.class_names)))


def _conclusion(folder: Path, best: BestModel) -> str:
    if best.best is None:
        return f"Done: the model is in {str(folder / 'last')!r}."
    return f"Done: best AP {best.best:.3f} in epoch {best.epoch}, in {str(best.folder)!r}."


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Show the run's lines where the program has not said what becomes of log messages."""
    handler = None
    level = _LOG.level
    if not _LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        _LOG.addHandler(handler)
    if level == logging.NOTSET:
        _LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOG.setLevel(level)
        if handler is not None:
            _LOG.removeHandler(handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep pytorch-lightning's small talk, and warnings of no use, out of the run's lines."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
