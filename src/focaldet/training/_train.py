"""Training a detector in one call, with everything about the run in one folder."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy

from focaldet._checks import shortened
from focaldet.pretrained import Checkpoint as Weights
from focaldet.pretrained import save_checkpoint
from focaldet.training._before_training import check_before_training
from focaldet.training._checkpoints import (
    AtomicCheckpointIO,
    BestModel,
    LastCheckpoint,
    weights_to_save,
)
from focaldet.training._coco_ap import CocoAP
from focaldet.training._curves import Curves
from focaldet.training._data_module import DetectionDataModule
from focaldet.training._early_stopping import StopEarly
from focaldet.training._failures import CurrentBatch, explain_failures
from focaldet.training._freezing import has_same_buffers, restored_gradients
from focaldet.training._lightning_module import RetinaNetModule
from focaldet.training._lock import locked_folder
from focaldet.training._logging import LOG, hide_lightning_messages, log_on_rank_zero, show_log
from focaldet.training._metrics_file import MetricsFile
from focaldet.training._nonfinite import NonFiniteGuard
from focaldet.training._options import TrainingOptions
from focaldet.training._pictures import Pictures
from focaldet.training._progress import EpochBar, ProgressLog, on_terminal
from focaldet.training._resuming import RestoredState, resuming_from
from focaldet.training._run_folder import prepare_folder, recorded_outcome, step_of_checkpoint
from focaldet.training._weight_average import AverageWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from focaldet.datasets import DetectionDataset
    from focaldet.retinanet import RetinaNet

__all__ = ["TrainingSummary", "train"]


class TrainingSummary(NamedTuple):
    """Result of a training run.

    Attributes:
        folder: Folder of the run.
        best_ap: Highest validation AP, or None without validation.
        best_epoch: Epoch of the highest AP, counted from 1, or None without validation.
        epochs: Number of completed epochs, including those before resuming.
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
    recipe: Mapping[str, Any] | None = None,
    callbacks: Iterable[pl.Callback] = (),
    loggers: Iterable[Logger] = (),
) -> TrainingSummary:
    """Train a detector and write everything about the run to one folder.

    The folder holds ``config.json`` (the model), ``run.json`` (the options), ``metrics.csv``,
    TensorBoard events, ``curves.png``, ``pictures/`` (of validation images),
    ``checkpoints/last.ckpt``, and two models for ``RetinaNet.from_pretrained``: ``best/`` (highest
    validation AP) and ``last/`` (at the end of the run).

    Args:
        model: Model to train, in place, starting from its current weights. Afterwards it has the last
            weights, or their average if the options ask for one, and is in evaluation mode.
        train_data: Training dataset.
        val_data: Validation dataset, on which the AP and the loss are computed after each epoch. None
            skips validation.
        folder: Folder of the run. It must be new or empty unless ``resume`` is set. What a run that
            ended before its first checkpoint has left there is removed.
        options: Settings of the run. None uses the defaults.
        resume: Whether to continue from the last checkpoint in the folder. If it has none, a new run
            starts.
        resize_images: Whether the model resizes training images. None resizes them only if
            ``train_data`` has no transform, because :func:`focaldet.datasets.train_transform` already
            does.
        recipe: How the run was set up, for ``run.json``: values that JSON can express, such as the
            name of a recipe and the reasons for its choices. It does not affect the training. When the
            run is resumed, None keeps the previous value.

            .. versionadded:: 0.3.0
        callbacks: Lightning callbacks of your own. They run after those that evaluate, save the best
            model and draw pictures, so they find ``val/AP`` in ``trainer.callback_metrics``, and before
            the log line of an epoch and the checkpoint, which holds their state. When the run is
            resumed, callbacks of the same class get that state back, as in Lightning. A progress bar
            replaces the usual one.

            .. versionadded:: 0.3.0
        loggers: Lightning loggers, such as ``WandbLogger``, ``MLFlowLogger`` or ``CSVLogger``, that
            receive all metrics in addition to ``metrics.csv`` and TensorBoard, and the options and the
            config of the model as hyperparameters. When the run is resumed, a logger continues if it
            is created with the same id or version as before.

            .. versionadded:: 0.3.0

    Returns:
        The folder, the highest validation AP with its epoch, and the number of epochs.

    Raises:
        FileExistsError: If the folder is not empty and not to be resumed.
        TrainingError: If the run has to stop because of a loss that is not finite, an image that
            cannot be read, a full disk, too little memory or a killed worker. The last checkpoint is
            complete. Before the first step, if an image file is missing, unreadable or of a different
            size than annotated, the first image or target does not fit the model, or the disk has no
            space for the checkpoints. Also if another run uses the folder, or the files of the run to
            be resumed are damaged.
        TypeError: If a callback, a logger or a value of ``recipe`` has the wrong type.
        ValueError: If the classes of the datasets and the model differ, a dataset has no objects, the
            options name a part or a class that the model does not have, or have
            ``backbone_lr_decay`` below 1 for a backbone without stages, or a run to be resumed has
            trained a different model or used a different optimiser.
        SystemExit: After SIGTERM or Ctrl-C, once the state has been saved.
    """
    options = options or TrainingOptions()
    callbacks = _all_of("callbacks", callbacks, pl.Callback)
    loggers = _all_of("loggers", loggers, Logger)
    folder = Path(folder)
    last = folder / "checkpoints" / "last.ckpt"
    if resize_images is None:
        resize_images = train_data.transform is None
    _check_classes(model, train_data)
    if options.patience is not None and val_data is None:
        raise ValueError(
            f"patience={options.patience} stops a run by its validation AP; pass val_data, or set "
            "patience=None."
        )
    data = DetectionDataModule(
        train_data,
        val_data,
        batch_size=options.batch_size,
        workers=options.workers,
        on_error=options.on_error,
        seed=options.seed,
        sampler=options.sampler,
        repeat_threshold=options.repeat_threshold,
    )
    batch = CurrentBatch()
    with (
        show_log(),
        hide_lightning_messages(),
        explain_failures(folder, last),
        locked_folder(folder) as locked,
    ):
        parts = {"train": train_data, **({} if val_data is None else {"val": val_data})}
        prepare_folder(
            folder,
            model.current_config(),
            options,
            parts,
            resume=resume,
            locked=locked,
            resize_images=resize_images,
            recipe=recipe,
        )
        with (
            recorded_outcome(folder) as outcome,
            explain_failures(folder, last, batch=batch, lower=_memory_to_lower(model, options)),
            restored_gradients(model),
        ):
            module = RetinaNetModule(model.train(), options, resize_images=resize_images)
            _report_frozen(model, options)
            check_before_training(model, parts, options, folder)
            step = step_of_checkpoint(last) if resume else None
            metrics = MetricsFile(folder / "metrics.csv", resume_step=step)
            best = BestModel(folder / "best")
            trainer = _trainer(
                options,
                folder=folder,
                callbacks=_callbacks(
                    options,
                    folder=folder,
                    metrics=metrics,
                    best=best,
                    last=last,
                    val_data=val_data,
                    extra=[batch, *callbacks],
                ),
                loggers=[
                    metrics,
                    TensorBoardLogger(folder, name="", version="tensorboard", purge_step=step),
                    *loggers,
                ],
                validates=val_data is not None,
                same_buffers=has_same_buffers(model),
            )
            outcome.follow(lambda: _result(trainer, best))
            _log_hyperparameters(trainer, loggers, model, options)
            if step is None:
                trainer.fit(module, data)
            else:
                state = RestoredState()
                trainer.callbacks.insert(0, state)  # type: ignore[attr-defined]
                with resuming_from(last, state):
                    trainer.fit(module, data, ckpt_path=last, weights_only=True)
            if trainer.is_global_zero:
                weights = Weights(model.current_config(), weights_to_save(trainer, module))
                save_checkpoint(weights, folder / "last")
                LOG.info("%s", _conclusion(folder, best))
    if options.channels_last:
        model.to(memory_format=torch.contiguous_format)
    model.eval()
    return TrainingSummary(folder, best.best, best.epoch, trainer.current_epoch)


