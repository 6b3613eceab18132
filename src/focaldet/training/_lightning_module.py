"""RetinaNet as a LightningModule, with losses in training and detections in validation."""

from __future__ import annotations

import atexit
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch

from focaldet.training._class_weights import class_weight_tensor, weighted_classes
from focaldet.training._freezing import freeze_parts
from focaldet.training._logging import log_on_rank_zero
from focaldet.training._optimisation import (
    build_optimizer,
    check_backbone_lr_decay,
    choose_lr,
    lr_factor,
)
from focaldet.training._options import TrainingOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from focaldet.retinanet import RetinaNet
    from focaldet.structures import Target

    Batch = tuple[list[Tensor], list[Target]]

__all__ = ["RetinaNetModule"]


class RetinaNetModule(pl.LightningModule):
    """A RetinaNet with its optimiser and learning rate schedule.

    Batches are ``(images, targets)``, as for :class:`~focaldet.RetinaNet`. In validation, losses and
    detections come from a single forward pass per batch.

    Logs ``train/loss``, ``train/classification``, ``train/box_regression`` and ``train/lr`` per step,
    and ``train/loss_epoch``, ``val/loss``, ``val/classification`` and ``val/box_regression`` per
    epoch.

    In distributed training the criterion divides by the number of positives averaged over ranks, and
    DDP averages the gradients. Ranks that each process part of a batch therefore compute the same
    update as one process with the whole batch.

    Args:
        model: Model to train, in place.
        options: Settings of the optimiser and the schedule, with the class weights, the parts to
            freeze and the memory format. The batch size and the accumulation are used to scale the
            learning rate. None uses the defaults. When training has ended, frozen parts of the model
            are still frozen, and its memory format is still channels_last.
        resize_images: Whether the model resizes training images. Pass False if the transform of the
            dataset has resized them already. Validation images are always resized by the model.

    Attributes:
        stopping: Whether to skip the rest of a validation, because the run has been asked to stop.

    Raises:
        ValueError: If the options name a part or a class that the model does not have, or have
            ``backbone_lr_decay`` below 1 for a backbone that is not divided into stages.
        TypeError: If the options have class weights, and the criterion of the model is of your own kind.

    >>> from focaldet import RetinaNet, RetinaNetConfig
    >>> config = RetinaNetConfig(num_classes=2, backbone="resnet18", backbone_norm="batch")
    >>> RetinaNetModule(RetinaNet.from_config(config.replace(fpn_channels=32))).options.lr is None
    True
    """

    def __init__(
        self,
        model: RetinaNet,
        options: TrainingOptions | None = None,
        *,
        resize_images: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.options = options or TrainingOptions()
        self.resize_images = resize_images
        self.stopping = False
        if self.options.channels_last:
            model.to(memory_format=torch.channels_last)
        check_backbone_lr_decay(model, self.options.backbone_lr_decay)
        freeze = self.options.freeze
        self._frozen = [] if not freeze else freeze_parts(model, freeze)
        weights = self.options.class_weights
        self._class_weights = None if not weights else _weights_of(model, weights)

    def train(self, mode: bool = True) -> RetinaNetModule:  # noqa: FBT001, FBT002 - as in torch
        """Set the mode of the model, in which frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def on_train_epoch_start(self) -> None:
        """Seed the random numbers of the network (dropout) for this epoch and rank."""
        numbers = (self.options.seed, self.current_epoch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the sum of the losses of a batch."""
        images, targets = batch
        # The data module has already checked the images and targets, on the CPU.
        with weighted_classes(self.model.criterion, self._class_weights):
            output = self.model(images, targets, resize=self.resize_images, validate=False)
        losses: dict[str, Tensor] = output.losses
        loss = torch.stack(list(losses.values())).sum()
        each = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(each, batch_size=len(images))
        self.log("train/loss", loss.detach(), batch_size=len(images), prog_bar=True)
        self.log("train/lr", torch.tensor(self._lr()))  # a float would be copied to the device
        self.log(
            "train/loss_epoch",
            loss.detach(),
            batch_size=len(images),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
        )
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any] | None:  # noqa: ARG002
        """Return a dictionary with "loss" and "detections", from one forward pass."""
        if self.stopping:
            return None
        images, targets = batch
        with weighted_classes(self.model.criterion, self._class_weights):
            output = self.model(images, targets, validate=False)
        losses: dict[str, Tensor] = output.losses
        loss = torch.stack(list(losses.values())).sum()
        named = {"loss": loss, **losses}
        self.log_dict(
            {f"val/{name}": value for name, value in named.items()},
            batch_size=len(images),
            sync_dist=True,
        )
        return {"loss": loss, "detections": self.model.detections(output)}

    def on_fit_end(self) -> None:
        """Make the process group shut down before Python exits.

        Lightning does so only for NCCL. A gloo thread that still holds a tensor when Python exits
        aborts the process, and torchrun then kills the other ranks, which may still be writing files.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            atexit.register(_shut_down_process_group)

    def configure_optimizers(self) -> Any:
        """Build the optimiser and the schedule, and log the learning rate."""
        options = self.options
        real_batch = options.batch_size * options.accumulate * self.trainer.world_size
        lr, description = choose_lr(options, real_batch)
        if options.backbone_lr_decay < 1:
            description += f", x {options.backbone_lr_decay:g} per stage of the backbone"
        steps = int(self.trainer.estimated_stepping_batches)
        log_on_rank_zero(
            f"Optimizer: {options.optimizer}, {description}, {options.schedule} schedule over {steps} "
            "updates"
        )
        optimizer = build_optimizer(self.model, options, lr)
        factor = functools.partial(
            lr_factor,
            total_steps=steps,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _lr(self) -> float:
        """Return the learning rate of the parts outside the backbone."""
        group = self.trainer.optimizers[0].param_groups[0]
        return float(group["lr"] / group.get("lr_factor", 1.0))


def _weights_of(model: RetinaNet, weights: Mapping[str, float]) -> Tensor:
    """Return the class weights for a model, after checking that its criterion can use them."""
    names = model.config.class_names
    if names is None:
        raise ValueError(
            "class_weights needs the names of the classes; set class_names in the config."
        )
    tensor = class_weight_tensor(weights, names)
    with weighted_classes(model.criterion, tensor):
        return tensor


def _shut_down_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