def _callbacks(
    options: TrainingOptions,
    *,
    folder: Path,
    metrics: MetricsFile,
    best: BestModel,
    last: Path,
    val_data: DetectionDataset | None,
    extra: Iterable[pl.Callback],
) -> list[pl.Callback]:
    """Return the callbacks of a run in their order, with those of the caller as ``extra``."""
    callbacks: list[pl.Callback] = [NonFiniteGuard(folder)]
    if options.ema_decay is not None:
        callbacks.append(AverageWeights(options.ema_decay))
    if val_data is not None:
        callbacks += [CocoAP(val_data), best]
        if options.pictures:
            callbacks.append(Pictures(folder / "pictures", val_data, count=options.pictures))
    callbacks += [*extra, ProgressLog()]
    if options.patience is not None:
        callbacks.append(StopEarly(best, options.patience))
    callbacks += [
        Curves(metrics, folder / "curves.png"),
        LastCheckpoint(last, every=options.checkpoint_every),
    ]
    return callbacks


def _trainer(
    options: TrainingOptions,
    *,
    folder: Path,
    callbacks: list[pl.Callback],
    loggers: list[Logger],
    validates: bool,
    same_buffers: bool,
) -> pl.Trainer:
    own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    bar = on_terminal() and not own_bar
    devices, nodes, several = _devices(options)
    strategy: str | DDPStrategy = "auto"
    if several:
        strategy = DDPStrategy(broadcast_buffers=not same_buffers, gradient_as_bucket_view=True)
    return pl.Trainer(
        accelerator=options.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=options.precision,
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip_norm,
        limit_val_batches=None if validates else 0,
        log_every_n_steps=options.log_every,
        logger=loggers,
        callbacks=[*([EpochBar()] if bar else []), *callbacks],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        enable_model_summary=False,
        enable_progress_bar=bar or own_bar,
        default_root_dir=folder,
    )


def _all_of(name: str, values: Iterable[Any], kind: type) -> list[Any]:
    """Return values as a list, or raise ``TypeError`` unless all are of a kind."""
    if isinstance(values, kind):
        raise TypeError(f"{name} must be a sequence; pass one as [{type(values).__name__}(...)].")
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name}[{i}] must be a {kind.__name__} of pytorch_lightning, got {shortened(value)}. "
                "Classes of the package 'lightning' are different ones."
            )
    return values


def _report_frozen(model: RetinaNet, options: TrainingOptions) -> None:
    if options.freeze:
        parameters = list(model.parameters())
        trained = sum(one.numel() for one in parameters if one.requires_grad)
        total = sum(one.numel() for one in parameters)
        log_on_rank_zero(f"freeze={options.freeze!r}: {trained:,} of {total:,} parameters train.")


def _log_hyperparameters(
    trainer: pl.Trainer, loggers: Iterable[Logger], model: RetinaNet, options: TrainingOptions
) -> None:
    if trainer.is_global_zero:
        config = json.loads(model.current_config().to_json())
        for logger in loggers:
            logger.log_hyperparams({"options": dataclasses.asdict(options), "config": config})


def _memory_to_lower(model: RetinaNet, options: TrainingOptions) -> str:
    """Return what uses memory in a run and can be lowered."""
    config = model.config
    ways = []
    if options.batch_size > 1:
        ways.append(
            f"batch_size (now {options.batch_size}; with accumulate, an update still uses as many "
            "images)"
        )
    ways.append(f"min_size and max_size (now {config.min_size} and {config.max_size}) with those of the "
                "transform")  # fmt: skip
    text = f"Lower {' or '.join(ways)}"
    if options.precision == "32-true":
        text += ", or set precision='bf16-mixed'"
    return text


def _devices(options: TrainingOptions) -> tuple[int | str, int, bool]:
    """Return devices, nodes and whether there are several processes, as torchrun started them."""
    devices: int | str = options.devices
    nodes = options.nodes
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if here is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        devices, nodes = int(here), int(os.environ["WORLD_SIZE"]) // int(here)
    several = nodes > 1 or (isinstance(devices, int) and devices > 1)
    return devices, nodes, several


def _check_classes(model: RetinaNet, data: DetectionDataset) -> None:
    config = model.config
    names = list(data.class_names)
    if data.num_classes != config.num_classes:
        raise ValueError(
            f"train_data has {data.num_classes} classes, {shortened(names)}, but model has "
            f"num_classes={config.num_classes}."
        )
    if config.class_names is not None and config.class_names != tuple(names):
        raise ValueError(
            "train_data and model must have the same classes in the same order. train_data has "
            f"{shortened(names)}, model has {shortened(list(config.class_names))}."
        )


def _result(trainer: pl.Trainer, best: BestModel) -> dict[str, Any]:
    """Return what a run has reached so far, for ``run.json``."""
    return {
        "best_ap": best.best,
        "best_epoch": best.epoch,
        "epochs": trainer.current_epoch,
        "stopped_early": any(
            isinstance(callback, StopEarly) and callback.stopped
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ),
    }


def _conclusion(folder: Path, best: BestModel) -> str:
    if best.best is None:
        return f"Finished; saved the model to {str(folder / 'last')!r}."
    return (
        f"Finished; best AP {best.best:.3f} in epoch {best.epoch}, saved to {str(best.folder)!r}."
    )
